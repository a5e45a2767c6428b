"""The files beside an export's weights are decided before the run trains."""

import json
from dataclasses import replace

import pytest
import torch
from scenarios import TINY, VOCAB, FakeBlocks
from tiny_models import phi_config, phi_model
from transformers import AutoConfig, GenerationConfig

import phigrow
from phigrow.errors import GrowthError
from phigrow.models.versions import reads_rope_parameters
from phigrow.training import RunConfig
from phigrow.training.export_files import export_files
from phigrow.training.model import causal_lm_config, model_config

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
START = phi_config(32, 4, 48, 2, 4, vocab=VOCAB, max_position_embeddings=64)


@pytest.fixture
def tokenizer(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<b>", "eos_token": "<e>", "pad_token": "<e>"}')
    (folder / "tokenizer.json").write_text(
        json.dumps({"added_tokens": [{"id": 5, "content": "<b>"}, {"id": 0, "content": "<e>"}]})
    )
    return folder


def files_of(config, blocks):
    config = replace(config, dtype="fp32")
    return export_files(config, model_config(config, data_vocab=blocks.vocab_size, seq_len=blocks.seq_len), blocks)


def ids(content):
    return [content.get(key) for key in IDS]


def test_a_run_from_scratch_has_the_ids_of_its_data(tokenizer):
    """They are not those of the configuration that only gave the sizes, nor those that PhiConfig fills in."""
    blocks = FakeBlocks(tokenizer_dir=tokenizer)
    for model in (TINY, TINY | {"bos_token_id": 90, "eos_token_id": 90}, TINY | {"eos_token_id": 5000}):
        files = files_of(RunConfig(model=model), blocks)
        assert (ids(files.config), ids(files.generation)) == ([5, 0, None], [5, 0, 0])
    # Without the tokenizer only the end of a document is known.
    files = files_of(RunConfig(model=TINY), FakeBlocks())
    assert (ids(files.config), ids(files.generation)) == ([None, 0, None], [None, 0, None])
    # Padding is a part of the model: it has no gradient.
    assert ids(files_of(RunConfig(model=TINY | {"pad_token_id": 7}), blocks).config) == [5, 0, 7]


def test_an_export_keeps_what_its_start_says(save_model, tokenizer, tmp_path):
    start = save_model(phi_model(START | {"eos_token_id": 3}, torch.float32), "start")
    (start / "generation_config.json").write_text('{"eos_token_id": [3, 9], "temperature": 0.25, "do_sample": true}')
    (start / "README.md").write_text("---\nlicense: mit\nbase_model: microsoft/phi-1\n---\n")
    files = files_of(RunConfig(init=str(start), export_dtype="bf16"), FakeBlocks(tokenizer_dir=tokenizer))
    assert files.generation == {
        "bos_token_id": 5, "eos_token_id": [3, 9], "pad_token_id": 0, "temperature": 0.25, "do_sample": True,
    }  # fmt: skip
    assert files.card.startswith("---\nbase_model: microsoft/phi-1\nlibrary_name: transformers\nlicense: mit\n")
    assert f"trained from {start.name}" in files.card
    out = tmp_path / "out"
    out.mkdir()
    files.write(out)
    loaded = AutoConfig.from_pretrained(out)
    assert (loaded.dtype, loaded.bos_token_id, loaded.eos_token_id) == (torch.bfloat16, 5, 3)
    assert loaded.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    assert GenerationConfig.from_pretrained(out).temperature == 0.25
    assert (
        files.config.items() >= {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "torch_dtype": "bfloat16"}.items()
    )
    # The same from a growth of this start, which has both spellings itself.
    grown = phigrow.expand(start, {**START, "eos_token_id": 3, "num_hidden_layers": 3}, tmp_path / "grown")
    again = files_of(RunConfig(init=str(grown), export_dtype="bf16"), FakeBlocks(tokenizer_dir=tokenizer))
    assert again.generation == files.generation
    assert again.config == {key: files.config[key] for key in again.config} | {"num_hidden_layers": 3}


def test_a_start_with_an_id_outside_its_vocabulary_is_refused(save_model):
    start = save_model(phi_model(START, torch.float32), "start")
    config = json.loads((start / "config.json").read_text())
    for key in IDS:
        (start / "config.json").write_text(json.dumps(config | {key: VOCAB}))
        with pytest.raises(GrowthError, match=f"{key} is {VOCAB}, but the vocabulary has the ids 0 to {VOCAB - 1}"):
            files_of(RunConfig(init=str(start)), FakeBlocks())


def test_a_start_that_transformers_reads_in_another_way_is_refused_or_made_whole(save_model):
    if reads_rope_parameters():  # version 4 of transformers does not check types of values
        with pytest.raises(GrowthError, match="transformers cannot read the configuration") as caught:
            causal_lm_config(TINY | {"rms_norm_eps": 1e-5, "use_cache": "always"})
        assert "use_cache" in str(caught.value)
    # A null head and stale kinds of layers crash transformers; a run from such a start trains the model that is meant.
    plain = causal_lm_config(TINY)
    mended = causal_lm_config(TINY | {"head_dim": None, "layer_types": ["full_attention"] * 7})
    assert mended.to_dict() == plain.to_dict()
    assert causal_lm_config(TINY | {"num_hidden_layers": 3}).to_dict() != plain.to_dict()


def test_the_data_of_a_stream_may_have_no_tokenizer_yet():
    blocks = replace(FakeBlocks(), eos_token_id=11)
    assert ids(files_of(RunConfig(model=TINY), blocks).config) == [None, 11, None]
