"""Every family around the whole circle: train, export, expand, grow the optimizer's state, train, export."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import records
from printed_commands import run_command
from safetensors.torch import load_file
from scenarios import SETTINGS, VOCAB, FakeBlocks

import phigrow
from phigrow.checkpoints.pickles import PickledWeights
from phigrow.checkpoints.stored_model import StoredModel, equal
from phigrow.errors import GrowthError
from phigrow.models.families import all_families
from phigrow.training import RunConfig, train

# What torch's own modules say when DeepSpeed imports them in this process.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SIZES = {"vocab": VOCAB, "kv": 2, "group": 1, "q": 8, "rotary": 8, "hidden": 16, "mlp": 24, "layer": 2}
LARGER = SIZES | {"kv": 4, "hidden": 32, "mlp": 40, "layer": 3}


def config_of(name: str, sizes: dict[str, int], **more: Any) -> dict[str, Any]:
    config = all_families()[name].config_of(sizes)
    return {**config, "max_position_embeddings": 32, "initializer_range": 0.1, **more}


def run(out: Path, **settings: Any) -> Path:
    shared = {"out": str(out), "eval_every": 0, "log_every": 1, "export": "export", "export_dtype": "fp32"}
    train(RunConfig(**SETTINGS | {"zero": 1} | shared | settings), FakeBlocks())
    return out / "export"


CASES = [
    *(pytest.param(name, 1, False, id=f"{name}-zero1") for name in all_families()),
    pytest.param("gpt_neox", 3, False, id="gpt_neox-zero3"),
    pytest.param("gpt_neox", 1, True, id="gpt_neox-tied-zero1"),
    pytest.param("gpt_neox", 0, True, id="gpt_neox-tied-zero0", marks=pytest.mark.slow),
    *(pytest.param(name, 3, False, id=f"{name}-zero3", marks=pytest.mark.slow) for name in ("llama", "phi", "qwen2")),
]


@pytest.mark.parametrize(("name", "stage", "tied"), CASES)
def test_a_family_goes_around_the_circle(alone, tmp_path, name, stage, tied):
    family = all_families()[name]
    small, large = (config_of(name, sizes, tie_word_embeddings=tied) for sizes in (SIZES, LARGER))
    first = run(tmp_path / "small", model=small, zero=stage, steps=2, warmup=0, save_every=2, keep=1)
    assert list(load_file(first / "model.safetensors")) == sorted(family.state_shapes(small))
    grown = phigrow.expand(first, large, tmp_path / "grown", method="lossless")
    assert phigrow.verify(first, grown, backend="numpy").passed
    assert phigrow.verify(first, grown, backend="transformers").passed
    state = phigrow.grow_optimizer(tmp_path / "small", grown, tmp_path / "state")
    start = {"init": str(grown), "model": None, "init_optimizer": str(state), "zero": stage, "warmup": 0}
    # A learning rate of 0: the export is what the run started from, every parameter of it.
    again = run(tmp_path / "still", **start, steps=1, lr=0.0)
    expected, exported = (load_file(folder / "model.safetensors") for folder in (grown, again))
    assert set(exported) == set(expected) == set(family.state_shapes(large))
    assert all(torch.equal(exported[key], expected[key]) for key in expected)
    trained = run(tmp_path / "large", **start, steps=1)
    # Negative control: a step changes every matrix.
    moved = load_file(trained / "model.safetensors")
    assert not any(torch.equal(moved[key], expected[key]) for key in expected if expected[key].ndim == 2)
    check_the_advice_about_deepspeed(tmp_path, name)
    # And the model grows once more.
    assert phigrow.expand(trained, large, tmp_path / "third").is_dir()


def check_the_advice_about_deepspeed(folder: Path, name: str) -> None:
    """The command that an error prints for DeepSpeed's checkpoint of a run gives the weights of the run's export."""
    step = shutil.copytree(folder / "small" / "checkpoints" / "step-2", folder / "foreign" / "global_step2")
    (step / "complete.json").unlink()
    for given, out in ((step, "global_step2-hf"), (step.parent, "foreign-hf")):
        with pytest.raises(GrowthError, match="it is a checkpoint of DeepSpeed") as refused, contextlib.chdir(folder):
            phigrow.expand(given, "phi2.json")
        with contextlib.chdir(folder), contextlib.redirect_stdout(None):
            run_command(refused.value.fix)
        shutil.copy(folder / "small" / "export" / "config.json", folder / out)
        with pytest.warns(PickledWeights):
            joined = StoredModel(folder / out)
        with joined, StoredModel(folder / "small" / "export") as exported:
            joined.check()
            assert all(equal(tensor, exported.tensors[key]) for key, tensor in joined.tensors.items()), name


@pytest.mark.parametrize("kind", ["stored names", "live names", "pickled"])
def test_runs_and_teachers_start_from_every_spelling(alone, tmp_path, kind):
    from safetensors.torch import save_file

    family = all_families()["gpt_neox"]
    config = config_of("gpt_neox", SIZES)
    source = run(tmp_path / "source", model=config, steps=1, warmup=0)
    weights = source / "model.safetensors"
    tensors = load_file(weights)
    if kind == "live names":
        save_file({family.live_names.get(key, key): tensor for key, tensor in tensors.items()}, weights)
        assert "lm_head.weight" in load_file(weights)
    if kind == "pickled":
        mask = {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)}
        torch.save(tensors | mask, source / "pytorch_model.bin")
        weights.unlink()
    still = {"init": str(source), "model": None, "steps": 1, "warmup": 0, "lr": 0.0, "dtype": "bf16"}
    if kind == "pickled":
        with pytest.warns(match="pickled weights"):
            exported = run(tmp_path / "run", **still, teacher=str(source), teacher_steps=1, teacher_weight=1.0)
    else:
        exported = run(tmp_path / "run", **still, teacher=str(source), teacher_steps=1, teacher_weight=1.0)
    # fp32 masters are the stored values, read by their place in the file or in the pickle.
    found = load_file(exported / "model.safetensors")
    assert set(found) == set(tensors)
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    # The model is its own teacher, so it does not diverge from it.
    (step,) = records(tmp_path / "run", "step")
    assert abs(step["distillation_loss"]) < 1e-3 < step["loss"]
