"""Files of other programs: each is named, and the command that an error gives is run."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from printed_commands import run_command
from safetensors.torch import load_file, save_file
from tiny_models import model_of, random_pair

import phigrow
from phigrow.checkpoints.hub import locate
from phigrow.checkpoints.pickles import PickledWeights
from phigrow.errors import GrowthError
from phigrow.files.foreign import recognise, recognise_tensors
from phigrow.models.config import load_config
from phigrow.models.families import all_families

OWN = "model.safetensors"


def touched(folder: Path, *names: str, **content: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    for name, text in content.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.fixture
def source(tmp_path, monkeypatch) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor]]:
    """A tiny Llama in ``tmp_path/src``, which is also the current folder's neighbour of every result."""
    src, dst = random_pair(all_families()["llama"], random.Random(3))
    model_of(src, torch.float32).save_pretrained(tmp_path / "src")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "src", dst, load_file(tmp_path / "src" / OWN)


def refused(call: Callable[[], Any], match: str) -> str:
    with pytest.raises(GrowthError, match=match) as raised:
        call()
    return raised.value.fix


def same_growth(folder: Path, dst: dict[str, Any], expected: Path, tmp_path: Path) -> bool:
    """Growing a folder gives the bytes of an expected growth."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(tmp_path / "again")
    with pytest.warns() if not (folder / OWN).exists() and list(folder.glob("*.bin")) else contextlib.nullcontext():
        out = phigrow.expand(folder, dst, tmp_path / "again")
    return (out / OWN).read_bytes() == (expected / OWN).read_bytes()


FOLDERS = {
    "adapter": (["adapter_config.json", "adapter_model.safetensors"], "an adapter", "merge_and_unload"),
    "gguf": (["phi.Q4_K_M.gguf"], "a GGUF file", "gguf_file='phi.Q4_K_M.gguf'"),
    "deepspeed": (
        ["latest", "global_step7/mp_rank_00_model_states.pt", "global_step7/zero_pp_rank_0_mp_rank_00_optim_states.pt"],
        "a checkpoint of DeepSpeed",
        "zero_to_fp32",
    ),
    "tag": (["zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"], "of DeepSpeed", "-t tag"),
    "zero-0": (["global_step7/mp_rank_00_model_states.pt"], "a checkpoint of DeepSpeed", r"\['module'\]"),
    "neox": (["layer_00-model_00-model_states.pt", "mp_rank_00_model_states.pt"], "gpt-neox library", "convert_neox"),
    "fsdp": (["pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp"], "FSDP", "dcp_to_torch"),
    "shards": (
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        "a checkpoint in 2 shards without their index",
        "model.safetensors.index.json",
    ),
    "a shard": (
        ["model-00002-of-00003.safetensors"],
        "2 are missing, such as model-00001-of-00003",
        "download it again",
    ),
    "trainer": (["checkpoint-9/config.json", "checkpoint-10/config.json"], "the output of a Trainer", "checkpoint-10$"),
    "cache": (["snapshots/abc/config.json", "refs/main"], "in the cache of the hub", r"snapshots/abc$"),
    "run": (["run.json", "export/config.json"], "the folder of a training run", "give .*export$"),
    "run without export": (["run.json"], "a training run that has no export", "--export export"),
    "data": (["data.json", "train.bin"], "packed data", "--data"),
    "maps": (["growth-maps.safetensors"], "learned maps", "--maps"),
    "meta": (["consolidated.00.pth", "params.json"], "in the format of its authors", "-hf"),
    "flax": (["flax_model.msgpack"], "a checkpoint of Flax", "from_flax=True"),
    "onnx": (["model.onnx"], "a model for ONNX", "from which it was made"),
    "name": (["weights.safetensors"], "another name, weights.safetensors", "mv .*weights.safetensors"),
    "pickle": (["epoch=3.ckpt"], r"a pickle of PyTorch that transformers does not read, epoch=3\.ckpt", "state_dict"),
    "tokenizer": (["tokenizer.json", "vocab.json"], "a tokenizer without a model", "config.json and weights"),
}


@pytest.mark.parametrize(("names", "what", "fix"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_of_another_kind_is_named_with_its_remedy(tmp_path, names, what, fix):
    folder = touched(tmp_path / "tag", *names)
    for call in (lambda: load_config(folder), lambda: phigrow.plan(folder, "phi2.json")):
        advice = refused(call, rf"the folder has no config.json\n  where: {folder}\n  why: it is .*{what}")
        assert re.search(fix, advice), advice
    if {"export/config.json", "snapshots/abc/config.json", "checkpoint-9/config.json"} & set(names):
        return
    # With a configuration beside it, the missing weights are explained alike.
    (folder / "config.json").write_text(json.dumps(load_config("phi2.json")))
    if not {"tokenizer.json"} & set(names):
        refused(
            lambda: phigrow.expand(folder, "phi2.json", tmp_path / "out"),
            rf"safetensors is missing\n.*\n  why: it is .*{what}",
        )


def test_nothing_is_known_about_an_empty_or_an_ordinary_folder(tmp_path, source):
    assert recognise(touched(tmp_path / "empty", "notes.txt")) is None
    assert recognise(source[0]) is None
    assert recognise(tmp_path / "nothing") is None


FILES = {
    "phi.gguf": (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
    "renamed.bin": (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
    "model.safetensors": (b"", "one file of a checkpoint"),
    "pytorch_model.bin": (b"PK", "one file of a checkpoint"),
    "last.ckpt": (b"PK", "a pickle of PyTorch"),
    "model.tar.gz": (b"", "an archive"),
    "lfs.safetensors": (b"version https://git-lfs.github.com/spec/v1\n", "a placeholder of git lfs"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_named_wherever_a_folder_is_needed(tmp_path, name):
    from phigrow.training import RunConfig
    from phigrow.training.model import model_config

    content, what = FILES[name]
    (tmp_path / name).write_bytes(content)
    refused(lambda: locate(tmp_path / name), f"a checkpoint is a folder, not a file\n.*\n  why: it is {what}")
    refused(
        lambda: phigrow.plan(tmp_path / name, "phi2.json"), f"nor the folder of a checkpoint\n.*\n  why: it is {what}"
    )
    run = RunConfig(init=str(tmp_path / name), model=None)
    refused(lambda: model_config(run, data_vocab=1, seq_len=1), f"to start from\n.*\n  why: it is {what}")


WRAPPED = {
    "module.": "DistributedDataParallel",
    "_orig_mod.": "torch.compile",
    "module._orig_mod.": "DistributedDataParallel or DeepSpeed, torch.compile",
    "base_model.model.": "PEFT",
    "_fsdp_wrapped_module.": "FSDP",
    "student.": "another program",
    "_orig_mod.module.student.": "DistributedDataParallel or DeepSpeed, torch.compile, another program",
}


@pytest.mark.parametrize("prefix", WRAPPED)
def test_the_prefix_of_a_wrapper_is_named_and_its_command_removes_it(source, tmp_path, prefix):
    folder, dst, tensors = source
    expected = phigrow.expand(folder, dst, tmp_path / "expected")
    wrapped = {prefix + name: tensor for name, tensor in tensors.items()}
    if prefix == "module.":  # pickled, as most training scripts write it
        torch.save(wrapped, folder / "pytorch_model.bin")
        (folder / OWN).unlink()
    else:
        save_file(wrapped, folder / OWN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PickledWeights)
        grow = functools.partial(phigrow.expand, folder, dst, tmp_path / "out")
        advice = refused(grow, f"inside of a wrapper .{WRAPPED[prefix]}")
    run_command(advice)
    shutil.copy(folder / "config.json", tmp_path / "src-hf")
    assert same_growth(tmp_path / "src-hf", dst, expected, tmp_path)


def test_parts_inside_of_names_are_removed_as_well(source, tmp_path):
    folder, dst, tensors = source
    expected = phigrow.expand(folder, dst, tmp_path / "expected")
    inner = {
        re.sub(r"layers\.(\d+)\.", r"layers.\1._checkpoint_wrapped_module.", name): t for name, t in tensors.items()
    }
    save_file(inner, folder / OWN, {"format": "pt"})
    advice = refused(lambda: phigrow.expand(folder, dst, tmp_path / "out"), "activation checkpointing")
    run_command(advice)
    shutil.copy(folder / "config.json", tmp_path / "src-hf")
    assert same_growth(tmp_path / "src-hf", dst, expected, tmp_path)


def test_shards_get_their_index(source, tmp_path):
    folder, dst, tensors = source
    expected = phigrow.expand(folder, dst, tmp_path / "expected")
    for ending, save in (("safetensors", save_file), ("bin", torch.save)):
        (folder / OWN).unlink(missing_ok=True)
        stem = "model" if ending == "safetensors" else "pytorch_model"
        for part in range(2):
            some = {name: tensors[name] for name in sorted(tensors)[part::2]}
            save(some, folder / f"{stem}-{part + 1:05}-of-00002.{ending}")
        run_command(refused(lambda: phigrow.expand(folder, dst, tmp_path / "out"), "in 2 shards without their index"))
        assert same_growth(folder, dst, expected, tmp_path)
        for file in folder.glob("model*"):
            file.unlink()


def test_a_checkpoint_of_a_training_script_is_taken_apart(source, tmp_path):
    folder, dst, tensors = source
    expected = phigrow.expand(folder, dst, tmp_path / "expected")
    (folder / OWN).unlink()
    for key, name in (("model_state_dict", "epoch3.pt"), ("state_dict", "pytorch_model.bin")):
        torch.save({key: tensors, "epoch": 3, "optimizer": {"lr": 0.1}}, folder / name)
        advice = refused(lambda: phigrow.expand(folder, dst, tmp_path / "out"), "pickle of PyTorch|not a state dict")
        run_command(advice)
        shutil.copy(folder / "config.json", tmp_path / "src-hf")
        assert same_growth(tmp_path / "src-hf", dst, expected, tmp_path)
        (folder / name).unlink()
        shutil.rmtree(tmp_path / "src-hf")


def test_a_distributed_checkpoint_is_joined(source, tmp_path):
    import torch.distributed.checkpoint as dcp

    folder, dst, tensors = source
    expected = phigrow.expand(folder, dst, tmp_path / "expected")
    (folder / OWN).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about a process without ranks
        dcp.save(tensors, checkpoint_id=folder, no_dist=True)
    run_command(refused(lambda: phigrow.expand(folder, dst, tmp_path / "out"), "a distributed checkpoint of PyTorch"))
    shutil.copy(folder / "config.json", tmp_path / "src-hf")
    assert same_growth(tmp_path / "src-hf", dst, expected, tmp_path)


def test_other_models_of_the_same_family_are_named(source):
    folder, _, tensors = source
    expected = set(tensors)

    def kind(names: set[str]) -> str:
        found = recognise_tensors(names, expected, str(folder))
        return found.what if found else ""

    assert kind({*expected, "v_head.summary.weight"}) == "a model of another task, with v_head.summary.weight"
    without = {name for name in expected if not name.startswith("lm_head")}
    assert kind(without).startswith("a model whose head was not saved")
    assert kind({*without, "score.weight"}) == "a model of another task, with score.weight"
    assert kind({name.removeprefix("model.") for name in without}) == "a model without a head (AutoModel)"
    assert kind({f"base_model.model.{name}" for name in expected} | {"base_model.model.x.lora_A.weight"}) == (
        "a model with an adapter (PEFT) that was not merged"
    )
    assert kind({*without, "model.layers.0.mlp.up_proj.qweight"}) == "a quantised model"
    assert kind({"tok_embeddings.weight", "output.weight"}).startswith("a checkpoint in the format of its authors")
    # Negative controls: a damaged file and an unknown name are no wrapper.
    assert kind(without - {"model.norm.weight"}) == ""
    assert kind({*expected, "mystery.weight"}) == ""
    assert kind({f"module.{k}" for k in range(9)}) == ""
