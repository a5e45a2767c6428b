"""What DeepSpeed is told, and what a model is built from."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scenarios import TINY
from tiny_models import model_of, random_pair
from torch import nn
from transformers import AutoConfig

from phigrow.errors import GrowthError
from phigrow.models.cost import count_cost
from phigrow.models.families import all_families
from phigrow.training import RunConfig, deepspeed_file
from phigrow.training.engine import engine_config, micro_batch
from phigrow.training.model import build_model, has_dropout, model_config
from phigrow.training.optimizer_spec import decay_matrices
from phigrow.training.process import World
from phigrow.training.weights import masters_from_scratch

CPU = World(0, 1, 0, 1, torch.device("cpu"))


def file(tmp_path: Path, content: Any) -> str:
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_the_runs_keys_fill_the_file(tmp_path):
    content = {"train_batch_size": "auto", "zero_optimization": {"stage": 2, "overlap_comm": True}, "bf16": {}}
    out = engine_config(RunConfig(batch=32, dtype="bf16", deepspeed=file(tmp_path, content)), 4, 2)
    assert (out["train_batch_size"], out["train_micro_batch_size_per_gpu"]) == (32, 2)
    assert out["gradient_accumulation_steps"] == 4
    assert out["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert out["bf16"] == {"enabled": True}
    assert out["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "fp16" not in out


def test_communication_overlaps_the_backward_pass_on_gpus_where_deepspeed_reads_the_key(tmp_path):
    def section(ranks: int = 8, device: str = "cuda", **settings: Any) -> Any:
        found = engine_config(RunConfig(batch=16, **{"dtype": "bf16", **settings}), ranks, 2, device)
        return found["zero_optimization"].get("overlap_comm")

    assert [section(zero=stage) for stage in range(4)] == [None, None, True, None]  # at stage 3 it is the default
    assert [section(zero=stage, dtype="fp32") for stage in range(4)] == [None, True, True, None]
    assert section(zero=1, dtype="fp16") is section(zero=1, offload_optimizer="cpu") is True
    assert section(zero=2, device="cpu") is section(zero=2, ranks=1) is None
    off = file(tmp_path, {"zero_optimization": {"overlap_comm": False}})
    assert section(zero=2, deepspeed=off) is False  # the file decides


def test_stage_0_and_fp32_have_no_gradient_dtype_of_their_own():
    assert "data_types" not in engine_config(RunConfig(zero=0, dtype="bf16"), 1, 16)
    assert "bf16" not in engine_config(RunConfig(zero=0, dtype="fp32"), 1, 16)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"train_batch_size": 8}, "train_batch_size is 8 in the DeepSpeed file, but 16 in the run"),
        ({"gradient_clipping": 0.3}, "gradient_clipping is 0.3"),
        ({"bf16": {"enabled": False}}, "bf16.enabled is False"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True"),
        ({"optimizer": {"type": "Adam"}}, "has a section 'optimizer'"),
        ({"scheduler": {}}, "has a section 'scheduler'"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "round_robin_gradients"),
    ],
)
def test_a_file_that_contradicts_the_run_is_refused(tmp_path, content, part):
    with pytest.raises(GrowthError, match=part):
        engine_config(RunConfig(dtype="bf16", deepspeed=file(tmp_path, content)), 1, 16)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"gradient_cliping": 0.5}, "(?s)no key 'gradient_cliping'.*would be ignored.*did you mean gradient_clipping"),
        ({"my_note": "for Anna"}, "(?s)no key 'my_note'.*begin its name with an underscore"),
        ({"bfloat16": {"enabled": True}, "bf16": {"enabled": False}}, "bf16 stands twice, as bf16 and b"),
        ({"sparse_gradients": True}, "(?s)sparse_gradients in the DeepSpeed file is not supported.*sparse tensors"),
        ({"progressive_layer_drop": {"enabled": True, "theta": 0.5}}, "layers would be left out at random"),
        ({"curriculum_learning": {"enabled": True}}, "blocks would be cut to other lengths"),
        ({"gradient_allreduce_op": "sum"}, "summed over ranks"),
        ({"tensor_parallel": {"autotp_size": 2}}, "data parallelism only"),
        ({"csv_monitor": "here"}, "csv_monitor in the DeepSpeed file is 'here', but must be an object"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, "offload_optimizer in the DeepSpeed file is 'cpu', but"),
        (
            {"checkpoint": {"writer": {"decoupled": True}}},
            "(?s)writer in the DeepSpeed file.*a decoupled writer is still",
        ),
        ({"checkpoint": {"writer": {"type": "fast"}}}, "writer in the DeepSpeed file is not supported"),
        ({"checkpoint": {"writer": {}}}, "writer in the DeepSpeed file is not supported"),
        ({"checkpoint": {"load_universal": True}}, "(?s)load_universal.*the setting universal decides"),
        ({"datastates_ckpt": {"host_cache_size": 16}}, "(?s)datastates_ckpt.*still be written while phigrow hashes"),
        ({"datastates_ckpt": {}}, "datastates_ckpt in the DeepSpeed file is not supported"),
        ({"nebula": {"enabled": True}}, "(?s)nebula.*DeepSpeed has removed it"),
        ({"async_io": True}, "DeepSpeed has no key 'async_io'"),
        ({"zero_optimization": {"stage": "two"}}, "(?s)stage in the DeepSpeed file is 'two'.*give 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, "stage in the DeepSpeed file is True"),
        ({"zero_optimization": {"stage": [1]}}, r"stage in the DeepSpeed file is \[1\]"),
    ],
)
def test_what_deepspeed_would_do_unseen_is_refused(tmp_path, content, part):
    with pytest.raises(GrowthError, match=part):
        engine_config(RunConfig(dtype="bf16", deepspeed=file(tmp_path, content)), 1, 16)


def test_switched_off_or_harmless_keys_of_checkpoints_are_taken(tmp_path):
    content = {"checkpoint": {"tag_validation": "Fail", "writer": None}, "nebula": {"enabled": False}, "aio": {}}
    out = engine_config(RunConfig(deepspeed=file(tmp_path, content | {"datastates_ckpt": False})), 1, 16)
    assert out["checkpoint"] == content["checkpoint"]
    assert not {"nebula", "datastates_ckpt"} & set(out)


def test_an_alias_is_the_name_that_it_stands_for(tmp_path):
    """`bfloat16` once trained in bf16 while banner and record had fp32."""
    path = file(tmp_path, {"bfloat16": {"enabled": True}, "_note": "a comment", "sparse_gradients": False})
    with pytest.raises(GrowthError, match=r"bf16\.enabled is True"):
        engine_config(RunConfig(dtype="fp32", deepspeed=path), 1, 16)
    out = engine_config(RunConfig(dtype="bf16", deepspeed=path), 1, 16)
    assert out["bf16"] == {"enabled": True}
    assert not {"bfloat16", "_note", "sparse_gradients"} & set(out)


def test_a_key_that_stands_twice_in_the_file_is_refused(tmp_path):
    path = tmp_path / "engine.json"
    path.write_text('{"gradient_clipping": 1, "gradient_clipping": 2}')
    with pytest.raises(GrowthError, match=r"(?s)DeepSpeed file.*gradient_clipping"):
        RunConfig(deepspeed=str(path)).deepspeed_file()


def test_deepspeed_reads_every_key_that_is_known():
    """The names come from DeepSpeed's own modules, so that a renamed key is noticed."""
    import deepspeed

    folder = Path(deepspeed.__file__).parent
    source = "".join(path.read_text(errors="replace") for path in folder.rglob("*.py"))
    for key in (*deepspeed_file.KNOWN, *deepspeed_file.UNSEEN, *deepspeed_file.ALIASES):
        assert f'"{key}"' in source or f"'{key}'" in source, key
    assert '"gradient_cliping"' not in source


