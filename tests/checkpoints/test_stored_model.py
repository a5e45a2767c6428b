"""Stored weights against the claims of their configuration: tied heads, names of tensors, masks, quantisation."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Config, logits, model_of, probe, random_pair

import phigrow
from phigrow.checkpoints import universal
from phigrow.checkpoints.reader import CheckpointReader
from phigrow.checkpoints.stored_model import StoredModel, UntiedHead, equal, stored_model_config
from phigrow.errors import GrowthError
from phigrow.models.config import load_config
from phigrow.models.families import all_families
from phigrow.models.family import TIE

FAMILIES = list(all_families())
OWN = "model.safetensors"
EXACT = 1e-4


def made(folder: Path, name: str, **flags: Any) -> tuple[Path, Config, Config, dict[str, torch.Tensor]]:
    """A saved tiny model of a family, its configuration, a larger one, and the saved tensors."""
    src, dst = random_pair(all_families()[name], random.Random(3), **flags)
    dst = dst | {"vocab_size": src["vocab_size"]}
    model_of(src, torch.float32).save_pretrained(folder)
    return folder, src, dst, load_file(folder / OWN)


def store(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / OWN, {"format": "pt"})


def of_transformers(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def names(name: str) -> tuple[str, str]:
    family = all_families()[name]
    return family.embedding, str(family.head_matrix)


@pytest.fixture(params=FAMILIES)
def differing(request, tmp_path) -> tuple[str, Path, Config, Config]:
    """A folder whose configuration ties head and embedding, and whose file stores two of them."""
    folder, src, dst, tensors = made(tmp_path / "src", request.param, tie_word_embeddings=True)
    embedding, head = names(request.param)
    assert head not in tensors
    generator = torch.Generator().manual_seed(7)
    store(folder, tensors | {head: 0.15 * torch.randn(tensors[embedding].shape, generator=generator)})
    return request.param, folder, src, dst


def test_a_head_of_its_own_is_grown_as_transformers_loads_it(differing, tmp_path):
    name, folder, src, dst = differing
    ids = probe(src["vocab_size"])
    reference = of_transformers(folder)
    expected = logits(reference, ids)
    untied = dst | {TIE: False}
    with pytest.warns(UntiedHead, match=r"tie_word_embeddings is true, but .* have different values"):
        plan = phigrow.plan(folder, untied, "lossless")
    assert plan.exact
    assert plan.src_config[TIE] is False
    with pytest.warns(UntiedHead):
        out = phigrow.expand(folder, untied, tmp_path / "out", method="lossless")
    assert (logits(of_transformers(out), ids) - expected).abs().max() < EXACT
    with pytest.warns(UntiedHead):
        live = phigrow.expand_model(reference, untied, method="lossless")
    assert (logits(live, ids) - expected).abs().max() < EXACT
    with pytest.warns(UntiedHead):
        assert phigrow.verify(folder, out, backend="numpy").passed
    with pytest.warns(UntiedHead):
        assert phigrow.verify(folder, out, backend="transformers").passed
    # Negative control: the embedding as head, which the flag asks for, is another function.
    embedding, head = names(name)
    tensors = load_file(folder / OWN)
    store(folder, tensors | {head: tensors[embedding].clone()})
    assert (logits(of_transformers(folder), ids) - expected).abs().max() > 0.1


def test_a_head_of_its_own_does_not_grow_into_a_tied_one(differing, tmp_path):
    name, folder, _, dst = differing
    message = rf"differ in tie_word_embeddings\n  where: {names(name)[1]}\n.*false in the source.*true in the dest"
    for grow in (phigrow.plan, lambda *words: phigrow.expand(*words, tmp_path / "out")):
        with pytest.warns(UntiedHead), pytest.raises(GrowthError, match=message):
            grow(folder, dst)
    assert not (tmp_path / "out").exists()
    with pytest.warns(UntiedHead), pytest.raises(GrowthError, match=message):
        phigrow.expand_model(of_transformers(folder), dst)


@pytest.mark.parametrize("differing", ["phi"], indirect=True)
def test_the_command_line_warns_once(differing, tmp_path, monkeypatch, capsys):
    import phigrow.cli

    _, folder, _, dst = differing
    (tmp_path / "dst.json").write_text(json.dumps(dst | {TIE: False}))
    words = ["phigrow", "expand", "--src", str(folder), "--dst-config", str(tmp_path / "dst.json")]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "out")])
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with pytest.raises(SystemExit) as done:
            phigrow.cli.main()
    assert done.value.code in (0, None)
    assert capsys.readouterr().err.count(f"warning: {folder}: tie_word_embeddings is true") == 1


def test_a_source_on_the_hub_is_planned_by_its_weights(differing, tmp_path, monkeypatch):
    """Its configuration is there before its weights; the hub library itself is stood in for."""
    import huggingface_hub

    _, folder, _, dst = differing
    config = tmp_path / "config only"
    config.mkdir()
    shutil.copy(folder / "config.json", config)

    def snapshot_download(*_: Any, allow_patterns: list[str], **__: Any) -> str:
        return str(folder if "*.safetensors" in allow_patterns else config)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    untied = dst | {TIE: False}
    with pytest.warns(UntiedHead):
        out = phigrow.expand("some/model", untied, tmp_path / "out", method="lossless")
    with pytest.warns(UntiedHead):
        local = phigrow.expand(folder, untied, tmp_path / "local", method="lossless")
    assert (out / OWN).read_bytes() == (local / OWN).read_bytes()
    with pytest.warns(UntiedHead), pytest.raises(GrowthError, match="differ in tie_word_embeddings"):
        phigrow.expand("some/model", dst, tmp_path / "tied")


def test_training_and_teachers_take_the_stored_head(differing, tmp_path):
    from phigrow.training import RunConfig
    from phigrow.training.inputs import keep_inputs
    from phigrow.training.model import causal_lm_config, empty_model, model_config
    from phigrow.training.weights import fill_from_checkpoint

    _, folder, src, _ = differing
    run = RunConfig(init=str(folder), model=None)
    with pytest.warns(UntiedHead):
        config = model_config(run, data_vocab=src["vocab_size"], seq_len=8)
    assert config[TIE] is False
    model = empty_model(causal_lm_config(config), run, "sdpa")
    model.tie_weights()
    with pytest.warns(UntiedHead):
        fill_from_checkpoint(model, folder)
    ids = probe(src["vocab_size"])
    assert torch.equal(logits(model.eval(), ids), logits(of_transformers(folder), ids))
    # A run that loses its start continues with the same model.
    with pytest.warns(UntiedHead):
        keep_inputs(run, tmp_path / "out")
    assert load_config(tmp_path / "out" / "inputs" / "init")[TIE] is False
    assert load_config(folder)[TIE] is True


def to_pickle(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    (folder / OWN).unlink(missing_ok=True)
    torch.save(tensors, folder / "pytorch_model.bin")


@pytest.mark.filterwarnings("ignore:.*pickled weights")
@pytest.mark.parametrize("differing", ["llama", "gpt_neox"], indirect=True)
def test_training_takes_the_stored_head_of_pickled_weights(differing, tmp_path):
    from phigrow.training import RunConfig
    from phigrow.training.inputs import keep_inputs
    from phigrow.training.model import causal_lm_config, empty_model, model_config
    from phigrow.training.weights import fill_from_checkpoint

    name, folder, src, _ = differing
    embedding, head = names(name)
    ids = probe(src["vocab_size"])
    expected, tensors = logits(of_transformers(folder), ids), load_file(folder / OWN)
    to_pickle(folder, tensors)
    run = RunConfig(init=str(folder), model=None)

    def made_of(config: Config) -> Any:
        model = empty_model(causal_lm_config(config), run, "sdpa")
        model.tie_weights()
        return model.eval()

    with pytest.warns(UntiedHead):
        config = model_config(run, data_vocab=src["vocab_size"], seq_len=8)
    assert config[TIE] is False
    model = made_of(config)
    with pytest.warns(UntiedHead):
        fill_from_checkpoint(model, folder)
    assert torch.equal(logits(model, ids), expected)
    with pytest.warns(UntiedHead):
        keep_inputs(run, tmp_path / "out")
    assert load_config(tmp_path / "out" / "inputs" / "init")[TIE] is False
    # A tied model has no place for the head, and does not drop it.
    with pytest.warns(UntiedHead), pytest.raises(GrowthError, match=rf"no parameters of the model\n  where: {head}"):
        fill_from_checkpoint(made_of(config | {TIE: True}), folder)
    # Negative control: a second copy of the embedding is no second matrix, and the model is another one.
    to_pickle(folder, tensors | {head: tensors[embedding].clone()})
    config = model_config(run, data_vocab=src["vocab_size"], seq_len=8)
    assert config[TIE] is True
    model = made_of(config)
    fill_from_checkpoint(model, folder)
    assert (logits(model, ids) - expected).abs().max() > 0.1


def test_a_tensor_that_a_model_lacks_is_not_dropped(tmp_path):
    from phigrow.training import RunConfig
    from phigrow.training.model import causal_lm_config, empty_model
    from phigrow.training.weights import fill_from_checkpoint

    folder, src, _, tensors = made(tmp_path / "src", "llama", tie_word_embeddings=False)
    model = empty_model(causal_lm_config(load_config(folder)), RunConfig(init=str(folder), model=None), "sdpa")
    ignored = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    store(folder, tensors | ignored)
    fill_from_checkpoint(model, folder)
    expected = logits(model.eval(), probe(src["vocab_size"]))
    store(folder, tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(len(tensors["lm_head.weight"]))})
    with pytest.raises(GrowthError, match=r"1 unexpected: model\.layers\.0\.self_attn\.q_proj\.bias"):
        fill_from_checkpoint(model, folder)
    assert torch.equal(logits(model, probe(src["vocab_size"])), expected)


@pytest.mark.filterwarnings("ignore:.*pickled weights")
@pytest.mark.parametrize("pickled", [False, True])
def test_unchanged_weights_are_compared_once(tmp_path, monkeypatch, pickled):
    from phigrow.checkpoints import stored_model

    folder, _, _, tensors = made(tmp_path / "src", "llama", tie_word_embeddings=True)
    embedding, head = names("llama")
    write = to_pickle if pickled else store
    write(folder, tensors | {head: tensors[embedding] + 1})
    compared = []
    monkeypatch.setattr(stored_model, "equal", lambda *pair: compared.append(pair) or equal(*pair))
    for _ in range(2):  # the file is too young: a change in the same tick of the clock would not be noticed
        with pytest.warns(UntiedHead):
            assert stored_model_config(folder)[TIE] is False
    assert len(compared) == 2
    monkeypatch.setattr(stored_model, "SETTLED", 0)
    for _ in range(3):
        with pytest.warns(UntiedHead):
            config = stored_model_config(folder)
        assert config.pop(TIE) is False
    assert len(compared) == 3
    # Negative controls: other weights and another configuration are read again.
    write(folder, tensors | {head: tensors[embedding].clone()})
    assert stored_model_config(folder)[TIE] is True
    assert len(compared) == 4
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token_id": 3}))
    assert stored_model_config(folder)["bos_token_id"] == 3
    assert len(compared) == 5


def test_learning_a_growth_starts_from_the_stored_head(differing):
    from phigrow.expansion.expand import check_source
    from phigrow.ligo.model import GrownModel

    name, folder, _, dst = differing
    with pytest.warns(UntiedHead):
        plan = phigrow.plan(folder, dst | {TIE: False}, "ligo", depth="stack")
    with pytest.warns(UntiedHead):
        model = StoredModel(folder)
    with model:
        check_source(plan, model)
        source = {key: tensor.rows(0, tensor.shape[0]) for key, tensor in model.tensors.items()}
    grown = GrownModel(plan, source, noise=0.0, seed=0, dtype=torch.float32, attention="sdpa").weights()
    embedding, head = names(name)
    kept = source[head].shape[1]
    assert torch.equal(grown[embedding][:, :kept], source[embedding])
    assert grown[head].shape == grown[embedding].shape
    assert not torch.equal(grown[head], grown[embedding])


def test_planning_from_stored_weights_needs_no_torch(tmp_path):
    folder, _, dst, tensors = made(tmp_path / "src", "llama", tie_word_embeddings=True)
    store(folder, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    (tmp_path / "dst.json").write_text(json.dumps(dst))
    script = f"import sys, phigrow; print(phigrow.plan({str(folder)!r}, {str(tmp_path / 'dst.json')!r}).src_config"
    script += "['tie_word_embeddings'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_second_copy_of_the_embedding_is_no_second_matrix(name, tmp_path):
    folder, _, dst, tensors = made(tmp_path / "src", name, tie_word_embeddings=True)
    out = phigrow.expand(folder, dst, tmp_path / "out", method="lossless")
    embedding, head = names(name)
    copied, only = (shutil.copytree(folder, tmp_path / each) for each in ("copied", "only"))
    store(copied, tensors | {head: tensors[embedding].clone()})
    store(only, {head if key == embedding else key: tensor for key, tensor in tensors.items()})
    for source in (copied, only):
        grown = phigrow.expand(source, dst, tmp_path / f"{source.name}-grown", method="lossless")
        assert (grown / OWN).read_bytes() == (out / OWN).read_bytes()
        assert phigrow.verify(source, grown, backend="numpy").passed
        with StoredModel(source) as model:
            assert set(model.tensors) == set(tensors)
    # Negative control: without both there is nothing to read.
    store(only, {key: tensor for key, tensor in tensors.items() if key != embedding})
    with pytest.raises(GrowthError, match=rf"1 missing: {embedding}"):
        phigrow.expand(only, dst, tmp_path / "none")


@pytest.mark.parametrize("where", ["first", "last"])
def test_one_value_in_a_later_block_unties(tmp_path, where, monkeypatch):
    monkeypatch.setattr("phigrow.checkpoints.stored_model.BLOCK_VALUES", 64)
    folder, _, _, tensors = made(tmp_path / "src", "llama", tie_word_embeddings=True)
    embedding, head = names("llama")
    other = tensors[embedding].clone()
    store(folder, tensors | {head: other})
    assert stored_model_config(folder)[TIE] is True
    other[(0, 0) if where == "first" else (-1, -1)] += 1e-3
    store(folder, tensors | {head: other})
    with pytest.warns(UntiedHead):
        assert stored_model_config(folder)[TIE] is False


def test_values_are_compared_across_dtypes_and_shards(tmp_path):
    folder, _, _, tensors = made(tmp_path / "src", "qwen2", tie_word_embeddings=True)
    embedding, head = names("qwen2")
    rounded = tensors | {embedding: tensors[embedding].bfloat16()}
    for second, tied in ((rounded[embedding].float(), True), (tensors[embedding], False)):
        (folder / OWN).unlink(missing_ok=True)
        save_file({name: t.contiguous() for name, t in rounded.items()}, folder / "model-00001-of-00002.safetensors")
        save_file({head: second.contiguous()}, folder / "model-00002-of-00002.safetensors")
        places = dict.fromkeys(rounded, "model-00001-of-00002.safetensors") | {head: "model-00002-of-00002.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UntiedHead)
            with StoredModel(folder) as model:
                assert (model.config[TIE], head in model.tensors) == (tied, not tied)


def test_a_second_copy_in_an_optimizer_state_is_compared_before_it_is_deleted(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "universal"
    source.mkdir()
    aliases = {"lm_head.weight": "model.embed_tokens.weight"}
    torch.save({"shared_params": aliases}, source / "mp_rank_00_model_states.pt")
    value = torch.arange(6.0)
    for name, values in (("model.embed_tokens.weight", value), ("lm_head.weight", value.reshape(2, 3))):
        (folder / "zero" / name).mkdir(parents=True)
        torch.save({"param": values}, folder / "zero" / name / "fp32.pt")
    shutil.copytree(folder, tmp_path / "other")
    universal.forget_aliases(source, folder)
    assert universal.parameters(folder) == ["model.embed_tokens.weight"]
    torch.save({"param": value + 1}, tmp_path / "other" / "zero" / "lm_head.weight" / "fp32.pt")
    with pytest.raises(GrowthError, match="ties two parameters that have different values"):
        universal.forget_aliases(source, tmp_path / "other")
    assert len(universal.parameters(tmp_path / "other")) == 2


def test_state_of_an_untied_model_does_not_fill_a_tied_one(tmp_path):
    from phigrow.training.engine_state import names_in

    _, _, _, tensors = made(tmp_path / "src", "gpt_neox", tie_word_embeddings=True)
    model = of_transformers(tmp_path / "src")
    for name in tensors:
        (tmp_path / "zero" / name).mkdir(parents=True)
        (tmp_path / "zero" / name / "fp32.pt").touch()
    assert names_in(tmp_path, model) == {name: name for name in tensors}
    (tmp_path / "zero" / "embed_out.weight").mkdir()
    (tmp_path / "zero" / "embed_out.weight" / "fp32.pt").touch()
    with pytest.raises(GrowthError, match=r"a parameter that the model does not have: embed_out\.weight"):
        names_in(tmp_path, model)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    # An untied model reads the same folder: the state's name of the head is the table's.
    assert names_in(tmp_path, model)["lm_head.weight"] == "embed_out.weight"


def with_masks(name: str, tensors: dict[str, torch.Tensor], kind: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors that old files of a family carry and no model learns."""
    if name == "gpt_neox":
        at = "gpt_neox.layers.0.attention"
        masks = {f"{at}.bias": torch.ones(1, 1, 8, 8).tril().to(kind), f"{at}.masked_bias": torch.tensor(-1e9)}
        return tensors | masks | {f"{at}.rotary_emb.inv_freq": torch.ones(4).to(kind)}
    at = "model.layers.0.self_attn.rotary_emb"
    return tensors | {f"{at}.inv_freq": torch.ones(4).to(kind), f"{at}.cos_cached": torch.ones(4, 4).to(kind)}


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.float32])
@pytest.mark.parametrize("name", FAMILIES)
def test_masks_and_rotary_tables_of_any_dtype_are_left_out(name, kind, tmp_path):
    folder, _, dst, tensors = made(tmp_path / "src", name)
    out = phigrow.expand(folder, dst, tmp_path / "out")
    store(folder, with_masks(name, tensors, kind))
    grown = phigrow.expand(folder, dst, tmp_path / "grown")
    assert (grown / OWN).read_bytes() == (out / OWN).read_bytes()
    torch.save(with_masks(name, tensors, kind), folder / "pytorch_model.bin")
    (folder / OWN).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pickled = phigrow.expand(folder, dst, tmp_path / "pickled")
    assert (pickled / OWN).read_bytes() == (out / OWN).read_bytes()


