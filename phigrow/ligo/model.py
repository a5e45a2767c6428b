"""A large model whose weights are a linear function of a small model's weights; learned growth trains this function.

It implements the lift a second time, in torch, because gradients must pass through it. `tests/ligo/test_learning.py`
compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from phigrow.checkpoints.configuration import resolve_config
from phigrow.growth.learned import Learned
from phigrow.growth.lift import InMemory, lift
from phigrow.growth.origins import Kind, anatomy
from phigrow.growth.plan import Plan
from phigrow.growth.recipe import Leg, TensorRecipe
from phigrow.models.family import Axis


class GrownModel(nn.Module):
    """The large model as a function of the matrices of a learned plan, which are its parameters (float32).

    Args:
        plan: the plan that learning starts from.
        source: name -> weight of the small model; they stay as they are.
        noise: size of the uniform noise added to every row of a matrix at the start, as a fraction of the row's length.
            Without it, copies have equal gradients forever. The authors' code draws it from positive values only.
        seed: seed of the noise.
        dtype: data type of the large model's weights and activations.
        attention: transformers' name of the attention to use.

    ``forward`` takes blocks, int64 [n, seq_len + 1], and returns their mean cross entropy, nats per token, or with
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
        random = torch.Generator().manual_seed(seed % 2**64)
        wide = torch.float64 if next(iter(source.values())).dtype == torch.float64 else torch.float32
        self.width = nn.ParameterDict()
        for name, (dst, src) in self.learned.widths.items():
            uniform = 2 * torch.rand(dst, src, generator=random, dtype=torch.float64) - 1
            perturbation = uniform * noise * math.sqrt(3 / src)
            self.width[name] = nn.Parameter((torch.from_numpy(self.learned.matrix(name)) + perturbation).to(wide))
        self.depth_keys = {line: f"line_{k}" for k, line in enumerate(self.learned.lines())}
        self.depth = nn.ParameterDict(
            {
                key: nn.Parameter(torch.from_numpy(self.learned.depth(line)).to(wide))
                for line, key in self.depth_keys.items()
            }
        )
        self._recipes: dict[str, list[TensorRecipe]] = {}
        for recipe in plan.recipes():
            self._recipes.setdefault(recipe.line, []).append(recipe)
        for k, (line, recipes) in enumerate(self._recipes.items()):
            if recipes[0].layer is None:
                held = source[recipes[0].source][None]
            else:
                held = torch.stack([source[line.format(layer=layer)] for layer in range(plan.src_sizes["layer"])])
            self.register_buffer(f"source_{k}", held.detach().to(wide), persistent=False)
            self._keep_drawn(k, recipes, source, wide)
        # In a list, so that it is no submodule: its parameters have no values and must not be trained.
        self._skeleton = [_skeleton(plan, attention, dtype)]
        model_names = {name for name, _ in self.skeleton.named_parameters()}
        self._live = {recipe.name: plan.table.name_among(recipe.name, model_names) for recipe in plan.recipes()}

    @property
    def skeleton(self) -> Any:
        """The large model's modules, without weights."""
        return self._skeleton[0]

    def _keep_drawn(
        self, k: int, recipes: list[TensorRecipe], source: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        """Keep the random values of the start, which come from no source."""
        if not any(leg.random.any() for leg in recipes[0].legs):
            return
        fresh = torch.from_numpy(anatomy(recipes[0]).kinds() == Kind.FRESH)
        tensors = {name: InMemory(value) for name, value in source.items()}
        drawn = [lift(recipe, tensors, dtype) for recipe in recipes]
        self.register_buffer(f"fresh_{k}", fresh, persistent=False)
        self.register_buffer(f"drawn_{k}", torch.stack(drawn), persistent=False)

    def weights(self) -> dict[str, Tensor]:
        """Name -> weight of the large model, a function of the parameters."""
        matrices: dict[Axis, Tensor] = {}
        out: dict[str, Tensor] = {}
        for k, (line, recipes) in enumerate(self._recipes.items()):
            value: Tensor = getattr(self, f"source_{k}")
            if line in self.depth_keys:
                value = torch.einsum("lk,k...->l...", self.depth[self.depth_keys[line]], value)
            elif recipes[0].layer is not None:
                value = value[list(self.plan.layers)]
            for stored, leg in enumerate(recipes[0].legs):
                if leg.dense is not None and leg.axis not in matrices:
                    matrices[leg.axis] = self._matrix(leg.axis, value.device)
                value = _grown(value, 1 + stored, leg, matrices.get(leg.axis), float(recipes[0].fill))
            if hasattr(self, f"fresh_{k}"):
                value = torch.where(getattr(self, f"fresh_{k}"), getattr(self, f"drawn_{k}"), value)
            out |= {recipe.name: value[layer] for layer, recipe in enumerate(recipes)}
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
        model = self.skeleton
        for module in model.modules():  # the rotary table, which is computed and not learned
            for name, value in module.named_buffers(recurse=False):
                if value.device != blocks.device:
                    setattr(module, name, value.to(blocks.device))
        live = {self._live[name]: value.to(self.dtype) for name, value in self.weights().items()}
        loss: Tensor = torch.func.functional_call(model, live, (blocks, by_row))
        return loss

    def matrices(self) -> dict[str, np.ndarray]:
        """The learned matrices, as `phigrow.growth.matrices` keeps them."""
        width = {f"width/{name}": value for name, value in self.width.items()}
        depth = {f"depth/{line}": self.depth[key] for line, key in self.depth_keys.items()}
        return {name: value.detach().float().cpu().numpy() for name, value in {**width, **depth}.items()}


def map_flops(learned: Learned, plan: Plan) -> float:
    """FLOPs of one step's matrix products from the small model's weights to the large one's, backward pass included."""
    total = 0.0
    for recipe in plan.recipes():
        if recipe.line in learned.lines():
            total += 2 * plan.src_sizes["layer"] * math.prod(recipe.source_shape)
        shape = list(recipe.source_shape)
        for stored, leg in enumerate(recipe.legs):
            if leg.dense is not None:
                total += 2 * leg.dst_size * math.prod(shape)
            shape[stored] = leg.dst_size
    return 3 * total


def _grown(value: Tensor, dim: int, leg: Leg, matrix: Tensor | None, fill: float) -> Tensor:
    """Grow one axis of a tensor [layers, ...]."""
    if leg.dense is None and leg.is_identity:
        return value
    gain = torch.from_numpy(leg.gain).to(value)
    if leg.dense is not None and matrix is not None:
        grown = matrix.to(value) * gain[:, None]
        return torch.einsum("ij,lj...->li...", grown, value) if dim == 1 else torch.einsum("ij,lkj->lki", grown, value)
    copies = torch.from_numpy(leg.is_copy).to(value.device)
    taken = value.index_select(dim, torch.from_numpy(np.maximum(leg.source, 0)).to(value.device))
    shape = [-1 if at == dim else 1 for at in range(value.ndim)]
    return torch.where(copies.view(shape), taken * gain.view(shape), fill)


def _skeleton(plan: Plan, attention: str, dtype: torch.dtype) -> Any:
    """The large model without values; its forward is the loss of blocks."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from phigrow.training.loss import attach_loss

    config = resolve_config(plan.dst_config, "the destination configuration").hf_config
    with init_empty_weights(include_buffers=False):
        make: Any = AutoModelForCausalLM.from_config
        model = make(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()
    attach_loss(model)
    return model.eval()  # without dropout, because only the first weights are learned
