"""Pickled weights: read by the restricted loader only, to the same grown bytes as safetensors."""

import os
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import phi_config, phi_model

import phigrow
from phigrow.checkpoints.fingerprint import checkpoint_fingerprint, has_weights
from phigrow.checkpoints.pickles import PickledWeights, PickleReader, open_checkpoint
from phigrow.checkpoints.reader import CheckpointReader
from phigrow.errors import GrowthError

SRC, DST = phi_config(32, 4, 48, 2, 4), phi_config(48, 6, 60, 3, 4)


class Payload:
    """What a hostile pickle does: run a command of its own when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def to_pickles(folder: Path, shards: int = 1, **how: bool) -> dict[str, torch.Tensor]:
    """Replace a folder's model.safetensors by pickles."""
    import json

    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin", **how)
        return state
    names = [f"pytorch_model-{k + 1:05}-of-{shards:05}.bin" for k in range(shards)]
    places = {name: names[k % shards] for k, name in enumerate(state)}
    for file in names:
        torch.save({name: state[name] for name in state if places[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return state


@pytest.mark.parametrize("method", ["wr", "lossless"])
@pytest.mark.parametrize(("shards", "how"), [(1, {}), (3, {}), (1, {"_use_new_zipfile_serialization": False})])
def test_pickles_grow_to_the_bytes_of_safetensors(save_model, tmp_path, method, shards, how):
    folder = save_model(phi_model(SRC, torch.bfloat16))
    expected = phigrow.expand(folder, DST, tmp_path / "expected", method=method)
    to_pickles(folder, shards, **how)
    with pytest.warns(PickledWeights, match="read without running their code and written as safetensors"):
        out = phigrow.expand(folder, DST, tmp_path / "out", method=method)
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert not list(out.glob("*.bin"))
    with pytest.warns(PickledWeights):
        certificate = phigrow.verify(folder, out, tokens=32)
    assert certificate.passed is (True if method == "lossless" else None)


def test_the_command_line_says_that_weights_were_pickled(save_model, tmp_path, monkeypatch, capsys):
    import json
    import sys

    import phigrow.cli

    to_pickles(save_model(phi_model(SRC, torch.float32)))
    (tmp_path / "dst.json").write_text(json.dumps(DST))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["phigrow", "expand", "--src", "src", "--dst-config", "dst.json", "--out", "out"])
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with pytest.raises(SystemExit) as done:
            phigrow.cli.main()
    assert done.value.code in (0, None)
    said = capsys.readouterr().err
    assert "warning: pytorch_model.bin in src: pickled weights, read without running their code" in said
    assert "save_pretrained, which writes safetensors\n" in said


def test_provenance_names_the_pickle(save_model, tmp_path):
    import hashlib
    import json

    folder = save_model(phi_model(SRC, torch.float32))
    to_pickles(folder)
    with pytest.warns(PickledWeights):
        out = phigrow.expand(folder, DST, tmp_path / "out")
    files = json.loads((out / "phigrow.json").read_text())["source"]["files"]
    digest = hashlib.sha256((folder / "pytorch_model.bin").read_bytes()).hexdigest()
    assert files["pytorch_model.bin"]["sha256"] == digest


def test_safetensors_come_first_and_no_pickle_is_touched(save_model, tmp_path):
    folder = save_model(phi_model(SRC, torch.float32))
    ran = tmp_path / "ran"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(ran)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        phigrow.expand(folder, DST, tmp_path / "out")
    assert not ran.exists()


@pytest.mark.parametrize("archive", [True, False])
def test_a_malicious_pickle_is_refused_and_does_not_run(save_model, tmp_path, archive):
    folder = save_model(phi_model(SRC, torch.float32))
    state = to_pickles(folder)
    ran, out = tmp_path / "ran", tmp_path / "out"
    hostile = state | {"lm_head.bias": Payload(ran)}
    if archive:
        torch.save(hostile, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(hostile))
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(GrowthError, match="the pickled weights cannot be read safely") as caught:
        phigrow.expand(folder, DST, out)
    assert f"where: {folder / 'pytorch_model.bin'}" in str(caught.value)
    assert "weights_only" not in (caught.value.fix or "")  # never the advice to switch the protection off
    assert sorted(os.listdir(tmp_path)) == before
    assert not ran.exists()
    # Negative control: a loader without the restriction does run it.
    if archive:
        torch.load(folder / "pytorch_model.bin", weights_only=False)
    else:
        pickle.loads((folder / "pytorch_model.bin").read_bytes())  # noqa: S301
    assert ran.exists()


def write(folder: Path, content: object) -> Path:
    torch.save(content, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "not a state dict\n.*\n  why: the file holds a list"),
        ({"model": {"a": torch.ones(2)}}, "not a state dict\n.*\n  why: 'model' is a dict"),
        ({7: torch.ones(2)}, "not a state dict\n.*\n  why: 7 is a Tensor"),
        ({"a": torch.ones(2, dtype=torch.int8)}, "the weights have dtype int8\n  where: a in "),
        ({"a": torch.ones(2, 2).to_sparse()}, "the pickled tensor is not dense on the CPU"),
        ({"a": torch.ones(1).expand(10**6, 10**6)}, "has fewer stored values than its shape needs"),
        ({}, "the checkpoint has no tensors"),
    ],
)
def test_pickles_of_anything_but_named_plain_tensors_are_refused(tmp_path, content, message):
    with pytest.raises(GrowthError, match=message):
        PickleReader(write(tmp_path, content))


def test_damaged_pickles_and_dishonest_indexes_are_refused(save_model, tmp_path):
    folder = save_model(phi_model(SRC, torch.float32))
    to_pickles(folder, 2)
    index = folder / "pytorch_model.bin.index.json"
    honest = index.read_text()
    index.write_text(honest.replace('"pytorch_model-00001-of-00002.bin"', '"../elsewhere.bin"', 1))
    with pytest.raises(GrowthError, match="the index of shards names a file outside its folder"):
        open_checkpoint(folder)
    index.write_text(honest.replace("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", 1))
    with pytest.raises(GrowthError, match="the index of shards does not match its files"):
        open_checkpoint(folder)
    index.write_text(honest)
    shard = folder / "pytorch_model-00002-of-00002.bin"
    whole = shard.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        shard.write_bytes(whole[:size])
        with pytest.raises(GrowthError, match="the pickled weights cannot be read safely"):
            open_checkpoint(folder)
    shard.unlink()
    with pytest.raises(GrowthError, match=f"the file {shard.name} is missing"):
        open_checkpoint(folder)


def test_training_does_not_start_from_pickles(save_model):
    folder = save_model(phi_model(SRC, torch.float32))
    to_pickles(folder)
    with pytest.raises(
        GrowthError, match=r"the file model.safetensors is missing\n.*\n  why: the folder holds only pickled weights"
    ):
        CheckpointReader(folder)


def test_settings_of_a_trainer_are_no_weights(save_model, tmp_path):
    folder = save_model(phi_model(SRC, torch.float32))
    to_pickles(folder)
    weights = checkpoint_fingerprint(folder)
    (folder / "training_args.bin").write_bytes(b"settings of transformers' Trainer")
    assert checkpoint_fingerprint(folder) == weights
    (tmp_path / "args").mkdir()
    shutil.copy(folder / "training_args.bin", tmp_path / "args")
    assert has_weights(folder)
    assert not has_weights(tmp_path / "args")
    # Negative control: other weights have another fingerprint.
    torch.save(phi_model(SRC, torch.float32, seed=1).state_dict(), folder / "pytorch_model.bin")
    assert checkpoint_fingerprint(folder) != weights
