"""`ResolvedRun`: the settings of a run as they take effect on its ranks, worked out once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.records.readers.phigrow import first_record
from phigrow.training.configuration import RunConfig
from phigrow.training.offload import optimizer_device
from phigrow.training.optimizer_spec import OptimizerSpec, find_optimizer
from phigrow.training.settings import AUTO

if TYPE_CHECKING:
    from phigrow.models.config import Config
    from phigrow.training.attention_choice import AttentionChoice
    from phigrow.training.process import World


@dataclass(frozen=True)
class ResolvedRun:
    """Settings as they take effect; ranks, device, data and DeepSpeed file decide those that `RunConfig` leaves open.

    Attributes:
        config: the settings as asked.
        world: the ranks.
        out: folder of the run.
        stage: ZeRO stage.
        micro_batch: sequences that a rank processes at once.
        accumulation: micro-batches per step and rank.
        attention: the attention implementation, and the reason for it.
        optimizer: the optimizer.
        optimizer_device: device of its state: ``device``, ``cpu`` or ``nvme``.
        export: folder of the final checkpoint; None writes none.
        engine: DeepSpeed's configuration.
        seq_len: tokens per block.
    """

    config: RunConfig
    world: World
    out: Path
    stage: int
    micro_batch: int
    accumulation: int
    attention: AttentionChoice
    optimizer: OptimizerSpec
    optimizer_device: str
    export: Path | None
    engine: dict[str, Any]
    seq_len: int

    @property
    def step_tokens(self) -> int:
        """Tokens per optimizer step, over all ranks."""
        return self.config.batch * self.seq_len


def recorded_attention(config: RunConfig, out: Path) -> str | None:
    """Return the attention that a run recorded, or its trunk, so that a run that resumes keeps its kernel."""
    for folder in (out, Path(config.branch_from) if config.branch_from else None):
        record = first_record(folder) if folder is not None else None
        if record is not None and isinstance(known := record.get("attention"), dict):
            return str(known.get("name"))
    return None


def resolve_run(config: RunConfig, world: World, out: Path, seq_len: int, model: Config) -> ResolvedRun:
    """Work out every setting that depends on the ranks, the device, the data or the DeepSpeed file.

    Args:
        config: the settings as asked.
        world: the ranks.
        out: folder of the run.
        seq_len: tokens per block.
        model: the configuration of the model.

    Raises:
        GrowthError: ranks and micro-batch do not divide the batch, the DeepSpeed file contradicts the settings, or the
            data type or the attention that the run asks for does not work here.
    """
    from phigrow.training.attention_choice import choose_attention, shape_of
    from phigrow.training.engine import check_dtype, engine_config, micro_batch
    from phigrow.training.process import on_rank_zero

    check_dtype(config)
    assert AUTO not in (config.dtype, config.compile), "`automatic.choose` comes first"
    micro = micro_batch(config, world.size, seq_len)
    engine = engine_config(config, world.size, micro, world.device.type)
    shape = shape_of(model, rows=micro, tokens=seq_len, within=config.documents == "within")
    attention = on_rank_zero(
        world,
        lambda: choose_attention(config.attention, config.dtype, world.device, shape, recorded_attention(config, out)),
    )
    return ResolvedRun(
        config=config,
        world=world,
        out=out,
        stage=config.stage,
        micro_batch=micro,
        accumulation=engine["gradient_accumulation_steps"],
        attention=attention,
        optimizer=find_optimizer(config.optimizer),
        optimizer_device=optimizer_device(config),
        export=None if config.export is None else out / config.export,
        engine=engine,
        seq_len=seq_len,
    )