def test_fp16_needs_zero():
    with pytest.raises(GrowthError, match="requires ZeRO stage 1, 2 or 3"):
        engine_config(RunConfig(dtype="fp16", zero=0), 1, 16)
    assert engine_config(RunConfig(dtype="fp16", zero=2), 1, 16)["fp16"] == {"enabled": True}


def test_compile_needs_whole_weights():
    with pytest.raises(GrowthError, match="compile requires ZeRO stage 0, 1 or 2"):
        engine_config(RunConfig(compile=True, zero=3), 1, 16)


def test_micro_batches_divide_the_batch():
    assert micro_batch(RunConfig(batch=16), 2, 256) == 8
    assert micro_batch(RunConfig(batch=16, micro_batch=2), 2, 256) == 2
    with pytest.raises(GrowthError, match="cannot be shared by 3 ranks"):
        micro_batch(RunConfig(batch=16), 3, 256)
    with pytest.raises(GrowthError, match="choose a multiple of 96, such as 2016 or 2112"):
        micro_batch(RunConfig(batch=2048), 96, 2048)
    with pytest.raises(GrowthError, match="cannot be cut into micro-batches of 3"):
        micro_batch(RunConfig(batch=16, micro_batch=3), 1, 256)


def test_the_vocabulary_of_the_demo_is_the_datas_and_of_others_must_hold_it():
    assert model_config(RunConfig(), data_vocab=1234, seq_len=64)["vocab_size"] == 1234
    assert model_config(RunConfig(model="phi-1"), data_vocab=1234, seq_len=64)["vocab_size"] == 51200
    assert model_config(RunConfig(model="phi-1", vocab_size=2000), data_vocab=1234, seq_len=64)["vocab_size"] == 2000
    assert model_config(RunConfig(), data_vocab=9, seq_len=64, eos_token_id=3)["eos_token_id"] == 3
    assert model_config(RunConfig(model="phi2"), data_vocab=9, seq_len=64, eos_token_id=3)["eos_token_id"] == 50256
    with pytest.raises(GrowthError, match="a vocabulary of 100 tokens, but the data has one of 101"):
        model_config(RunConfig(model=TINY, vocab_size=100), data_vocab=101, seq_len=16)
    with pytest.raises(GrowthError, match="blocks of 64 tokens, but the model has 32 positions"):
        model_config(RunConfig(model=TINY), data_vocab=50, seq_len=64)


