"""What a grown checkpoint says about itself: ``phigrow.json`` and the model card."""

from __future__ import annotations

import hashlib
import shlex
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from phigrow.files.untrusted import read_json_strict
from phigrow.growth.origins import Part, anatomy
from phigrow.growth.plan import Plan
from phigrow.models.config import Config


def installed_version(package: str) -> str:
    """The installed version of a package, or ``unknown``."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def sha256_of(path: Path) -> str:
    """sha256 of a file, as the hub lists it for files in large-file storage."""
    digest, buffer = hashlib.sha256(), bytearray(1 << 24)  # large pieces: another thread may hold the interpreter
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(memoryview(buffer)[:size])
    return digest.hexdigest()


def provenance(
    plan: Plan,
    *,
    source_name: str,
    revision: str | None,
    source: Path,
    hashes: dict[str, str],
    dtype: str,
    command: str,
    seconds: float,
    learning: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of ``phigrow.json``: the resolved plan, the source's hashes, versions, and the command.

    ``source.training`` holds the tokens, FLOPs and seconds that the source's training cost, where the source says so
    (``training.json``, written by the pretraining recipe): the charged account of a run that starts here needs them.
    ``learning`` says how learned maps came to be, and what that cost besides.
    """
    entry: dict[str, Any] = {"name": source_name, "revision": revision}
    entry["files"] = {name: {"bytes": (source / name).stat().st_size, "sha256": h} for name, h in hashes.items()}
    if (training := _training_of(source)) is not None:
        entry["training"] = training
    return {
        "format": 1,
        "plan": {"hash": plan.hash, **plan.to_json()},
        "source": entry,
        "copied": copied_values(plan),
        **({"learning": learning} if learning else {}),
        "dtype": dtype,
        "command": command,
        "seconds": round(seconds, 3),
        "versions": {name: installed_version(name) for name in ("phigrow", "torch", "numpy")},
    }


def copied_values(plan: Plan) -> dict[str, Any]:
    """Which grown values are copies of a source's, for a training that gives them a learning rate of their own.

    ``spans`` has, for every line of the family table, the half-open ranges of coordinates of each stored axis that are
    copies, scaled or not, or mixtures of the source alone; a value is one where all its coordinates are. ``fresh``
    names the tensors that hold none (the writers of identity layers), ``blocks`` the lines of matrices that are zero
    but for so many blocks on the diagonal.
    """
    spans: dict[str, list[list[list[int]]]] = {}
    blocks: dict[str, int] = {}
    fresh = []
    for growth in plan.tensors():
        if growth.zero:
            fresh.append(growth.name)
        elif growth.parameter.name not in spans:
            sides = anatomy(growth, plan.axes).sides
            spans[growth.parameter.name] = [_copied_ranges(side.whole) for side in sides]
            if growth.parts > 1:
                blocks[growth.parameter.name] = growth.parts
    return {"spans": spans, "fresh": fresh, **({"blocks": blocks} if blocks else {})}


def _copied_ranges(part: Part) -> list[list[int]]:
    ranges: list[list[int]] = []
    for span in part.spans:
        if not span.kind.is_old:
            continue
        if ranges and ranges[-1][1] == span.start:
            ranges[-1][1] = span.stop
        else:
            ranges.append([span.start, span.stop])
    return ranges


def _training_of(folder: Path) -> Any:
    """What the folder's training cost; a grown folder that was not trained yet cost what its own source did."""
    training, grown = folder / "training.json", folder / "phigrow.json"
    if training.is_file():
        return read_json_strict(training, "a training.json")
    if grown.is_file():
        source = read_json_strict(grown, "a phigrow.json").get("source")
        return source.get("training") if isinstance(source, dict) else None
    return None


def command_line(
    plan: Plan,
    src: str | Path,
    dst_config: str | Path | Config,
    out: Path,
    dtype: str,
    revision: str | None,
    maps: str | Path | None = None,
) -> str:
    """The command that repeats an expansion, with every default written out."""
    target = "config.json" if isinstance(dst_config, dict) else str(dst_config)
    apart = {name: value for name, value in plan.options.items() if name in ("anchor", "scale")}
    method = ":".join([plan.method, *(f"{name}={value}" for name, value in plan.options.items() if name not in apart)])
    words = ["phigrow", "expand", "--src", str(src), "--dst-config", target, "--method", method]
    for name, value in apart.items():
        words += [f"--{name}", str(value)]
    words += ["--depth", plan.depth]
    for name, value in plan.depth_options.items():
        words += [f"--{name}", str(value)]
    words += ["--seed", str(plan.seed)]
    if plan.noise and plan.noise_on == "copies":
        words += ["--noise", repr(plan.noise)]
    if maps is not None:
        words += ["--maps", str(maps)]
    if revision is not None:
        words += ["--revision", revision]
    return shlex.join([*words, "--dtype", dtype, "--out", str(out)])


def model_card(plan: Plan, base_model: str, dtype: str) -> str:
    """A Hugging Face model card with ``base_model`` in its front matter."""
    src, dst = plan.cost()
    claim = (
        "It computes the same function as its source (in evaluation mode, to rounding of the stored dtype)."
        if plan.exact
        else "It does not compute the same function as its source: " + "; ".join(plan.approximations) + "."
    )
    return f"""---
base_model: {base_model}
library_name: transformers
pipeline_tag: text-generation
tags:
- model-growth
- phigrow
---

# {base_model.split("/")[-1]} grown by {plan.method}

{src.parameters / 1e6:,.1f}M parameters grown to {dst.parameters / 1e6:,.1f}M by phigrow: width method
`{plan.method}`, depth method `{plan.depth}`, seed {plan.seed}, stored as {dtype}. {claim}

It is an initialisation, to be trained further. `phigrow.json` holds the resolved plan (hash `{plan.hash[:16]}`), the
hashes of the source and the command that repeats the expansion; `phigrow verify` measures the claim.
"""
