"""The training loop: data order, steps, evaluations, records, checkpoints, export."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.checkpoints.provenance import TrainingCost
from phigrow.checkpoints.run_checkpoints import Found, Progress
from phigrow.models.cost import count_cost
from phigrow.records.readers.phigrow import step_losses
from phigrow.records.writer import RecordWriter
from phigrow.training import checkpoints, initial_state
from phigrow.training.anomalies import NonFinite, Spikes
from phigrow.training.branches import branch, starts_branch
from phigrow.training.configuration import RunConfig
from phigrow.training.data import check_tokenizer, data_curve, keep_tokenizer, load_data, make_feed
from phigrow.training.feed import Prefetcher, repeated
from phigrow.training.monitors import Monitors, monitor_sections
from phigrow.training.offload import optimizer_place
from phigrow.training.optimizer_spec import find_optimizer
from phigrow.training.per_value_lr import copied_values, is_paced, make_pace
from phigrow.training.process import StopRequest, World, forget_stop, lost_rank_named, on_rank_zero, start
from phigrow.training.progress import Reporter
from phigrow.training.run_info import opening, run_record
from phigrow.training.schedule import rejoin
from phigrow.training.settings import SCRATCH
from phigrow.training.training_cost import Source, run_folder, source_of

if TYPE_CHECKING:
    from phigrow.training.step import Reading, Stepper

STOP_FILE = "stop"


@dataclass(frozen=True)
class Summary:
    """How a run ended. Losses are in nats a token; ``export`` is None where none was written."""

    out: Path
    step: int
    finished: bool
    loss: float | None = None
    heldout_loss: float | None = None
    export: Path | None = None


def train(config: RunConfig, blocks: Any = None) -> Summary:
    """Train one model; call it on every rank (a single process is one rank).

    Args:
        config: the run.
        blocks: packed blocks, as `phigrow.corpus.load_blocks` returns them; None loads ``config.data``, or prepares
            the embedded corpus beside the run folder.

    Raises:
        GrowthError: on every rank: the configuration, the data and the checkpoint do not fit together, or the run
            folder holds another run.
    """
    config.stage  # noqa: B018  # an unreadable DeepSpeed file is reported before anything is loaded
    source = source_of(config)
    out = run_folder(config, source)
    forget_stop(out / STOP_FILE)
    monitors = monitor_sections(config, out)
    if is_paced(config):
        copied_values(config)
    place = optimizer_place(config)
    world = start(config.threads)
    if blocks is None:
        blocks = load_data(config, out, world)
    begins = initial_state.start_of(config, blocks)
    source = initial_state.with_state(source, begins)
    curve = config.reproducibility_keys() | data_curve(blocks)
    on_rank_zero(world, lambda: branch(config, curve, out))
    found = checkpoints.resumable(out, curve, world, resume=config.resume == "auto")
    export = None if config.export is None else out / config.export
    if found is not None and found.progress.step == config.steps and (export is None or export.is_dir()):
        if world.first:
            print(f"{out} is complete, {config.steps} steps. To run it again, choose another --out.", flush=True)
        return Summary(out, config.steps, True, export=export)
    if found is not None:
        checkpoints.check_fits(found, world, config.stage, convert=config.universal, place=place)
    run = _Run(config, source, out, world, blocks, found, monitors, begins)
    with lost_rank_named(world, lambda: checkpoints.how_to_continue(out)):
        return run.train()


class _Run:
    """One run on one rank."""

    def __init__(
        self,
        config: RunConfig,
        source: Source,
        out: Path,
        world: World,
        blocks: Any,
        found: Found | None,
        monitors: dict[str, dict[str, Any]],
        begins: initial_state.Start,
    ) -> None:
        from phigrow.training.engine import engine_config, make_engine, micro_batch
        from phigrow.training.evaluation import held_out
        from phigrow.training.model import build_model, choose_attention, has_dropout, initializer_range, model_config
        from phigrow.training.weights import masters_from_checkpoint, masters_from_scratch

        self.config, self.source, self.out, self.world, self.blocks = config, source, out, world, blocks
        self.feed, self.begins = make_feed(config, blocks, begins.first), begins
        self.model_dict = model_config(
            config, data_vocab=blocks.vocab_size, seq_len=blocks.seq_len, eos_token_id=blocks.eos_token_id
        )
        if config.init != SCRATCH:
            check_tokenizer(Path(config.init), blocks)
        self.micro = micro_batch(config, world.size, blocks.seq_len)
        engine_dict = engine_config(config, world.size, self.micro)
        attention, said = choose_attention(config, world.device)
        if world.first:
            keep_tokenizer(blocks)
            feed, micro = self.feed, self.micro
            text = opening(config, self.model_dict, world, blocks, feed, micro, engine_dict, said, out, source, begins)
            print("\n".join([text, *repeated(feed.epochs(config.steps))]), flush=True)
        model = build_model(config, self.model_dict, world, attention, engine_dict, blocks.eos_token_id)
        self.dropout = has_dropout(self.model_dict)
        self.engine = make_engine(model, config, engine_dict)
        self.place = optimizer_place(config)
        self.optimizer = find_optimizer(config.optimizer)
        if found is None and config.init != SCRATCH:
            masters_from_checkpoint(self.engine, Path(config.init))
            if begins.optimizer is not None:
                initial_state.load(self.engine, begins.optimizer, world, self.optimizer)
        elif found is None and self.place != "nvme":  # there DeepSpeed moves a gigabyte or more for every parameter
            masters_from_scratch(self.engine, config.seed, initializer_range(self.model_dict))
        self.at = Progress(data=begins.position, blocks=begins.first * config.batch)
        if found:
            self.at = checkpoints.load(
                self.engine, found, world, stage=config.stage, place=self.place, optimizer=self.optimizer
            )
            rejoin(self.engine.lr_scheduler)
        self.pace = make_pace(self.engine, config)
        self.flops_per_token = count_cost(self.model_dict, blocks.seq_len).training_flops
        self.step_tokens = config.batch * blocks.seq_len
        self.heldout = held_out(blocks, config.eval_blocks)
        self.loss: float | None = None
        self.heldout_loss: float | None = None
        self.heldout_by_source: dict[str, float] = {}
        self.records: RecordWriter | None = None
        self.monitors = Monitors(monitors if world.first else {}, out, tokens=self.at.tokens)
        self.nonfinite = NonFinite(config.nonfinite_limit, config.dtype)
        self.spikes = Spikes()
        self._stop_file = out / STOP_FILE if world.first else None
        if world.first:
            trunk = starts_branch(config, out) if found else None
            run = run_record(config, source, self.model_dict, world, blocks, self.feed) if trunk or not found else None
            self.records = RecordWriter(out, resume_step=self.at.step if found else None, trunk=trunk, run=run)
            if found:
                self.spikes = Spikes(step_losses(out))
            if found and not trunk:
                now = {"world_size": world.size, "zero": config.stage}
                self.records.write(
                    "resume", step=self.at.step, **now, was={"world_size": found.world_size, "zero": found.stage}
                )

    def train(self) -> Summary:
        reporter = self._reporter()
        try:
            return self._train(reporter)
        finally:
            reporter.close()
            self.monitors.close()
            if self.records:
                self.records.close()

    def _train(self, reporter: Reporter) -> Summary:
        from phigrow.training.step import Stepper

        config = self.config
        eval_at, save_at = set(config.eval_at or ()), set(config.save_at or ())
        saved_at = self.at.step if self.at.step else None
        if self.at.step:
            reporter.say(f"resuming at step {self.at.step}")
        else:
            self._evaluate(reporter)
            self._diagnose(0)
        stopped, done = False, self.at.step
        world = self.world
        # First the requests to stop: one may come while the first batch is read, and then must not kill the rank.
        with (
            StopRequest(self._stop_file) as stop,
            contextlib.closing(
                Prefetcher(self.feed, done, config.steps, world.rank, world.size, self.at.data)
            ) as ahead,
        ):
            stepper = Stepper(
                self.engine,
                config,
                self.world,
                self.feed,
                ahead,
                self.micro,
                dropout=self.dropout,
                stop=stop,
                pace=self.pace,
            )
            while done < config.steps and not stopped:
                stepper(done)
                done += 1
                last = done == config.steps
                evaluates = last or done in eval_at or (config.eval_every and done % config.eval_every == 0)
                saves = done in save_at or (config.save_every and (last or done % config.save_every == 0))
                if evaluates or saves or stepper.due(done):
                    stopped = self._account_for(stepper, reporter)
                if evaluates:
                    self._evaluate(reporter)
                if config.diagnostics_every and (last or done % config.diagnostics_every == 0):
                    self._diagnose(done)
                if saves or (stopped and config.save_every):
                    self.at = dataclasses.replace(self.at, data=stepper.position)
                    checkpoints.save(
                        self.engine,
                        self.out,
                        self.at,
                        self.world,
                        keep=config.keep,
                        stage=config.stage,
                        place=self.place,
                        optimizer=self.optimizer,
                        stay=save_at,
                    )
                    saved_at = done
        if stopped and self.at.step < config.steps:
            kept = f"the checkpoint of step {saved_at}" if saved_at else "nothing, because save_every is 0"
            reporter.say(f"stopped at step {self.at.step}, as asked; the same command resumes from {kept}")
            return Summary(self.out, self.at.step, False, self.loss, self.heldout_loss)
        if self.heldout_loss is None:  # resumed from the last step, to write the export
            self.heldout_loss = self._heldout_loss()
        folder = self._export(reporter)
        return Summary(self.out, self.at.step, True, self.loss, self.heldout_loss, folder)

    def _reporter(self) -> Reporter:
        config = self.config
        return Reporter(speaks=self.world.first, steps=config.steps, done=self.at.step, every=config.log_every)

    def _account_for(self, stepper: Stepper, reporter: Reporter) -> bool:
        """Count, record and report the steps since the last reading; returns whether any rank was asked to stop."""
        readings = stepper.read()
        for reading in readings:
            tokens, seconds = self.at.tokens + self.step_tokens, self.at.seconds + reading.seconds
            blocks = (self.begins.first + reading.step) * self.config.batch
            self.at = Progress(reading.step, tokens, seconds, blocks=blocks)
            self.loss = reading.loss
            speed = self.step_tokens / reading.seconds
            flags = self._flags(reading, reporter)
            if self.records:
                values = {"loss": reading.loss, "lr": reading.lr, "grad_norm": reading.grad_norm}
                rates = {"tokens_per_second": round(speed, 1), "data_wait": round(reading.waited / reading.seconds, 4)}
                self.records.write("step", **self._account(), **values, **rates, **flags)
                self.monitors.step(self.at.tokens, values | rates)
            left = (self.config.steps - reading.step) * self.at.seconds / reading.step
            reporter.step(reading.step, reading.loss, reading.lr, speed, left)
            if reading.skipped:
                self.nonfinite.check(reading, self.feed.rows(reading.step - 1).tolist())
        return any(reading.asked_to_stop for reading in readings)

    def _flags(self, reading: Reading, reporter: Reporter) -> dict[str, Any]:
        """What was unusual in a step, for its record, said at once."""
        if self.nonfinite.is_overflow(reading):
            return {"overflow": True}
        if reading.skipped:
            blocks = list(reading.broken) or self.feed.rows(reading.step - 1).tolist()
            what = "loss" if reading.broken else "gradient"
            reporter.say(f"step {reading.step}: a {what} is not finite; no update (blocks in the records)")
            return {"skipped": True, "blocks": blocks}
        if self.spikes.is_spike(reading.loss):
            reporter.say(f"step {reading.step}: the loss jumped to {reading.loss:.4f}")
            return {"spike": True}
        return {}

    def _account(self) -> dict[str, Any]:
        at = self.at
        flops = at.tokens * self.flops_per_token
        return {"step": at.step, "tokens": at.tokens, "flops": flops, "seconds": round(at.seconds, 4)}

    def _heldout_loss(self) -> float | None:
        from phigrow.training.evaluation import heldout_loss

        if not len(self.heldout.rows):
            return None
        loss, self.heldout_by_source = heldout_loss(
            self.engine, self.blocks.heldout, self.heldout, self.micro, self.world
        )
        return loss

    def _evaluate(self, reporter: Reporter) -> None:
        self.heldout_loss = self._heldout_loss()
        if self.heldout_loss is None:
            return
        reporter.say(f"step {self.at.step}/{self.config.steps}  held-out loss {self.heldout_loss:.4f}")
        if self.records:
            by_source = self._by_source()
            self.records.write("eval", **self._account(), loss=self.heldout_loss, **by_source)
            self.monitors.eval(self.at.tokens, self.heldout_loss, by_source.get("sources", {}))

    def _diagnose(self, step: int) -> None:
        if not self.config.diagnostics_every:
            return
        from phigrow.training.diagnostics import Diagnostics

        rows = self.heldout.rows
        found = Diagnostics(self.config, self.world).measure(self.engine, self.blocks.heldout, rows, self.micro)
        if self.records:
            self.records.write("diagnostics", step=step, **found)

    def _by_source(self) -> dict[str, Any]:
        """Where there are several sources: the held-out loss of each, and the train tokens read of each."""
        names, step = self.feed.sources, self.at.step
        if len(names) < 2:
            return {}
        read = self.feed.blocks_read(step)
        tokens = {name: n * self.blocks.seq_len for name, n in zip(names, read, strict=True)}
        found: dict[str, Any] = {"sources": self.heldout_by_source, "tokens_by_source": tokens}
        if self.blocks.mixture and (epochs := self.feed.epochs(step)):
            found["epochs_by_source"] = epochs
        return found

    def _export(self, reporter: Reporter) -> Path | None:
        from phigrow.training.export import export_model

        config = self.config
        if config.export is None:
            return None
        folder = self.out / config.export
        own = TrainingCost(self.at.tokens, self.at.tokens * self.flops_per_token, round(self.at.seconds, 3))
        tokens, flops, seconds = own.plus(self.source.before).values()
        training = {
            "tokens": tokens,
            "flops": flops,
            "seconds": seconds,
            "arm": self.source.arm,
            "seed": config.seed,
            "steps": self.at.step,
            "loss": self.loss,
            "heldout_loss": self.heldout_loss,
            "data_fingerprint": self.blocks.fingerprint,
        }
        dtype = config.export_dtype or config.dtype
        tokenizer = self.blocks.tokenizer_dir
        export_model(
            self.engine,
            folder,
            dtype,
            self.world,
            tokenizer_dir=Path(tokenizer) if tokenizer else None,
            training=training,
        )
        reporter.say(f"exported to {folder} ({dtype})")
        return folder