def saved(tmp_path: Path) -> Path:
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(1)
    folder = tmp_path / "checkpoint"
    PhiForCausalLM(
        PhiConfig(**{k: v for k, v in TINY.items() if k not in ("architectures", "model_type")})
    ).save_pretrained(folder)
    return folder


def test_a_checkpoint_decides_its_model(tmp_path):
    folder = saved(tmp_path)
    config = RunConfig(init=str(folder))
    assert model_config(config, data_vocab=96, seq_len=16)["hidden_size"] == 32
    assert model_config(RunConfig(init=str(folder), model=TINY), data_vocab=96, seq_len=16)["hidden_size"] == 32
    with pytest.raises(GrowthError, match="hidden_size is 32 in the checkpoint, but 64 in model"):
        model_config(RunConfig(init=str(folder), model=TINY | {"hidden_size": 64}), data_vocab=96, seq_len=16)
    with pytest.raises(GrowthError, match="vocab_size is 97, but the checkpoint has 96"):
        model_config(RunConfig(init=str(folder), vocab_size=97), data_vocab=96, seq_len=16)
    with pytest.raises(GrowthError, match="no checkpoint to start from"):
        model_config(RunConfig(init=str(tmp_path / "none")), data_vocab=96, seq_len=16)


def build(config: RunConfig, model_dict: dict[str, Any] = TINY) -> Any:
    return build_model(config, model_dict, CPU, "sdpa", {})


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_tied_as_the_configuration_says(tied):
    config = TINY | {"tie_word_embeddings": tied}
    model = build_model(RunConfig(model=config), config, CPU, "sdpa", {})
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert sum(p.numel() for p in model.parameters()) == count_cost(config).parameters


