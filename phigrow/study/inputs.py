"""Inputs of a study and of stages, held by content: data, text, sources, starts, states and teachers.

The hash in a folder's name covers the path of an input, and not its content. So ``inputs.json`` in the folder of all
results has, for every result, fingerprints of the inputs that it was begun with. Where an input was replaced, the study
is refused: results of two inputs are never mixed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from phigrow.checkpoints.provenance import read_provenance
from phigrow.checkpoints.run_checkpoints import FOLDER as CHECKPOINTS
from phigrow.corpus.local_files import TRAIN
from phigrow.errors import GrowthError
from phigrow.files.atomic import atomic_json
from phigrow.files.fingerprint import MISSING, SHOWN
from phigrow.files.output import writing
from phigrow.files.paths import user_path
from phigrow.files.untrusted import read_json_strict
from phigrow.records.schema import FILE as RECORDS
from phigrow.study.job import Job
from phigrow.study.progress import DONE
from phigrow.study.settings import Study

FILE = "inputs.json"
"""File in the folder of a study or of stages. Folders of earlier releases do not have it."""

MOST_NAMED = 3
"""Most results that a message names."""

Kind = Literal["checkpoint", "state", "blocks", "text"]


@dataclass(frozen=True)
class Input:
    """One input of a result.

    Attributes:
        kind: its kind.
        place: its place as the user or the study names it.
        split, config: the split and the configuration of a text.
    """

    kind: Kind
    place: str
    split: str = TRAIN
    config: str | None = None

    def fingerprint(self) -> str | None:
        """Return the fingerprint of the content, `MISSING`, or None for text on the hub and the embedded corpus."""
        from phigrow.checkpoints.fingerprint import checkpoint_fingerprint, state_fingerprint

        if self.kind == "checkpoint":
            return checkpoint_fingerprint(user_path(self.place))
        if self.kind == "state":
            return state_fingerprint(user_path(self.place))
        from phigrow.corpus.fingerprint import data_fingerprint, text_fingerprint

        if self.kind == "text":
            return text_fingerprint(self.place, self.split, self.config)
        from phigrow.corpus.blocks import load_blocks

        try:
            return data_fingerprint(load_blocks(self.place))
        except GrowthError:  # not packed yet, or deleted
            return MISSING


@dataclass(frozen=True)
class Result:
    """A result with its inputs.

    Attributes:
        name: name for people.
        folder: its folder.
        inputs: name -> input.
        trains: it is a training run.
    """

    name: str
    folder: Path
    inputs: dict[str, Input] = field(default_factory=dict)
    trains: bool = False

    @property
    def has_begun(self) -> bool:
        """True if there is something that was made of the inputs. A run that failed to start has made nothing."""
        maps = self.folder.with_name(self.folder.name + "-maps")  # learned before the first weights
        made = [self.folder / name for name in (DONE, RECORDS, CHECKPOINTS)] if self.trains else [self.folder, maps]
        return any(path.exists() for path in made)


class Ledger:
    """The file `FILE` in a folder of results."""

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out / FILE
        self.entries: dict[str, dict[str, str]] = (
            read_json_strict(self.path, "the inputs of a study") if self.path.is_file() else {}
        )

    def check(self, results: Iterable[Result]) -> list[str]:
        """Compare the inputs of all results that have begun, and take up those that have no entry yet.

        Returns:
            The names of the results that had no entry, because an earlier release began them.

        Raises:
            GrowthError: an input was replaced. The error names it, both fingerprints and the results.
        """
        found: dict[Input, str | None] = {}
        changed: dict[tuple[str, str, str, str], list[Result]] = {}
        new: list[str] = []
        for result in results:
            if not result.inputs or not result.has_begun:
                continue
            former = self.entries.get(self._key(result))
            now = self._fingerprints(result, found)
            if former is None:
                new.append(result.name)
            for name, value in now.items():
                was = (former or {}).get(name, MISSING)
                if MISSING not in (was, value) and was != value:
                    changed.setdefault((name, result.inputs[name].place, was, value), []).append(result)
            self._enter(result, now)
        if changed:
            raise _replaced(self.out, changed)
        return new

    def begin(self, result: Result) -> None:
        """Write the inputs of a result before the work on it begins.

        Raises:
            GrowthError: the work has begun before, with another content of an input; or the file cannot be written.
        """
        if not result.has_begun:
            self.entries.pop(self._key(result), None)
            self._enter(result, self._fingerprints(result, {}))
        else:
            self.check([result])
        self.write()

    def write(self) -> None:
        """Write the file.

        Raises:
            GrowthError: it cannot be written.
        """
        with writing(self.out):
            atomic_json(self.path, self.entries)

    def _enter(self, result: Result, now: dict[str, str]) -> None:
        """Enter fingerprints; the former one of an input stays."""
        entry = self.entries.setdefault(self._key(result), {})
        for name, value in now.items():
            if entry.get(name, MISSING) == MISSING:
                entry[name] = value

    def _fingerprints(self, result: Result, found: dict[Input, str | None]) -> dict[str, str]:
        for each in result.inputs.values():
            if each not in found:
                found[each] = each.fingerprint()
        return {name: value for name, each in result.inputs.items() if (value := found[each]) is not None}

    def _key(self, result: Result) -> str:
        return os.path.relpath(result.folder, self.out)


def check_inputs(out: Path, results: Iterable[Result], say: Callable[[str], None]) -> Ledger:
    """Compare the inputs of a study's results with those that they were begun with.

    Args:
        out: folder of all results.
        results: the results.
        say: receives a note about results of an earlier release, which have no fingerprints.

    Raises:
        GrowthError: as `Ledger.check`.
    """
    ledger = Ledger(out)
    if new := ledger.check(results):
        say(
            f"note: an earlier phigrow made {len(new)} result{'s' * (len(new) != 1)} in {out} and kept no "
            "fingerprints. phigrow assumes that their inputs have not changed."
        )
    return ledger


def _replaced(out: Path, changed: dict[tuple[str, str, str, str], list[Result]]) -> GrowthError:
    inputs, reasons = [], []
    for (name, place, was, value), results in changed.items():
        inputs.append(f"{name} ({was[:SHOWN]}, now {value[:SHOWN]})")
        names = ", ".join(result.name for result in results[:MOST_NAMED])
        more = f" and {len(results) - MOST_NAMED} more" if len(results) > MOST_NAMED else ""
        reasons.append(f"{names}{more} had another content of {place}")
    return GrowthError(
        f"inputs have changed since these results were made: {', '.join(dict.fromkeys(inputs))}",
        where=str(out),
        why="; ".join(reasons),
        fix="put the former content back, or choose another --out; or delete the folders of these results, which are "
        "then made anew",
    )


def check_method_files(starts: Iterable[Path], files: Mapping[str, str | None], where: str) -> None:
    """Refuse a method file that has changed since grown weights were made of it.

    Args:
        starts: folders of grown weights of one arm or stage, of whatever settings.
        files: hash of each method file now, by the method's name.
        where: the arm or the stage, for messages.

    Raises:
        GrowthError: a folder was grown by a method of the same name from a file of another content.
    """
    for start in starts:
        grown = read_provenance(start)
        before = grown.plan.get("method_files") if grown is not None else None
        for method, was in before.items() if isinstance(before, dict) else ():
            now = files.get(method, was)
            if was != now:
                raise GrowthError(
                    f"the file of method {method} has changed since results were made of it "
                    f"({str(was)[:SHOWN]}, now {str(now)[:SHOWN]})",
                    where=where,
                    why=f"{start} was grown by its former content",
                    fix="put the former content back, or choose another --out; or delete that folder and the runs that "
                    "start from it, which are then made anew",
                )


def inputs_of_data(data: Path | dict[str, Any]) -> dict[str, Input]:
    """Return the inputs of packed blocks that a study makes: text and tokenizer."""
    if isinstance(data, Path):
        return {}
    text = Input("text", str(data.get("ref", "embedded")), str(data.get("split", TRAIN)), data.get("config"))
    inputs = {"text": text}
    tokenizer = data.get("tokenizer")
    if isinstance(tokenizer, str):
        given = user_path(tokenizer)
        file = given / "tokenizer.json" if given.is_dir() else given
        if file.is_file():
            inputs["tokenizer"] = Input("text", str(file))
    return inputs


def inputs_of_run(keys: dict[str, Any]) -> dict[str, Input]:
    """Return the inputs that the keys of a training run name."""
    kinds: dict[str, Kind] = {
        "init": "checkpoint", "init_optimizer": "state", "teacher": "checkpoint", "data": "blocks"
    }  # fmt: skip
    return {name: Input(kind, str(keys[name])) for name, kind in kinds.items() if isinstance(keys.get(name), str)}


def results_of(study: Study, jobs: Iterable[Job]) -> list[Result]:
    """Return the results of a study's jobs with their inputs."""
    return [result_of(study, job) for job in jobs if not job.undecided]


def result_of(study: Study, job: Job) -> Result:
    """Return the result of one job with its inputs.

    A run has those that its own keys name, and those before them: a source that is a checkpoint, and the text. So they
    are compared also where what was made of them has been deleted.
    """
    text = inputs_of_data(study.data)
    if job.kind == "data":
        return Result(job.name, job.folder, text)
    inputs: dict[str, Input] = {}
    if job.start is not None and (not job.trains or _is_given(study, job)):
        inputs["source"] = Input("checkpoint", str(job.start))
    if job.trains:
        return Result(job.name, job.folder, inputs_of_run(job.keys) | inputs | text, trains=True)
    if job.arm is not None and job.arm.learn is not None:
        blocks = {"data": Input("blocks", str(study.data))} if isinstance(study.data, Path) else {}
        inputs |= blocks | text
    return Result(job.name, job.folder, inputs)


def _is_given(study: Study, job: Job) -> bool:
    """Return True if a job's source is a checkpoint that the study was given."""
    return job.arm is not None and study.source(job.arm.source).path is not None
