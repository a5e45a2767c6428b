"""A callback for Hugging Face's Trainer, and for TRL's trainers, that writes phigrow's records."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from phigrow.errors import GrowthError
from phigrow.integrations.run_recorder import RunRecorder

OF_ONE_SET = re.compile(r"eval_(?P<name>.+)_loss")
"""Metric of one of several held-out sets."""

SCHEDULES = {"constant_with_warmup": "constant"}
"""Schedules of transformers -> their names in records. All others keep their own name."""


class RecordsCallback(TrainerCallback):
    """Write ``records.jsonl`` while Trainer trains, for ``phigrow report``.

    A step is recorded whenever Trainer logs its loss (``logging_steps``), which is the mean since the last time. The
    last step is evaluated even if ``eval_steps`` does not reach it. Set ``eval_on_start=True``, so that the report
    knows the loss before the first update. With several held-out sets, the loss is the mean over them.

    Trainer must count tokens: set ``include_num_input_tokens_seen="all"``, or give ``tokens_per_step``.

    Args:
        arm: name of the arm.
        init: ``scratch``, or the folder from which the weights were loaded.
        folder: of the records; by default ``output_dir``.
        seq_len: tokens of a sequence, for FLOPs; by default the context of the model.
        tokens_per_step: tokens of an update, over all ranks and accumulated batches.
        overwrite: replace the records of an earlier run.

    >>> trainer = Trainer(..., callbacks=[RecordsCallback("mine", "grown")])  # doctest: +SKIP
    """

    def __init__(
        self,
        arm: str,
        init: str | Path,
        *,
        folder: str | Path | None = None,
        seq_len: int | None = None,
        tokens_per_step: float | None = None,
        overwrite: bool = False,
    ) -> None:
        self.arm, self.init, self.folder, self.seq_len = arm, init, folder, seq_len
        self.tokens_per_step, self.overwrite = tokens_per_step, overwrite
        self._recorder: RunRecorder | None = None
        self._losses: dict[str, float] = {}
        self._seconds, self._mark, self._seen = 0.0, 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Write the ``run`` record, or go on with the records of the run that is resumed."""
        if self.tokens_per_step is None and args.include_num_input_tokens_seen in ("no", False):
            raise GrowthError(
                "Trainer does not count tokens",
                where="include_num_input_tokens_seen",
                why="costs are counted in tokens",
                fix='set include_num_input_tokens_seen="all", or give RecordsCallback tokens_per_step',
            )
        if str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
            raise GrowthError(
                "Trainer does not evaluate",
                where="eval_strategy",
                why="arms are compared by their held-out loss",
                fix='set eval_strategy="steps", eval_steps and eval_dataset',
            )
        if not state.is_world_process_zero:
            return
        self._losses = {}  # of evaluations outside of training
        self._seen = int(state.num_input_tokens_seen)  # of the checkpoint from which a run resumes
        resumed = int(state.global_step) or None
        self._recorder = RunRecorder(
            args.output_dir if self.folder is None else self.folder,
            self.arm,
            self.init,
            model,
            seed=args.seed,
            settings=_settings(args, int(state.max_steps)),
            seq_len=self.seq_len,
            world_size=args.world_size,
            resume_step=resumed,
            overwrite=self.overwrite,
        )
        self._seconds, self._mark = self._recorder.seconds, time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record the evaluation before the first step."""
        self._flush(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count the seconds of a step, and evaluate after the last one."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
        if control.should_evaluate or control.should_save:
            _wait_for_device()  # its work belongs to the step, and not to the evaluation
        # transformers 4 counts the next step's first micro-batch before on_step_begin, version 5 after it.
        self._seen = int(state.num_input_tokens_seen)
        self._count()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Record a training loss. Metrics of an evaluation are logged too, and its seconds do not count."""
        if self._recorder is None or not logs or "loss" not in logs:
            return
        self._count()
        names = {"learning_rate": "lr", "grad_norm": "grad_norm"}
        more = {names[key]: float(value) for key, value in logs.items() if key in names}
        step = int(state.global_step)
        self._recorder.step(step, self._tokens(state), float(logs["loss"]), seconds=self._seconds, **more)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Keep the held-out losses of this step. Several sets are evaluated one after the other."""
        for key, value in (metrics or {}).items():
            if key == "eval_loss":
                self._losses[""] = float(value)
            elif match := OF_ONE_SET.fullmatch(key):
                self._losses[match["name"]] = float(value)
        self._mark = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the seconds of saving out."""
        self._flush(state)
        self._mark = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the records."""
        self._flush(state)
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    def _count(self) -> None:
        now = time.perf_counter()
        self._seconds, self._mark = self._seconds + now - self._mark, now

    def _flush(self, state: Any) -> None:
        losses, self._losses = self._losses, {}
        if self._recorder is None or not losses:
            return
        sources = {name: loss for name, loss in losses.items() if name}
        loss = losses[""] if "" in losses else sum(sources.values()) / len(sources)
        # A step begins before the number of steps goes up, so this is the step that was evaluated.
        step = int(state.global_step)
        self._recorder.evaluation(step, self._tokens(state), loss, seconds=self._seconds, sources=sources)

    def _tokens(self, state: Any) -> float:
        if self.tokens_per_step is not None:
            return self.tokens_per_step * int(state.global_step)
        return self._seen


def _settings(args: Any, steps: int) -> dict[str, Any]:
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "steps": steps,
        "batch": batch * max(1, args.n_gpu),
        "schedule": SCHEDULES.get(schedule, schedule),
        "lr": args.learning_rate,
        "warmup": args.get_warmup_steps(steps),
        "weight_decay": args.weight_decay,
        "beta1": args.adam_beta1,
        "beta2": args.adam_beta2,
        "eps": args.adam_epsilon,
        "grad_clip": args.max_grad_norm,
        "dtype": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
    }


def _wait_for_device() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
