"""A large model whose weights are a linear function of a small one's: what learned growth trains.

The second form of the lift, in torch, because gradients must pass it. `tests/ligo/test_learning.py` holds it to the
first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from phigrow.growth.axes import AxisMap
from phigrow.growth.learned import Learned
from phigrow.growth.lift import InMemory, lift
from phigrow.growth.origins import Kind, anatomy
from phigrow.growth.plan import Plan, TensorGrowth
from phigrow.models.family import Axis


class GrownModel(nn.Module):
    """The large model as a function of the matrices of a learned plan, which are its parameters (float32).

    Args:
        plan: the plan that learning starts from.
        source: name -> weight of the small model; they stay as they are.
        noise: what every row of a matrix is moved by at the start, as a fraction of a selected row: without it copies
            get equal gradients for ever. Uniform, as in the authors' code, but as likely negative.
        seed: of the noise.
        dtype: of the large model's weights and activations.
        attention: transformers' name of the attention to use.

    ``forward`` takes blocks, int64 [n, seq_len + 1], and returns their mean cross entropy, nats a token, or with
    ``by_row`` that of every block.
    """

    def __init__(
        self,
        plan: Plan,
        source: Mapping[str, Tensor],
        *,
        noise: float = 0.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
    ) -> None:
        super().__init__()
        assert plan.learned is not None, "a plan of a learned method"
        self.plan, self.learned, self.dtype = plan, plan.learned, dtype
        random = torch.Generator().manual_seed(seed)
        wide = torch.float64 if next(iter(source.values())).dtype == torch.float64 else torch.float32
        self.width = nn.ParameterDict()
        for name, (dst, src) in self.learned.widths.items():
            moved = (2 * torch.rand(dst, src, generator=random, dtype=torch.float64) - 1) * noise * math.sqrt(3 / src)
            self.width[name] = nn.Parameter((torch.from_numpy(self.learned.matrix(name)) + moved).to(wide))
        self._lines = {line: f"line_{k}" for k, line in enumerate(self.learned.lines())}
        self.depth = nn.ParameterDict(
            {
                key: nn.Parameter(torch.from_numpy(self.learned.depth(line)).to(wide))
                for line, key in self._lines.items()
            }
        )
        self._growths: dict[str, list[TensorGrowth]] = {}
        for growth in plan.tensors():
            self._growths.setdefault(growth.parameter.name, []).append(growth)
        for k, (line, growths) in enumerate(self._growths.items()):
            if growths[0].layer is None:
                held = source[growths[0].source][None]
            else:
                held = torch.stack([source[line.format(layer=layer)] for layer in range(plan.src_sizes["layer"])])
            self.register_buffer(f"source_{k}", held.detach().to(wide), persistent=False)
            self._keep_drawn(k, growths, source, wide)
        # Not a submodule: its own parameters hold nothing, and are none of ours.
        self._skeleton = [_skeleton(plan, attention, dtype)]
        there = {name for name, _ in self._skeleton[0].named_parameters()}
        self._live = {theirs: ours for theirs, ours in plan.table.live_names.items() if ours in there}

    def _keep_drawn(
        self, k: int, growths: list[TensorGrowth], source: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        """Values that come from no source: of the start, drawn."""
        if len(growths[0].maps) == 1 or not any((m.write_random | m.read_random).any() for m in growths[0].maps):
            return
        fresh = torch.from_numpy(anatomy(growths[0], self.plan.axes).kinds() == Kind.FRESH)
        sources = {name: InMemory(value) for name, value in source.items()}
        drawn = [lift(growth, sources[growth.source], self.plan, dtype, sources) for growth in growths]
        self.register_buffer(f"fresh_{k}", fresh, persistent=False)
        self.register_buffer(f"drawn_{k}", torch.stack(drawn), persistent=False)

    def weights(self) -> dict[str, Tensor]:
        """Name -> weight of the large model, a function of the parameters."""
        matrices: dict[Axis, Tensor] = {}
        out: dict[str, Tensor] = {}
        for k, (line, growths) in enumerate(self._growths.items()):
            value: Tensor = getattr(self, f"source_{k}")
            if line in self._lines:
                value = torch.einsum("lk,k...->l...", self.depth[self._lines[line]], value)
            elif growths[0].layer is not None:
                value = value[list(self.plan.layers)]
            first = growths[0]
            for stored, axis in enumerate(first.maps):
                names = first.parameter.axes[stored]
                if axis.legs is not None and names not in matrices:
                    matrices[names] = self._matrix(names, value.device)
                gains, fill = _gains(first, stored)
                value = _grown(value, 1 + stored, axis, matrices.get(names), gains, fill)
            if hasattr(self, f"fresh_{k}"):
                value = torch.where(getattr(self, f"fresh_{k}"), getattr(self, f"drawn_{k}"), value)
            out |= {growth.name: value[at] for at, growth in enumerate(growths)}
        return out

    def _matrix(self, axis: Axis, device: torch.device) -> Tensor:
        total: Tensor | None = None
        for place in self.learned.places(axis):
            known = place.name in self.width
            b = self.width[place.name] if known else torch.from_numpy(self.learned.matrix(place.name)).to(device)
            rows, columns = (torch.from_numpy(each).to(device) for each in (place.rows, place.columns))
            part = b[rows][:, columns] * torch.from_numpy(place.mask).to(device)
            total = part if total is None else total + part
        assert total is not None, "an axis that is learned"
        return total

    def forward(self, blocks: Tensor, by_row: bool = False) -> Tensor:
        model = self._skeleton[0]
        for module in model.modules():  # the rotary table, which is computed and not learned
            for name, value in module.named_buffers(recurse=False):
                if value.device != blocks.device:
                    setattr(module, name, value.to(blocks.device))
        live = {self._live.get(name, name): value.to(self.dtype) for name, value in self.weights().items()}
        loss: Tensor = torch.func.functional_call(model, live, (blocks, by_row))
        return loss

    def matrices(self) -> dict[str, np.ndarray]:
        """What was learned, as `phigrow.growth.matrices` keeps it."""
        width = {f"width/{name}": value for name, value in self.width.items()}
        depth = {f"depth/{line}": self.depth[key] for line, key in self._lines.items()}
        return {name: value.detach().float().cpu().numpy() for name, value in {**width, **depth}.items()}


def map_flops(learned: Learned, plan: Plan) -> float:
    """FLOPs of one step's matrix products from the small model's weights to the large one's, backward pass included."""
    total = 0.0
    for growth in plan.tensors():
        if growth.parameter.name in learned.lines():
            total += 2 * plan.src_sizes["layer"] * math.prod(growth.source_shape)
        shape = list(growth.source_shape)
        for stored, axis in enumerate(growth.maps):
            if axis.legs is not None:
                total += 2 * axis.dst_size * math.prod(shape)
            shape[stored] = axis.dst_size
    return 3 * total


