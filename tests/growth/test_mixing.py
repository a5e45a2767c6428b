"""One method an axis, and methods with their options, as ``--method`` spells them."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import logits, model_of, phi_config, probe, random_pair

import phigrow
from phigrow.errors import GrowthError
from phigrow.expansion.logits import widen_norms
from phigrow.growth.axis_groups import AXIS_GROUPS
from phigrow.growth.method_spec import MethodEntry, parse_method, resolve_method, spell_method
from phigrow.models.families import all_families

SRC, DST = phi_config(32, 4, 48, 2, 4), phi_config(72, 6, 70, 3, 4)


def same(one, other):
    return all(
        np.array_equal(getattr(one, leg), getattr(other, leg))
        for leg in ("source", "write", "read", "write_random", "read_random")
    )


def test_every_axis_grows_by_its_own_method():
    mixed = phigrow.plan(SRC, DST, "lossless,mlp=tile:scale=preserve")
    lossless, tile = phigrow.plan(SRC, DST, "lossless"), phigrow.plan(SRC, DST, "tile", scale="preserve")
    assert mixed.method == "lossless,mlp=tile:anchor=edge:scale=preserve"
    for axis in mixed.axes:
        assert same(mixed.axes[axis], (tile if axis == "mlp" else lossless).axes[axis]), axis
    assert not same(tile.axes["mlp"], lossless.axes["mlp"])  # negative control
    assert mixed.exact


@pytest.mark.parametrize("family", all_families())
@pytest.mark.parametrize(
    "spec",
    [
        "hidden=lossless,head=lossless,heads=tile:scale=preserve,mlp=net2net",
        "lossless,mlp=fpi",
        "lemon,heads=lossless",
        "lossless,mlp=wr",
        "lossless,mlp=tile",
    ],
)
def test_a_mixture_is_exact_where_it_says_so(spec, family):
    rng, taken = random.Random(2), 0
    while taken < 3:
        src, dst = random_pair(all_families()[family], rng)
        try:
            made = phigrow.plan(src, dst, spec)
        except GrowthError as refused:
            assert "cannot grow" in refused.what  # noqa: PT017
            continue
        model = model_of(src)
        grown = phigrow.expand_model(model, dst, method=spec)
        widen_norms(grown)
        ids = probe(src["vocab_size"])
        worst = float((logits(model, ids) - logits(grown, ids)).abs().max())
        assert (worst <= 1e-10) == made.exact, (worst, made.approximations)
        taken += 1


def test_options_can_be_part_of_the_name():
    one, other = phigrow.plan(SRC, DST, "tile:scale=preserve"), phigrow.plan(SRC, DST, "tile", scale="preserve")
    assert one.hash == other.hash
    assert phigrow.plan(SRC, phi_config(64, 8, 48, 2, 4), "hypercloning:snr=20").noise == pytest.approx(0.1)
    # In Python and YAML a number is a number.
    wide = phi_config(64, 8, 48, 2, 4)
    assert phigrow.plan(SRC, wide, "hypercloning", snr=20).hash == phigrow.plan(SRC, wide, "hypercloning:snr=20").hash
    assert phigrow.plan(SRC, wide, "hypercloning", snr=12.5).options == {"snr": "12.5"}
    for wrong in (-1, 101, "loud", True, float("nan")):
        with pytest.raises(GrowthError, match=r"snr .* is not allowed(.|\n)*give a number from 0 to 100, or none"):
            phigrow.plan(SRC, wide, "hypercloning", snr=wrong)


def test_axes_that_no_entry_names_grow_by_the_first_entry_and_a_note_says_so():
    made = phigrow.plan(SRC, DST, "hidden=lossless,mlp=tile")
    whole = phigrow.plan(SRC, DST, "lossless,mlp=tile")
    assert all(same(made.axes[axis], whole.axes[axis]) for axis in made.axes)
    assert made.notes[-1] == "heads, head: not named in the method, so grown by its first entry, lossless"
    assert "heads" not in " ".join(whole.notes)


@pytest.mark.parametrize(
    "given", [{"seed": "a"}, {"seed": -1}, {"seed": True}, {"noise": float("nan")}, {"noise": "x"}]
)
def test_a_seed_and_noise_are_numbers(given):
    with pytest.raises(GrowthError, match=rf"{next(iter(given))} "):
        phigrow.plan(SRC, DST, "tile", **given)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lossless,mlp=tile,mlp=wr", "'mlp' is given two methods"),
        ("lossless,stream=tile", "no axes called 'stream'"),
        (
            "lossless,kv=tile",
            r"'kv' is one axis of the group heads\n(.*\n)*.*write heads=tile; the groups are",
        ),
        ("lossless,normed=tile", r"'normed' is one axis of the group hidden\n(.*\n)*.*write hidden=tile;"),
        ("lossless,q=tile:scale=rms", r"'q' is one axis of the group head\n(.*\n)*.*write head=tile:scale=rms;"),
        ("=tile", "the method .* cannot be read"),
        ("tile:scale", "the method .* cannot be read"),
        ("lossless,mlp=copy", "method 'copy' is unknown"),
        ("lossless,mlp=tile:scale=big", "scale 'big' is not allowed"),
        ("lossless,mlp=hypercloning", "hypercloning cannot be mixed"),
        ("isometric,mlp=aki", "aki cannot be mixed with a method that rotates"),
    ],
)
def test_mixtures_that_cannot_be(spec, message):
    with pytest.raises(GrowthError, match=message):
        phigrow.plan(SRC, DST, spec)


def test_a_mixture_from_the_command_line_is_the_one_in_memory(save_model, tmp_path):
    model = model_of(SRC, torch.float32)
    spec = "lossless,mlp=tile:scale=preserve"
    out = phigrow.expand(save_model(model), DST, tmp_path / "out", method=spec)
    from transformers import AutoModelForCausalLM

    written = AutoModelForCausalLM.from_pretrained(out).state_dict()
    grown = phigrow.expand_model(model, DST, method=spec).state_dict()
    assert all(torch.equal(tensor, grown[name]) for name, tensor in written.items())
    assert phigrow.verify(tmp_path / "src", out).passed


quick = settings(max_examples=80, deadline=None, derandomize=True, database=None)

NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789._-+", min_size=1, max_size=12)
ENTRIES = st.builds(
    MethodEntry,
    group=st.sampled_from(["", *AXIS_GROUPS]),
    method=NAMES,
    options=st.lists(st.tuples(NAMES, NAMES), max_size=3).map(tuple),
)


@quick
@given(st.lists(ENTRIES, min_size=1, max_size=6, unique_by=lambda entry: entry.group).map(tuple))
def test_a_spelling_is_read_back_as_it_was_written(entries):
    assert parse_method(spell_method(entries)) == entries


@quick
@given(st.text(max_size=30))
def test_any_text_is_read_or_refused_with_a_reason(text):
    try:
        entries = parse_method(text)
    except GrowthError as refused:
        assert refused.fix  # noqa: PT017
    else:
        assert parse_method(spell_method(entries)) == entries


@quick
@given(st.floats(0, 100) | st.integers(0, 100) | st.just("none"))
def test_the_name_in_a_plan_gives_the_same_options(snr):
    method, options = resolve_method("hypercloning", {"snr": snr})
    assert method.resolve_options(method.spell_options(options)) == options
