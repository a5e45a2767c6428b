"""Splits of packed blocks, and the sources of a mixture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class Numbers(Protocol):
    """Numbers of blocks, such as an array or `phigrow.corpus.source_rows.ScatteredRows`."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: Any, /) -> Any: ...


Rows = range | Numbers
"""Numbers of blocks."""


class Split(Protocol):
    """A split for training: blocks by number, and the source of each."""

    sources: list[str]

    def __len__(self) -> int: ...

    def batch(self, indices: Any) -> npt.NDArray[np.int64]: ...

    def source_of(self, indices: Any) -> npt.NDArray[np.int64]: ...


@dataclass(frozen=True)
class MixedSource:
    """One source of a mixture: its weight, its train blocks and its held-out blocks."""

    name: str
    weight: float
    train: Rows = field(repr=False)
    heldout: Rows = field(repr=False)


def relative_weights(mixture: tuple[MixedSource, ...]) -> dict[str, float]:
    """Return each source's share of the weights of a mixture."""
    total = sum(source.weight for source in mixture)
    return {source.name: source.weight / total for source in mixture}
