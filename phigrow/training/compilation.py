"""Compile the training pass of a model with torch.compile, in the form that compiles well on CPUs."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phigrow.models.versions import compilable_embedding, raise_recompile_limits

GELU_SCALE = 2 * (2 / torch.pi) ** 0.5


def compile_training(model: Any, *, plain_positions: bool) -> None:
    """Compile the training pass of a model; evaluations and diagnostics are not compiled.

    All training passes have one shape, so each model is compiled once. Held-out blocks may have other shapes, and the
    hooks of diagnostics would compile the model again. Later models of the same shape in this process share the
    compiled code.

    Args:
        model: a model with the ``forward`` of `phigrow.training.loss.attach_loss`.
        plain_positions: positions count from 0 in every block, so the tables of rotary embeddings are constant.
    """
    _allow_many_shapes()
    use_sigmoid_gelu(model)
    compilable_embedding(model)
    rotary = keep_rotary_tables(model) if plain_positions else []
    plain: Any = model.forward
    compiled: Any = torch.compile(plain, dynamic=False)

    def forward(blocks: Tensor, by_row: bool = False, **distillation: Any) -> Any:
        if not model.training or by_row or not torch.is_grad_enabled():
            return plain(blocks, by_row)
        for module in rotary:
            if module.tables is None:
                module.tables = _tables(module, blocks, model.get_input_embeddings().weight.dtype)
        return compiled(blocks, **distillation)

    model.forward = forward


def compile_layers(model: Any, *, backend: str = "inductor") -> None:
    """Compile the training pass of a model layer by layer: one graph serves all layers.

    Embeddings, masks and the loss stay plain, so it works with ``documents: within`` as well. Evaluations are compiled
    inside `compiled_evaluation` only, because other batches may have other shapes.

    Args:
        model: a transformers model.
        backend: of torch.compile.
    """
    _allow_many_shapes()
    use_sigmoid_gelu(model)
    model.evaluates_compiled = False
    for layer in model.base_model.layers:
        plain: Any = layer.forward
        compiled: Any = torch.compile(plain, dynamic=False, backend=backend)

        def forward(*given: Any, layer: Any = layer, plain: Any = plain, compiled: Any = compiled, **more: Any) -> Any:
            trains = layer.training and torch.is_grad_enabled()
            return (compiled if trains or model.evaluates_compiled else plain)(*given, **more)

        layer.forward = forward


@contextlib.contextmanager
def compiled_evaluation(model: Any, wanted: bool = True) -> Iterator[None]:
    """Let the compiled layers of a model run inside this context without gradients, where all batches have one shape.

    It changes nothing for a model without compiled layers, or if it is not ``wanted``.
    """
    if not wanted or not hasattr(model, "evaluates_compiled"):
        yield
        return
    model.evaluates_compiled = True
    try:
        yield
    finally:
        model.evaluates_compiled = False


def _allow_many_shapes() -> None:
    """Raise PyTorch's limits of recompilation: above them it stops compiling without a message.

    A worker may train models of many shapes.
    """
    raise_recompile_limits(256, 1024)


class SigmoidGELU(nn.Module):
    """The tanh approximation of GELU, compiled for CPUs as ``x * sigmoid(2 u)``, which equals ``x (1 + tanh u) / 2``.

    PyTorch's vectorised tanh takes four times as long as its sigmoid. On one thread of an EPYC without AVX-512, forward
    and backward of a million values took 3.9 ms instead of 8.3 ms.
    """

    def forward(self, values: Tensor) -> Tensor:
        """Return the activations of values of any shape."""
        if torch.compiler.is_compiling() and values.device.type == "cpu":
            return values * torch.sigmoid(GELU_SCALE * (values + 0.044715 * values * values * values))
        return F.gelu(values, approximate="tanh")


def use_sigmoid_gelu(model: nn.Module) -> int:
    """Replace ``nn.GELU(approximate="tanh")`` modules by `SigmoidGELU`, and return their number.

    >>> use_sigmoid_gelu(nn.Sequential(nn.GELU(approximate="tanh"), nn.GELU()))
    1
    """
    activations = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.GELU) and child.approximate == "tanh"
    ]
    for parent, name in activations:
        setattr(parent, name, SigmoidGELU())
    return len(activations)


def keep_rotary_tables(model: nn.Module) -> list[Any]:
    """Make compiled passes read the cosines and sines of rotary embeddings from tables, and return the modules.

    Otherwise the compiler computes a cosine and a sine for every value of every query and key, in each layer.
    """
    rotary: list[Any] = [m for m in model.modules() if "inv_freq" in dict(m.named_buffers(recurse=False))]
    for module in rotary:
        module.tables = None
        module.forward = types.MethodType(_rotary_forward, module)
    return rotary


def _rotary_forward(self: Any, values: Tensor, position_ids: Tensor) -> Any:
    if self.tables is not None and torch.compiler.is_compiling():
        return self.tables
    return type(self).forward(self, values, position_ids)


def _tables(module: Any, blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the cosines and sines of the positions of a block."""
    positions = torch.arange(blocks.shape[1] - 1, device=blocks.device)[None]
    tables: tuple[Tensor, ...] = type(module).forward(module, blocks.new_empty(0, dtype=dtype), positions)
    return tables
