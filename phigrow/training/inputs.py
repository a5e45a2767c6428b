"""Inputs of a run, held by their content: first weights, optimizer state, teacher, model and text.

``run.json`` has a fingerprint of each, so that a run continues only with the content that it began with. Paths play no
part. Small files of the inputs are kept in ``inputs/`` in the run's folder, so a run with a checkpoint continues after
its start was moved or deleted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phigrow.checkpoints.fingerprint import CONFIG, STATE, checkpoint_fingerprint, config_content, state_fingerprint
from phigrow.checkpoints.integrity import MARKER
from phigrow.checkpoints.model_card import CARD_FILE
from phigrow.checkpoints.provenance import PROVENANCE_FILE, TRAINING_FILE, TrainingCost
from phigrow.checkpoints.run_checkpoints import RUN_FILE
from phigrow.checkpoints.stored_model import stored_model_config
from phigrow.checkpoints.token_ids import GENERATION_FILE
from phigrow.corpus.blocks import DataSource
from phigrow.errors import GrowthError
from phigrow.files.atomic import atomic_json, atomic_write
from phigrow.files.fingerprint import MISSING, SHOWN
from phigrow.files.output import writing
from phigrow.files.paths import user_path
from phigrow.files.untrusted import read_json_strict
from phigrow.models.config import load_config, shipped_name
from phigrow.records.former_names import with_current_names
from phigrow.records.readers.phigrow import first_record
from phigrow.training.configuration import DEMO_MODEL, RunConfig
from phigrow.training.declaration import Role
from phigrow.training.settings import DEMO, SCRATCH
from phigrow.training.training_cost import InitSource

FOLDER = "inputs"
"""Folder in a run's folder with the small files of its inputs."""

CONTENTS = "contents"
"""Key of ``run.json`` with the fingerprints. Run folders of earlier releases do not have it."""

_CHECKPOINT = (CONFIG, GENERATION_FILE, CARD_FILE, PROVENANCE_FILE, TRAINING_FILE)
_FOLDERS: dict[str, tuple[Callable[[Path], str], tuple[str, ...]]] = {
    "init": (checkpoint_fingerprint, _CHECKPOINT),
    "init_optimizer": (state_fingerprint, (MARKER, STATE)),
    "teacher": (checkpoint_fingerprint, _CHECKPOINT),
}
"""Settings that name a folder, with the function for its fingerprint and the files to keep."""


def contents_of(config: RunConfig, blocks: DataSource) -> dict[str, Any]:
    """Return the contents of a run's inputs: a fingerprint of each, and the configuration of a model from scratch.

    An input that the run does not have is None. One whose folder does not exist any more is `MISSING`.

    Raises:
        GrowthError: a file cannot be read.
    """
    from phigrow.corpus.fingerprint import data_fingerprint

    contents: dict[str, Any] = {}
    for name, (fingerprint, _) in _FOLDERS.items():
        folder = _folder(config, name)
        contents[name] = None if folder is None else fingerprint(folder)
    contents["model"] = _model(config)
    contents["data"] = data_fingerprint(blocks)
    return contents


def former_settings(folder: Path) -> dict[str, Any]:
    """Return the settings with which the run in a folder began.

    Those that ``run.json`` of an earlier release lacks come from the ``run`` record.

    Raises:
        GrowthError: ``run.json`` cannot be read.
    """
    former = with_current_names(read_json_strict(folder / RUN_FILE, "the settings of a run"))
    recorded = (first_record(folder) or {}).get("config")
    if not isinstance(recorded, dict):
        return former
    names = RunConfig.keys_with(Role.HELDOUT)
    return {name: recorded[name] for name in names if name in recorded} | former


