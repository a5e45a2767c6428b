"""Train one model: resolve the settings, build the run, take its steps and export the result."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phigrow.checkpoints.run_checkpoints import Progress, RunCheckpoint
from phigrow.corpus.blocks import DataSource
from phigrow.corpus.feed import Feed
from phigrow.errors import GrowthError
from phigrow.models.config import Config
from phigrow.models.cost import count_cost
from phigrow.records.readers.phigrow import first_record, last_source_tokens, step_losses
from phigrow.records.schema import FILE as RECORDS
from phigrow.records.writer import RecordWriter
from phigrow.training import checkpoints, initial_state
from phigrow.training.automatic import choose
from phigrow.training.branches import branch, starts_branch
from phigrow.training.callbacks import Diagnose, Evaluate, Save, export
from phigrow.training.configuration import RunConfig
from phigrow.training.data import check_data, check_tokenizer, data_keys, load_data, make_feed, restricted
from phigrow.training.device_check import check_device
from phigrow.training.export_files import export_files
from phigrow.training.export_place import check_export, check_other_export, is_exported
from phigrow.training.gpu_setup import gpu_of
from phigrow.training.initial_state import InitialState
from phigrow.training.inputs import CONTENTS, check_present, contents_of, keep_inputs, recorded_source, with_kept_inputs
from phigrow.training.lost_ranks import LostRank, RankWatch, keep_traces, lost_rank_named
from phigrow.training.monitors import Monitors, monitor_sections
from phigrow.training.offload import optimizer_device
from phigrow.training.per_value_lr import copied_values, has_per_value_lr, make_per_value_lr
from phigrow.training.prefetch import repeated
from phigrow.training.process import (
    World,
    deterministic_kernels,
    environment_kept,
    forget_stop,
    gather_objects,
    on_rank_zero,
    start,
)
from phigrow.training.resolved import ResolvedRun, resolve_run
from phigrow.training.run_info import device_name, opening, run_record
from phigrow.training.run_lock import run_lock
from phigrow.training.schedule import rejoin
from phigrow.training.settings import SCRATCH
from phigrow.training.teacher import load_teacher, teacher_of
from phigrow.training.trainer import Trainer
from phigrow.training.training_cost import InitSource, run_folder, source_of

STOP_FILE = "stop"


@dataclass(frozen=True)
class Summary:
    """Result of a run. Losses are in nats per token; ``export`` is None if no export was written."""

    out: Path
    step: int
    finished: bool
    loss: float | None = None
    heldout_loss: float | None = None
    export: Path | None = None


@environment_kept()
def train(config: RunConfig, blocks: DataSource | None = None) -> Summary:
    """Train one model; call it on every rank (a single process is one rank).

    Args:
        config: the run.
        blocks: packed blocks, as `phigrow.corpus.load_blocks` returns them; None loads ``config.data`` or
            ``config.stream``.

    Raises:
        GrowthError: the configuration, the data and the checkpoint do not fit together, or the run folder holds another
            run. Every rank raises it.
    """
    config.stage  # noqa: B018  # report an unreadable DeepSpeed file before anything is loaded
    if blocks is None:
        check_data(config)
    out = run_folder(config)
    asked = config
    config, missing = with_kept_inputs(asked, out)
    source = source_of(config)
    forget_stop(out / STOP_FILE)
    monitors = monitor_sections(config, out)
    if has_per_value_lr(config):
        copied_values(config)
    optimizer_device(config)
    keep_traces(out)
    world = start(config.threads)
    with lost_rank_named(world, lambda: checkpoints.how_to_continue(out)):
        return _train_on(world, config, asked, blocks, out, source, monitors, missing)


def _train_on(
    world: World,
    config: RunConfig,
    asked: RunConfig,
    blocks: DataSource | None,
    out: Path,
    source: InitSource,
    monitors: dict[str, dict[str, Any]],
    missing: dict[str, Path],
) -> Summary:
    """Check the devices and the data, resolve what is ``auto``, and train in the run's folder."""
    gpus = gather_objects(world, gpu_of(world.device))
    on_rank_zero(world, lambda: check_device(config, world, gpus))
    on_rank_zero(world, lambda: check_export(out, config.export))
    if blocks is None:
        blocks = load_data(config, out, world)
    blocks = restricted(config, blocks)
    config = choose(config, world, out, lambda: _model_of(config, blocks), blocks.seq_len)
    initial = initial_state.initial_state_of(config, blocks)
    source = initial_state.with_state(source, initial)
    if missing:  # the former cost of the start and of the teacher, whose weights cannot be compared any more
        source = recorded_source(out) or source
    contents = on_rank_zero(world, lambda: contents_of(asked, blocks))
    keys = config.reproducibility_keys() | asked.inputs() | data_keys(blocks) | {CONTENTS: contents}
    on_rank_zero(world, lambda: branch(config, keys, out))
    with contextlib.ExitStack() as held:
        on_rank_zero(world, lambda: _hold(held, out))
        held.enter_context(deterministic_kernels(config.deterministic))
        try:
            return _train_in(out, config, world, blocks, initial, source, keys, monitors, missing)
        finally:
            gc.collect()  # an engine and its parameters refer to each other