def test_a_master_that_deepspeed_takes_from_another_parameter_is_noticed():
    model = nn.Sequential(nn.Linear(8, 8)).bfloat16()
    model[0].weight.requires_grad_(False)  # what is not trained has no master
    engine, bias = SimpleNamespace(module=model, optimizer=None), model[0].bias
    bias.data = torch.arange(8, dtype=torch.bfloat16)
    for start, fits in ((4, True), (3, False)):
        own = SimpleNamespace(
            lp_fragment_address=SimpleNamespace(start=4, numel=4), hp_fragment=torch.arange(start, start + 4.0)
        )
        bias._hp_mapping = own  # type: ignore[attr-defined]
        if fits:
            masters_from_scratch(engine, 0, 0.02)
            assert own.hp_fragment.tolist() == [0.0] * 4  # a bias starts from 0
        else:
            with pytest.raises(GrowthError, match=r"a master differs from its weight\n  where: 0\.bias"):
                masters_from_scratch(engine, 0, 0.02)


def test_loading_is_exact_and_strict(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = saved(tmp_path)
    config, file_ = RunConfig(init=str(folder), zero=0), folder / "model.safetensors"
    tensors = load_file(file_)
    built = dict(build(config).named_parameters())
    assert set(built) == set(tensors)
    assert all(torch.equal(built[name], tensors[name]) for name in tensors)
    name = "model.layers.1.mlp.fc2.bias"
    save_file({**tensors, name: tensors[name][:-1].clone()}, file_)
    with pytest.raises(GrowthError, match=r"shape \[31\], but the model's parameter has \[32\]"):
        build(config)
    save_file({k: v for k, v in tensors.items() if k != name}, file_)
    with pytest.raises(GrowthError, match="1 missing: ") as error:
        build(config)
    assert name in str(error.value)
    file_.unlink()
    with pytest.raises(GrowthError, match=r"the file model\.safetensors is missing"):
        build(config)


def test_scratch_weights_are_transformers_distribution_and_depend_on_the_seed_alone():
    first, second = (dict(build(RunConfig(zero=0, seed=seed)).named_parameters()) for seed in (0, 1))
    again = dict(build(RunConfig(zero=0)).named_parameters())
    for name, value in first.items():
        assert torch.equal(value, again[name])
        if name.endswith("bias"):
            assert not value.any()
        elif "layernorm" in name:
            assert (value == 1).all()
        else:
            assert abs(value.std() / 0.02 - 1) < 0.1, name
            assert not torch.equal(value, second[name])


def test_an_unknown_model_type_is_refused():
    for kind in ("phii", "vit"):
        with pytest.raises(GrowthError, match=f"phigrow does not support model_type '{kind}'"):
            build(RunConfig(zero=0), TINY | {"model_type": kind})


def test_matrices_decay_and_vectors_do_not():
    model = build(RunConfig(zero=0))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = ([names[id(p)] for p in group["params"]] for group in decay_matrices(model, RunConfig()))
    assert all(name.endswith("weight") and "layernorm" not in name for name in decayed)
    assert all(name.endswith("bias") or "layernorm" in name for name in kept)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(decayed)
    assert len(decayed) + len(kept) == len(names)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_computes_what_transformers_own_does(attention, monkeypatch):
    """Without its masks, and with GELU as one kernel."""
    from transformers import PhiConfig, PhiForCausalLM

    built = build_model(RunConfig(zero=0, dtype="fp32"), TINY, CPU, attention, {})
    sizes = {key: value for key, value in TINY.items() if key not in ("architectures", "model_type")}
    plain = PhiForCausalLM(PhiConfig(**sizes))
    plain.load_state_dict(built.state_dict())
    blocks = torch.randint(0, 96, (3, 17), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([torch.full((3, 1), -100), blocks[:, 1:]], dim=1)
    found, wanted = built(blocks), plain(input_ids=blocks, labels=labels).loss
    found.backward()
    wanted.backward()
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    for (name, one), other in zip(built.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7, msg=name)
    assert sum(type(module).__name__ == "NewGELUActivation" for module in built.modules()) == 0
    if attention == "sdpa":  # negative control: the comparison sees a model that looks ahead
        real = torch.nn.functional.scaled_dot_product_attention

        def ahead(*tensors: Any, is_causal: bool, **more: Any) -> Any:
            return real(*tensors, is_causal=False, **more)

        monkeypatch.setattr("phigrow.training.attention.F.scaled_dot_product_attention", ahead)
        assert float(built(blocks).detach()) != pytest.approx(float(wanted.detach()), rel=1e-6)


def test_attention_by_products_is_the_same_attention():
    from torch.nn.functional import scaled_dot_product_attention

    from phigrow.training.attention import attention_by_products, by_products_is_faster

    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 17, 8)
    made = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)]
    ours, theirs = attention_by_products(*made, 0.3), scaled_dot_product_attention(*made, is_causal=True, scale=0.3)
    weights = torch.randn(shape, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(ours, made, weights), torch.autograd.grad(theirs, made, weights), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    assert not torch.allclose(ours, scaled_dot_product_attention(*made, is_causal=False, scale=0.3))
    half = [each.detach().bfloat16() for each in made]
    off = (attention_by_products(*half, 0.3).double() - theirs).abs().max()
    assert off < 3 * (scaled_dot_product_attention(*half, is_causal=True, scale=0.3).double() - theirs).abs().max()
    assert by_products_is_faster(half[0], half[1], 0.0)
    assert not by_products_is_faster(made[0], made[1], 0.0)  # fp64
    assert not by_products_is_faster(half[0], half[1][:, :1], 0.0)  # shared key/value heads
    assert not by_products_is_faster(half[0], half[1], 0.1)


@pytest.mark.parametrize("name", all_families())
def test_every_dropout_rate_of_a_family_is_noticed(name):
    family = all_families()[name]
    config = random_pair(family, random.Random(0))[0]
    known = {key for key in AutoConfig.for_model(family.model_type).to_dict() if "drop" in key}
    known -= {"classifier_dropout"}  # of GPTNeoXForTokenClassification; the causal language model does not read it
    assert known == set(family.dropout_keys)
    assert not has_dropout(config | dict.fromkeys(known, 0.0))
    assert not has_dropout(config | dict.fromkeys(known))
    ids = torch.arange(12).remainder(config["vocab_size"])[None]
    for key in known:
        dropped = config | dict.fromkeys(known, 0.0) | {key: 0.5}
        assert has_dropout(dropped), key
        model = model_of(dropped).train()
        # Rates that are noticed are rates that act: a second pass draws other numbers, unless it is seeded.
        assert not torch.equal(_seeded(model, ids, 0), _seeded(model, ids, 1)), key
        assert torch.equal(_seeded(model, ids, 0), _seeded(model, ids, 0)), key


def _seeded(model, ids, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("bf16", "bf16_master_weights_and_grads"),
        ("bf16", "bf16_optimizer_states"),
        ("fp16", "fp16_master_weights_and_grads"),
        ("zero_optimization", "zero_quantized_gradients"),
    ],
)
def test_keys_that_shorten_masters_or_gradients_are_refused(section, key, tmp_path):
    with pytest.raises(GrowthError, match=f"{key} in the DeepSpeed file is not supported"):
        RunConfig(deepspeed=file(tmp_path, {section: {key: True}})).deepspeed_file()
    assert RunConfig(deepspeed=file(tmp_path, {section: {key: False}})).deepspeed_file()[section] == {key: False}
