"""Normalisations folded into what reads them, for a stream whose coordinates a method turns.

A normalisation scales and shifts coordinate by coordinate: n -> g n + b. Once the stream is turned, n -> Q n, no
weights of a normalisation do the same, but its readers can: W (g n + b) = (W diag(g) Q^T) Q n + W b. So every reader
takes in the weights, the normalisation keeps one gain for all coordinates, and W b goes

- into the readers' own biases, where all readers of the normalisation have one; its bias is then 0;
- else along a unit vector u that nothing else writes: its bias is u, and every reader gets W b u^T besides.

Neither divides by a weight, so both are exact whatever the weights are.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from phigrow.models.config import Config
from phigrow.models.family import Axis, Family, Parameter


@dataclass(frozen=True)
class Fold:
    """What one tensor needs of a normalisation that is folded.

    Attributes:
        scale, shift: tensors of its weight and bias (None without).
        reader: for the bias of a reader, the matrix through which it takes in the shift.
        bias: for a matrix that reads the normalisation, its bias (None without).
        aside: the shift is read along a direction of its own.
    """

    scale: str
    shift: str | None
    reader: str | None
    aside: bool
    bias: str | None = None

    def at(self, layer: int | None) -> Fold:
        """With the names of a source layer."""
        names = (self.scale, self.shift, self.reader, self.bias)
        scale, shift, reader, bias = (n and n.format(layer=layer) for n in names)
        return Fold(str(scale), shift, reader, self.aside, bias)

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(name for name in (self.scale, self.shift, self.reader) if name is not None)


def folds(family: Family, config: Config, axes: Collection[Axis]) -> dict[str, Fold]:
    """Line of the family table -> what it takes in.

    Args:
        family, config: of the source.
        axes: what normalisations write, where they are folded.

    >>> folds(phi, config, {("normed",)})["model.layers.{layer}.mlp.fc1.bias"].reader  # doctest: +SKIP
    'model.layers.{layer}.mlp.fc1.weight'
    """
    present = [p for p in family.parameters if p.present(config)]
    found: dict[str, Fold] = {}
    for at, scale in enumerate(present):
        if scale.kind != "scale" or scale.written not in axes:
            continue
        shift, readers = _bias(scale, present), _readers(at, present)
        biases = [_bias(reader, present) for reader in readers]
        aside = shift is not None and None in biases
        fold = Fold(scale.name, shift.name if shift else None, None, aside)
        found |= {p.name: fold for p in (scale, *([shift] if shift else []))}
        for reader, bias in zip(readers, biases, strict=True):
            found[reader.name] = replace(fold, bias=bias.name if bias else None)
            if shift is not None and bias is not None and not aside:
                found[bias.name] = replace(fold, reader=reader.name)
    return found


def _readers(at: int, table: list[Parameter]) -> list[Parameter]:
    """The matrices that read a normalisation, given by its place: after it, before the next that writes its axis."""
    readers = []
    for p in table[at + 1 :]:
        if p.kind == "scale" and p.written == table[at].written:
            break
        if p.kind == "matrix" and p.read == table[at].written:
            readers.append(p)
    return readers


def _bias(of: Parameter, table: list[Parameter]) -> Parameter | None:
    name = of.name.removesuffix("weight") + "bias"
    return next((p for p in table if p.name == name), None)
