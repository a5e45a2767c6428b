"""Normalisations fused into the matrices that read them, for a stream that a method rotates.

A normalisation scales and shifts coordinate by coordinate: n -> g n + b. After a rotation of the stream, n -> Q n, no
weights of a normalisation do the same, but its readers can: W (g n + b) = (W diag(g) Q^T) Q n + W b. So the weights g
are fused into every reader, the normalisation keeps one gain for all coordinates, and W b goes

- into the readers' biases, if all readers of the normalisation have one; its own bias is then 0;
- otherwise along the bias direction u, a unit vector orthogonal to the columns of Q: the normalisation's bias is u, and
  W b u^T is added to every reader.

Neither divides by a weight, so both are exact for any weights.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from phigrow.models.config import Config
from phigrow.models.family import Axis, Family, Parameter


@dataclass(frozen=True)
class NormFusion:
    """The names that one tensor needs of a normalisation that is fused into its readers.

    Attributes:
        scale, shift: tensors of the normalisation's weight and bias (None without).
        reader: for the bias of a reader, the matrix through which it takes in the shift.
        bias: for a matrix that reads the normalisation, its bias (None without).
        bias_direction: the shift is read along the bias direction, because a reader has no bias.
    """

    scale: str
    shift: str | None
    reader: str | None
    bias_direction: bool
    bias: str | None = None

    def at(self, layer: int | None) -> NormFusion:
        """The same with the tensor names of a source layer."""
        names = (self.scale, self.shift, self.reader, self.bias)
        scale, shift, reader, bias = (n and n.format(layer=layer) for n in names)
        return NormFusion(str(scale), shift, reader, self.bias_direction, bias)


def norm_fusions(family: Family, config: Config, axes: Collection[Axis]) -> dict[str, NormFusion]:
    """Return line of the family table -> the normalisation that is fused into it.

    Args:
        family, config: of the source.
        axes: the axes whose normalisations are fused.

    >>> norm_fusions(phi, config, {("normed",)})["model.layers.{layer}.mlp.fc1.bias"].reader  # doctest: +SKIP
    'model.layers.{layer}.mlp.fc1.weight'
    """
    present = [p for p in family.parameters if p.present(config)]
    fusions: dict[str, NormFusion] = {}
    for place, scale in enumerate(present):
        if scale.kind != "scale" or scale.written not in axes:
            continue
        shift, readers = _bias(scale, present), _readers(place, present)
        biases = [_bias(reader, present) for reader in readers]
        bias_direction = shift is not None and None in biases
        fusion = NormFusion(scale.name, shift.name if shift else None, None, bias_direction)
        fusions |= {p.name: fusion for p in (scale, *([shift] if shift else []))}
        for reader, bias in zip(readers, biases, strict=True):
            fusions[reader.name] = replace(fusion, bias=bias.name if bias else None)
            if shift is not None and bias is not None and not bias_direction:
                fusions[bias.name] = replace(fusion, reader=reader.name)
    return fusions


def _readers(place: int, table: list[Parameter]) -> list[Parameter]:
    """The matrices that read the normalisation at a place: those after it, before the next that writes its axis."""
    readers = []
    for p in table[place + 1 :]:
        if p.kind == "scale" and p.written == table[place].written:
            break
        if p.kind == "matrix" and p.read == table[place].written:
            readers.append(p)
    return readers


def _bias(of: Parameter, table: list[Parameter]) -> Parameter | None:
    name = of.name.removesuffix("weight") + "bias"
    return next((p for p in table if p.name == name), None)
