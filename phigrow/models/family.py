"""The table notation: the axes that every parameter of an architecture reads and writes.

One line a parameter, ``name  axes [condition]``. The axes are in storage order, and the arrow points from the axis that
the parameter reads to the axis that it writes. A composite axis is in brackets, slowest part first, as in einops::

    model.embed_tokens.weight                          vocab -> hidden
    model.layers.{layer}.self_attn.q_proj.weight|bias  (kv group q) <- normed
    model.layers.{layer}.input_layernorm.weight|bias   norm hidden -> normed
    model.norm.weight                                  rmsnorm hidden -> final
    lm_head.weight                                     vocab <- final       unless tie_word_embeddings
    lm_head.bias                                       vocab
    attention.query_key_value.weight|bias              (kv q|k|v) <- normed

``weight|bias`` names two tensors; the bias carries the axis that the weight writes. ``norm a -> b`` is an
elementwise scale (and shift) of a LayerNorm that reads ``a`` and writes ``b``, ``rmsnorm a -> b`` that of a
normalisation that does not subtract the mean. ``q|k|v`` is several axes one after the other, in one place of a
composite axis. A condition names a key of the configuration.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from phigrow.errors import GrowthError
from phigrow.files.foreign import recognise_tensors
from phigrow.models.config import Config

if TYPE_CHECKING:
    from phigrow.models.forward import Ids, Values, Weights
    from phigrow.models.rotary import Turn

Sizes = dict[str, int]
TIE = "tie_word_embeddings"
"""The configuration's key for a head that is the embedding."""
ROTARY_TABLES = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")
"""Ends of the names of tensors in old files, which models of today compute."""

Axis = tuple[str, ...]

_LINE = re.compile(r"^(?P<name>\S+)\s+(?P<axes>.+?)(?:\s+(?P<when>if|unless)\s+(?P<key>\w+))?$")
_NAMES = re.compile(r"\((?P<composite>[\w |]+)\)|(?P<plain>[\w|]+)")
_NORM = re.compile(r"^(rms)?norm ")
_NOTATION = "write it as `name  axes [condition]`, see phigrow.models.family"


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
        centred: True for a normalisation that subtracts the mean (LayerNorm, not RMSNorm).
        default: value of ``key`` in configurations that leave it out.
    """

    name: str
    axes: tuple[Axis, ...]
    kind: Literal["matrix", "bias", "scale", "shift"]
    written: Axis
    read: Axis | None
    when: str | None = None
    key: str | None = None
    centred: bool = False
    default: bool = False

    @property
    def in_layer(self) -> bool:
        return "{layer}" in self.name

    def present(self, config: Config) -> bool:
        """Return True if a model of this configuration has the parameter."""
        return self.when is None or (self.when == "if") == bool(config.get(self.key or "", self.default))

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return its shape at the given axis sizes."""
        shape = []
        for axis in self.axes:
            size = 1
            for name in axis:
                size *= sum(sizes[each] for each in stacked_names(name))
            shape.append(size)
        return tuple(shape)


def stacked_names(part: str) -> list[str]:
    """Return the axes that lie one after the other in one part of a composite axis.

    >>> stacked_names("q|k|v"), stacked_names("kv")
    (['q', 'k', 'v'], ['kv'])
    """
    return part.split("|")


def spelled(names: Axis) -> str:
    """Return an axis as the family table writes it.

    >>> spelled(("kv", "k")), spelled(("mlp",))
    ('(kv k)', 'mlp')
    """
    return names[0] if len(names) == 1 else f"({' '.join(names)})"


def parse_table(table: str) -> tuple[Parameter, ...]:
    """Parse the notation of this module.

    Raises:
        GrowthError: a line that cannot be read, with the line.
    """
    return tuple(p for line in table.strip().splitlines() if line.strip() for p in _parse_line(line.strip()))


