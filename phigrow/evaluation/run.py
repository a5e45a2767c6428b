"""Evaluate checkpoints task by task. Every result is written when it is there, so an interrupted command goes on."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phigrow.checkpoints.fingerprint import checkpoint_fingerprint
from phigrow.checkpoints.hub import display_name, locate
from phigrow.checkpoints.provenance import read_provenance, read_training
from phigrow.errors import GrowthError
from phigrow.evaluation.shipped_tasks import SHIPPED, documents_of, fingerprint_of, metrics_of
from phigrow.expansion.progress_bar import progress_bar
from phigrow.files.output import check_writable, writing
from phigrow.files.paths import user_path
from phigrow.models.config import load_config
from phigrow.records.evaluations import (
    FOLDER,
    Evaluation,
    evaluation_path,
    read_evaluation,
    write_evaluation,
)
from phigrow.records.readers.phigrow import first_record, has_records


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint to evaluate: its folder, the folder of its results, and its description for them."""

    folder: Path
    results: Path
    described: dict[str, Any]


def evaluate(
    checkpoints: Sequence[str | Path],
    *,
    tasks: Iterable[str] = (),
    out: str | Path | None = None,
    limit: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
    batch_size: int = 16,
    revision: str | None = None,
    progress: bool = False,
    say: Callable[[object], None] = lambda _: None,
) -> list[Evaluation]:
    """Evaluate checkpoints on shipped tasks, and write one file for each checkpoint and task.

    A result that an earlier call wrote, for the same weights, documents and settings, is read and not computed again.

    Args:
        checkpoints: Hugging Face folders, run folders (their export is evaluated) or names on the hub.
        tasks: names of shipped tasks; by default all.
        out: folder of the results. By default, those of a run are in ``evaluations`` in the run's folder, and those of
            another checkpoint in ``evaluations`` in the current folder.
        limit: first documents of every task; by default all.
        dtype: of the arithmetic: ``float32``, ``bfloat16``, ``float16`` or ``float64``.
        device: of torch; by default the accelerator, or the CPU where there is none.
        batch_size: sequences per forward pass.
        revision: branch, tag or commit on the hub.
        progress: show a progress bar on stderr.
        say: called with a line about every task.

    Returns:
        The results, task by task, in the order of the checkpoints.

    Raises:
        GrowthError: a task does not exist; a checkpoint cannot be read or has no tokenizer; two checkpoints have one
            name; or the results cannot be written. This is checked before anything is computed.
    """
    from phigrow.evaluation.scoring import DTYPES, load, logprobs, tokenizer_of

    names = list(dict.fromkeys(tasks)) or list(SHIPPED)
    for name in names:
        _check_task(name)
    if dtype not in DTYPES:
        raise GrowthError(f"there is no dtype {dtype!r}", where="--dtype", fix=f"choose one of {', '.join(DTYPES)}")
    if limit is not None and limit < 1:
        raise GrowthError(f"the limit is {limit}", where="--limit", fix="choose at least 1 document")
    chosen = [_described(name, user_path(out) if out else None, revision) for name in checkpoints]
    _check_names(chosen)
    for each in chosen:
        tokenizer_of(each.folder)
        check_writable(each.results)
    settings = {"dtype": dtype, "limit": limit}
    results: dict[tuple[str, str], Evaluation] = {}
    for each in chosen:
        missing = []
        for task in names:
            known = _known(each, task, settings, limit)
            if known is None:
                missing.append(task)
            else:
                results[each.described["name"], task] = known
                say(f"{each.described['name']}, {task}: kept")
        if not missing:
            continue
        loaded = load(each.folder, dtype, device)
        described = {**each.described, "parameters": loaded.parameters}
        for task in missing:
            documents = documents_of(task)[:limit]
            requests = [(document.prompt, choice) for document in documents for choice in document.choices]
            began = time.monotonic()
            with progress_bar(f"{described['name']}, {task}", len(requests), progress) as advance:
                scores = iter(logprobs(loaded, requests, batch_size, advance))
            metrics = metrics_of(documents, [[next(scores) for _ in document.choices] for document in documents])
            evaluation = Evaluation(
                task, "phigrow", described, settings, fingerprint_of(documents), metrics, _versions(),
                round(time.monotonic() - began, 3),
            )  # fmt: skip
            with writing(each.results):
                write_evaluation(each.results, evaluation)
            results[described["name"], task] = evaluation
            say(f"{described['name']}, {task}: {len(documents)} documents in {evaluation.seconds:.1f} s")
        del loaded
    return [results[each.described["name"], task] for task in names for each in chosen]


