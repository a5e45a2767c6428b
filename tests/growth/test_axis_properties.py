"""Properties of axis maps that hold for any sources and gains: JSON, composite axes, R E = I, and the recipe's legs."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phigrow.errors import GrowthError
from phigrow.growth.axes import (
    FRESH,
    MEAN,
    AxisMap,
    DiagonalBlocks,
    FromNextLayer,
    HeadNorm,
    axis_map,
    block,
    copies_of_each,
    dense_axis_map,
    kronecker,
    stacked,
    wrap,
)
from phigrow.growth.dense_map import Isometry
from phigrow.growth.origins import first_copies

ARRAYS = ("source", "is_mean", "write", "read", "write_random", "read_random")
GAINS = st.floats(-4, 4, allow_subnormal=False)
FILLS = st.sampled_from(["random", "zero"])
ANCHORS = st.sampled_from(["edge", "center"])
quick = settings(max_examples=80, deadline=None, derandomize=True, database=None)


@st.composite
def maps(draw, special=(FRESH,), most=6):
    """A map with any sources, gains and fills; ``special`` spells what a coordinate may be besides a copy."""
    src = draw(st.integers(1, most))
    source = draw(st.lists(st.one_of(st.integers(0, src - 1), st.sampled_from(special)), min_size=1, max_size=2 * most))
    write, read = (np.array(draw(st.lists(GAINS, min_size=len(source), max_size=len(source)))) for _ in range(2))
    return axis_map(src, source, write=write, read=read, fresh_write=draw(FILLS), fresh_read=draw(FILLS))


@st.composite
def structured(draw):
    """Any map that a plan may hold, dense axes and structures among them."""
    made = draw(maps(special=(FRESH, MEAN)))
    kind = draw(st.sampled_from(["none", "dense", "blocks", "next layer", "norm"]))
    values = {name: getattr(made, name) for name in ARRAYS}
    if kind == "dense":
        src = draw(st.integers(1, 5))
        isometry = Isometry(src, src + draw(st.integers(1, 4)), draw(st.integers(0, 99)))
        return dense_axis_map(src, isometry.dst_size, isometry, write=draw(GAINS), read=draw(GAINS))
    if kind == "blocks":
        divisors = [count for count in range(1, made.dst_size + 1) if made.dst_size % count == 0]
        return AxisMap(made.src_size, **values, structure=DiagonalBlocks(draw(st.sampled_from(divisors))))
    if kind == "next layer":
        chosen = draw(st.lists(st.booleans(), min_size=made.dst_size, max_size=made.dst_size))
        return AxisMap(made.src_size, **values, structure=FromNextLayer(np.array(chosen)))
    if kind == "norm":
        norm = HeadNorm(draw(st.floats(0.1, 4)), draw(st.booleans()))
        return AxisMap(made.src_size, **values, structure=norm)
    return AxisMap(made.src_size, **values, fresh_bias=draw(GAINS))


@quick
@given(structured())
def test_json_keeps_every_value(axis):
    data = json.loads(json.dumps(axis.to_json()))
    again = AxisMap.from_json(data)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(again, name), getattr(axis, name), err_msg=name)
    assert (again.src_size, again.fresh_bias, again.diagonal_blocks) == (
        axis.src_size, axis.fresh_bias, axis.diagonal_blocks,
    )  # fmt: skip
    assert again.dense == axis.dense
    assert again.head_norm == axis.head_norm
    assert np.array_equal(again.from_next_layer, axis.from_next_layer) or axis.from_next_layer is None
    assert again.to_json() == data
    assert sum(run[0] for run in data["runs"]) == axis.dst_size


@quick
@given(structured(), st.data())
def test_a_changed_map_is_refused_or_is_another_map(axis, data):
    """No change of a number or a word in the runs is read as the map that it was made from."""
    stored = axis.to_json()
    run = data.draw(st.integers(0, len(stored["runs"]) - 1))
    place = data.draw(st.integers(0, 3))
    value = data.draw(st.sampled_from([-3, 10**6, "unknown", None, [], 0.125, "mean", "fresh", "dense", "random"]))
    if stored["runs"][run][place] == value:
        return
    stored["runs"][run] = [*stored["runs"][run][:place], value, *stored["runs"][run][place + 1 :]]
    try:
        again = AxisMap.from_json(stored)
    except GrowthError:
        return
    assert again.to_json() != axis.to_json()


@quick
@given(st.lists(maps(most=3), max_size=2), maps(special=(FRESH, MEAN), most=3))
def test_legs_of_a_composite_axis_are_kronecker_products(parts, last):
    parts = [*parts, last]
    joined = kronecker([f"part{k}" for k in range(len(parts))], parts)
    for side in (0, 1):
        expected = np.ones((1, 1))
        for part in parts:
            expected = np.kron(expected, part.dense_legs()[side])
        np.testing.assert_allclose(joined.dense_legs()[side], expected, rtol=1e-14, atol=0)
    # Where the product is zero because of a fresh part, a random leg of that part makes the composite leg random,
    # unless another fresh part's leg is zero.
    for leg in ("write_random", "read_random"):
        # Means are written, but what reads them is new.
        fresh = [part.is_fresh if leg == "write_random" else ~part.is_copy for part in parts]
        closed = [f & ~getattr(part, leg) for f, part in zip(fresh, parts, strict=True)]
        grid = np.meshgrid(*(np.arange(part.dst_size) for part in parts), indexing="ij")
        any_fresh = np.any([f[at] for f, at in zip(fresh, grid, strict=True)], axis=0)
        any_closed = np.any([c[at] for c, at in zip(closed, grid, strict=True)], axis=0)
        np.testing.assert_array_equal(getattr(joined, leg), (any_fresh & ~any_closed).ravel(), err_msg=leg)


@quick
@given(st.lists(maps(), min_size=1, max_size=3))
def test_stacked_axes_are_block_diagonal(parts):
    joined = stacked(parts)
    row = column = 0
    write, _ = joined.dense_legs()
    for part in parts:
        rows, columns = slice(row, row + part.dst_size), slice(column, column + part.src_size)
        np.testing.assert_array_equal(write[rows, columns], part.dense_legs()[0])
        write[rows, columns] = 0
        row, column = row + part.dst_size, column + part.src_size
    assert not write.any()


@quick
@given(st.integers(1, 9), st.integers(0, 9), ANCHORS, st.floats(0.1, 4))
def test_copies_that_are_averaged_are_undone(src, more, anchor, gain):
    """R E = I for wrapped copies read over their count and for a block whose new coordinates are not read."""
    source = wrap(src, src + more, anchor)
    averaged = axis_map(src, source, write=gain, read=1 / (gain * copies_of_each(src, source)))
    kept = axis_map(src, block(src, src + more, anchor), write=gain, read=1 / gain, fresh_read="zero")
    for axis in (averaged, kept):
        write, read = axis.dense_legs()
        np.testing.assert_allclose(read @ write, np.eye(src), rtol=0, atol=1e-14)
        assert axis.left_inverse_error() <= 1e-14
    if more:  # negative controls: copies read in full, and new coordinates that are written and read at random
        assert axis_map(src, source, write=gain, read=1 / gain).left_inverse_error() >= 0.99
        assert axis_map(src, block(src, src + more, anchor)).left_inverse_error() == np.inf


@quick
@given(maps())
def test_the_error_of_a_left_inverse_is_that_of_the_matrices(axis):
    if (axis.write_random & axis.read_random).any():
        assert axis.left_inverse_error() == np.inf
        return
    write, read = axis.dense_legs()
    assert axis.left_inverse_error() == pytest.approx(np.abs(read @ write - np.eye(axis.src_size)).max(), abs=1e-12)


@quick
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99), st.floats(0.1, 4))
def test_an_isometry_is_undone_by_its_transpose(src, more, seed, gain):
    axis = dense_axis_map(src, src + more, Isometry(src, src + more, seed), write=gain, read=1 / gain)
    write, read = axis.dense_legs()
    np.testing.assert_allclose(read @ write, np.eye(src), rtol=0, atol=1e-13)
    assert axis.left_inverse_error() <= 1e-13
    assert not axis.is_fresh.any()


@quick
@given(maps(special=(FRESH, MEAN), most=8))
def test_every_source_coordinate_that_is_copied_has_one_first_copy(axis):
    first = first_copies(axis.source)
    assert not first[~axis.is_copy].any()
    np.testing.assert_array_equal(np.bincount(axis.source[first], minlength=axis.src_size), axis.counts > 0)