def _parse_line(line: str) -> Iterator[Parameter]:
    match = _LINE.match(line)
    if match is None:
        raise GrowthError("a line of a family table cannot be read", where=line, fix=_NOTATION)
    stem, dot, tensors = match["name"].rpartition(".")
    when, key, text = match["when"], match["key"], match["axes"]
    is_norm = text.startswith(("norm ", "rmsnorm "))
    centred = text.startswith("norm ")
    axes = tuple(tuple((m["composite"] or m["plain"]).split()) for m in _NAMES.finditer(_NORM.sub("", text)))
    arrow = "->" if "->" in text else "<-" if "<-" in text else None
    if len(axes) != (2 if arrow else 1):
        raise GrowthError(
            f"a line of a family table has {len(axes)} axes, but needs one, or two with an arrow",
            where=line,
            fix=_NOTATION,
        )
    read, written = (axes[0], axes[-1]) if is_norm or arrow == "->" else (axes[-1], axes[0])
    for tensor in tensors.split("|"):
        name = stem + dot + tensor
        if is_norm:
            kind: Literal["scale", "shift"] = "scale" if tensor == "weight" else "shift"
            yield Parameter(name, (written,), kind, written, read, when, key, centred)
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
        residual: the residual stream; in an identity layer all parameters that write it are zero.
        normed: the stream after a layer's normalisation.
        final: the stream after the last normalisation, which the head reads.
        vocab: the token axis.
        head: parts of the attention axes: ``query`` and ``key`` hold the rotary part first.
        config_of: the inverse of ``sizes_of``: the least configuration of given sizes, where the architecture lets one
            choose them (a Phi's hidden is its heads times their coordinates, whatever the given size).
        function_keys: configuration keys that change the function of the weights, with their defaults; the rotary
            embedding and the keys that all families share are not among them, see `phigrow.models.function`.
        dropout_keys: configuration keys of dropout rates.
        has_layer_types: transformers gives every layer a kind (``layer_types``), whatever the configuration leaves out.
        without_effect: keys that change nothing in a configuration that ``sizes_of`` accepts -> the value that is
            written where the configuration has the key, so that no change of another key gives it an effect.
        live_names: names in checkpoints -> in live models, where transformers renames on loading. Files may have
            either; `stored_name` and `name_among` translate.
        ignored_tensors: ends of the names of tensors that some checkpoints hold and no model learns.
        former_model_types, former_tensors: ``model_type`` and ends of tensor names by which earlier uploads of the
            family are recognised. Only remote code could load them.
        former_advice: the fix for a user who has such an upload.
        forward: computes logits [rows, last, vocab] in numpy from a configuration (one spelling, every function key
            set), sizes, the rotary embedding, weights, ids [rows, length] and the number of last positions to return;
            None where only transformers can.
    """

    name: str
    model_type: str
    architecture: str
    table: str
    sizes_of: Callable[[Config], Sizes]
    config_of: Callable[[Sizes], Config]
    residual: str = "hidden"
    normed: str = "normed"
    final: str = "final"
    vocab: str = "vocab"
    mlp: str = "mlp"
    heads: tuple[str, ...] = ("kv", "group")
    query: str = "q"
    key: str = "k"
    value: str = "v"
    function_keys: Mapping[str, Any] = field(default_factory=dict)
    dropout_keys: tuple[str, ...] = ()
    has_layer_types: bool = False
    without_effect: Mapping[str, Any] = field(default_factory=dict)
    live_names: Mapping[str, str] = field(default_factory=dict)
    ignored_tensors: tuple[str, ...] = ()
    former_model_types: tuple[str, ...] = ()
    former_tensors: tuple[str, ...] = ()
    former_advice: str | None = None
    forward: Callable[[Config, Sizes, Turn, Weights, Ids, int], Values] | None = None

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        defaults = self.function_keys
        return tuple(replace(p, default=bool(defaults.get(p.key or ""))) for p in parse_table(self.table))

    @cached_property
    def axis_names(self) -> tuple[str, ...]:
        """Every axis name, in order of first appearance."""
        parts = [part for p in self.parameters for axis in (*p.axes, p.read or (), p.written) for part in axis]
        return tuple(dict.fromkeys(name for part in parts for name in stacked_names(part)))

    @cached_property
    def centred(self) -> bool:
        """The normalisations of the residual stream subtract its mean (LayerNorm)."""
        return any(p.centred and p.read == (self.residual,) for p in self.parameters)

    @cached_property
    def has_vocab_bias(self) -> bool:
        """The head has a bias, which alone can keep a new token out of the probabilities."""
        return any(p.kind == "bias" and p.written == (self.vocab,) for p in self.parameters)

    @cached_property
    def embedding(self) -> str:
        """The matrix that reads tokens."""
        return next(p.name for p in self.parameters if p.kind == "matrix" and p.read == (self.vocab,))

    @cached_property
    def head_matrix(self) -> str | None:
        """The matrix that writes tokens, and that a configuration can tie to the embedding; None if it cannot."""
        return next((p.name for p in self.parameters if p.key == TIE and p.kind == "matrix"), None)

    def ties(self, config: Config) -> bool:
        """Return True if a configuration says that head and embedding are one matrix.

        The stored matrices may say otherwise, see `phigrow.checkpoints.stored_model`.
        """
        return self.head_matrix is not None and config.get(TIE, self.function_keys.get(TIE)) is True

    def stored_name(self, name: str) -> str:
        """Return the name that a tensor has in this table, from its name in a file or in a live model."""
        return self._stored_names.get(name, name)

    def name_among(self, name: str, names: Container[str]) -> str:
        """Return the spelling of a tensor's name that a collection has; the table's where it has none."""
        stored = self.stored_name(name)
        return next((n for n in (name, stored, self.live_names.get(stored, stored)) if n in names), stored)

    @cached_property
    def _stored_names(self) -> dict[str, str]:
        return {live: stored for stored, live in self.live_names.items()}

    def first_use(self, axis: str) -> str:
        """The first parameter that has the axis, for error messages."""
        return next(
            p.name
            for p in self.parameters
            if any(axis in stacked_names(part) for names in (*p.axes, p.read or ()) for part in names)
        )

    def state_shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor that a checkpoint of this configuration holds, in table order."""
        sizes = self.sizes_of(config)
        shapes: dict[str, tuple[int, ...]] = {}
        present = [p for p in self.parameters if p.present(config)]
        layered = [p for p in present if p.in_layer]
        for p in present:
            if not p.in_layer:
                shapes[p.name] = p.shape(sizes)
            elif p is layered[0]:
                for layer in range(sizes["layer"]):
                    shapes.update({q.name.format(layer=layer): q.shape(sizes) for q in layered})
        return shapes

    def check_tensors(self, config: Config, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
        """Check the tensors of a checkpoint against the table.

        Args:
            config: the checkpoint's configuration.
            shapes: name -> shape of its tensors.
            where: its path, for messages.

        Raises:
            GrowthError: tensors are missing, unexpected, or of another shape than the configuration demands.
        """
        expected = self.state_shapes(config)
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith(self.ignored_tensors)}
        if former := [name for name in shapes if name.endswith(self.former_tensors or ("\0",))]:
            raise GrowthError(
                f"the tensors have the names of the first {self.model_type} uploads: {_some(former)}",
                where=where,
                why="their authors' own code wrote them, before transformers had the model",
                fix=self.former_advice,
            )
        missing = [name for name in expected if name not in shapes]
        extra = [name for name in shapes if name not in expected]
        if (missing or extra) and (foreign := recognise_tensors(shapes, expected, where)) is not None:
            raise foreign.error("the tensors of the checkpoint do not match its configuration", where)
        if missing or extra:
            details = [f"{len(m)} {word}: {_some(m)}" for m, word in ((missing, "missing"), (extra, "unexpected")) if m]
            raise GrowthError(
                "the tensors of the checkpoint do not match its configuration",
                where=where,
                why="; ".join(details),
                fix=f"check that config.json belongs to these weights and that they are a {self.model_type} model "
                "saved by transformers >= 4.37",
            )
        for name, shape in expected.items():
            if tuple(shapes[name]) != shape:
                raise GrowthError(
                    f"the tensor has shape {list(shapes[name])}, but the configuration gives it {list(shape)}",
                    where=f"{name} in {where}",
                    fix="check that config.json belongs to these weights",
                )


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