def test_weights_of_another_dtype_are_still_refused(tmp_path):
    folder, _, dst, tensors = made(tmp_path / "src", "gpt_neox")
    store(
        folder, tensors | {"gpt_neox.final_layer_norm.bias": tensors["gpt_neox.final_layer_norm.bias"].to(torch.int8)}
    )
    with pytest.raises(GrowthError, match="the weights have dtype I8"):
        phigrow.expand(folder, dst, tmp_path / "out")
    store(folder, with_masks("gpt_neox", tensors, torch.bool))
    with pytest.raises(GrowthError, match="the weights have dtype BOOL"):
        CheckpointReader(folder)  # without a family nothing is known to be a mask


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_with_the_names_of_live_models_is_read(name, tmp_path):
    folder, _, dst, tensors = made(tmp_path / "src", name)
    out = phigrow.expand(folder, dst, tmp_path / "out", method="lossless")
    live = {all_families()[name].live_names.get(key, key): tensor for key, tensor in tensors.items()}
    store(folder, live)
    assert (set(live) != set(tensors)) == (name == "gpt_neox")
    grown = phigrow.expand(folder, dst, tmp_path / "grown", method="lossless")
    assert (grown / OWN).read_bytes() == (out / OWN).read_bytes()
    assert phigrow.verify(folder, grown, backend="numpy").passed


