import json
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import logits, phi_config, phi_model, probe, random_growth

import phigrow
from phigrow import expand as expand_function
from phigrow.checkpoints.reader import CheckpointReader
from phigrow.cli import app
from phigrow.errors import GrowthError
from phigrow.expansion.expand import default_out, parse_size

SRC, DST = phi_config(32, 4, 48, 2, 4), phi_config(72, 6, 70, 3, 4, resid_pdrop=0.1, bos_token_id=1, eos_token_id=2)


SPELLED = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 4 / 12},
    "rope_scaling": None,
    "pad_token_id": None,
}
"""Keys that DST leaves out and that an output has."""


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("method", ["wr", "tile", "lossless"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_streamed_through_files_is_bit_equal_to_in_memory(method, dtype, save_model, tmp_path):
    rng = random.Random(str(dtype))
    for trial in range(3):
        src, dst = random_growth(rng)
        model = phi_model(src, dtype)
        options = {"noise": 0.1} if method == "tile" else {}
        folder = save_model(model, f"src{trial}", max_shard_size=rng.choice(["20KB", "5GB"]))
        out = phigrow.expand(
            folder,
            dst,
            tmp_path / f"out{trial}",
            method=method,
            shard_size=rng.choice(["9KB", "100KB", "1GB"]),
            **options,
        )
        in_memory = phigrow.expand_model(model, dst, method=method, **options).state_dict()
        assert same(stored(out), dict(in_memory)), (src, dst)


def test_blocks_of_any_size_give_the_same_bytes(save_model, tmp_path, monkeypatch):
    """Rows are lifted in blocks: neither the blocks nor the threads may show in the result."""
    folder = save_model(phi_model(SRC, torch.float32))
    for method, options in (("wr", {}), ("lossless", {}), ("tile", {"noise": 0.2, "scale": "rms"})):
        whole = phigrow.expand_model(phi_model(SRC, torch.float32), DST, method=method, **options).state_dict()
        for size in (1, 300, 301 * 5):
            monkeypatch.setattr("phigrow.expansion.write_tensors.BLOCK_VALUES", size)
            out = phigrow.expand(folder, DST, tmp_path / f"{method}-{size}", method=method, **options)
            assert same(stored(out), dict(whole))
    # Negative control: another seed draws other values.
    again = phigrow.expand(folder, DST, tmp_path / "other", method="wr", seed=1)
    assert not same(stored(again), stored(tmp_path / "wr-300"))


def test_shard_sizes_and_names_are_those_of_transformers(save_model, tmp_path):
    folder = save_model(phi_model(SRC, torch.float32))
    one = phigrow.expand(folder, DST, tmp_path / "one", method="wr")
    many = phigrow.expand(folder, DST, tmp_path / "many", method="wr", shard_size="60KB")
    assert [p.name for p in one.glob("*.safetensors*")] == ["model.safetensors"]
    index = json.loads((many / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert names == [f"model-{k + 1:05}-of-{len(names):05}.safetensors" for k in range(len(names))]
    assert len(names) > 3
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in stored(one).values())
    assert same(stored(one), stored(many))
    with safe_open(one / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_result_is_an_ordinary_folder_without_phigrow(save_model, tmp_path):
    folder = save_model(phi_model(SRC, torch.float32))
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "evil.py").write_text("raise SystemExit")
    out = phigrow.expand(folder, DST, tmp_path / "grown", method="tile", seed=7, dtype="bfloat16")
    config = json.loads((out / "config.json").read_text())
    assert config == DST | SPELLED | {"torch_dtype": "bfloat16", "dtype": "bfloat16"}
    generation = json.loads((out / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)
    assert (out / "tokenizer.json").read_text() == '{"a": 1}'
    assert not (out / "evil.py").exists()
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")  # the name of a local folder is no base model
    assert "\n# src grown by tile\n" in card
    script = f"""
import sys
sys.modules["phigrow"] = None  # importing it would fail
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(out)!r}, dtype="auto")
assert model.dtype == torch.bfloat16 and model.config.num_hidden_layers == 3
tokens = model.generate(torch.tensor([[3, 4]]), max_new_tokens=5, do_sample=False, eos_token_id=None)
assert tokens.shape == (1, 7)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_destination_in_the_spelling_of_transformers_5_is_kept_and_loads(save_model, tmp_path):
    from transformers import AutoModelForCausalLM

    dropped = ("partial_rotary_factor", "rope_theta", "torch_dtype")
    new = {key: value for key, value in DST.items() if key not in dropped}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 4 / 12}
    new["dtype"] = "float32"
    model = phi_model(SRC, torch.float32)
    folder = save_model(model)
    outs = [phigrow.expand(folder, c, tmp_path / n, method="lossless") for n, c in (("old", DST), ("new", new))]
    assert same(*map(stored, outs))
    both = DST | SPELLED | {"dtype": "float32"}
    assert [json.loads((out / "config.json").read_text()) for out in outs] == [both, both]
    ids = probe(61)
    for out in outs:
        grown = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        assert grown.model.layers[0].self_attn.rotary_ndims == 4
        assert float((logits(grown, ids) - logits(model, ids)).abs().max()) < 1e-5


def test_provenance_repeats_the_expansion(save_model, tmp_path, monkeypatch):
    import hashlib

    monkeypatch.chdir(tmp_path)
    folder = save_model(phi_model(SRC, torch.float32))
    (folder / "training.json").write_text('{"tokens": 5, "flops": 6.0, "seconds": 7.0}')
    (tmp_path / "dst.json").write_text(json.dumps(DST))
    out = phigrow.expand("src", "dst.json", method="tile", scale="rms", noise=0.25, seed=9, rounding="floor")
    assert out == Path("src-to-dst-tile")
    record = json.loads((out / "phigrow.json").read_text())
    weights = (folder / "model.safetensors").read_bytes()
    assert record["source"]["files"]["model.safetensors"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert record["source"]["training"] == {"tokens": 5, "flops": 6.0, "seconds": 7.0}
    assert record["plan"]["hash"] == phigrow.Plan.from_json(record["plan"]).hash
    words = shlex.split(record["command"])
    assert words[:2] == ["phigrow", "expand"]
    first = stored(out)
    with pytest.raises(SystemExit) as done:
        app([*words[1:], "--overwrite"])
    assert done.value.code == 0
    assert same(first, stored(out))


def test_seed_and_name_alone_decide_new_values(save_model, tmp_path):
    folder = save_model(phi_model(SRC, torch.float32))
    a, b, c = (
        stored(phigrow.expand(folder, DST, tmp_path / name, method="wr", seed=seed))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert same(a, b)
    assert not same(a, c)


def test_a_failure_leaves_nothing_behind(save_model, tmp_path, monkeypatch):
    folder = save_model(phi_model(SRC, torch.float32))
    before = sorted(os.listdir(tmp_path))
    import phigrow.checkpoints.writer

    calls = []

    def break_late(self, name, row, values):
        calls.append(name)
        if len(calls) == 12:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(phigrow.checkpoints.writer.CheckpointWriter, "write", break_late)
    with pytest.raises(GrowthError, match="the output cannot be written") as caught:
        phigrow.expand(folder, DST, tmp_path / "new" / "folders" / "out", method="wr")
    assert "No space left on device" in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before
    monkeypatch.undo()
    phigrow.expand(folder, DST, tmp_path / "out", method="wr")
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "out"])


def test_an_existing_output_is_kept_unless_told_otherwise(save_model, tmp_path):
    folder = save_model(phi_model(SRC, torch.float32))
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(GrowthError, match="the output folder exists"):
        phigrow.expand(folder, DST, out)
    assert (out / "precious").exists()
    # Never replaced: phigrow did not write it.
    with pytest.raises(GrowthError, match=r"(?s)it is not a grown checkpoint.*phigrow replaces only what it wrote"):
        phigrow.expand(folder, DST, out, overwrite=True)
    assert (out / "precious").read_text() == "x"
    grown = phigrow.expand(folder, DST, tmp_path / "grown", method="tile")
    before = (grown / "phigrow.json").read_bytes()
    phigrow.expand(folder, DST, grown, method="wr", overwrite=True)
    assert (grown / "phigrow.json").read_bytes() != before


@pytest.mark.parametrize("place", [".", "..", "file.txt"])
def test_neither_a_file_nor_the_current_folder_is_replaced(save_model, tmp_path, monkeypatch, place):
    folder = save_model(phi_model(SRC, torch.float32))
    inside = tmp_path / "here" / "inside"
    inside.mkdir(parents=True)
    (inside / "file.txt").write_text("mine")
    monkeypatch.chdir(inside)
    with pytest.raises(GrowthError, match=r"(?s)the output (is the current folder|exists).*choose another --out"):
        phigrow.expand(folder, DST, place, overwrite=True)
    assert (inside / "file.txt").read_text() == "mine"


def test_float16_overflow_names_the_tensor(save_model, tmp_path):
    model = phi_model(SRC, torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.fc1.weight[0, 0] = 1e5
    folder = save_model(model)
    with pytest.raises(GrowthError, match=r"do not fit float16\n  where: model.layers.[12].mlp.fc1.weight"):
        phigrow.expand(folder, DST, tmp_path / "out", method="tile", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_missing_and_extra_tensors_are_named(save_model, tmp_path):
    from safetensors.torch import save_file

    folder = save_model(phi_model(SRC, torch.float32))
    tensors = stored(folder)
    tensors["surprise"] = tensors.pop("lm_head.bias")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(GrowthError, match=r"1 missing: lm_head.bias; 1 unexpected: surprise"):
        phigrow.expand(folder, DST, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rotary_tables_of_old_checkpoints_are_ignored(save_model, tmp_path):
    from safetensors.torch import save_file

    folder = save_model(phi_model(SRC, torch.float32))
    tensors = stored(folder) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file(tensors, folder / "model.safetensors")
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in stored(phigrow.expand(folder, DST, tmp_path / "out"))


def test_tied_embeddings_stream_and_stay_tied(tmp_path, save_model):
    src, dst = (phi_config(*sizes, tie_word_embeddings=True) for sizes in ((32, 4, 48, 2, 4), (64, 8, 60, 2, 4)))
    model = phi_model(src, torch.float32)
    out = phigrow.expand(save_model(model), dst, tmp_path / "out", method="tile")
    grown = phigrow.expand_model(model, dst, method="tile")
    assert "lm_head.weight" not in stored(out)
    assert grown.lm_head.weight is grown.model.embed_tokens.weight
    assert torch.equal(stored(out)["model.embed_tokens.weight"], grown.lm_head.weight)


def test_a_folder_with_a_dot_in_its_name_names_the_output(tmp_path, monkeypatch):
    (tmp_path / "phi-1.5").mkdir()
    monkeypatch.chdir(tmp_path / "phi-1.5")
    assert default_out("phi-1", tmp_path / "phi-1.5", "wr") == Path("phi-1-to-phi-1.5-wr")
    assert default_out("phi-1", ".", "wr") == Path("phi-1-to-phi-1.5-wr")


def test_the_tensor_with_most_values_decides_the_dtype(tmp_path):
    tensors = {"long": torch.zeros(9, dtype=torch.float32), "large": torch.zeros(4, 8, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        assert reader.dtype_name == "bfloat16"
    save_file(tensors | {"long": torch.zeros(99)}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        assert reader.dtype_name == "float32"


@pytest.mark.parametrize("tokens", [-1, 0, 1])
def test_too_few_tokens_are_refused(tokens):
    with pytest.raises(GrowthError, match=f"verify cannot run on {tokens} tokens"):
        phigrow.verify("src", "dst", tokens=tokens)


def test_default_names_and_sizes():
    assert default_out("phi-1_5", "phi2.json", "tile") == Path("phi-1_5-to-phi2-tile")
    assert default_out("someone/model", {}, "wr") == Path("model-to-grown-wr")
    assert [parse_size(text) for text in ("5GB", "1.5 mb", "2GiB", "77")] == [5 * 10**9, 1_500_000, 2**31, 77]
    for text in ("GB", "-1GB", "many", "inf", "1e400GB", "nan"):
        with pytest.raises(GrowthError, match="cannot be read"):
            parse_size(text)


def test_certificate_of_files(save_model, tmp_path):
    folder = save_model(phi_model(SRC, torch.float32))
    good = phigrow.expand(folder, DST, tmp_path / "good", method="lossless")
    certificate = phigrow.verify(folder, good)
    assert certificate.passed is True
    assert certificate.max_abs_dlogit < 1e-5
    assert certificate.source_loss == pytest.approx(certificate.destination_loss, abs=1e-6)
    assert certificate.plan_hash == phigrow.plan(folder, DST, "lossless").hash
    assert certificate.tokens == len(probe(61, 4, 64).flatten())
    wr = phigrow.verify(folder, phigrow.expand(folder, DST, tmp_path / "wr", method="wr"))
    assert wr.passed is None
    assert wr.max_abs_dlogit > 0.1
    assert wr.kl > 1e-3
    # Negative control: one altered value of a model that claims to be exact.
    from safetensors.torch import save_file

    tensors = stored(good)
    tensors["model.layers.0.mlp.fc1.weight"][3, 3] += 0.5
    save_file(tensors, good / "model.safetensors", metadata={"format": "pt"})
    assert phigrow.verify(folder, good).passed is False
    tensors["model.layers.0.mlp.fc1.weight"][3, 3] = float("nan")
    save_file(tensors, good / "model.safetensors", metadata={"format": "pt"})
    assert phigrow.verify(folder, good).passed is False


def test_float64_certificate(save_model, tmp_path):
    folder = save_model(phi_model(SRC, torch.float64))
    out = phigrow.expand(folder, DST, tmp_path / "out", method="lossless")
    certificate = phigrow.verify(folder, out, dtype="float64", tokens=64)
    assert certificate.tolerance == pytest.approx(1e-10)
    assert certificate.passed is True


def test_an_altered_plan_is_noticed(save_model, tmp_path):
    folder = save_model(phi_model(SRC, torch.float32))
    out = phigrow.expand(folder, DST, tmp_path / "out", method="wr")
    record = json.loads((out / "phigrow.json").read_text())
    record["plan"]["approximations"] = []
    (out / "phigrow.json").write_text(json.dumps(record))
    with pytest.raises(GrowthError, match="the plan was altered"):
        phigrow.verify(folder, out)


def test_names_of_functions_win_over_names_of_modules():
    import phigrow.expansion.verify
    import phigrow.growth.plan

    assert phigrow.expand is expand_function
    assert all(callable(f) for f in (phigrow.plan, phigrow.verify, phigrow.expand, phigrow.expand_model))
