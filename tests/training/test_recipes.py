"""Every shipped recipe parses, says its command, and trains the model it names."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from phigrow.errors import GrowthError
from phigrow.models.capacity import capacity
from phigrow.models.config import load_config
from phigrow.models.cost import count_cost
from phigrow.training import DEMO_MODEL, RunConfig, load_run_config
from phigrow.training.engine import engine_config, micro_batch
from phigrow.training.model import model_config

RECIPES = Path(__file__).parents[2] / "phigrow" / "recipes"
MILLIONS = {
    "demo": (6, 8),
    "notebook": (300, 400),
    "phi-1-small": (300, 400),
    "phi-1": (1300, 1500),
    "phi-1_5": (1300, 1500),
    "phi-1_5-web": (1300, 1500),
    "phi-2": (2700, 2900),
}


@pytest.mark.parametrize("name", MILLIONS)
def test_a_recipe_parses_and_matches_its_model(name):
    path = RECIPES / f"{name}.yaml"
    text = path.read_text()
    assert text.startswith("# ")
    assert f"phigrow pretrain {name}" in text
    config = load_run_config(path)
    model = model_config(config, data_vocab=4096, seq_len=config.seq_len)
    low, high = MILLIONS[name]
    assert low < count_cost(model).parameters / 1e6 < high
    ranks = 8 if name not in ("demo", "notebook") else 1
    out = engine_config(config, ranks, micro_batch(config, ranks, 2048))
    assert out["zero_optimization"]["stage"] == config.stage
    # 'auto' would reach DeepSpeed as it is.
    assert "auto" not in json.dumps(out)


@pytest.mark.parametrize("ranks", [1, 8, 96])
@pytest.mark.parametrize("name", [name for name in MILLIONS if name not in ("demo", "notebook")])
def test_a_published_recipe_runs_on_1_8_and_96_gpus_as_its_comment_says(name, ranks):
    text = (RECIPES / f"{name}.yaml").read_text()
    (batch,) = re.findall(r"# sequences; 96 GPUs cannot share them: --batch (\d+) there", text)
    config = load_run_config(RECIPES / f"{name}.yaml")
    if ranks == 96:
        with pytest.raises(GrowthError, match=f"such as {batch} or "):
            micro_batch(config, ranks, 2048)
        config = dataclasses.replace(config, batch=int(batch))
    micro = micro_batch(config, ranks, 2048)
    assert micro in (5, 7, 8)  # of 8 that the budget of tokens allows: no rank is left with single sequences
    out = engine_config(config, ranks, micro)
    assert out["gradient_accumulation_steps"] * micro * ranks == config.batch


@pytest.mark.parametrize("gpus", ["8x40", "8x80", "96x80"])
@pytest.mark.parametrize("name", ["phi-1", "phi-1_5", "phi-1_5-web", "phi-2"])
def test_a_recipe_is_what_the_planner_chooses(name, gpus):
    """With the words of its comment where it has any for these GPUs."""
    text = (RECIPES / f"{name}.yaml").read_text()
    config = load_run_config(RECIPES / f"{name}.yaml")
    ranks = int(gpus.partition("x")[0])
    if ranks == 96:
        (batch,) = re.findall(r"--batch (\d+) there", text)
        config = dataclasses.replace(config, batch=int(batch))
    if gpus == "8x40" and (words := re.findall(r"# on 8 GPUs of 40 GiB: --micro-batch (\d+)", text)):
        config = dataclasses.replace(config, micro_batch=int(words[0]))
    planned = capacity(load_config(str(config.model)), gpus, batch=config.batch)
    fit = next(fit for fit in planned.fits if fit.layout == planned.chosen)
    assert (config.stage, config.activation_checkpointing) == (fit.layout.stage, False)
    assert micro_batch(config, ranks, 2048) <= fit.largest


def test_the_recipe_for_notebooks_fits_into_16_gib():
    config = load_run_config(RECIPES / "notebook.yaml")
    planned = capacity("phi-1-small.json", "1x16", batch=config.batch, micro_batch=config.micro_batch)
    assert next(fit for fit in planned.fits if fit.layout.stage == config.stage).fits
    assert (config.dtype, config.attention) == ("auto", "auto")
    assert config.steps * config.batch * 2048 == pytest.approx(131e6, rel=0.01)
    whole = capacity("phi-1-small.json", "1x16", batch=config.batch, micro_batch=8)
    assert not next(fit for fit in whole.fits if fit.layout.stage == config.stage).fits  # negative control


def test_phi_2_does_not_fit_into_40_gib_without_the_words_of_its_comment():
    config = load_run_config(RECIPES / "phi-2.yaml")
    rows = micro_batch(config, 8, 2048)
    planned = capacity(load_config("phi2.json"), "8x40", batch=config.batch, micro_batch=rows)
    assert not next(fit for fit in planned.fits if fit.layout.stage == config.stage).fits
    assert "# on 8 GPUs of 40 GiB" in (RECIPES / "phi-2.yaml").read_text()


def test_no_recipe_is_untested():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(MILLIONS)


def test_no_arguments_and_the_demo_recipe_are_the_same_run():
    config = load_run_config(RECIPES / "demo.yaml")
    assert config == RunConfig(model="demo")
    assert model_config(config, data_vocab=4096, seq_len=256) == DEMO_MODEL


@pytest.mark.parametrize("name", ["phi-1-small", "phi-1"])
def test_phi_1_recipes_have_the_published_hyperparameters(name):
    config = load_run_config(RECIPES / f"{name}.yaml")
    assert (config.lr, config.warmup, config.weight_decay, config.batch) == (1e-3, 750, 0.1, 1024)
    assert config.steps == 36000
    assert load_config(str(config.model)) == load_config(f"{name}.json")


@pytest.mark.parametrize(
    ("name", "weights"),
    [("phi-1_5", {"textbooks": 0.8, "code": 0.2}), ("phi-1_5-web", {"textbooks": 0.4, "web": 0.4, "code": 0.2})],
)
def test_phi_1_5_recipes_have_the_published_hyperparameters_and_mixture(name, weights):
    config = load_run_config(RECIPES / f"{name}.yaml")
    assert config.data == weights
    assert (config.lr, config.schedule, config.warmup, config.weight_decay) == (2e-4, "constant", 0, 0.1)
    assert (config.beta1, config.beta2, config.eps, config.batch, config.stage) == (0.9, 0.98, 1e-7, 2048, 1)
    assert config.steps * config.batch * 2048 == pytest.approx(150e9, rel=0.01)
    assert load_config(str(config.model)) == load_config("phi-1_5.json")


FILES = {
    "zero1": 1, "zero2": 2, "zero3": 3, "zero2-offload": 2, "zero3-offload": 3, "zero3-96": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_deepspeed_files_are_of_their_stage_and_mean_what_they_say_to_deepspeed(name):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    path = RECIPES / "deepspeed" / f"{name}.json"
    config = RunConfig(deepspeed=str(path))
    assert config.stage == FILES[name]
    out = engine_config(config, 8, 2)
    assert "auto" not in json.dumps(out)
    read = DeepSpeedZeroConfig(**out["zero_optimization"])
    for key, value in json.loads(path.read_text())["zero_optimization"].items():
        found = getattr(read, key.removeprefix("stage3_"))  # DeepSpeed ignores a key that it does not know
        if isinstance(value, dict):
            assert {part: getattr(found, part) for part in value} == value
        else:
            assert found == value
    assert (read.offload_optimizer is not None) == ("offload" in name)
    assert (read.offload_param is not None) == (name == "zero3-offload")


def test_every_deepspeed_file_is_explained_and_tested():
    explained = (RECIPES / "deepspeed" / "README.md").read_text()
    assert {path.stem for path in (RECIPES / "deepspeed").glob("*.json")} == set(FILES)
    assert all(f"`{name}.json`" in explained for name in FILES)
