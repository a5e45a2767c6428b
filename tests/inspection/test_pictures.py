"""Pictures of matrices: the rectangles cover every value once, with its kind; nothing overlaps; files are the same."""

import random

import numpy as np
import pytest
from tiny_models import phi_config, random_growth

import phigrow
from phigrow.errors import GrowthError
from phigrow.growth.origins import Kind, anatomy, matching
from phigrow.inspection.pictures import COLOURS, LABELS, blocks, default_tensors, heading, picture, save

SRC, DST = phi_config(32, 4, 48, 2, 4), phi_config(72, 6, 70, 3, 4)
GROWTHS = [("wr", {}), ("tile", {}), ("tile", {"anchor": "center", "scale": "preserve"}), ("lossless", {})]


def painted(found):
    """The blocks, painted onto an array of the tensor's shape; how often each value was painted."""
    shape = (*found.recipe.shape, 1)[:2]
    kinds, gains, times = np.zeros(shape, int), np.zeros(shape), np.zeros(shape, int)
    for block in blocks(found):
        here = np.s_[slice(*block.rows), slice(*block.columns)]
        kinds[here], gains[here] = block.kind, block.gain
        times[here] += 1
    return kinds.reshape(found.recipe.shape), gains.reshape(found.recipe.shape), times


@pytest.mark.parametrize(("method", "options"), GROWTHS)
def test_the_blocks_are_the_tensor(method, options):
    rng = random.Random(3)
    for _ in range(3):
        plan = phigrow.plan(*random_growth(rng), method, **options)
        for recipe in plan.recipes():
            found = anatomy(recipe)
            kinds, gains, times = painted(found)
            assert (times == 1).all()
            assert np.array_equal(kinds, found.kinds())
            told = (kinds <= Kind.MEAN) | (kinds == Kind.CONSTANT)
            assert np.array_equal(gains[told], found.gains()[told])
            assert (gains[~told] == 1).all()


def boxes(texts):
    return [text.get_window_extent() for text in texts if text.get_text()]


@pytest.mark.parametrize(("method", "options"), GROWTHS)
def test_no_text_overlaps_another(method, options):
    plan = phigrow.plan("phi-1_5", "phi2.json", method, **options)
    for tensors in (default_tensors(plan), matching(plan, "*.layers.0.self_attn.k_proj.weight")):
        figure = picture(plan, tensors)
        figure.draw_without_rendering()
        for axes in figure.axes:
            numbers, gains = boxes(axes.get_xticklabels()), boxes(axes.texts)
            for group in (numbers, gains):
                for k, one in enumerate(group):
                    assert not any(one.overlaps(other) for other in group[k + 1 :])
            assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in numbers + gains)
            assert [axes.get_xticklabels()[k].get_text() != "" for k in (0, -1)] == [True, True]


def test_what_the_usual_picture_shows():
    plan = phigrow.plan("phi-1_5", "phi2.json", "lossless")
    tensors = default_tensors(plan)
    assert [found.recipe.name.split(".")[-2] for found in tensors] == [
        "embed_tokens", "q_proj", "dense", "fc1", "fc2", "lm_head",
    ]  # fmt: skip
    figure = picture(plan, tensors)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["copied", "copied, scaled ×1.118", "mean of the source ×1.118", "fresh random", "zero"]
    q = figure.axes[1]
    assert (q.get_ylabel(), q.get_xlabel()) == ("rows: heads x head: (kv group q)", "columns: hidden: normed")
    assert len(q.lines) == 31  # between 32 heads
    assert figure.get_suptitle() == "lossless: hidden 2048 → 2560"
    assert "×1.118" in [text.get_text() for text in figure.axes[0].texts]


def test_one_matrix_comes_with_one_of_its_heads():
    plan = phigrow.plan(SRC, DST, "tile", scale="preserve", noise=0.1)
    assert heading(plan) == "tile, anchor edge, scale preserve, noise 0.1: hidden 32 → 72"
    q = picture(plan, matching(plan, "model.layers.0.self_attn.q_proj.weight"))
    assert len(q.axes) == 2
    assert q.axes[1].get_ylim() == (12, 0)
    assert {"rotary", "not rotary"} <= {text.get_text() for text in q.axes[1].texts}
    dense = picture(plan, matching(plan, "model.layers.0.self_attn.dense.weight"))
    assert (dense.axes[1].get_xlim(), dense.axes[1].get_xlabel()) == ((0, 12), "columns: head: v")
    assert len(picture(plan, matching(plan, "model.layers.0.mlp.fc1.weight")).axes) == 1
    bias = picture(plan, matching(plan, "model.layers.0.mlp.fc1.bias"))
    assert bias.axes[0].get_ylabel() == "values: mlp"


def test_a_large_matrix_costs_what_a_small_one_does(tmp_path):
    sizes = []
    for growth in (("phi-1_5", "phi2.json"), (SRC, DST)):
        plan = phigrow.plan(*growth, "lossless")
        path = save(picture(plan, matching(plan, "model.layers.0.mlp.fc1.weight")), tmp_path / "a.svg")
        sizes.append(path.stat().st_size)
    assert sizes[0] < 60_000
    assert abs(sizes[0] - sizes[1]) < 5_000


@pytest.mark.parametrize("ending", ["svg", "png", "pdf"])
def test_files_are_the_same_every_time(ending, tmp_path):
    plan = phigrow.plan(SRC, DST, "lossless")
    made = [save(picture(plan, default_tensors(plan)), tmp_path / f"{k}.{ending}").read_bytes() for k in range(2)]
    assert made[0] == made[1]
    assert len(made[0]) > 1000


def test_every_kind_has_a_colour_of_its_own():
    assert set(COLOURS) == set(LABELS) == set(Kind)
    assert len(set(COLOURS.values())) == len(set(LABELS.values())) == len(Kind)


def test_what_cannot_be_drawn_is_refused(tmp_path):
    plan = phigrow.plan(SRC, DST, "wr")
    with pytest.raises(
        GrowthError,
        match=r"a picture cannot show 14 tensors\n  where: .*\n  why: it has room for 1 to 12\n  what to do: choo",
    ):
        picture(plan, matching(plan, "model.layers.0.*"))
    figure = picture(plan, matching(plan, "lm_head.weight"))
    with pytest.raises(
        GrowthError, match=r"'.gif' is not a known picture format\n  where: .*a.gif\n  what to do: end the name in"
    ):
        save(figure, tmp_path / "a.gif")
    with pytest.raises(GrowthError, match="the folder for the picture does not exist"):
        save(figure, tmp_path / "nowhere" / "a.svg")


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    plan = phigrow.plan(SRC, DST, "wr")
    figure, path = picture(plan, matching(plan, "lm_head.weight")), tmp_path / "a.svg"
    before = save(figure, path).read_bytes()

    def full(file, **_):
        file.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(GrowthError, match=r"the output cannot be written\n  where: .*a.svg\n  why: .*No space left"):
        save(figure, path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.svg"]
