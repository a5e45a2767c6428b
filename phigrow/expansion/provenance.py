"""Describe a grown checkpoint: the content of its ``phigrow.json``, and its model card."""

from __future__ import annotations

import hashlib
import shlex
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from phigrow.checkpoints.model_card import model_card
from phigrow.checkpoints.origin import Origin
from phigrow.checkpoints.provenance import Provenance, read_provenance, read_training
from phigrow.growth.methods.depth import DEPTHS
from phigrow.growth.origins import Part, anatomy
from phigrow.growth.plan import Plan
from phigrow.models.config import Config


def installed_version(package: str) -> str:
    """Return the installed version of a package, or ``unknown``."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, as the hub lists it for files in large-file storage."""
    digest, buffer = hashlib.sha256(), bytearray(1 << 24)  # large pieces: another thread may hold the interpreter
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(memoryview(buffer)[:size])
    return digest.hexdigest()


def provenance(
    plan: Plan,
    *,
    method_summary: str,
    source_name: str,
    revision: str | None,
    source: Path,
    hashes: dict[str, str],
    dtype: str,
    command: str,
    seconds: float,
    learning: dict[str, Any] | None = None,
) -> Provenance:
    """Return the provenance of an expansion.

    Args:
        plan: the resolved plan.
        method_summary: the method in one line.
        source_name: the hub id of the source, or the name of its folder.
        revision: its commit where it is known, else as the user named it.
        source: its folder. The cost of its training is copied from its ``training.json``, if there is one, so that runs
            which start from the grown weights can be charged for it.
        hashes: file name -> sha256 of the source's weights.
        dtype: of the grown weights.
        command: the command that repeats the expansion.
        seconds: of the expansion.
        learning: the record of the learning of maps, with its cost.
    """
    return Provenance(
        plan={"hash": plan.hash, **plan.to_json()},
        method_summary=method_summary,
        source_name=source_name,
        source_revision=revision,
        source_files={name: {"bytes": (source / name).stat().st_size, "sha256": h} for name, h in hashes.items()},
        source_training=_training_of(source),
        copied=copied_values(plan),
        learning=learning,
        dtype=dtype,
        command=command,
        seconds=round(seconds, 3),
        versions={name: installed_version(name) for name in ("phigrow", "torch", "numpy")},
    )


def copied_values(plan: Plan) -> dict[str, Any]:
    """Describe the grown values that are copies of a source's, so that training can give them their own learning rate.

    A value is a copy if all its coordinates are: copies, scaled copies or mixtures of source coordinates alone.

    Returns:
        ``spans`` has, for every line of the family table, the half-open ranges of copied coordinates of each stored
        axis. ``fresh`` names the tensors without copies (the writers of identity layers, and new layers). ``blocks``
        has the number of diagonal blocks of matrices that are zero outside them.
    """
    spans: dict[str, list[list[list[int]]]] = {}
    blocks: dict[str, int] = {}
    fresh = []
    for recipe in plan.recipes():
        if recipe.is_zero or recipe.is_new:
            fresh.append(recipe.name)
        elif recipe.line not in spans:
            spans[recipe.line] = [_copied_ranges(side.whole) for side in anatomy(recipe).sides]
            if recipe.diagonal_blocks > 1:
                blocks[recipe.line] = recipe.diagonal_blocks
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


def _training_of(folder: Path) -> dict[str, Any] | None:
    """Return the cost of the folder's training. An untrained grown folder has the cost of its own source."""
    if (training := read_training(folder)) is not None:
        return training
    grown = read_provenance(folder)
    return None if grown is None else grown.source_training


def command_line(
    plan: Plan,
    src: str | Path,
    dst_config: str | Path | Config,
    out: Path,
    dtype: str,
    revision: str | None,
    spelled: str,
    maps: str | Path | None = None,
) -> str:
    """Return the command that repeats an expansion, with every default written out.

    Args:
        plan: the resolved plan.
        src, dst_config, out, dtype, revision, maps: as they were given.
        spelled: a method from outside of phigrow, with its options, which have no flags of their own.
    """
    target = "config.json" if isinstance(dst_config, dict) else str(dst_config)
    words = ["phigrow", "expand", "--src", str(src), "--dst-config", target, "--method"]
    if plan.method_files:
        words.append(spelled)
    else:
        words.append(plan.method)
        for name, value in plan.options.items():
            words += [f"--{name.replace('_', '-')}", str(value)]
    if plan.depth in DEPTHS:
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


def growth_card(plan: Plan, source: Path, origin: Origin, dtype: str) -> str:
    """Return the model card of a grown checkpoint, with the licence of its source.

    Args:
        plan: the resolved plan.
        source: the source's folder.
        origin: of the source.
        dtype: of the grown weights.
    """
    src, dst = plan.cost()
    claim = (
        "It computes the same function as its source (in evaluation mode, to rounding of the stored dtype)."
        if plan.exact
        else "It does not compute the same function as its source: " + "; ".join(plan.approximations) + "."
    )
    text = f"""# {origin.name.split("/")[-1]} grown by {plan.method}

{src.parameters / 1e6:,.1f}M parameters grown to {dst.parameters / 1e6:,.1f}M by phigrow: width method
`{plan.method}`, depth method `{plan.depth}`, seed {plan.seed}, stored as {dtype}. {claim}

It is an initialisation, to be trained further. `phigrow.json` holds the resolved plan (hash `{plan.hash[:16]}`), the
hashes of the source and the command that repeats the expansion; `phigrow verify` measures the claim.
"""
    return model_card(text, source=source, repository=origin.repository, tags=["model-growth", "phigrow"])