def changed_contents(former: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Compare the contents of two runs' inputs; one that is missing in either is not compared.

    Returns:
        The inputs that differ, each with its former and its new content; fingerprints are shortened.

    >>> changed_contents({"init": "ab", "model": {"hidden_size": 8}}, {"init": "missing", "model": {"hidden_size": 9}})
    {'model.hidden_size': (8, 9)}
    """
    changed: dict[str, tuple[Any, Any]] = {}
    for name in {**former, **now}:
        one, other = former.get(name), now.get(name)
        if one == other or MISSING in (one, other):
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            one, other = config_content(one), config_content(other)
            for key in {**one, **other}:
                if one.get(key) != other.get(key):
                    changed[f"{name}.{key}"] = one.get(key), other.get(key)
        else:
            changed[f"content of {name}"] = _short(one), _short(other)
    return changed


def merged(former: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of a run that continues: today's, and the former ones of missing inputs."""
    return {name: former.get(name) if value == MISSING else value for name, value in now.items()}


def same_place(one: Any, other: Any) -> bool:
    """Return True if two settings are equal, or are paths of one place.

    >>> same_place("g1", "./g1"), same_place("g1", "g2"), same_place(None, None)
    (True, False, True)
    """
    if isinstance(one, str) and isinstance(other, str):
        return one == other or user_path(one).resolve() == user_path(other).resolve()
    return bool(one == other)


def with_kept_inputs(config: RunConfig, out: Path) -> tuple[RunConfig, dict[str, Path]]:
    """Return the settings of a run with the kept files of inputs that do not exist any more, and those inputs.

    Args:
        config: the settings as asked.
        out: folder of the run.

    Returns:
        The settings, and the places of the missing inputs by the name of their setting.
    """
    folders = [out, *([Path(config.branch_from)] if config.branch_from else [])]
    changes: dict[str, Any] = {}
    missing: dict[str, Path] = {}
    for name in _FOLDERS:
        asked = _folder(config, name)
        if asked is None or asked.is_dir():
            continue
        kept = [folder / FOLDER / name for folder in folders if (folder / FOLDER / name).is_dir()]
        if kept:
            changes[name], missing[name] = str(kept[0]), asked
    if _is_file_name(config.model) and not Path(str(config.model)).exists():
        for folder in folders:
            contents = former_settings(folder).get(CONTENTS) if (folder / RUN_FILE).is_file() else None
            if isinstance(contents, dict) and isinstance(contents.get("model"), dict):
                changes["model"] = contents["model"]
                break
    return (dataclasses.replace(config, **changes) if changes else config), missing


def keep_inputs(config: RunConfig, out: Path) -> None:
    """Copy the small files of a run's inputs into its folder, so that it can continue without the inputs.

    Args:
        config: the settings, as `with_kept_inputs` returns them.
        out: folder of the run.

    Raises:
        GrowthError: the folder cannot be written.
    """
    for name, (_, files) in _FOLDERS.items():
        source, target = _folder(config, name), out / FOLDER / name
        if source is None or source.resolve() == target.resolve():
            continue
        with writing(out):
            target.mkdir(parents=True, exist_ok=True)
            for file in files:
                if (source / file).is_file():
                    atomic_write(target / file, (source / file).read_bytes())
            if (target / CONFIG).is_file() and (stored := stored_model_config(source)) != load_config(source):
                atomic_json(target / CONFIG, stored)  # without weights beside it, the file must say what they are


def check_present(missing: dict[str, Path], config: RunConfig, step: int | None) -> None:
    """Refuse a run without an input that it still needs.

    Args:
        missing: the second result of `with_kept_inputs`.
        config: the settings.
        step: step of the checkpoint from which the run continues; None for a run that begins.

    Raises:
        GrowthError: a run begins without its first weights or its optimizer state, or has no teacher that still
            teaches.
    """
    if "teacher" in missing and (step or 0) < min(config.teacher_steps, config.steps):
        raise GrowthError(
            f"the teacher does not exist any more, and the run learns from it until step {config.teacher_steps}",
            where=f"teacher, {missing['teacher'].absolute()}",
            fix="put the folder back, or give its new place",
        )
    if step is not None:
        return
    for name in ("init", "init_optimizer"):
        if name in missing:
            raise GrowthError(
                f"{name} does not exist any more, and the run has no checkpoint to continue from",
                where=str(missing[name].absolute()),
                fix="put the folder back, or give its new place",
            )


def recorded_source(out: Path) -> InitSource | None:
    """Return the origin of a run's first weights from its ``run`` record, or None without such a record."""
    record = first_record(out)
    if record is None or not isinstance(record.get("arm"), str):
        return None
    cost = TrainingCost(*(record.get(f"source_{unit}") for unit in ("tokens", "flops", "seconds")))
    tokens, flops = record.get("expand_tokens") or 0, record.get("expand_flops") or 0.0
    return InitSource(record["arm"], cost, record.get("growth"), record.get("expand_seconds"), tokens, flops)


def _folder(config: RunConfig, name: str) -> Path | None:
    """Return the folder that a setting names; None if it names none."""
    value = getattr(config, name)
    return None if value is None or (name == "init" and value == SCRATCH) else user_path(value)


def _model(config: RunConfig) -> Any:
    """Return the configuration of a model from scratch, as it is spelled; None for a run that starts elsewhere."""
    if config.init != SCRATCH:
        return None
    model = config.model or DEMO
    if model == DEMO:
        return config_content(DEMO_MODEL)
    if _is_file_name(model) and not user_path(str(model)).exists():
        return MISSING
    return config_content(load_config(model))


def _is_file_name(model: Any) -> bool:
    return isinstance(model, str) and model != DEMO and shipped_name(model) is None


def _short(value: Any) -> Any:
    return value[:SHOWN] if isinstance(value, str) else value
