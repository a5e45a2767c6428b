"""Write the records of a run from any training loop."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.files.paths import user_path
from phigrow.models.cost import count_cost
from phigrow.records.readers.phigrow import first_record, has_records, last_record
from phigrow.records.writer import RecordWriter
from phigrow.training.configuration import RunConfig
from phigrow.training.training_cost import source_of

PACKAGES = ("phigrow", "torch", "transformers", "accelerate", "trl")


class RunRecorder:
    """Write ``records.jsonl`` of one run: settings once, then training steps and evaluations.

    Only one process of a run may have a recorder. Costs count up from the first step of the run.

    Args:
        folder: of the records. It is made if it is missing.
        arm: name of the arm, as in ``phigrow report``.
        init: ``scratch``, or the folder from which the weights were loaded. The folder of ``phigrow expand`` gives the
            growth and the cost of its source.
        model: a transformers model. Parameters and FLOPs per token are counted from its configuration; for families
            that phigrow does not know, FLOPs are left out.
        seed: of the run. Arms are compared seed by seed.
        settings: further settings for the ``run`` record, such as ``steps``, ``lr`` and ``schedule``.
        seq_len: tokens of a sequence; by default the context of the model.
        world_size: number of ranks.
        resume_step: number of updates that the run had made where it goes on; None for a fresh start.
        overwrite: replace the records of an earlier run.

    Raises:
        GrowthError: the folder has the records of another run, or ``init`` is not ``scratch`` or a folder.

    >>> recorder = RunRecorder("runs/mine", "mine", "grown", model, settings={"steps": 1000})  # doctest: +SKIP
    """

    def __init__(
        self,
        folder: str | Path,
        arm: str,
        init: str | Path,
        model: Any,
        *,
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
        seq_len: int | None = None,
        world_size: int = 1,
        resume_step: int | None = None,
        overwrite: bool = False,
    ) -> None:
        self.folder = user_path(folder)
        if resume_step is None and not overwrite and has_records(self.folder):
            raise GrowthError(
                "the folder has the records of a run",
                where=str(self.folder),
                why="a new run would replace them",
                fix="choose another folder, resume the run, or set overwrite=True",
            )
        run = run_record(arm, init, model, seed=seed, settings=settings, seq_len=seq_len, world_size=world_size)
        self.flops_per_token: float | None = run.get("flops_per_token")
        self._last_eval = -1
        self.seconds = 0.0
        if resume_step is not None:
            self._last_eval = int((last_record(self.folder, "eval", at_most=resume_step) or {"step": -1})["step"])
            self.seconds = float((last_record(self.folder, "step", at_most=resume_step) or {}).get("seconds", 0.0))
        is_new = resume_step is None or first_record(self.folder) is None
        self._writer = RecordWriter(self.folder, resume_step=resume_step, run=run if is_new else None)
        if not is_new:
            self._writer.write("resume", step=resume_step, device=run["device"], world_size=world_size)

    def step(self, step: int, tokens: float, loss: float, *, seconds: float | None = None, **more: float) -> None:
        """Record the training loss after an update.

        Args:
            step: number of updates so far, from 1.
            tokens: read so far.
            loss: in nats per token.
            seconds: of training so far, without evaluations; None leaves them out, in all records or in none.
            more: ``lr`` and ``grad_norm``.
        """
        self._writer.write("step", step=step, **self._costs(tokens, seconds), loss=loss, **more)

    def evaluation(
        self,
        step: int,
        tokens: float,
        loss: float,
        *,
        seconds: float | None = None,
        sources: Mapping[str, float] | None = None,
    ) -> None:
        """Record a held-out loss, the mean over ``sources`` if there are several. A second one of a step is left out.

        Args: as `step`; step 0 is the model before its first update.
        """
        if step <= self._last_eval:
            return
        self._last_eval = step
        more = {"sources": dict(sources)} if sources else {}
        self._writer.write("eval", step=step, **self._costs(tokens, seconds), loss=loss, **more)

    def close(self) -> None:
        """Write all records to disk and close the file."""
        self._writer.close()

    def _costs(self, tokens: float, seconds: float | None) -> dict[str, float]:
        costs = {"tokens": tokens}
        if self.flops_per_token is not None:
            costs["flops"] = tokens * self.flops_per_token
        return costs if seconds is None else {**costs, "seconds": round(seconds, 4)}


def run_record(
    arm: str,
    init: str | Path,
    model: Any,
    *,
    seed: int,
    settings: Mapping[str, Any] | None,
    seq_len: int | None,
    world_size: int,
) -> dict[str, Any]:
    """Return the ``run`` record of a run in another training loop. Arguments as for `RunRecorder`."""
    start = str(init) if init == "scratch" else str(user_path(init))
    if start != "scratch" and not user_path(init).is_dir():
        raise GrowthError(
            f"init is {start!r}, which is no folder",
            where="init",
            why="its files tell whether the weights were grown, and what their source cost",
            fix="give the folder from which the model was loaded, or 'scratch' for random weights",
        )
    source = source_of(RunConfig(init=start, arm=arm))
    tokens, flops, seconds = source.cost.values()
    record: dict[str, Any] = {"arm": arm, "seed": seed}
    record["config"] = {**(settings or {}), "arm": arm, "seed": seed, "init": start}
    record |= _size(model, seq_len)
    record |= {"growth": source.growth, "source_tokens": tokens, "source_flops": flops, "source_seconds": seconds}
    record["expand_seconds"] = source.expand_seconds
    if source.expand_tokens:
        record |= {"expand_tokens": source.expand_tokens, "expand_flops": source.expand_flops}
    versions = {name: found for name in PACKAGES if (found := _version(name))} | {"python": platform.python_version()}
    return record | {"world_size": world_size, "device": _device(model), "versions": versions}


def _size(model: Any, seq_len: int | None) -> dict[str, Any]:
    config = model.config.to_dict()
    length = {} if seq_len is None else {"seq_len": seq_len}
    try:
        cost = count_cost(config, seq_len)
    except GrowthError:  # a family that phigrow does not know: its parameters can be counted, and its FLOPs cannot
        return {"model": {"model_type": config.get("model_type")}, "parameters": model.num_parameters(), **length}
    sizes = {"parameters": cost.parameters, "non_embedding_parameters": cost.non_embedding_parameters}
    kept = {key: value for key, value in config.items() if value is not None}
    return {"model": kept, **sizes, "flops_per_token": cost.training_flops, **length}


def _device(model: Any) -> str:
    import torch

    device = next(model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