def _hold(held: contextlib.ExitStack, out: Path) -> None:
    held.enter_context(run_lock(out))


def _train_in(
    out: Path,
    config: RunConfig,
    world: World,
    blocks: DataSource,
    initial: InitialState,
    source: InitSource,
    keys: dict[str, Any],
    monitors: dict[str, dict[str, Any]],
    missing: dict[str, Path],
) -> Summary:
    """Start or resume a run in a folder that this launch holds."""
    checkpoint = checkpoints.resumable(out, keys, world, resume=config.resume == "auto")
    check_present(missing, config, checkpoint.progress.step if checkpoint else None)
    if missing and world.first:
        gone = ", ".join(map(str, missing.values()))
        print(f"the run continues from its checkpoint; these inputs no longer exist: {gone}", flush=True)
    on_rank_zero(world, lambda: keep_inputs(config, out))
    exported = None if config.export is None else out / config.export
    if checkpoint:
        check_length(checkpoint, None if config.is_trunk else config.steps, out)
    if checkpoint and checkpoint.progress.step == config.steps and is_exported(exported, config.stored_dtype):
        if world.first:
            print(f"{out} is complete, {config.steps} steps. To run it again, choose another --out.", flush=True)
        return Summary(out, config.steps, True, export=exported)
    if checkpoint is None and exported is not None:
        on_rank_zero(world, lambda: check_other_export(out, exported, config))
    run = resolve_run(config, world, out, blocks.seq_len, _model_of(config, blocks))
    if checkpoint is not None:
        checkpoints.check_fits(checkpoint, world, run.stage, convert=config.universal, device=run.optimizer_device)
    trainer = build_run(run, source, blocks, initial, checkpoint, monitors)
    trainer.watch = watch = RankWatch(world, str(out))
    with (
        engine_released(trainer.engine),
        lost_rank_named(world, lambda: checkpoints.how_to_continue(out), watch),
        watch,
        contextlib.closing(trainer),
    ):
        return _train(trainer, source, blocks)


@contextlib.contextmanager
def engine_released(engine: Any) -> Iterator[None]:
    """Release DeepSpeed's engine at the end of the block, so that a process can train again; a context.

    After an error its own errors are left out. After a lost rank the engine stays, because its work may never end.
    """
    from phigrow.training import zero

    try:
        yield
    except LostRank:
        raise
    except BaseException:
        with contextlib.suppress(Exception):
            zero.release(engine)
        raise
    zero.release(engine)


def check_length(checkpoint: RunCheckpoint, steps: int | None, out: Path) -> None:
    """Refuse a run that has trained for more steps than it is now asked for. A trunk may be longer than its ends need.

    Raises:
        GrowthError: its checkpoint is beyond ``steps``.
    """
    if steps is not None and checkpoint.progress.step > steps:
        raise GrowthError(
            f"the run has trained {checkpoint.progress.step} steps, and steps is {steps}",
            where=str(out),
            why="a run cannot go back",
            fix=f"give steps: {checkpoint.progress.step} or more, or choose another --out",
        )


