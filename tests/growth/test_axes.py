import numpy as np
import pytest

from phigrow.errors import GrowthError
from phigrow.growth.axes import (
    FRESH,
    MEAN,
    AxisMap,
    axis_map,
    block,
    concatenate,
    copies_of_each,
    identity,
    kronecker,
    wrap,
)


def test_sources_of_block_and_wrap():
    assert block(2, 5).tolist() == [0, 1, FRESH, FRESH, FRESH]
    assert block(2, 5, "center").tolist() == [FRESH, 0, 1, FRESH, FRESH]
    assert wrap(3, 8).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert wrap(4, 7, "center").tolist() == [3, 0, 1, 2, 3, 0, 1]
    assert wrap(0, 2).tolist() == [FRESH, FRESH]


def test_parts_of_an_axis_do_not_mix():
    assert concatenate([(2, wrap(2, 3)), (3, block(3, 4))]).tolist() == [0, 1, 0, 2, 3, 4, FRESH]


def test_a_left_inverse_is_recognised_and_its_absence_too():
    source = wrap(3, 5)
    counts = copies_of_each(3, source)
    assert counts.tolist() == [2, 2, 1, 2, 2]
    assert axis_map(3, source, read=1 / counts).left_inverse_error() == 0
    assert axis_map(3, source).left_inverse_error() == 1  # negative control: two copies read in full
    assert axis_map(2, block(2, 3), fresh_read="zero").left_inverse_error() == 0
    assert axis_map(2, block(2, 3)).left_inverse_error() == np.inf  # random values read by random values


def test_dense_legs_multiply_to_the_identity():
    axis = axis_map(3, wrap(3, 7), read=1 / copies_of_each(3, wrap(3, 7)))
    write, read = axis.dense_legs()
    np.testing.assert_allclose(read @ write, np.eye(3), atol=1e-15)
    mean = axis_map(2, np.array([0, 1, MEAN]), write=3.0)
    np.testing.assert_array_equal(mean.dense_legs()[0], [[3, 0], [0, 3], [1.5, 1.5]])


def test_runs_are_the_fewest_slices():
    axis = axis_map(4, np.array([2, 3, 0, 1, MEAN, MEAN, FRESH]))
    assert [run[:2] for run in axis.to_json()["runs"]] == [[2, 2], [2, 0], [2, "mean"], [1, "fresh"]]


def test_composite_axis_is_a_kronecker_product():
    rng = np.random.default_rng(0)
    parts = []
    for src, dst in ((2, 3), (1, 2), (3, 5)):
        source = wrap(src, dst)
        parts.append(axis_map(src, source, write=rng.random(dst), read=rng.random(dst)))
    joined = kronecker(("kv", "group", "q"), parts)
    for leg in (0, 1):
        expected = parts[0].dense_legs()[leg]
        for part in parts[1:]:
            expected = np.kron(expected, part.dense_legs()[leg])
        np.testing.assert_allclose(joined.dense_legs()[leg], expected, rtol=1e-14)
    # Negative control: the other order is another map.
    assert not np.array_equal(joined.source, kronecker(("a", "b", "c"), parts[::-1]).source)


def test_a_zero_leg_wins_in_a_composite_axis():
    heads = axis_map(1, block(1, 2), fresh_write="random", fresh_read="zero")
    keys = axis_map(1, block(1, 2), fresh_write="zero", fresh_read="random")
    joined = kronecker(("kv", "k"), [heads, keys])
    assert joined.source.tolist() == [0, FRESH, FRESH, FRESH]
    assert joined.write_random.tolist() == [False, False, True, False]
    assert joined.read_random.tolist() == [False, True, False, False]


def test_json_round_trip_keeps_every_value():
    source = np.array([0, 1, 2, 0, 1, MEAN, FRESH, FRESH])
    axis = axis_map(3, source, write=np.sqrt(2), read=1 / copies_of_each(3, source), fresh_write="zero", fresh_bias=-7)
    again = AxisMap.from_json(axis.to_json())
    for name in ("source", "is_mean", "write", "read", "write_random", "read_random"):
        np.testing.assert_array_equal(getattr(again, name), getattr(axis, name))
    assert (again.src_size, again.fresh_bias) == (3, -7)


@pytest.mark.parametrize(
    "damage",
    [{"dst_size": 4}, {"runs": [[3, 1, 1.0, 1.0]]}, {"runs": [[3, "what", 1.0, 1.0]]}, {"runs": [[3, 0, 1.0]]}],
    ids=["size", "range", "word", "short"],
)
def test_a_damaged_map_is_refused(damage):
    data = identity(3).to_json()
    assert AxisMap.from_json(data).is_identity
    with pytest.raises(GrowthError, match="an axis map of the plan cannot be read"):
        AxisMap.from_json(data | damage)
