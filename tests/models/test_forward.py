"""The forward passes in numpy against transformers' models of every family."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_models import model_of, phi_config, phi_model, random_pair

import phigrow
from phigrow.errors import GrowthError
from phigrow.expansion.logits import choose_backend, compute_logits
from phigrow.models.families import all_families

# Rotary tables are float32 in both; the cosines of numpy and torch differ in their last bit, in float64 models too.
TOLERANCE = {"float32": 2e-5, "float64": 2e-6}

VARIANTS = {
    "phi": [
        {},
        {"qk_layernorm": True},
        {"tie_word_embeddings": True},
        {"hidden_act": "relu"},
        {"rope_theta": 500.0},
        {"layer_norm_eps": 0.01},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    ],
    "gpt_neox": [
        {},
        {"use_parallel_residual": False},
        {"attention_bias": False},
        {"tie_word_embeddings": True},
        {"rotary_emb_base": 500.0},
        {"layer_norm_eps": 0.01},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
    "llama": [
        {},
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True},
        {"rope_theta": 500.0},
        {"rms_norm_eps": 0.01},
        {"hidden_act": "gelu"},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ],
    "qwen2": [{}, {"tie_word_embeddings": True}, {"rope_theta": 500.0}, {"rms_norm_eps": 0.01}],
}


def difference(folder, dtype, seed=0):
    """Largest difference between the logits of both backends, and the largest logit."""
    vocab = phigrow.models.config.load_config(folder)["vocab_size"]
    ids = np.random.default_rng(seed).integers(vocab, size=(3, 40))
    ours, theirs = (compute_logits(folder, ids, dtype, backend)[0] for backend in ("numpy", "transformers"))
    assert ours.dtype == theirs.dtype == dtype
    assert ours.shape == theirs.shape == (3, 40, vocab)
    return np.abs(ours - theirs).max(), np.abs(theirs).max()


def test_every_family_is_held_against_transformers():
    assert set(VARIANTS) == set(all_families())


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_in_numpy_are_those_of_transformers(name, save_model):
    rng = random.Random(5)
    for number, flags in enumerate(VARIANTS[name]):
        for side, config in enumerate(random_pair(all_families()[name], rng, **flags)):
            stored, dtype = rng.choice([(torch.float32, "float32"), (torch.float64, "float64")])
            folder = save_model(model_of(config, stored), f"{number}-{side}")
            assert choose_backend("auto", folder) == "numpy", flags
            differs, largest = difference(folder, dtype)
            assert differs < TOLERANCE[dtype] * max(1, largest), (flags, config)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_stored_half_precision_is_computed_in_float32(stored, save_model):
    folder = save_model(phi_model(phi_config(num_key_value_heads=2), stored))
    assert difference(folder, "float32")[0] < 2e-5


def test_a_changed_setting_is_noticed(save_model):
    # Negative control of the comparison: the same weights with another epsilon.
    folder = save_model(phi_model(phi_config(), torch.float32))
    text = (folder / "config.json").read_text()
    ids = np.arange(40)[None] % 61
    before = compute_logits(folder, ids, "float32", "transformers")[0]
    (folder / "config.json").write_text(text.replace('"layer_norm_eps": 1e-05', '"layer_norm_eps": 0.01'))
    assert np.abs(compute_logits(folder, ids, "float32", "numpy")[0] - before).max() > 1e-3


def test_random_probes_are_those_that_torch_draws(save_model, tmp_path):
    from phigrow.expansion.verify import probe_tokens

    folder = save_model(phi_model(phi_config(), torch.float32))
    for seed in (0, 7, 2**40 + 3, -1):
        drawn = torch.randint(61, (4, 64), generator=torch.Generator().manual_seed(seed))
        assert (probe_tokens(folder, None, 256, 61, seed)[0] == drawn.numpy()).all()


def test_a_text_is_encoded_as_transformers_encodes_it(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from phigrow.expansion.verify import PROBE_TEXT, encode

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = {letter: number for number, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    tokenizer.model = models.BPE(vocab=alphabet, merges=[])
    tokenizer.enable_truncation(8)  # a limit that a saved tokenizer may carry
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    ids = encode(tmp_path, PROBE_TEXT)
    assert len(ids) > 500
    assert ids == AutoTokenizer.from_pretrained(tmp_path)(PROBE_TEXT)["input_ids"]


def test_what_numpy_cannot_run_goes_to_transformers(save_model):
    plain = save_model(phi_model(phi_config(), torch.float32), "plain")
    for number, (flags, why) in enumerate(
        [
            ({"hidden_act": "gelu_fast"}, "no activation 'gelu_fast'"),
            ({"hidden_act": "mish"}, "no activation 'mish'"),
        ]
    ):
        folder = save_model(phi_model(phi_config(**flags), torch.float32), f"odd-{number}")
        assert choose_backend("auto", plain, folder) == "transformers"
        assert phigrow.verify(folder, folder, tokens=16).backend == "transformers"
        with pytest.raises(GrowthError, match="the numpy backend cannot run this checkpoint") as caught:
            phigrow.verify(plain, folder, backend="numpy")
        assert why in str(caught.value)
        assert str(folder) in str(caught.value)
    with pytest.raises(GrowthError, match="no backend 'jax'"):
        phigrow.verify(plain, plain, backend="jax")


def test_both_backends_certify_the_same(save_model, tmp_path):
    folder = save_model(phi_model(phi_config(), torch.float32))
    grown = phigrow.expand(folder, phi_config(72, 6, 70, 3, 4), tmp_path / "grown", method="wr")
    ours, theirs = (phigrow.verify(folder, grown, backend=backend) for backend in ("auto", "transformers"))
    assert (ours.backend, theirs.backend) == ("numpy", "transformers")
    for name in ("max_abs_dlogit", "mean_abs_dlogit", "max_abs_logit", "kl", "source_loss", "destination_loss"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-4), name


def test_large_models_run_in_transformers(save_model, monkeypatch):
    import phigrow.expansion.logits as logits

    folder = save_model(phi_model(phi_config(), torch.float32))
    monkeypatch.setattr(logits, "LARGEST_IN_NUMPY", 1000)
    assert choose_backend("auto", folder) == "transformers"
    assert choose_backend("numpy", folder) == "numpy"


def test_weights_that_do_not_fit_the_configuration_are_refused(save_model):
    from safetensors.torch import load_file, save_file

    folder = save_model(phi_model(phi_config(), torch.float32))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.fc1.bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for backend in ("numpy", "transformers"):
        with pytest.raises(GrowthError, match="the tensors of the checkpoint do not match"):
            phigrow.verify(folder, folder, backend=backend)


def test_verifying_a_small_model_needs_no_torch(save_model, tmp_path):
    folder = save_model(phi_model(phi_config(), torch.float32))
    script = "import sys\nfrom phigrow.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    words = ["verify", str(folder), str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
