"""The files beside grown weights: token ids, generation settings, the model card, and configurations that load."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import logits, model_of, phi_config, phi_model, probe
from transformers import AutoModelForCausalLM

import phigrow
from phigrow.errors import GrowthError
from phigrow.expansion.expand import preview
from phigrow.growth.growth_spec import GrowthSpec
from phigrow.models.families import all_families

SRC, DST = phi_config(32, 4, 48, 2, 4), phi_config(72, 6, 70, 3, 4)
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
BARE = {key: value for key, value in DST.items() if key not in IDS}
TOKENIZER = {
    "tokenizer_config.json": {"bos_token": "<s>", "eos_token": {"content": "<e>"}, "pad_token": "<p>"},
    "tokenizer.json": {
        "added_tokens": [{"id": 4, "content": "<s>"}, {"id": 0, "content": "<e>"}, {"id": 5, "content": "<p>"}]
    },
}


@pytest.fixture
def source(save_model):
    """A source whose configuration has no ids, with the files of a tokenizer that has."""
    folder = save_model(phi_model(SRC, torch.float32))
    (folder / "generation_config.json").unlink()
    for name, content in TOKENIZER.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def read(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def ids_of(folder, name="config.json"):
    return [read(folder, name).get(key) for key in IDS]


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def test_ids_come_from_the_tokenizer_where_no_configuration_has_them(source, tmp_path):
    out = phigrow.expand(source, BARE, tmp_path / "out")
    assert ids_of(out) == [4, 0, None]
    assert ids_of(out, "generation_config.json") == [4, 0, 5]
    model = loaded(out)
    assert (model.config.bos_token_id, model.config.eos_token_id, model.generation_config.eos_token_id) == (4, 0, 0)
    # Negative control: without a tokenizer nobody knows them, and PhiConfig's 1 and 2 do not take their place.
    for name in TOKENIZER:
        (source / name).unlink()
    bare = phigrow.expand(source, BARE, tmp_path / "bare")
    assert ids_of(bare) == [None] * 3
    assert (loaded(bare).config.bos_token_id, loaded(bare).config.eos_token_id) == (None, None)


def test_the_sources_generation_settings_keep_their_list_of_ends(source, tmp_path):
    (source / "generation_config.json").write_text('{"eos_token_id": [7, 9], "temperature": 0.5, "do_sample": true}')
    (source / "config.json").write_text(json.dumps(read(source) | {"eos_token_id": 7}))
    for name, config, ends in (
        ("kept", {**DST, "eos_token_id": 7}, [7, 9]),
        ("bare", BARE, [7, 9]),
        ("own", {**DST, "eos_token_id": 3}, 3),
    ):
        generation = read(phigrow.expand(source, config, tmp_path / name), "generation_config.json")
        assert generation == {
            "bos_token_id": 4,
            "eos_token_id": ends,
            "pad_token_id": 5,
            "temperature": 0.5,
            "do_sample": True,
        }
    assert ids_of(tmp_path / "bare")[1] == 7


def test_a_live_model_keeps_its_generation_settings():
    model = phi_model(SRC | {"eos_token_id": 7, "bos_token_id": 3}, torch.float32)
    model.generation_config.update(eos_token_id=[7, 9], temperature=0.3, do_sample=True)
    grown = phigrow.expand_model(model, BARE)
    assert (grown.config.bos_token_id, grown.config.eos_token_id, grown.config.pad_token_id) == (3, 7, None)
    settings = grown.generation_config
    assert (settings.eos_token_id, settings.bos_token_id, settings.temperature) == ([7, 9], 3, 0.3)
    assert grown.generation_config is not model.generation_config
    assert phigrow.expand_model(model, {**DST, "eos_token_id": 5}).generation_config.eos_token_id == 5
    with pytest.raises(GrowthError, match="eos_token_id is 61, but the vocabulary has the ids 0 to 60"):
        phigrow.expand_model(model, {**DST, "eos_token_id": 61})


BAD = {
    "an end beyond the vocabulary": (
        {"eos_token_id": 61},
        "eos_token_id is 61, but the vocabulary has the ids 0 to 60",
    ),
    "padding of -1": ({"pad_token_id": -1}, "pad_token_id is -1"),
    "no factor": ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    "an unknown activation": ({"hidden_act": "nope"}, "nope"),
    "a null epsilon": ({"layer_norm_eps": None}, "layer_norm_eps"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_would_not_load_is_refused_before_a_byte_is_written(case, source, tmp_path):
    more, message = BAD[case]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(GrowthError, match=message):
        phigrow.expand(source, {**DST, **more}, tmp_path / "out")
    with pytest.raises(GrowthError, match=message):
        preview(source, {**DST, **more}, GrowthSpec.of("wr"))
    with pytest.raises(GrowthError, match=message):
        phigrow.expand_model(phi_model(SRC, torch.float32), {**DST, **more})
    assert sorted(tmp_path.rglob("*")) == before


REST = {
    "quantisation": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "code": {"auto_map": {"AutoModelForCausalLM": "code.Model"}},
    "two dtypes": {"dtype": "float16", "torch_dtype": "bfloat16"},
    "a null head": {"head_dim": None},
    "stale kinds of layers": {"layer_types": ["full_attention"] * 2},
}


@pytest.mark.parametrize("case", REST)
def test_what_describes_other_weights_does_not_reach_the_output(case, source, tmp_path):
    out = phigrow.expand(source, {**DST, **REST[case]}, tmp_path / "out", method="lossless")
    assert not set(REST[case]) & set(read(out)) - {"dtype", "torch_dtype"}
    assert (read(out)["dtype"], read(out)["torch_dtype"]) == ("float32", "float32")
    model, ids = loaded(out), probe(61)
    assert model.dtype == torch.float32
    assert float((logits(model, ids) - logits(loaded(source), ids)).abs().max()) < 1e-5


def test_a_qwen2_of_another_depth_grows_from_its_own_configuration(save_model, tmp_path):
    """transformers 5 writes one kind for every layer, so a changed number of layers alone did not load."""
    sizes = {"kv": 2, "group": 2, "q": 8, "rotary": 8, "mlp": 20, "layer": 2, "vocab": 40, "hidden": 32}
    config = all_families()["qwen2"].config_of(sizes) | {"max_position_embeddings": 64}
    model = model_of(config, torch.float32)
    folder = save_model(model)
    assert read(folder)["layer_types"] == ["full_attention"] * 2
    out = phigrow.expand(folder, read(folder) | {"num_hidden_layers": 3}, tmp_path / "out", method="lossless")
    live = phigrow.expand_model(model, model.config.to_dict() | {"num_hidden_layers": 3}, method="lossless")
    assert live.config.layer_types == ["full_attention"] * 3
    ids = probe(40)
    for grown in (loaded(out), live):
        assert float((logits(grown, ids) - logits(loaded(folder), ids)).abs().max()) < 1e-5
    assert load_file(out / "model.safetensors").keys() == live.state_dict().keys()


def test_the_card_and_the_record_name_the_repository_its_commit_and_its_licence(source, tmp_path):
    commit = "ab" * 20
    snapshot = tmp_path / "models--microsoft--phi-1_5" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    source.rename(snapshot)
    (snapshot / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\n\nThe source.\n")
    out = phigrow.expand(snapshot, DST, tmp_path / "out")
    assert read(out, "phigrow.json")["source"].items() >= {"name": "microsoft/phi-1_5", "revision": commit}.items()
    card = (out / "README.md").read_text()
    assert card.startswith(
        "---\nbase_model: microsoft/phi-1_5\nlanguage:\n- en\nlibrary_name: transformers\nlicense: mit\n"
    )
    assert "\n# phi-1_5 grown by wr\n" in card
    # A growth of the growth keeps both.
    again = phigrow.expand(out, {**DST, "num_hidden_layers": 4}, tmp_path / "again")
    assert (again / "README.md").read_text().split("---")[1] == card.split("---")[1]
    assert read(again, "phigrow.json")["source"].items() >= {"name": "out", "revision": None}.items()