def test_two_names_of_one_parameter_must_agree(tmp_path):
    folder, _, dst, tensors = made(tmp_path / "src", "gpt_neox")
    head = tensors["embed_out.weight"]
    store(folder, tensors | {"lm_head.weight": head.clone()})
    phigrow.expand(folder, dst, tmp_path / "out")
    store(folder, tensors | {"lm_head.weight": head + 1})
    with pytest.raises(GrowthError, match=r"two tensors of different values stand for embed_out\.weight"):
        phigrow.expand(folder, dst, tmp_path / "other")


def test_a_stale_quantization_config_has_no_effect_on_floating_point_weights(tmp_path):
    folder, _, dst, _ = made(tmp_path / "src", "llama")
    plain = phigrow.expand(folder, dst, tmp_path / "plain", method="lossless")
    path = folder / "config.json"
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantised}))
    assert "quantization_config" not in stored_model_config(folder)
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    to_pickle(pickled, load_file(folder / OWN))
    with pytest.warns(match="pickled weights"):
        assert "quantization_config" not in stored_model_config(pickled)
    assert "quantization_config" not in phigrow.plan(folder, dst).src_config
    out = phigrow.expand(folder, dst, tmp_path / "out", method="lossless")
    assert (out / OWN).read_bytes() == (plain / OWN).read_bytes()
    for backend in ("numpy", "transformers"):
        assert phigrow.verify(folder, out, backend=backend).passed
    # Negative control: transformers alone takes the key at its word.
    with pytest.raises(Exception, match=r"bitsandbytes|quantiz"):
        of_transformers(folder)


def test_a_live_model_without_values_or_with_quantised_ones_is_refused_by_name(tmp_path):
    src, dst = random_pair(all_families()["phi"], random.Random(3))
    model = model_of(src, torch.float32)
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(GrowthError, match=r"no values, because it is on the meta device\n  where: model\.embed_tokens"):
        phigrow.expand_model(empty, dst)
    wrapped = torch.nn.Sequential(model)
    with pytest.raises(GrowthError, match=r"no configuration of transformers\n  where: a Sequential\n"):
        phigrow.expand_model(wrapped, dst)
    wrapped.config = model.config
    with pytest.raises(GrowthError, match=r"inside of a wrapper .*adds 0\. to names\n.*give the model inside"):
        phigrow.expand_model(wrapped, dst)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(GrowthError, match=r"has a tensor of int8\n  where: lm_head\.weight"):
        phigrow.expand_model(model, dst)
