"""Evaluate checkpoints task by task. Every result is written when it is there, so an interrupted command goes on."""

from __future__ import annotations

import dataclasses
import difflib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phigrow.checkpoints.fingerprint import CONFIG, checkpoint_fingerprint, has_weights
from phigrow.checkpoints.hub import locate
from phigrow.checkpoints.hub_names import hub_name
from phigrow.checkpoints.provenance import read_provenance, read_training
from phigrow.checkpoints.tokenizer_folder import tokenizer_fingerprint
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
    """A checkpoint to evaluate.

    Attributes:
        folder: of the checkpoint, resolved.
        run: folder of its run; None without one.
        name: in tables.
        parent: name of the folder that holds the checkpoint or its run; empty for a checkpoint on the hub.
        described: its description in the results, without its name.
    """

    folder: Path
    run: Path | None
    name: str
    parent: str
    described: dict[str, Any]

    def results(self, out: Path | None) -> Path:
        """Return the folder of its results. In the run's folder, it does not have the run's name, which may change."""
        if out is not None or self.run is None:
            return (out or Path(FOLDER)) / self.name
        return self.run / FOLDER if self.folder == self.run else self.run / FOLDER / self.folder.name


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

    A result that an earlier call wrote is read and not computed again, if weights, tokenizer, documents, settings
    (dtype, limit and kind of device) and versions of phigrow, torch and transformers are the same.

    Args:
        checkpoints: Hugging Face folders, run folders (their model, or else their export) or names on the hub.
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
    from phigrow.evaluation.scoring import DTYPES, device_type, load, logprobs, tokenizer_of

    names = list(dict.fromkeys(tasks)) or list(SHIPPED)
    for name in names:
        _check_task(name)
    if dtype not in DTYPES:
        raise GrowthError(f"there is no dtype {dtype!r}", where="--dtype", fix=f"choose one of {', '.join(DTYPES)}")
    if limit is not None and limit < 1:
        raise GrowthError(f"the limit is {limit}", where="--limit", fix="choose at least 1 document")
    settings = {"dtype": dtype, "limit": limit, "device": device_type(device)}
    folder = user_path(out) if out else None
    chosen = _with_different_names([_described(name, revision) for name in checkpoints])
    for each in chosen:
        if folder is not None or each.run is None:
            _check_results(each, each.results(folder))
        tokenizer = tokenizer_fingerprint(each.folder, tokenizer_of(each.folder))
        each.described.update(name=each.name, tokenizer=tokenizer)
        check_writable(each.results(folder))
    results: dict[tuple[str, str], Evaluation] = {}
    for each in chosen:
        missing = []
        for task in names:
            known = _known(each, each.results(folder), task, settings)
            if known is None:
                missing.append(task)
            else:
                results[each.name, task] = known
                say(f"{each.name}, {task}: kept")
        if not missing:
            continue
        loaded = load(each.folder, dtype, device)
        described = {**each.described, "parameters": loaded.parameters}
        for task in missing:
            documents = documents_of(task)[:limit]
            requests = [(document.prompt, choice) for document in documents for choice in document.choices]
            began = time.monotonic()
            with progress_bar(f"{each.name}, {task}", len(requests), progress) as advance:
                scores = iter(logprobs(loaded, requests, batch_size, advance))
            metrics = metrics_of(documents, [[next(scores) for _ in document.choices] for document in documents])
            evaluation = Evaluation(
                task, "phigrow", described, settings, fingerprint_of(documents), metrics, _versions(),
                round(time.monotonic() - began, 3),
            )  # fmt: skip
            with writing(each.results(folder)):
                write_evaluation(each.results(folder), evaluation)
            results[each.name, task] = evaluation
            say(f"{each.name}, {task}: {len(documents)} documents in {evaluation.seconds:.1f} s")
        del loaded
    return [results[each.name, task] for task in names for each in chosen]


def _check_task(name: str) -> None:
    if name in SHIPPED:
        return
    near = difflib.get_close_matches(name, SHIPPED, 1, 0.4)
    raise GrowthError(
        f"there is no task {name!r}",
        where="--tasks",
        fix=(f"did you mean {near[0]}? " if near else "") + f"The tasks are {', '.join(SHIPPED)}",
    )


