"""Branches of a trunk: runs that start from the checkpoint of a run with which they share their first steps.

Under warmup-stable-decay the learning rate is constant until the decay, so runs of several lengths share their
beginning. It is trained once, as a trunk. A branch has the same losses, to the bit, as a run without a trunk.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phigrow.checkpoints.run_checkpoints import FOLDER, RUN_FILE, marked_checkpoints
from phigrow.errors import GrowthError
from phigrow.files.folder_copy import copy_folder
from phigrow.files.output import writing
from phigrow.files.staged_folder import staged_folder
from phigrow.records.schema import FILE
from phigrow.training.checkpoints import changed_keys, has_begun
from phigrow.training.configuration import RunConfig
from phigrow.training.declaration import Role
from phigrow.training.inputs import former_settings


def branch(config: RunConfig, curve: dict[str, Any], out: Path) -> None:
    """Put the trunk's checkpoint into the folder of a branch; call it on rank 0, before the run looks for checkpoints.

    The files are linked, or copied where the file system has no links. A run that has begun is left as it is.

    Args:
        config: the run; nothing happens unless it sets ``branch_from``.
        curve: the settings and properties of the data on which its loss curve depends.
        out: its folder.

    Raises:
        GrowthError: the trunk's folder holds no run, a run with other settings, a run whose learning rate has decayed
            before the branch starts, or no checkpoint of that step.
    """
    if config.branch_from is None or has_begun(out):
        return
    trunk, step = Path(config.branch_from), config.steps - config.decay_steps
    _check(trunk, json.loads(json.dumps(curve)), step)
    checkpoints = {each.progress.step: each.folder for each in marked_checkpoints(trunk)[0]}
    if step not in checkpoints:
        there = ", ".join(map(str, checkpoints)) or "none"
        raise GrowthError(
            f"the trunk has no checkpoint of step {step}",
            where=str(trunk / FOLDER),
            why=f"it has checkpoints of these steps: {there}",
            fix=f"train it with --save-at {step}, or leave branch_from out",
        )
    target = out / FOLDER / f"step-{step}"
    with writing(out), staged_folder(target) as folder:
        copy_folder(checkpoints[step], folder, link=True)


def starts_branch(config: RunConfig, out: Path) -> Path | None:
    """Return the trunk's folder for a branch that has no records of its own yet; else None."""
    return Path(config.branch_from) if config.branch_from and not (out / FILE).is_file() else None


def _check(trunk: Path, curve: dict[str, Any], step: int) -> None:
    """Refuse a trunk whose training up to a step differs from the branch's."""
    path = trunk / RUN_FILE
    if not path.is_file():
        raise GrowthError("there is no run to branch from", where=str(path), fix="give the folder of a run")
    theirs = former_settings(trunk)
    own = RunConfig.keys_with(Role.BRANCH)
    different = {key: values for key, values in changed_keys(theirs, curve).items() if key not in own}
    if different:
        changes = ", ".join(f"{key} ({one!r}, now {other!r})" for key, (one, other) in different.items())
        raise GrowthError(
            "the trunk has other settings than the branch",
            where=str(trunk),
            why=f"these keys differ: {changes}",
            fix=f"give both the same; only {' and '.join(own)} may differ",
        )
    steps, decay = theirs.get("steps"), theirs.get("decay")
    constant = None if steps is None else steps - (steps // 5 if decay is None else decay)
    if constant is not None and constant < steps and step > constant:
        raise GrowthError(
            f"the branch starts at step {step}, but the trunk's learning rate has decayed since step {constant}",
            where=str(trunk),
            why="a branch starts where the learning rate is still constant",
            fix="train the trunk with decay 0",
        )
