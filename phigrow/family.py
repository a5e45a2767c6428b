"""The table notation: what every parameter of an architecture writes and reads, axis by axis.

One line a parameter, ``name  axes [condition]``. The axes are in storage order and the arrow points from what the
parameter reads to what it writes; a composite axis is in brackets, slowest part first, as in einops::

    model.embed_tokens.weight                          vocab -> hidden
    model.layers.{layer}.self_attn.q_proj.weight|bias  (kv group q) <- normed
    model.layers.{layer}.input_layernorm.weight|bias   norm hidden -> normed
    lm_head.weight                                     vocab <- normed      unless tie_word_embeddings
    lm_head.bias                                       vocab

``weight|bias`` names two tensors; the bias carries the axis that the weight writes. ``norm a -> b`` is an
elementwise scale (and shift) of a normalisation that reads ``a`` and writes ``b``. A condition names a key of the
configuration.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from phigrow.config import Config
from phigrow.errors import GrowthError

Sizes = dict[str, int]
Axis = tuple[str, ...]

_LINE = re.compile(r"^(?P<name>\S+)\s+(?P<axes>.+?)(?:\s+(?P<when>if|unless)\s+(?P<key>\w+))?$")
_NAMES = re.compile(r"\((?P<composite>[\w ]+)\)|(?P<plain>\w+)")


@dataclass(frozen=True)
class Parameter:
    """One tensor of a family.

    Attributes:
        name: its key in the state dict, with ``{layer}`` where it belongs to a layer.
        axes: its axes in storage order, each a tuple of names (several for a composite axis).
        kind: ``matrix``, ``bias``, or ``scale`` and ``shift`` of a normalisation.
        written: the axis that it writes.
        read: the axis that it reads (None for a bias).
        when, key: the condition (``if`` or ``unless`` a configuration key is true), or None.
    """

    name: str
    axes: tuple[Axis, ...]
    kind: Literal["matrix", "bias", "scale", "shift"]
    written: Axis
    read: Axis | None
    when: str | None = None
    key: str | None = None

    @property
    def in_layer(self) -> bool:
        return "{layer}" in self.name

    def present(self, config: Config) -> bool:
        """Whether a model of this configuration has the parameter."""
        return self.when is None or (self.when == "if") == bool(config.get(self.key or ""))

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape at the given axis sizes."""
        shape = []
        for axis in self.axes:
            size = 1
            for name in axis:
                size *= sizes[name]
            shape.append(size)
        return tuple(shape)


def parse_table(table: str) -> tuple[Parameter, ...]:
    """Parse the notation of this module.

    Raises:
        GrowthError: a line that cannot be read, with the line.
    """
    return tuple(p for line in table.strip().splitlines() if line.strip() for p in _parse_line(line.strip()))


def _parse_line(line: str) -> Iterator[Parameter]:
    match = _LINE.match(line)
    if match is None:
        raise GrowthError("a line of a family table that cannot be read", where=line)
    stem, dot, tensors = match["name"].rpartition(".")
    when, key, text = match["when"], match["key"], match["axes"]
    is_norm = text.startswith("norm ")
    axes = tuple(tuple((m["composite"] or m["plain"]).split()) for m in _NAMES.finditer(text.removeprefix("norm ")))
    arrow = "->" if "->" in text else "<-" if "<-" in text else None
    if len(axes) != (2 if arrow else 1):
        raise GrowthError("a line of a family table needs one axis, or two and an arrow", where=line)
    read, written = (axes[0], axes[-1]) if is_norm or arrow == "->" else (axes[-1], axes[0])
    for tensor in tensors.split("|"):
        name = stem + dot + tensor
        if is_norm:
            yield Parameter(name, (written,), "scale" if tensor == "weight" else "shift", written, read, when, key)
        elif arrow is None or tensor == "bias":
            yield Parameter(name, (written,), "bias", written, None, when, key)
        else:
            yield Parameter(name, axes, "matrix", written, read, when, key)