def _described(name: str | Path, revision: str | None) -> _Checkpoint:
    """Find a checkpoint, its run and its name."""
    path = user_path(name)
    run = None
    if path.is_dir() and revision is None:
        path = path.resolve()
        run = path if has_records(path) else path.parent if has_records(path.parent) else None
        folder = locate(_model_of(run) if run == path else path).resolve()
        shown = path.name if run is None or folder == run else f"{run.name}-{folder.name}"
        parent = (run or folder).parent.name
    else:
        folder = locate(name, revision).resolve()
        asked = hub_name(name, revision)
        shown = "@".join(filter(None, (asked.repository, asked.revision or revision))).replace("/", "--")
        parent = ""
    load_config(folder)
    described: dict[str, Any] = {"folder": str(folder), "fingerprint": checkpoint_fingerprint(folder)}
    training, provenance = read_training(folder), read_provenance(folder)
    if training is not None:
        described |= {"arm": training.get("arm"), "seed": training.get("seed"), "step": training.get("steps")}
    if provenance is not None:
        described["method"] = provenance.method_summary
    return _Checkpoint(folder, run, shown, parent, described)


def _model_of(run: Path) -> Path:
    """Return the folder of a run's model: the run's folder if it holds one, else its export."""
    if (run / CONFIG).is_file() and has_weights(run):
        return run
    config = (first_record(run) or {}).get("config") or {}
    folder = run / str(config.get("export") or "export")
    if folder.is_dir():
        return folder
    if "export" in config:  # a setting of phigrow pretrain
        raise GrowthError(
            "the run has no export to evaluate",
            where=str(folder),
            why="it has not finished, or was trained with export: none",
            fix="continue the run with the same phigrow pretrain command, with --export export",
        )
    raise GrowthError(
        "the run has no model to evaluate",
        where=str(run),
        why=f"the folder has records, but neither {CONFIG} with weights nor a folder {folder.name}",
        fix="give the folder of one of its checkpoints, or save the model and its tokenizer in the run's folder",
    )


def _with_different_names(chosen: Sequence[_Checkpoint]) -> list[_Checkpoint]:
    """Put the name of the parent folder before names that several checkpoints have.

    Raises:
        GrowthError: two checkpoints still have one name.
    """
    counts = Counter(each.name for each in chosen)
    named = [
        dataclasses.replace(each, name=f"{each.parent}-{each.name}") if counts[each.name] > 1 and each.parent else each
        for each in chosen
    ]
    seen: dict[str, Path] = {}
    for before, each in zip(chosen, named, strict=True):
        if each.name in seen:
            raise GrowthError(
                f"two checkpoints have the name {before.name!r}",
                where=f"{seen[each.name]}, {each.folder}",
                why="their results would have one place, and one column of the table",
                fix="rename one of the folders, or leave it out",
            )
        seen[each.name] = each.folder
    return named


def _check_results(each: _Checkpoint, folder: Path) -> None:
    """Refuse results of another checkpoint, with other weights and from another folder."""
    for path in sorted(folder.glob("*.json")):
        other = read_evaluation(path).checkpoint
        if all(other.get(key) != each.described[key] for key in ("fingerprint", "folder")):
            raise GrowthError(
                f"the results of another checkpoint have the name {each.name!r}",
                where=str(path),
                why=f"they are of {other.get('folder')}",
                fix="choose another --out, or delete them",
            )


def _known(each: _Checkpoint, folder: Path, task: str, settings: dict[str, Any]) -> Evaluation | None:
    """Return the result that an earlier call wrote, if all is the same that can change it.

    The checkpoint may have moved since: the result then gets its new name and folder.
    """
    path = evaluation_path(folder, task)
    if not path.is_file():
        return None
    known = read_evaluation(path)
    if any(known.checkpoint.get(key) != each.described[key] for key in ("fingerprint", "tokenizer")):
        return None
    if known.settings != settings or known.versions != _versions():
        return None
    if known.documents != fingerprint_of(documents_of(task)[: settings["limit"]]):
        return None
    moved = dataclasses.replace(known, checkpoint=known.checkpoint | each.described)
    if moved != known:
        with writing(folder):
            write_evaluation(folder, moved)
    return moved


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("phigrow", "torch", "transformers")}
