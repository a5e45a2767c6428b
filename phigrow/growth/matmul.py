"""Matrix products of the lift: the same bits for a row whatever block it is computed in.

A BLAS may add up in another order where a matrix has another height, so products are taken in tiles of rows that lie
at multiples of `TILE` of the whole tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from phigrow.checkpoints.bits import Values

TILE = 32
"""Rows of a product; from 16 to 128 equally fast."""


def aligned(start: int, stop: int, rows: int) -> tuple[int, int]:
    """The rows, of ``rows`` in all, that whole tiles around ``start .. stop`` hold.

    >>> aligned(40, 70, 80), aligned(40, 70, 200)
    ((32, 80), (32, 96))
    """
    return start - start % TILE, min(-(-stop // TILE) * TILE, rows)


def mixed_rows(legs: Values, parts: Iterable[tuple[int, Values]], width: int) -> Values:
    """``legs @ source``, [rows, width], the source [all, width] given in parts (first row, rows), each seen once.

    Args:
        legs: [rows, all], whose first row lies at a multiple of `TILE` of the whole tensor.
    """
    out: Values = np.zeros((len(legs), width), dtype=legs.dtype)
    for first, part in parts:
        for start, stop in _tiles(len(legs)):
            out[start:stop] += legs[start:stop, first : first + len(part)] @ part
    return out


def mixed_columns(rows: Values, legs: Values) -> Values:
    """``rows @ legs``, [rows, wide], of rows of which the first lies at a multiple of `TILE` of the whole tensor."""
    out: Values = np.empty((len(rows), legs.shape[1]), dtype=rows.dtype)
    for start, stop in _tiles(len(rows)):
        np.matmul(rows[start:stop], legs, out=out[start:stop])
    return out


def _tiles(rows: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + TILE, rows)) for start in range(0, rows, TILE))
