"""Actions between the steps of a run: evaluate, diagnose, save, and export at the end."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.checkpoints.provenance import TrainingCost
from phigrow.corpus.blocks import DataSource
from phigrow.training import checkpoints
from phigrow.training.configuration import RunConfig
from phigrow.training.trainer import Trainer
from phigrow.training.training_cost import InitSource

if TYPE_CHECKING:
    from phigrow.training.evaluation import HeldOutLoss


class Evaluate:
    """Compute the held-out loss and record it."""

    needs_progress, before_first_step, when_stopped = True, True, False

    def __init__(self, config: RunConfig, blocks: DataSource) -> None:
        from phigrow.training.evaluation import held_out

        self.every, self.steps, self.extra = config.eval_every, config.steps, set(config.eval_at or ())
        self.blocks, self.held_out = blocks, held_out(blocks, config.eval_blocks)

    def is_due(self, step: int) -> bool:
        """See `Callback`."""
        return step == self.steps or step in self.extra or bool(self.every and step % self.every == 0)

    def __call__(self, trainer: Trainer, step: int) -> None:
        """See `Callback`."""
        losses = self.losses(trainer, by_group=step == self.steps)
        if losses is None:
            return
        trainer.heldout_loss = loss = losses.mean
        trainer.reporter.say(f"step {trainer.progress.step}/{self.steps}  held-out loss {loss:.4f}")
        if trainer.records:
            columns = self._by_source(trainer, losses.by_source)
            if losses.by_group is not None:
                columns |= {"group_losses": [round(group, 6) for group in losses.by_group]}
                columns |= {"group_blocks": losses.group_blocks}
            trainer.records.write("eval", **trainer.spent(), loss=loss, **columns)
            trainer.monitors.eval(trainer.progress.tokens, loss, columns.get("sources", {}))

    def losses(self, trainer: Trainer, *, by_group: bool = False) -> HeldOutLoss | None:
        """Return the held-out loss; None if there are no held-out blocks."""
        from phigrow.training.evaluation import heldout_loss

        if not len(self.held_out.rows):
            return None
        run = trainer.run
        return heldout_loss(
            trainer.engine,
            self.blocks.heldout,
            self.held_out,
            run.micro_batch,
            run.world,
            by_group=by_group,
            same_shape=run.world.device.type != "cpu",  # on a CPU a short batch costs less
        )

    def _by_source(self, trainer: Trainer, losses: dict[str, float]) -> dict[str, Any]:
        """Return the held-out loss and the training tokens of each source; empty if there is only one source."""
        feed, step = trainer.feed, trainer.progress.step
        if len(feed.sources) < 2:
            return {}
        read = zip(feed.sources, feed.blocks_read(step), strict=True)
        tokens = {name: blocks * self.blocks.seq_len for name, blocks in read}
        columns: dict[str, Any] = {"sources": losses, "tokens_by_source": tokens}
        if self.blocks.mixture and (epochs := feed.epochs(step)):
            columns["epochs_by_source"] = epochs
        return columns


class Diagnose:
    """Measure the symmetry of a grown model and record it."""

    needs_progress, when_stopped = False, False

    def __init__(self, config: RunConfig, evaluate: Evaluate) -> None:
        self.every, self.steps = config.diagnostics_every, config.steps
        self.before_first_step = bool(self.every)
        self.evaluate = evaluate

    def is_due(self, step: int) -> bool:
        """See `Callback`."""
        return bool(self.every) and (step == self.steps or step % self.every == 0)

    def __call__(self, trainer: Trainer, step: int) -> None:
        """See `Callback`."""
        from phigrow.training.diagnostics import Diagnostics

        run, held_out = trainer.run, self.evaluate.held_out
        diagnostics = Diagnostics(run.config, run.world)
        columns = diagnostics.measure(trainer.engine, self.evaluate.blocks.heldout, held_out.rows, run.micro_batch)
        if trainer.records:
            trainer.records.write("diagnostics", step=step, **columns)


class Save:
    """Save a checkpoint."""

    needs_progress, before_first_step = True, False

    def __init__(self, config: RunConfig, saved_step: int | None) -> None:
        self.every, self.steps, self.keep = config.save_every, config.steps, config.keep
        self.extra = set(config.save_at or ())
        self.when_stopped = bool(self.every)
        self.saved_step = saved_step

    def is_due(self, step: int) -> bool:
        """See `Callback`."""
        return step in self.extra or bool(self.every and (step == self.steps or step % self.every == 0))

    def __call__(self, trainer: Trainer, step: int) -> None:
        """See `Callback`."""
        run = trainer.run
        trainer.progress = dataclasses.replace(trainer.progress, data=trainer.position)
        checkpoints.save(
            trainer.engine,
            run.out,
            trainer.progress,
            run.world,
            keep=self.keep,
            stage=run.stage,
            device=run.optimizer_device,
            optimizer=run.optimizer,
            stay=self.extra,
        )
        self.saved_step = step


def export(trainer: Trainer, source: InitSource, blocks: DataSource) -> Path | None:
    """Write the trained model as a Hugging Face folder, and return the folder; None if ``export`` is none."""
    from phigrow.training.export import export_model

    run, config, progress, companions = trainer.run, trainer.run.config, trainer.progress, trainer.export_files
    if run.export is None:
        return None
    assert companions is not None, "the files beside the weights are decided where the run is built"
    own = TrainingCost(progress.tokens, trainer.spent()["flops"], round(progress.seconds, 3))
    tokens, flops, seconds = own.plus(source.before).values()
    training = {
        "tokens": tokens,
        "flops": flops,
        "seconds": seconds,
        "arm": source.arm,
        "seed": config.seed,
        "steps": progress.step,
        "loss": trainer.loss,
        "heldout_loss": trainer.heldout_loss,
        "data_fingerprint": blocks.fingerprint,
    }
    dtype = config.stored_dtype
    export_model(trainer.engine, run.export, dtype, run.world, companions=companions, training=training)
    trainer.reporter.say(f"exported to {run.export} ({dtype})")
    return run.export
