"""Dense axis maps: every coordinate of the larger axis mixes all coordinates of the smaller one.

An `Isometry` is drawn, not stored: a plan holds its seed, and the matrix is made again where it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from phigrow.growth.draws import NormalStream

Floats: TypeAlias = npt.NDArray[np.float64]


class DenseMap(Protocol):
    """The two legs of a dense axis map, before its gains.

    Attributes:
        fuses_norms: True if the weight and bias of a normalisation are fused into the matrices that read it, because
            rotated coordinates cannot be scaled one by one.
    """

    @property
    def fuses_norms(self) -> bool: ...

    def write(self, compute: npt.DTypeLike) -> npt.NDArray[Any]:
        """[dst, src], in the dtype of the arithmetic."""
        ...

    def read(self, compute: npt.DTypeLike) -> npt.NDArray[Any]:
        """[src, dst], in the dtype of the arithmetic."""
        ...

    def bias_direction(self, compute: npt.DTypeLike) -> npt.NDArray[Any]:
        """[dst]: unit vector orthogonal to the columns of `write`.

        It carries a fused normalisation's bias when its readers have none.
        """
        ...

    def left_inverse_error(self, gains: Floats) -> float:
        """max |R E - I|; ``gains`` [dst] are those of both legs, multiplied."""
        ...

    def dual(self, power: int, *, with_bias: bool = False) -> DenseMap | None:
        """The map of gradients, which writes with R^T and reads with E^T, every entry to a power; None if unknown.

        With ``with_bias``, the source has one more coordinate, the last, which lies along the bias direction.
        """
        ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Isometry:
    """A random Q [dst, src] with Q^T Q = I that maps the mean of the axis to the mean of the larger one.

    Q maps the unit vector of the mean, 1/sqrt(src) everywhere, to the larger one, 1/sqrt(dst) everywhere. On the
    orthogonal complement it is uniform among isometries. Both legs are one matrix, so R E = I. A QR decomposition makes
    it, in about 3 dst src^2 operations. It is held once for each dtype in use, with 8 or 4 bytes a value: 42 MB from
    2048 to 2560 in float64. LAPACK's rounding differs between machines in the last bits of float64.

    With ``power`` 2 the legs are the squares of Q's entries, for second moments of a sum of independent terms. With
    ``with_bias`` they have one more source coordinate, which lies along the bias direction.
    """

    src_size: int
    dst_size: int
    seed: int
    fuses_norms: bool = True
    power: int = 1
    with_bias: bool = False

    def write(self, compute: npt.DTypeLike) -> npt.NDArray[Any]:
        return _entries(self.src_size, self.dst_size, self.seed, np.dtype(compute).name, self.power, self.with_bias)

    def read(self, compute: npt.DTypeLike) -> npt.NDArray[Any]:
        return self.write(compute).T

    def bias_direction(self, compute: npt.DTypeLike) -> npt.NDArray[Any]:
        """[dst]: a unit vector orthogonal to the columns of Q, and so to the mean."""
        return _basis(self.src_size, self.dst_size, self.seed, np.dtype(compute).name)[:, -1]

    def left_inverse_error(self, gains: Floats) -> float:
        return max(_error(self.src_size, self.dst_size, self.seed), float(np.abs(gains - 1).max()))

    def dual(self, power: int, *, with_bias: bool = False) -> Isometry:
        """Return the map of gradients, which Q rotates like activations: R^T = Q."""
        return replace(self, power=power, with_bias=with_bias)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "isometry", "seed": self.seed}


def dense_map_from_json(data: dict[str, Any], src_size: int, dst_size: int) -> DenseMap:
    """Read a dense map from the JSON of `to_json`.

    Raises:
        ValueError: another kind, or an isometry into no larger axis.
    """
    if data["kind"] != "isometry" or src_size >= dst_size:
        raise ValueError(f"dense legs {data['kind']!r}, {src_size} -> {dst_size}")
    return Isometry(src_size, dst_size, int(data["seed"]))


@lru_cache(maxsize=2)
def _entries(src: int, dst: int, seed: int, dtype: str, power: int, with_bias: bool) -> npt.NDArray[Any]:
    """[dst, src], or [dst, src + 1] with the bias direction."""
    basis = _basis(src, dst, seed, dtype)
    turned = basis if with_bias else basis[:, :-1]
    return turned if power == 1 else turned**power


@lru_cache(maxsize=2)
def _basis(src: int, dst: int, seed: int, dtype: str) -> npt.NDArray[Any]:
    """[dst, src + 1], orthonormal columns: those of Q, and one more."""
    if dtype != "float64":
        return _basis(src, dst, seed, "float64").astype(dtype)
    drawn = NormalStream(seed, "isometry", "stream", src).values(0, dst - 1)
    turned, triangle = np.linalg.qr(drawn)
    # The decomposition leaves signs open; with a positive diagonal it is unique, and uniform.
    turned *= np.where(np.diag(triangle) < 0, -1.0, 1.0)
    basis = np.zeros((dst, src + 1))
    basis[0, 0] = 1.0
    basis[1:, 1:] = turned
    # Reflections that take the first coordinate to the mean. `turned` does not touch the first row of the inner basis,
    # so the mean goes to the mean and everything else stays orthogonal to it.
    _reflect(basis)
    _reflect(basis[:, :src].T)
    return basis


def _reflect(matrix: Floats) -> None:
    """Apply in place, from the left, the reflection between the first unit vector and the unit vector of the mean."""
    normal = np.full(len(matrix), len(matrix) ** -0.5)
    normal[0] -= 1
    square = float(normal @ normal)
    if square > 0:  # of one coordinate, which is its own mean
        matrix -= np.outer(normal, (2 / square) * (normal @ matrix))


@lru_cache(maxsize=2)
def _error(src: int, dst: int, seed: int) -> float:
    basis = _basis(src, dst, seed, "float64")[:, :-1]
    return float(np.abs(basis.T @ basis - np.eye(src)).max())