def _gains(growth: TensorGrowth, stored: int) -> tuple[np.ndarray, float]:
    """What the coordinates of a stored axis are multiplied by, and what stands where nothing is copied."""
    axis = growth.maps[stored]
    if len(growth.maps) == 2:
        return (axis.write if stored == growth.written else axis.read), 0.0
    if growth.parameter.kind != "scale" or growth.norm_read is None:
        return axis.write, axis.fresh_bias
    if growth.norm_read is axis:
        return np.ones_like(axis.write), 1.0
    return np.divide(axis.write, growth.norm_read.write, out=np.ones_like(axis.write), where=axis.write != 0), 1.0


def _grown(value: Tensor, dim: int, axis: AxisMap, matrix: Tensor | None, gains: np.ndarray, fill: float) -> Tensor:
    """A tensor [layers, ...] with one axis grown."""
    if axis.legs is None and axis.is_identity and (gains == 1).all():
        return value
    gain = torch.from_numpy(gains).to(value)
    if axis.legs is not None and matrix is not None:
        leg = matrix.to(value) * gain[:, None]
        return torch.einsum("ij,lj...->li...", leg, value) if dim == 1 else torch.einsum("ij,lkj->lki", leg, value)
    copies = torch.from_numpy(axis.is_copy).to(value.device)
    taken = value.index_select(dim, torch.from_numpy(np.maximum(axis.source, 0)).to(value.device))
    shape = [-1 if at == dim else 1 for at in range(value.ndim)]
    return torch.where(copies.view(shape), taken * gain.view(shape), fill)


def _skeleton(plan: Plan, attention: str, dtype: torch.dtype) -> Any:
    """The large model without values; its forward is the loss of blocks."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    from phigrow.training.loss import attach_loss

    settings = {k: v for k, v in plan.dst_config.items() if k not in ("torch_dtype", "dtype", "auto_map")}
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**settings), dtype=dtype, attn_implementation=attention
        )
    model.tie_weights()
    attach_loss(model)
    return model.eval()  # without dropout: what is learned is a start
