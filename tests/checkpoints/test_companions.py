"""The files beside the weights: one writer for expansions and for exports of runs."""

import copy
import json

import torch
import yaml
from tiny_models import phi_config, phi_model
from transformers import AutoConfig, GenerationConfig

from phigrow.checkpoints.companions import (
    generation_config,
    model_card,
    model_settings,
    stored_config,
    write_companions,
)

CONFIG = phi_config(8, 2, 16, 2, 2)


def test_the_dtype_keeps_the_spelling_that_is_there():
    assert stored_config({"dtype": "float32"}, "A", "bfloat16") == {"dtype": "bfloat16", "architectures": ["A"]}
    assert stored_config({}, "A", "bfloat16") == {"torch_dtype": "bfloat16", "architectures": ["A"]}
    both = stored_config({"dtype": "float32", "torch_dtype": "float32", "architectures": ["B"]}, "A", "bfloat16")
    assert both == {"dtype": "float32", "torch_dtype": "bfloat16", "architectures": ["B"]}


def test_code_of_the_source_is_not_referred_to():
    assert "auto_map" not in stored_config({"auto_map": {"AutoModel": "code.Model"}}, "A", "float32")
    assert model_settings(stored_config({"vocab_size": 3}, "A", "float32")) == {"vocab_size": 3, "architectures": ["A"]}


def test_only_tokenizer_files_are_copied(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    folder.mkdir()
    for name in ("tokenizer.json", "merges.txt", "model.safetensors", "secret.txt"):
        (source / name).write_text(name)
    write_companions(folder, CONFIG, {}, tokenizer=source, card="text")
    expected = ["README.md", "config.json", "generation_config.json", "merges.txt", "tokenizer.json"]
    assert sorted(path.name for path in folder.iterdir()) == expected
    assert json.loads((folder / "config.json").read_text()) == CONFIG


def test_generation_settings_are_the_sources_with_the_models_token_ids(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1, "temperature": 0.5}')
    found = generation_config({"eos_token_id": 2, "bos_token_id": None}, tmp_path)
    assert found == {"eos_token_id": 2, "temperature": 0.5}
    assert generation_config({"pad_token_id": 0}, tmp_path / "nowhere") == {"pad_token_id": 0}


def test_a_card_is_metadata_and_a_text():
    card = model_card("# Title\n", base_model="owner/a: [name]", tags=["one", "two"])
    _, data, text = card.split("---\n")
    assert yaml.safe_load(data) == {
        "base_model": "owner/a: [name]",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["one", "two"],
    }
    assert text == "\n# Title\n"


def test_configurations_are_written_as_transformers_writes_them(tmp_path):
    config = copy.deepcopy(phi_model(CONFIG, torch.float32).config)
    config.architectures, config.dtype = ["PhiForCausalLM"], torch.bfloat16
    config.save_pretrained(tmp_path / "theirs")
    generation = GenerationConfig.from_model_config(config)
    generation.save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    stored = stored_config(json.loads(config.to_json_string()), "PhiForCausalLM", "bfloat16")
    write_companions(tmp_path / "ours", stored, json.loads(generation.to_json_string()))
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    assert AutoConfig.from_pretrained(tmp_path / "ours").dtype == torch.bfloat16