@dataclass(frozen=True)
class Family:
    """An architecture: its table, and how its configuration gives the size of every axis.

    Attributes:
        name: the name in plans.
        model_type: `model_type` of its Hugging Face configurations.
        architecture: the transformers class that loads it.
        table: the parameters, in the notation of this module.
        sizes_of: configuration -> size of each axis, plus ``layer`` and ``rotary`` (rotary coordinates a head).
        residual: the residual stream; an identity layer is one whose writers of it are zero.
        normed: what readers see after the normalisation.
        vocab: the token axis.
        head: parts of the attention axes: ``query`` and ``key`` hold the rotary part first.
        function_keys: configuration keys (normalised) that change the function that the weights compute.
        dropout_keys: configuration keys of dropout rates.
        ignored_tensors: ends of the names of tensors that some checkpoints hold and no model learns.
        former_model_types, former_tensors, former_advice: how earlier uploads of the family, which only remote code
            could load, are recognised (``model_type``, ends of tensor names), and what to do with them.
    """

    name: str
    model_type: str
    architecture: str
    table: str
    sizes_of: Callable[[Config], Sizes]
    residual: str = "hidden"
    normed: str = "normed"
    vocab: str = "vocab"
    mlp: str = "mlp"
    heads: tuple[str, ...] = ("kv", "group")
    query: str = "q"
    key: str = "k"
    value: str = "v"
    function_keys: tuple[str, ...] = ()
    dropout_keys: tuple[str, ...] = ()
    ignored_tensors: tuple[str, ...] = ()
    former_model_types: tuple[str, ...] = ()
    former_tensors: tuple[str, ...] = ()
    former_advice: str | None = None

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        return parse_table(self.table)

    @cached_property
    def axis_names(self) -> tuple[str, ...]:
        """Every axis name, in order of first appearance."""
        names = [n for p in self.parameters for axis in (*p.axes, p.read or (), p.written) for n in axis]
        return tuple(dict.fromkeys(names))

    def first_use(self, axis: str) -> str:
        """The first parameter that has the axis, for error messages."""
        return next(p.name for p in self.parameters if any(axis in names for names in (*p.axes, p.read or ())))

    def state_shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor that a checkpoint of this configuration holds, in table order."""
        sizes = self.sizes_of(config)
        shapes: dict[str, tuple[int, ...]] = {}
        outside = [p for p in self.parameters if p.present(config)]
        layered = [p for p in outside if p.in_layer]
        for p in outside:
            if not p.in_layer:
                shapes[p.name] = p.shape(sizes)
            elif p is layered[0]:
                for layer in range(sizes["layer"]):
                    shapes.update({q.name.format(layer=layer): q.shape(sizes) for q in layered})
        return shapes

    def check_tensors(self, config: Config, found: Mapping[str, tuple[int, ...]], where: str) -> None:
        """Hold the tensors of a checkpoint against the table.

        Args:
            config: the checkpoint's configuration.
            found: name -> shape of what it holds.
            where: its path, for messages.

        Raises:
            GrowthError: missing or extra tensors, or a shape that is not the configuration's; each named.
        """
        expected = self.state_shapes(config)
        found = {name: shape for name, shape in found.items() if not name.endswith(self.ignored_tensors or ("\0",))}
        if former := [name for name in found if name.endswith(self.former_tensors or ("\0",))]:
            raise GrowthError(
                f"the tensors are named as in the first {self.model_type} uploads: {_some(former)}",
                where=where,
                why="they were written by code of their own, before transformers had the model",
                fix=self.former_advice,
            )
        missing = [name for name in expected if name not in found]
        extra = [name for name in found if name not in expected]
        if missing or extra:
            said = [f"{len(m)} {word}: {_some(m)}" for m, word in ((missing, "missing"), (extra, "unexpected")) if m]
            raise GrowthError(
                "the checkpoint does not hold the tensors of its configuration",
                where=where,
                why="; ".join(said),
                fix=f"check that config.json belongs to these weights and that they are a {self.model_type} model "
                "saved by transformers >= 4.37",
            )
        for name, shape in expected.items():
            if tuple(found[name]) != shape:
                raise GrowthError(
                    f"a tensor of shape {list(found[name])} where the configuration says {list(shape)}",
                    where=f"{name} in {where}",
                    fix="check that config.json belongs to these weights",
                )


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
