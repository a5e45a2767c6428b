"""Distillation: a trained smaller model as teacher for the first steps of a run.

In these steps the loss is ``(1 - w) CE + w KL(teacher || model)``, with CE the cross entropy of the text, w the setting
``teacher_weight`` and the divergence of the two next-token distributions at temperature 1. Afterwards it is CE alone.
A small model helps a larger one only early, so SALT (arXiv:2410.18779) stops distilling too; LET (arXiv:2602.05393)
aligns hidden representations instead, which phigrow does not do.

DeepSpeed's engine does not hold the teacher. Every rank has all of it, at each ZeRO stage and in the run's data type,
without gradients and optimizer state. Its forward pass counts in the run's FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.checkpoints.hub_names import download_advice
from phigrow.checkpoints.stored_model import stored_model_config
from phigrow.corpus.blocks import DataSource
from phigrow.errors import GrowthError
from phigrow.files.foreign import recognise
from phigrow.models.config import Config
from phigrow.models.cost import count_cost
from phigrow.training.configuration import RunConfig
from phigrow.training.data import check_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from phigrow.training.loss import TeacherOutput
    from phigrow.training.resolved import ResolvedRun


@dataclass(frozen=True)
class TeacherInfo:
    """Properties of a run's teacher, for records and costs.

    Attributes:
        config: configuration of its model.
        name: name of its folder, or of the run that exported it.
        steps: number of distilled steps of the run.
        weight: weight of the divergence in the loss.
        flops_per_token: FLOPs of its forward pass per token.
    """

    config: Config
    name: str
    steps: int
    weight: float
    flops_per_token: float

    def record(self) -> dict[str, Any]:
        """Return the field ``teacher`` of the ``run`` record."""
        return {
            "name": self.name,
            "steps": self.steps,
            "weight": self.weight,
            "flops_per_token": self.flops_per_token,
        }

    def flops(self, step: int, step_tokens: int) -> float:
        """Return the FLOPs of the teacher in the first ``step`` steps of a run."""
        return min(step, self.steps) * step_tokens * self.flops_per_token


def teacher_of(config: RunConfig, model_dict: Config, blocks: DataSource) -> TeacherInfo | None:
    """Return the properties of a run's teacher, after checking them against model and data; None without a teacher.

    Raises:
        GrowthError: there is no such checkpoint, its vocabulary or tokenizer differs, or blocks are too long for it.
    """
    if config.teacher is None:
        return None
    folder = Path(config.teacher)
    if not folder.is_dir():
        if (foreign := recognise(folder)) is not None:
            raise foreign.error("there is no checkpoint to take as teacher", f"teacher, {folder.absolute()}")
        raise GrowthError(
            "there is no checkpoint to take as teacher",
            where=f"teacher, {folder.absolute()}",
            fix=f"give the folder of a Hugging Face checkpoint{download_advice(config.teacher, 'teacher')}",
        )
    stored = stored_model_config(folder)
    if stored.get("vocab_size") != model_dict["vocab_size"]:
        raise GrowthError(
            f"the teacher has a vocabulary of {stored.get('vocab_size')} tokens, but the model has one of "
            f"{model_dict['vocab_size']}",
            where=f"teacher, {folder / 'config.json'}",
            why="the divergence compares the two distributions token by token",
            fix="give a teacher of the same vocabulary",
        )
    check_tokenizer(folder, blocks)
    if blocks.seq_len > stored.get("max_position_embeddings", blocks.seq_len):
        raise GrowthError(
            f"the data has blocks of {blocks.seq_len} tokens, but the teacher has "
            f"{stored['max_position_embeddings']} positions",
            where=f"teacher, {folder / 'config.json'}",
            fix="prepare the data with a smaller --seq-len, or give another teacher",
        )
    cost = count_cost(stored, blocks.seq_len)
    path = folder.resolve()
    name = path.parent.name if path.name == "export" else path.name  # a run's own name tells more
    return TeacherInfo(
        stored, name, min(config.teacher_steps, config.steps), config.teacher_weight,
        cost.forward_flops,
    )  # fmt: skip


class Teacher:
    """A frozen model on this rank, in evaluation mode; called with blocks, it returns a `TeacherOutput`."""

    def __init__(self, model: Any, *, within: int | None = None) -> None:
        self.model, self.within = model.eval().requires_grad_(False), within

    def __call__(self, blocks: Tensor) -> TeacherOutput:
        import torch

        from phigrow.training.loss import TeacherOutput, hidden_states

        with torch.no_grad():
            hidden = hidden_states(self.model, blocks[:, :-1], self.within)
        head = self.model.get_output_embeddings()
        return TeacherOutput(hidden.flatten(0, 1), head.weight, head.bias)


def load_teacher(info: TeacherInfo, run: ResolvedRun, eos_token_id: int | None) -> Teacher:
    """Load a run's teacher onto this rank, in the run's data type and with its attention.

    Raises:
        GrowthError: transformers has no such model, or the weights do not fit its configuration.
    """
    from phigrow.training.activation import fuse_gelu
    from phigrow.training.model import DTYPES, causal_lm_config, empty_model, place_parameters
    from phigrow.training.weights import fill_from_checkpoint

    config = run.config
    model = empty_model(causal_lm_config(info.config), config, run.attention.name)
    model.tie_weights()
    place_parameters(model, DTYPES[config.dtype], run.world.device)
    fill_from_checkpoint(model, Path(str(config.teacher)))
    fuse_gelu(model)
    # Buffers, such as the rotary frequencies, stay fp32, as in the engine's model.
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(run.world.device))
    return Teacher(model, within=eos_token_id if config.documents == "within" else None)
