"""Learned growth: the lift in torch against the lift in numpy, its gradients, and the run that learns."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ligo import drawn_maps
from tiny_models import model_of, phi_config, phi_model, random_pair

import phigrow
from phigrow.errors import GrowthError
from phigrow.expansion.logits import widen_norms
from phigrow.growth.lift import InMemory, lift
from phigrow.growth.matrices import read_maps
from phigrow.ligo.model import GrownModel, map_flops
from phigrow.ligo.train import check_data, learn_growth
from phigrow.models.families import all_families
from phigrow.training.configuration import RunConfig
from phigrow.training.training_cost import source_of

FAMILIES = all_families()
ROOT = Path(__file__).parents[2]
SRC, DST = phi_config(16, 2, 24, 2, 4), phi_config(24, 3, 30, 3, 4)


def stored(model, plan):
    """The model's tensors by their names in checkpoints."""
    state = model.state_dict()
    names = {ours: theirs for theirs, ours in plan.table.live_names.items() if ours in state}
    return {names.get(name, name): value for name, value in state.items()}


def with_maps(grown, maps):
    with torch.no_grad():
        for name, parameter in grown.width.items():
            parameter.copy_(torch.from_numpy(maps.tensors[f"width/{name}"]))
        for line, key in grown.depth_keys.items():
            grown.depth[key].copy_(torch.from_numpy(maps.tensors[f"depth/{line}"]))
    return grown


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lift_in_torch_is_the_lift(family, tmp_path):
    rng = random.Random(4)
    src, dst = random_pair(FAMILIES[family], rng, tie_word_embeddings=family == "qwen2")
    model, plan = model_of(src), phigrow.plan(src, dst, "ligo")
    state, blocks = stored(model, plan), torch.randint(src["vocab_size"], (2, 17))
    maps = drawn_maps(plan, tmp_path)
    grown = with_maps(GrownModel(plan, state, dtype=torch.float64), maps)
    widen_norms(grown.skeleton)
    learned, sources = phigrow.plan(src, dst, "ligo", maps=tmp_path), {n: InMemory(t) for n, t in state.items()}
    with torch.no_grad():
        made = grown.weights()
        for recipe in learned.recipes():
            expected = lift(recipe, sources, torch.float64)
            assert float((made[recipe.name] - expected).abs().max()) <= 1e-12, recipe.name
        big = phigrow.expand_model(model, dst, method="ligo", maps=tmp_path)
        widen_norms(big)
        logits = big(blocks[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
        assert float(grown(blocks)) == pytest.approx(float(loss), abs=1e-12)
        assert float(grown(blocks, by_row=True).mean()) == pytest.approx(float(loss), abs=1e-12)
    assert {name: value.shape for name, value in grown.matrices().items()} == {
        name: value.shape for name, value in maps.tensors.items()
    }


def test_gradients_of_maps_are_those_of_finite_differences():
    model, plan = phi_model(SRC), phigrow.plan(SRC, DST, "ligo")
    grown = GrownModel(plan, stored(model, plan), dtype=torch.float64, noise=0.2)
    blocks = torch.randint(61, (2, 9))
    grown(blocks).backward()
    random_values, step = np.random.default_rng(0), 1e-6
    for name, parameter in grown.named_parameters():
        if not name.startswith("width") and "line_8" not in name and "line_3" not in name:
            continue
        at = tuple(int(random_values.integers(size)) for size in parameter.shape)
        losses = []
        with torch.no_grad():
            for sign in (1, -2):
                parameter[at] += sign * step
                losses.append(float(grown(blocks)))
            parameter[at] += step
        assert float(parameter.grad[at]) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-5, abs=1e-9), (
            name
        )
    assert len(dict(grown.named_parameters())) == 5 + 14


def test_copies_are_told_apart_by_noise_alone():
    """Without noise rows that copy one coordinate get equal gradients for ever."""
    for noise, apart in ((0.0, False), (0.03, True)):
        plan = phigrow.plan(SRC, {**SRC, "intermediate_size": 48}, "ligo")
        grown = GrownModel(plan, stored(phi_model(SRC), plan), dtype=torch.float64, noise=noise)
        grown(torch.randint(61, (2, 9))).backward()
        source = plan.axes["mlp"].source
        one, other = np.flatnonzero(source == source[0])
        distance = float((grown.width["mlp"].grad[one] - grown.width["mlp"].grad[other]).abs().max())
        assert (distance > 1e-9) is apart


def test_flops_of_maps_are_counted():
    plan = phigrow.plan(SRC, {**SRC, "intermediate_size": 30}, "ligo")
    # fc1 and fc2 [24, 16] and the bias of fc1 [24], of two layers, times [30, 24]; three products a value in training.
    assert map_flops(plan.learned, plan) == 3 * 2 * 2 * 30 * 24 * (16 + 16 + 1)


def test_what_cannot_be_learned_is_said(tmp_path):
    with pytest.raises(GrowthError, match=r"tile has nothing to learn[\s\S]*use --method ligo"):
        learn_growth(SRC, DST, tmp_path / "maps", method="tile")
    with pytest.raises(GrowthError, match="there is nothing to learn"):
        learn_growth(SRC, SRC, tmp_path / "maps")
    with pytest.raises(GrowthError, match=r"requires ZeRO stage 0 or 1 \(got 3\)"):
        learn_growth(SRC, DST, tmp_path / "maps", zero=3)


def test_data_of_another_tokenizer_is_refused(tmp_path):
    from phigrow.corpus import train_tokenizer
    from phigrow.corpus.blocks import Blocks

    for name, text in (("source", "to be or not to be "), ("data", "another text ")):
        train_tokenizer([text * 9], 260).save_pretrained(tmp_path / name)
    plan = phigrow.plan({**SRC, "vocab_size": 300}, {**DST, "vocab_size": 300}, "ligo")

    def data_of(tokenizer_dir):
        return Blocks(
            folder=tmp_path, train=[0], heldout=[], seq_len=16, vocab_size=260, eos_token_id=0, fingerprint="",
            tokenizer_dir=tokenizer_dir, info={},
        )  # fmt: skip

    blocks = data_of(tmp_path / "data")
    with pytest.raises(GrowthError) as error:
        check_data(plan, blocks, tmp_path / "source")
    assert str(error.value) == (
        "the data was prepared with another tokenizer\n"
        f"  where: {tmp_path}/data/tokenizer.json, and {tmp_path}/source/tokenizer.json\n"
        "  why: one token id stands for two different tokens\n"
        f"  what to do: prepare the data with 'phigrow data --tokenizer {tmp_path}/source'"
    )
    # Its own, and none on either side.
    check_data(plan, data_of(tmp_path / "source"), tmp_path / "source")
    check_data(plan, data_of(tmp_path / "none"), tmp_path / "source")
    check_data(plan, blocks, tmp_path)


def test_the_cost_of_learning_is_charged_to_the_arm(tmp_path):
    (tmp_path / "phigrow.json").write_text(
        json.dumps(
            {
                "plan": {"method": "ligo"},
                "source": {"training": {"tokens": 100, "flops": 1e6, "seconds": 5.0}},
                "seconds": 2.0,
                "learning": {"cost": {"tokens": 40, "flops": 3e5, "seconds": 7.0}},
            }
        )
    )
    source = source_of(RunConfig(init=str(tmp_path)))
    assert source.cost.values() == (100, 1e6, 5.0)  # what the source cost, and in both accounts:
    assert (source.expand_tokens, source.expand_flops, source.expand_seconds) == (40, 3e5, 9.0)
    assert source.before.values() == (140, 1.3e6, 14.0)


def command(*words):
    """The command in a process of its own: DeepSpeed's imports warn, and warnings are errors here."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "phigrow.cli", "learn-growth", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_a_learning_run_lowers_the_loss_and_is_applied(save_model, tmp_path):
    from phigrow.corpus import prepare

    data = tmp_path / "data"
    prepare("embedded", data, seq_len=32, vocab_size=300, progress=False)
    src, dst = (phi_config(*size, vocab=300) for size in ((32, 2, 64, 2, 4), (48, 3, 96, 3, 4)))
    folder, out = save_model(phi_model(src, torch.float32)), tmp_path / "maps"
    (tmp_path / "dst.json").write_text(json.dumps(dst))
    words = ("--src", folder, "--dst-config", tmp_path / "dst.json", "--data", data, "--batch", 8, "--threads", 1)
    done = command(*words, "--out", out, "--steps", 20)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in out.iterdir()] == ["growth-maps.safetensors"]
    maps, record = read_maps(out)
    assert record["heldout_after"] < record["heldout_before"] - 0.05
    assert len(record["losses"]) == 20
    assert record["cost"]["tokens"] == 20 * 8 * 32
    assert set(maps.tensors) == set(drawn_maps(phigrow.plan(src, dst, "ligo"), tmp_path / "any").tensors)
    grown = phigrow.expand(folder, dst, tmp_path / "grown", method="ligo", maps=out)
    assert source_of(RunConfig(init=str(grown))).expand_flops == pytest.approx(record["cost"]["flops"])
    # What was learned is what is applied: the loss of the grown folder is the one that the run ended with.
    from transformers import AutoModelForCausalLM

    from phigrow.corpus import load_blocks
    from phigrow.training.evaluation import held_out

    blocks = load_blocks(data)
    rows = torch.from_numpy(blocks.heldout.batch(held_out(blocks, 64).rows))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(grown)(rows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    assert float(loss) == pytest.approx(record["heldout_after"], abs=1e-4)
    done = command(*words, "--out", tmp_path / "far", "--steps", 9, "--lr", 1e30)
    assert done.returncode == 2
    assert "not finite at step" in done.stderr
    assert "lower --lr" in done.stderr
    assert not (tmp_path / "far").exists()
