"""The files beside the weights: one writer for expansions and for exports of runs."""

import json

import torch
from tiny_models import phi_config, phi_model
from transformers import AutoConfig, GenerationConfig

from phigrow.checkpoints.companions import Companions, generation_settings, make_companions
from phigrow.checkpoints.configuration import resolve_config
from phigrow.checkpoints.token_ids import TokenIds
from phigrow.models.versions import reads_rope_parameters

CONFIG = phi_config(8, 2, 16, 2, 2)
IDS = TokenIds({"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None}, {"eos_token_id": [2, 3]})


def test_only_tokenizer_files_are_copied(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    folder.mkdir()
    for name in ("tokenizer.json", "merges.txt", "model.safetensors", "secret.txt"):
        (source / name).write_text(name)
    Companions(CONFIG, {}, "text", source).write(folder)
    expected = ["README.md", "config.json", "generation_config.json", "merges.txt", "tokenizer.json"]
    assert sorted(path.name for path in folder.iterdir()) == expected
    assert json.loads((folder / "config.json").read_text()) == CONFIG
    assert (folder / "README.md").read_text() == "text"


def test_generation_settings_are_the_sources_with_the_models_token_ids(tmp_path):
    (tmp_path / "generation_config.json").write_text(
        '{"eos_token_id": 1, "pad_token_id": 4, "temperature": 0.5, "_from_model_config": true}'
    )
    settings = generation_settings(tmp_path)
    made = make_companions(resolve_config(CONFIG, "here"), "bfloat16", IDS, settings, card="", tokenizer=None)
    assert made.generation == {"eos_token_id": [2, 3], "temperature": 0.5}
    assert {key: made.config[key] for key in IDS.model} == IDS.model
    assert generation_settings(tmp_path / "nowhere") == {}


def test_transformers_reads_what_is_written_as_its_own(tmp_path):
    config = phi_model(CONFIG, torch.float32).config
    resolved = resolve_config(json.loads(config.to_json_string()), "here")
    made = make_companions(resolved, "bfloat16", IDS, {"top_k": 7}, card="", tokenizer=None)
    made.write(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    config.dtype, config.eos_token_id, config.bos_token_id = torch.bfloat16, [2, 3], 1
    changed = {"architectures": ["PhiForCausalLM"], "_name_or_path": str(tmp_path)}
    if not reads_rope_parameters():
        changed["rope_parameters"] = made.config["rope_parameters"]
    assert loaded.to_dict() == config.to_dict() | changed
    assert (
        GenerationConfig.from_pretrained(tmp_path).to_diff_dict().items()
        >= {"top_k": 7, "eos_token_id": [2, 3]}.items()
    )
    # Negative control: another value shows.
    assert loaded.to_dict() != config.to_dict() | changed | {"rope_parameters": {"rope_type": "x"}}