def _check_task(name: str) -> None:
    if name in SHIPPED:
        return
    near = difflib.get_close_matches(name, SHIPPED, 1, 0.4)
    raise GrowthError(
        f"there is no task {name!r}",
        where="--tasks",
        fix=(f"did you mean {near[0]}? " if near else "") + f"The tasks are {', '.join(SHIPPED)}",
    )


def _described(name: str | Path, out: Path | None, revision: str | None) -> _Checkpoint:
    """Find a checkpoint, its name, and the folder of its results."""
    path = user_path(name)
    run = path if has_records(path) else path.parent if path.is_dir() and has_records(path.parent) else None
    if run is path:
        path = _export_of(run)
    folder = locate(path if run is not None else name, revision)
    load_config(folder)
    shown = f"{run.resolve().name}-{folder.name}" if run is not None else display_name(name).replace("/", "--")
    root = out if out is not None else run / FOLDER if run is not None else Path(FOLDER)
    described: dict[str, Any] = {"name": shown, "folder": str(folder), "fingerprint": checkpoint_fingerprint(folder)}
    training, provenance = read_training(folder), read_provenance(folder)
    if training is not None:
        described |= {"arm": training.get("arm"), "seed": training.get("seed"), "step": training.get("steps")}
    if provenance is not None:
        described["method"] = provenance.method_summary
    return _Checkpoint(folder, root / shown, described)


def _export_of(run: Path) -> Path:
    """Return the folder of a run's export."""
    config = (first_record(run) or {}).get("config") or {}
    folder = run / str(config.get("export") or "export")
    if not folder.is_dir():
        raise GrowthError(
            "the run has no export to evaluate",
            where=str(folder),
            why="it has not finished, or was trained with export: none",
            fix="continue the run with the same phigrow pretrain command, with --export export",
        )
    return folder


def _check_names(chosen: Sequence[_Checkpoint]) -> None:
    """Refuse two checkpoints whose results would have one name, and results of another checkpoint of that name."""
    seen: dict[str, Path] = {}
    for each in chosen:
        name = each.described["name"]
        if name in seen:
            raise GrowthError(
                f"two checkpoints have the name {name!r}",
                where=f"{seen[name]}, {each.folder}",
                why="their results would have one place, and one column of the table",
                fix="rename one of the folders, or leave it out",
            )
        seen[name] = each.folder
        for path in sorted(each.results.glob("*.json")):
            if (other := read_evaluation(path).checkpoint.get("folder")) != each.described["folder"]:
                raise GrowthError(
                    f"the results of another checkpoint have the name {name!r}",
                    where=str(path),
                    why=f"they are of {other}",
                    fix="choose another --out, or delete them",
                )


def _known(each: _Checkpoint, task: str, settings: dict[str, Any], limit: int | None) -> Evaluation | None:
    """Return the result that an earlier call wrote, if weights, documents and settings are the same."""
    path = evaluation_path(each.results, task)
    if not path.is_file():
        return None
    known = read_evaluation(path)
    same = known.checkpoint.get("fingerprint") == each.described["fingerprint"] and known.settings == settings
    return known if same and known.documents == fingerprint_of(documents_of(task)[:limit]) else None


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("phigrow", "torch", "transformers")}
