"""Learn the matrices of a growth by a short training run under DeepSpeed, the small model frozen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.checkpoints.hub import display_name, locate
from phigrow.checkpoints.stored_model import StoredModel
from phigrow.corpus.blocks import DataSource
from phigrow.errors import GrowthError
from phigrow.expansion.expand import check_source
from phigrow.expansion.provenance import installed_version
from phigrow.files.output import check_replaceable, writing
from phigrow.files.paths import user_path
from phigrow.files.staged_folder import staged_folder
from phigrow.growth.matrices import FILE, write_maps
from phigrow.growth.plan import Plan
from phigrow.growth.planner import plan as make_plan
from phigrow.models.config import Config, context_of
from phigrow.models.cost import count_cost
from phigrow.training.configuration import RunConfig

if TYPE_CHECKING:
    from phigrow.training.process import World
    from phigrow.training.trainer import Trainer

HELDOUT_BLOCKS = 64


@dataclass(frozen=True)
class Learning:
    """Result of a learning run. Losses are of held-out blocks, nats per token, None where there are none."""

    folder: Path
    before: float | None
    after: float | None
    tokens: int
    flops: float
    seconds: float


def learn_growth(
    src: str | Path,
    dst_config: str | Path | Config,
    out: str | Path,
    *,
    data: str | None = None,
    method: str = "ligo",
    depth: str | None = None,
    steps: int = 100,
    batch: int = 16,
    micro_batch: int | None = None,
    lr: float = 2e-3,
    noise: float = 0.03,
    seed: int = 0,
    dtype: str | None = None,
    zero: int = 1,
    seq_len: int = 256,
    threads: int | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Learning:
    """Learn the matrices of a growth; call it on every rank (a single process is one rank).

    In memory are the small model, the matrices with AdamW's state, and the large model's weights with their gradients;
    the large model has no optimizer's state.

    Args:
        src, dst_config, method, depth, seed, revision, options: of the plan that learning starts from, as in
            `phigrow.plan`; ``seed`` is also that of data order and noise.
        out: new folder of the matrices (``growth-maps.safetensors``); there complete, or not at all.
        data: folder of packed blocks, or ``embedded`` for the embedded corpus in blocks of ``seq_len`` tokens.
        steps, batch, micro_batch: optimizer steps; sequences a step, over all ranks; sequences a rank holds at once.
        lr: peak rate of AdamW, which warms up over a tenth of the steps and then decays to a tenth (cosine).
        noise: size of the noise added to rows of matrices at the start, as a fraction of their length.
        dtype: ``fp32`` or ``bf16``, of the large model; matrices are fp32. By default bf16 on a GPU.
        zero: DeepSpeed's stage, 0 or 1.
        threads: CPU threads a rank.
        overwrite: replace an existing ``out``.

    Raises:
        GrowthError: the plan is refused, there is nothing to learn, the data does not fit, a loss is not finite, or the
            run was asked to stop. Every rank raises it.
    """
    plan = make_plan(src, dst_config, method, depth=depth, seed=seed, revision=revision, **options)
    _check(plan, zero, dtype)
    if data is None:
        raise GrowthError(
            "there is no text to learn the maps from",
            where="data",
            fix="give --data <folder written by 'phigrow data' with the source's tokenizer>",
        )
    out = user_path(out)
    config = RunConfig(
        data=data, seq_len=seq_len, steps=steps, batch=batch, micro_batch=micro_batch, lr=lr, seed=seed, zero=zero,
        warmup=min(steps // 10, steps - 1), weight_decay=0.0, dtype="fp32", threads=threads,
        log_every=max(1, steps // 10), attention="sdpa", eval_blocks=HELDOUT_BLOCKS, nonfinite_limit=0,
    )  # fmt: skip
    from phigrow.training.lost_ranks import lost_rank_named
    from phigrow.training.process import on_rank_zero, start

    world = start(threads)
    exists = on_rank_zero(world, out.exists)
    if exists and not overwrite:
        raise GrowthError("the output folder exists", where=str(out), fix="choose another --out, or --overwrite")
    on_rank_zero(world, lambda: check_replaceable(out, [FILE], "a folder of learned maps"))
    run = _Run(plan, config, locate(src, revision), out, world, dtype or _best(world), noise)
    with lost_rank_named(world, lambda: "Nothing was written; run the same command again."):
        learned = run.train()
    record = run.record(learned, display_name(src), {"noise": noise, "dtype": run.dtype})
    on_rank_zero(world, lambda: _write(out, run.model.matrices(), record))
    return learned


def _check(plan: Plan, zero: int, dtype: str | None) -> None:
    if plan.learned is None:
        raise GrowthError(f"method {plan.method} has nothing to learn", where="method", fix="use --method ligo")
    if not plan.learned.widths and not plan.learned.lines():
        raise GrowthError(
            "there is nothing to learn",
            where="the destination configuration",
            why="neither width nor depth grows",
            fix="give a larger destination",
        )
    if zero not in (0, 1):
        raise GrowthError(
            f"learning maps requires ZeRO stage 0 or 1 (got {zero})",
            where="zero",
            why="the matrices are small, so partitioning more of their state saves little memory",
            fix="choose 0 or 1",
        )
    if dtype not in (None, "fp32", "bf16"):
        raise GrowthError(f"dtype {dtype!r} is unknown", where="dtype", fix="choose fp32 or bf16")


def _best(world: World) -> str:
    return "bf16" if world.device.type == "cuda" else "fp32"


def _write(out: Path, matrices: dict[str, Any], record: dict[str, Any]) -> None:
    with writing(out), staged_folder(out) as folder:
        write_maps(folder, matrices, record)


class KeepLosses:
    """A callback that keeps the training loss of every step, and ends the run at one that is not finite."""

    needs_progress, before_first_step, when_stopped = True, False, False

    def __init__(self) -> None:
        self.values: list[float] = []

    def is_due(self, step: int) -> bool:
        """See `Callback`."""
        return True

    def __call__(self, trainer: Trainer, step: int) -> None:
        """See `Callback`.

        Raises:
            GrowthError: the loss or a gradient is not finite; on every rank at once.
        """
        reading = trainer.reading
        assert reading is not None, "the step was read"
        if reading.skipped or not math.isfinite(reading.loss):
            raise GrowthError(
                f"the loss or its gradient is not finite at step {step}",
                where="the learning run",
                why=f"loss {reading.loss}",
                fix="lower --lr",
            )
        self.values.append(reading.loss)


class _Run:
    """One learning run on one rank."""

    def __init__(
        self, plan: Plan, config: RunConfig, folder: Path, out: Path, world: World, dtype: str, noise: float
    ) -> None:
        from phigrow.ligo.model import GrownModel
        from phigrow.training.callbacks import Evaluate
        from phigrow.training.data import load_data, make_feed
        from phigrow.training.engine import make_engine
        from phigrow.training.model import DTYPES
        from phigrow.training.resolved import resolve_run
        from phigrow.training.trainer import Trainer

        self.plan, self.config, self.out, self.dtype = plan, config, out, dtype
        self.blocks = blocks = load_data(config, out, world)
        check_data(plan, blocks, folder)
        run = resolve_run(config, world, out, blocks.seq_len, plan.dst_config)
        with StoredModel(folder) as reader:
            check_source(plan, reader)
            source = {name: tensor.rows(0, tensor.shape[0]).float() for name, tensor in reader.tensors.items()}
        self.model = GrownModel(
            plan, source, noise=noise, seed=config.seed, dtype=DTYPES[dtype], attention=run.attention.name
        )  # fmt: skip
        engine, feed = make_engine(self.model, config, run.engine), make_feed(config, blocks)
        cost = count_cost(plan.dst_config, blocks.seq_len)
        self.trainer = Trainer(run, engine, feed, flops_per_token=cost.training_flops, has_dropout=False)
        self.evaluate, self.losses = Evaluate(config, blocks), KeepLosses()

    def train(self) -> Learning:
        """Take all steps.

        Raises:
            GrowthError: a loss or gradient that is not finite, or a request to stop.
        """
        from phigrow.training.zero import release

        trainer = self.trainer
        try:
            before = self._heldout_loss()
            trainer.reporter.say(self._opening(before))
            if not trainer.take_steps([self.losses], None):
                raise GrowthError(
                    f"the run was asked to stop at step {trainer.progress.step}",
                    where="the learning run",
                    why="an unfinished learning run keeps nothing, because it is short",
                    fix="run the same command again",
                )
            after = self._heldout_loss()
            if before is not None and after is not None:
                trainer.reporter.say(f"held-out loss {before:.4f} -> {after:.4f}")
        finally:
            trainer.close()
        release(trainer.engine)
        progress = trainer.progress
        return Learning(self.out, before, after, progress.tokens, self._flops(progress.tokens), progress.seconds)

    def _heldout_loss(self) -> float | None:
        losses = self.evaluate.losses(self.trainer)
        return losses.mean if losses else None

    def _flops(self, tokens: int) -> float:
        """Return the FLOPs of training the large model on these tokens, and of computing its weights at every pass."""
        from phigrow.ligo.model import map_flops

        assert self.plan.learned is not None, "a plan of a learned method"
        passes = self.config.steps * self.config.batch // self.trainer.run.micro_batch
        return tokens * self.trainer.flops_per_token + passes * map_flops(self.plan.learned, self.plan)

    def _opening(self, before: float | None) -> str:
        learned = self.plan.learned
        assert learned is not None, "a plan of a learned method"
        width = sum(dst * src for dst, src in learned.widths.values())
        depth = len(learned.lines()) * len(self.plan.layers) * self.plan.src_sizes["layer"]
        start = ", ".join([*(f"{key} {value}" for key, value in self.plan.options.items()), f"depth {self.plan.depth}"])
        held = f"; held-out loss {before:.4f}" if before is not None else ""
        return f"learning {width + depth:,} coefficients ({width:,} of width, {depth:,} of depth) from {start}{held}"

    def record(self, learned: Learning, source: str, how: dict[str, Any]) -> dict[str, Any]:
        """The settings and the cost of the learning run."""
        config, plan = self.config, self.plan
        return {
            "method": plan.method,
            "start": {
                "options": plan.options,
                "depth": plan.depth,
                "rounding": plan.depth_options.get("rounding", "half-even"),
                "seed": plan.seed,
                "plan": plan.hash,
            },
            "source": source,
            "data": config.data,
            "data_fingerprint": self.blocks.fingerprint,
            "steps": config.steps,
            "batch": config.batch,
            "seq_len": self.blocks.seq_len,
            "lr": config.lr,
            **how,
            "ranks": self.trainer.run.world.size,
            "heldout_before": learned.before,
            "heldout_after": learned.after,
            "cost": {"tokens": learned.tokens, "flops": learned.flops, "seconds": round(learned.seconds, 3)},
            "losses": self.losses.values,
            "versions": {name: installed_version(name) for name in ("phigrow", "torch", "deepspeed")},
        }


def check_data(plan: Plan, blocks: DataSource, source: Path) -> None:
    """Refuse data that the source model cannot read.

    Raises:
        GrowthError: data of another tokenizer, with more tokens, or in blocks longer than the model's positions.
    """
    from phigrow.training.data import check_tokenizer

    vocab, positions = plan.src_sizes[plan.table.vocab], context_of(plan.dst_config)
    if blocks.vocab_size > vocab:
        raise GrowthError(
            f"the data uses {blocks.vocab_size} tokens, but the source has {vocab}",
            where="data",
            fix="prepare the data with the source's tokenizer",
        )
    check_tokenizer(source, blocks)
    if blocks.seq_len > positions:
        raise GrowthError(
            f"the data has blocks of {blocks.seq_len} tokens, but the destination has {positions} positions",
            where="data",
            fix="prepare the data with a smaller --seq-len",
        )