def build_run(
    run: ResolvedRun,
    source: InitSource,
    blocks: DataSource,
    initial: InitialState,
    checkpoint: RunCheckpoint | None,
    monitors: dict[str, dict[str, Any]],
) -> Trainer:
    """Build the model and the engine of a run on this rank, fill them, and open its records.

    Args:
        run: the settings as they take effect.
        source: the arm, and the cost of earlier training.
        blocks: the data.
        initial: the optimizer's state and the position in the data at the start.
        checkpoint: the checkpoint from which the run resumes; None for a run that starts.
        monitors: DeepSpeed's sections of the monitors.
    """
    from phigrow.training.engine import make_engine
    from phigrow.training.model import build_model, has_dropout, initializer_range
    from phigrow.training.weights import masters_from_checkpoint, masters_from_scratch

    config, world, out = run.config, run.world, run.out
    feed = make_feed(config, blocks, initial.first)
    model_dict = _model_of(config, blocks)
    if config.init != SCRATCH:
        check_tokenizer(Path(config.init), blocks)
    taught_by = teacher_of(config, model_dict, blocks)

    def tell_opening() -> None:
        blocks.save_tokenizer()
        text = opening(run, source, model_dict, blocks, feed, initial, taught_by)
        print("\n".join([text, *repeated(feed.epochs(config.steps))]), flush=True)

    on_rank_zero(world, tell_opening)
    exporting = run.export is not None
    beside = on_rank_zero(world, lambda: export_files(config, model_dict, blocks) if exporting else None)
    model = build_model(
        config, model_dict, world, run.attention.name, run.engine, blocks.eos_token_id, resumes=checkpoint is not None
    )
    engine = make_engine(model, config, run.engine)
    if checkpoint is None and config.init != SCRATCH:
        masters_from_checkpoint(engine, Path(config.init))
        if initial.optimizer is not None:
            initial_state.load(engine, initial.optimizer, world, run.optimizer)
    elif checkpoint is None and run.optimizer_device != "nvme":
        # With state on a disk DeepSpeed would move a gigabyte or more for every parameter.
        masters_from_scratch(engine, config.seed, initializer_range(model_dict))
    progress = Progress(data=initial.position, blocks=initial.first * config.batch)
    if checkpoint:
        progress = checkpoints.load(engine, checkpoint, run)
        rejoin(engine.lr_scheduler)
    per_value_lr = make_per_value_lr(engine, config)
    teacher = None
    if taught_by is not None and progress.step < taught_by.steps:
        teacher = load_teacher(taught_by, run, blocks.eos_token_id)
    records: RecordWriter | None = None  # of rank 0; it cannot be sent to others
    losses: list[float] = []

    def open_records() -> None:
        nonlocal records, losses
        trunk = starts_branch(config, out) if checkpoint else None
        kept = progress.step if trunk is None else min(progress.step, config.steps - config.decay_steps)
        lost = checkpoint is not None and (kept < progress.step or (trunk is None and first_record(out) is None))
        if lost:
            first = 1 if trunk is None else kept + 1
            print(
                f"warning: {out / RECORDS} has no run record, so the records of steps {first} to {progress.step} are "
                "lost. A report shows this run from there on.",
                file=sys.stderr,
                flush=True,
            )
        begins = checkpoint is None or trunk is not None or lost
        record = run_record(run, source, model_dict, blocks, feed, taught_by) if begins else None
        records = RecordWriter(out, resume_step=kept if checkpoint else None, trunk=trunk, run=record)
        if checkpoint:
            losses = step_losses(out)
            _resume_count(feed, out, blocks.seq_len)
        if checkpoint and (lost or not trunk):
            was = {"world_size": checkpoint.world_size, "zero": checkpoint.stage}
            records.write(
                "resume", step=progress.step, device=device_name(world), world_size=world.size, zero=run.stage, was=was
            )

    on_rank_zero(world, open_records)
    return Trainer(
        run,
        engine,
        feed,
        progress=progress,
        first_step_of_data=initial.first,
        flops_per_token=count_cost(model_dict, blocks.seq_len).training_flops,
        has_dropout=has_dropout(model_dict),
        per_value_lr=per_value_lr,
        teacher=teacher,
        teacher_info=taught_by,
        records=records,
        monitors=Monitors(monitors if world.first else {}, out, tokens=progress.tokens),
        losses=losses,
        export_files=beside,
    )


def _resume_count(feed: Feed, out: Path, seq_len: int) -> None:
    """Give the feed the counts of the last evaluation, because counting the blocks of most of a run takes minutes."""
    if (counted := last_source_tokens(out)) is not None and list(counted[1]) == feed.sources:
        feed.resume_count(counted[0], [tokens // seq_len for tokens in counted[1].values()])


def _model_of(config: RunConfig, blocks: DataSource) -> Config:
    """Return the configuration of the model that a run trains."""
    from phigrow.training.model import model_config

    return model_config(config, data_vocab=blocks.vocab_size, seq_len=blocks.seq_len, eos_token_id=blocks.eos_token_id)


def _train(trainer: Trainer, source: InitSource, blocks: DataSource) -> Summary:
    """Take the steps of a run, with evaluations, diagnostics and checkpoints between them, and export its model."""
    run, config = trainer.run, trainer.run.config
    evaluate = Evaluate(config, blocks)
    save = Save(config, trainer.progress.step or None)
    finished = trainer.take_steps(
        [evaluate, Diagnose(config, evaluate), save], run.out / STOP_FILE if run.world.first else None
    )
    if not finished:
        step = trainer.progress.step
        kept = f"the checkpoint of step {save.saved_step}" if save.saved_step else "nothing, because save_every is 0"
        trainer.reporter.say(f"stopped at step {step}, as asked; the same command resumes from {kept}")
        return Summary(run.out, step, False, trainer.loss, trainer.heldout_loss)
    if trainer.heldout_loss is None:  # the run resumed from its last step, to write the export
        losses = evaluate.losses(trainer)
        trainer.heldout_loss = losses.mean if losses else None
    folder = export(trainer, source, blocks)
    return Summary(run.out, trainer.progress.step, True, trainer.loss, trainer.heldout_loss, folder)
