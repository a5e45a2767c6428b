"""Places of a study's inputs: content that was moved keeps the results that were made of it.

The hash in the name of a result covers the places of text, blocks and sources. ``places.json`` in the folder of all
results has the fingerprint of each place. An input at a place that is not in the file may have the fingerprint of one
that is. If the former place is gone, the input was moved and enters hashes under that place. So no hash of a study
changes, and nothing is trained again. An input beside the former one may be a corrected copy, and is another input:
fingerprints sample large files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.files.atomic import atomic_json
from phigrow.files.fingerprint import MISSING
from phigrow.files.output import writing
from phigrow.files.paths import user_path
from phigrow.files.untrusted import read_json_strict
from phigrow.study.inputs import Input, inputs_of_data
from phigrow.study.settings import Study

FILE = "places.json"
"""File in the folder of a study or of stages. Folders of earlier releases do not have it."""

Given = Mapping[str, Input]
"""Place as hashes cover it -> input."""


def given_inputs(data: Path | dict[str, Any], checkpoints: Iterable[Path]) -> Given:
    """Return the inputs that a study or stages are given: text and tokenizer, or packed blocks, and checkpoints."""
    given = {str(folder.resolve()): Input("checkpoint", str(folder)) for folder in checkpoints}
    if isinstance(data, Path):
        return given | {str(data): Input("blocks", str(data))}
    found = inputs_of_data(data)
    names = {"ref": "text", "tokenizer": "tokenizer"}
    return given | {str(data[key]): found[name] for key, name in names.items() if key in data and name in found}


def with_former_places(study: Study) -> Study:
    """Return a study with the places under which its inputs enter hashes, see `former_places`."""
    return dataclasses.replace(study, former_places=former_places(study.out, inputs_of_study(study)))


def inputs_of_study(study: Study) -> Given:
    """Return the inputs that a study is given."""
    return given_inputs(study.data, [source.path for source in study.sources if source.path is not None])


def former_places(out: Path, given: Given) -> dict[str, str]:
    """Return the inputs that were moved: their place -> the former place of the same content.

    Nothing is read unless results in ``out`` were made of an input at another place.
    """
    known = _read(out)
    former: dict[str, str] = {}
    for place, each in given.items():
        candidates = [
            other
            for other, entry in known.items()
            if entry["kind"] == each.kind and other not in given and not user_path(other).exists()
        ]
        if place in known or not candidates or (fingerprint := _fingerprint(each)) is None:
            continue
        if same := [other for other in candidates if known[other]["fingerprint"] == fingerprint]:
            former[place] = same[0]
    return former


def keep_places(out: Path, given: Given, former: Mapping[str, str]) -> None:
    """Write the fingerprints of inputs, but of those that were moved, before results are made of them.

    Raises:
        GrowthError: the file cannot be written.
    """
    known = _read(out)
    for place, each in given.items():
        if place not in former and (fingerprint := _fingerprint(each)) is not None:
            known[place] = {"kind": each.kind, "fingerprint": fingerprint}
    with writing(out):
        atomic_json(out / FILE, known)


def hashed_data(data: Path | dict[str, Any], former: Mapping[str, str]) -> Any:
    """Return the data of a study as hashes cover it."""
    if isinstance(data, Path):
        return former.get(str(data), str(data))
    moved = {key: former[value] for key, value in data.items() if isinstance(value, str) and value in former}
    return data | moved


def moved_lines(former: Mapping[str, str]) -> list[str]:
    """Return a line about each input that was moved."""
    return [f"{place} has the content of {other}, so results of that place are used" for place, other in former.items()]


def _read(out: Path) -> dict[str, dict[str, str]]:
    path = out / FILE
    return read_json_strict(path, "the places of a study's inputs") if path.is_file() else {}


def _fingerprint(each: Input) -> str | None:
    """Return the fingerprint of an input; None if there is no content on this machine."""
    try:
        value = each.fingerprint()
    except GrowthError:  # whatever reads the input says what is wrong
        return None
    return None if value == MISSING else value
