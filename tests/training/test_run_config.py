"""Settings of a run: values, precedence, and the text of every refusal."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from phigrow.errors import GrowthError
from phigrow.measure import pairing
from phigrow.training import DEMO_MODEL, RunConfig, load_run_config
from phigrow.training.configuration import comparison_keys
from phigrow.training.declaration import Role, key
from phigrow.training.optimizer_spec import find_optimizer
from phigrow.training.optimizers import optimizer_names
from phigrow.training.options import parse, settings_page, usage
from phigrow.training.settings import SECTIONS


def refused(*words: str, recipe: Path | None = None) -> str:
    with pytest.raises(GrowthError) as error:
        load_run_config(recipe, words)
    return str(error.value)


def test_options_override_the_recipe_and_the_recipe_overrides_defaults(tmp_path):
    recipe = tmp_path / "run.yaml"
    recipe.write_text("steps: 40\nlr: 1e-4\nwarmup: 4\nactivation-checkpointing: true\n")
    config = load_run_config(recipe, ["--steps", "50", "--grad_clip=0.5", "--compile", "--min-lr", "0"])
    assert (config.steps, config.lr, config.warmup, config.batch) == (50, 1e-4, 4, RunConfig().batch)
    assert (config.grad_clip, config.compile, config.activation_checkpointing, config.min_lr) == (0.5, True, True, 0.0)


def test_words_of_every_type():
    config = load_run_config(None, ["--export", "none", "--compile", "no", "--threads", "2", "--out", "runs/1"])
    assert (config.export, config.compile, config.threads, config.out) == (None, False, 2, "runs/1")
    assert load_run_config(None, ["--compile", "auto"]).compile == "auto"
    assert load_run_config(None, ["--steps", "30", "--seed", "7"]).seed == 7


def test_an_unknown_key_names_its_neighbours(tmp_path):
    assert "no key 'wamup'" in refused("--wamup", "3")
    assert "did you mean warmup" in refused("--wamup", "3")
    assert "--help lists every key" in refused("--zzzz", "3")
    recipe = tmp_path / "run.yaml"
    recipe.write_text("batchsize: 3\n")
    message = refused(recipe=recipe)
    assert "no key 'batchsize'" in message
    assert str(recipe) in message
    assert "batch" in message.split("did you mean")[1]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--steps", "many"), "a whole number"),
        (("--steps", "1.5"), "a whole number"),
        (("--lr", "fast"), "a number"),
        (("--compile", "perhaps"), "one of true, false, layers, auto"),
        (("--micro-batch", "x"), "a whole number or none"),
        (("--steps", "none"), "a whole number"),
    ],
)
def test_a_wrong_type_names_key_place_and_expectation(words, what):
    message = refused(*words)
    assert words[0][2:].replace("-", "_") in message
    assert "the command line" in message
    assert f"give {what}" in message


def test_wrong_types_and_shapes_in_a_file(tmp_path):
    recipe = tmp_path / "run.yaml"
    for text, part in [
        ("steps: [1]\n", "give a whole number"),
        ("lr: true\n", "give a number"),
        ("model: 3\n", "give text or a mapping or none"),
        ("- steps\n", "not a mapping"),
        ("steps: {\n", "not valid YAML"),
    ]:
        recipe.write_text(text)
        message = refused(recipe=recipe)
        assert part in message
        assert str(recipe) in message
    assert "there is no such recipe" in refused(recipe=tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"min_lr": 1.5}, "min_lr is 1.5"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"dtype": "int8"}, "one of auto, bf16, fp16, fp32"),
        ({"schedule": "linear"}, "one of cosine, wsd, constant"),
        ({"zero": 4}, r"zero is 4\n.*\n.*give a value from 0 to 3"),
        ({"eval_at": [0]}, r"eval_at has 0\n.*\n.*give 1 or more"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"steps": True}, "steps is True"),
        ({"steps": 10, "warmup": 11}, "warmup 11 is longer than the 10 steps"),
        ({"steps": 10, "warmup": 5, "schedule": "wsd", "decay": 6}, "do not fit into 10 steps"),
        ({"source_tokens": 5.0}, "source costs are set, but the run starts from scratch"),
    ],
)
def test_values_that_cannot_be(settings, part):
    with pytest.raises(GrowthError, match=part):
        RunConfig(**settings)


def test_optimizer_names_an_optimizer_and_a_folder_is_told_where_to_go(tmp_path):
    assert RunConfig().optimizer == "adamw"
    recipe = tmp_path / "run.yaml"
    recipe.write_text("init: large\noptimizer: large-optimizer\n")
    message = refused(recipe=recipe)
    assert "there is no optimizer 'large-optimizer'" in message
    assert "A folder of 'phigrow grow-optimizer' belongs into init_optimizer" in message
    assert load_run_config(options=["--init", "a", "--init-optimizer", "b"]).init_optimizer == "b"


@pytest.mark.parametrize("name", optimizer_names())
def test_every_optimizer_describes_its_states(name):
    spec = find_optimizer(name)
    assert spec.name == name
    assert spec.summary
    assert spec.states
    assert all(power in (1, 2) for power in spec.states.values())


@pytest.mark.parametrize("word", ["no", "Off", "yes", "true"])
def test_a_switch_is_no_name(tmp_path, word):
    recipe = tmp_path / "run.yaml"
    recipe.write_text(f"export: '{word}'\n")
    message = refused(recipe=recipe)
    assert f"export is '{word}'" in message
    assert f"write none, or ./{word} for a file of this name" in message
    assert load_run_config(None, ["--compile", "yes", "--export", f"./{word}"]).export == f"./{word}"


def test_a_number_too_large_for_a_float_is_one_error():
    with pytest.raises(GrowthError, match="grad_clip is 1000"):
        RunConfig(grad_clip=10**400)
    with pytest.raises(GrowthError, match="lr"):
        RunConfig(lr=10**400)


def test_a_key_in_two_spellings_is_refused(tmp_path):
    recipe = tmp_path / "run.yaml"
    recipe.write_text("grad-clip: 1\ngrad_clip: 0.5\n")
    assert "grad_clip stands twice, as grad_clip and as grad-clip" in refused(recipe=recipe)


def test_words_without_keys_and_keys_without_words():
    assert "'steps' does not belong to a key" in refused("steps")
    assert "--steps has no value" in refused("--steps")
    assert "--lr has no value" in refused("--lr", "--steps", "3")


def test_the_launchers_own_word_is_dropped_and_help_is_not_a_run():
    config = parse(["--local_rank=1", "--steps", "30"])
    assert config is not None
    assert config.steps == 30
    assert parse([]) == parse(["--local_rank=0"]) == RunConfig()
    assert parse(["--help"]) is None


def test_help_has_every_key_with_its_meaning():
    text = usage()
    for field in dataclasses.fields(RunConfig):
        assert re.search(rf"^  --{field.name.replace('_', '-')}\b", text, re.M)
        assert field.metadata["help"] in " ".join(text.split())


def test_the_stage_comes_from_one_place(tmp_path):
    file = tmp_path / "zero3.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    assert RunConfig().stage == 1
    assert RunConfig(deepspeed=str(file)).stage == 3
    with pytest.raises(GrowthError, match="zero is 2, but the DeepSpeed file has stage 3"):
        RunConfig(deepspeed=str(file), zero=2).stage  # noqa: B018
    with pytest.raises(GrowthError, match="cannot be read"):
        RunConfig(deepspeed=str(tmp_path / "none.json")).stage  # noqa: B018
    # The checkpoint knows the stage that wrote it: the curve is the same to rounding at every stage.
    assert "zero" not in RunConfig(deepspeed=str(file)).reproducibility_keys()


def test_curve_keys_leave_out_what_only_rounds_or_reports():
    assert not {"out", "micro_batch", "attention", "save_every", "log_every", "threads", "export"} & set(
        RunConfig().reproducibility_keys()
    )
    assert {"steps", "batch", "lr", "seed", "model", "init", "dtype"} <= set(RunConfig().reproducibility_keys())


def test_the_demo_model_has_phis_geometry():
    hidden, heads = DEMO_MODEL["hidden_size"], DEMO_MODEL["num_attention_heads"]
    assert hidden / heads * DEMO_MODEL["partial_rotary_factor"] == 32


def test_importing_training_loads_nothing_heavy():
    heavy = "{'torch', 'transformers', 'deepspeed', 'yaml'}"
    code = f"import sys, phigrow.training as t; t.load_run_config; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_mixture_is_a_mapping_in_the_file_and_on_the_command_line(tmp_path):
    recipe = tmp_path / "run.yaml"
    recipe.write_text("data: {textbooks: 0.8, code: 0.2}\n")
    assert load_run_config(recipe).data == {"textbooks": 0.8, "code": 0.2}
    assert load_run_config(options=["--data", "{textbooks: 0.8, code: 0.2}"]).data == {"textbooks": 0.8, "code": 0.2}
    assert load_run_config(options=["--data", "books"]).data == "books"
    with pytest.raises(GrowthError, match=r"mixture is .*\n  where: mixture in the command line\n  why: "):
        load_run_config(options=["--data", "books", "--mixture", "{a: 1"])
    with pytest.raises(GrowthError, match="mixture is 'a'"):
        load_run_config(options=["--data", "books", "--mixture", "a"])


def test_infinite_numbers_are_refused(tmp_path):
    recipe = tmp_path / "run.yaml"
    for name, words in (("batch", ".inf"), ("lr", ".inf"), ("beta1", ".nan"), ("save_at", "[.inf]")):
        recipe.write_text(f"{name}: {words}\n")
        with pytest.raises(GrowthError, match=rf"{name} is (inf|nan|\[inf\])\n  where: {name}"):
            load_run_config(recipe)
    recipe.write_text("lr: 1e-2\n")
    assert load_run_config(recipe).lr == 0.01


@pytest.mark.parametrize("name", ["beta1", "beta2", "momentum"])
def test_a_decay_rate_of_1_is_refused(name):
    with pytest.raises(
        GrowthError, match=rf"{name} is 1\n  where: {name}\n  why: .* stays 0\n  what to do: give a value"
    ):
        RunConfig(**{name: 1.0})
    assert getattr(RunConfig(**{name: 0.999}), name) == 0.999


def test_a_negative_source_cost_is_refused():
    with pytest.raises(GrowthError, match=r"source_tokens is -5\n  where: source_tokens\n  what to do: give 0 or more"):
        RunConfig(init="checkpoint", source_tokens=-5)
    assert RunConfig(init="checkpoint", source_tokens=5).source_tokens == 5


def test_data_comes_from_one_place():
    with pytest.raises(GrowthError, match=r"stream and data are both set\n  where: stream"):
        RunConfig(data="books", stream={"ref": "x", "tokenizer": "y"})
    for data in (None, {"books": 1}):
        with pytest.raises(GrowthError, match=r"mixture requires data to be one folder\n  where: mixture"):
            RunConfig(data=data, mixture={"a": 1})
    with pytest.raises(GrowthError, match=r"documents is 'inside'\n.*\n.*one of plain, within"):
        RunConfig(documents="inside")


FIRST_RELEASE = {
    Role.RESUME: (
        "init model vocab_size documents data_start seed steps batch lr min_lr warmup schedule decay"
        " schedule_start schedule_steps rewarm weight_decay beta1 beta2 eps grad_clip fresh_lr fresh_warmup copied_lr"
        " dtype"
    ),
    Role.OPERATIONAL: "micro_batch offload_dir save_every keep log_every nonfinite_limit monitor threads",
    Role.STUDY: (
        "init model data stream arm out seed steps schedule decay trunk branch_from save_at lr_chosen_by resume"
        " universal source_tokens source_flops source_seconds data_start schedule_start schedule_steps"
    ),
    Role.STAGES: (
        "init model data stream data_start schedule_start schedule_steps arm out seed steps trunk branch_from"
        " lr_chosen_by resume universal source_tokens source_flops source_seconds export export_dtype"
    ),
    Role.ARMS: "steps batch schedule lr seed eval_blocks documents mixture",
    Role.BRANCH: "steps decay",
}


@pytest.mark.parametrize("role", FIRST_RELEASE, ids=str)
def test_no_setting_has_lost_a_role_that_it_had_in_the_first_release(role):
    assert set(FIRST_RELEASE[role].split()) <= set(RunConfig.keys_with(role))


def test_every_setting_is_declared_in_one_section():
    declared = [name for section in SECTIONS for name in section.__annotations__]
    assert declared == [field.name for field in dataclasses.fields(RunConfig)]
    assert all(field.metadata["help"].endswith(".") for field in dataclasses.fields(RunConfig))


def test_an_operational_setting_cannot_be_one_that_results_depend_on():
    for role in (Role.RESUME, Role.ARMS, Role.START):
        with pytest.raises(ValueError, match="operational setting cannot"):
            key(1, "Help.", role=Role.OPERATIONAL | role)


def test_a_record_names_what_a_report_compares():
    found = comparison_keys()
    for name in ("equal", "named"):
        assert set(pairing.FIRST_RELEASE[name]) <= set(found[name])
    assert found["unset"] == pairing.FIRST_RELEASE["unset"]
    assert not {"init", "model", "threads", "micro_batch"} & {*found["equal"], *found["named"]}


def test_the_page_of_settings_is_generated():
    path = Path(__file__).parents[2] / "docs" / "settings.md"
    if os.environ.get("PHIGROW_WRITE_GOLDEN"):
        path.write_text(settings_page(), encoding="utf-8")
    assert path.read_text(encoding="utf-8") == settings_page()
