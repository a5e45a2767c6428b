"""`verify` beyond the source's context: long sequences, and what is too long to run."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny_models import model_of, phi_config

import phigrow
from phigrow.expansion import verify as verifying
from phigrow.expansion.logits import Probe, run_probes
from phigrow.models.families import all_families
from phigrow.models.versions import reads_rope_parameters

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}


def llama(heads: int, **more: object) -> dict[str, object]:
    sizes = {"kv": heads, "group": 1, "q": 8, "rotary": 8, "mlp": 24, "layer": 2, "vocab": 31, "hidden": 8 * heads}
    ids = {"bos_token_id": None, "eos_token_id": None, "initializer_range": 0.02}
    return {**all_families()["llama"].config_of(sizes), **ids, "max_position_embeddings": 40, **more}


@pytest.fixture
def claimed(monkeypatch):
    """Plans claim to be exact whatever the configurations, as before function_of."""
    monkeypatch.setattr("phigrow.growth.planner.function_changes", lambda *_: [])


CASES = {
    # name: (source, destination, lengths that must be run)
    "dynamic, longer context": ({"rope_scaling": DYNAMIC}, {"max_position_embeddings": 200}, (41, 200)),
    "longrope, another long_factor": (
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
                          "original_max_position_embeddings": 150}, "max_position_embeddings": 300},
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4,
                          "original_max_position_embeddings": 150}},
        (150, 151, 300),
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["numpy", "transformers"])
@pytest.mark.parametrize("case", CASES)
def test_a_wrong_claim_beyond_the_ordinary_probe_fails(case, backend, save_model, tmp_path, claimed, monkeypatch):
    old, new, lengths = CASES[case]
    source, destination = llama(2, **old), {**llama(4, **old), **new}
    folder = save_model(model_of(json.loads(json.dumps(source)), torch.float32))
    grown = phigrow.expand(folder, destination, tmp_path / "grown", method="lossless")
    certificate = phigrow.verify(folder, grown, backend=backend)
    assert certificate.claims_exact
    assert set(lengths) <= set(certificate.lengths)
    assert certificate.not_run is None
    assert certificate.max_abs_dlogit > 1e-2
    assert certificate.passed is False
    # Negative control: the ordinary probe alone does not see it.
    monkeypatch.setattr(verifying, "long_lengths", lambda *_: ((), None))
    assert phigrow.verify(folder, grown, backend=backend).passed


@pytest.mark.parametrize("backend", ["numpy", "transformers"])
def test_a_sound_growth_passes_at_every_length(backend, save_model, tmp_path):
    folder = save_model(model_of(llama(2), torch.float32))
    grown = phigrow.expand(folder, llama(4, max_position_embeddings=333), tmp_path / "grown", method="lossless")
    certificate = phigrow.verify(folder, grown, backend=backend)
    assert certificate.passed
    assert certificate.lengths == (333,)
    assert phigrow.verify(folder, grown, backend=backend, longest=100).lengths == (100,)
    same = phigrow.expand(folder, llama(4), tmp_path / "same", method="lossless")
    assert phigrow.verify(folder, same, backend=backend).lengths == ()


def test_a_fault_only_at_long_lengths_makes_a_certificate_fail(save_model, tmp_path, monkeypatch):
    folder = save_model(model_of(llama(2), torch.float32))
    grown = phigrow.expand(folder, llama(4, max_position_embeddings=200), tmp_path / "grown", method="lossless")
    runs = []

    def damaged(*arguments):
        logits, stored = run_probes(*arguments)
        runs.append(arguments[0])
        if len(runs) == 2:
            logits[-1][0, -1, 3] = np.nan
        return logits, stored

    monkeypatch.setattr(verifying, "run_probes", damaged)
    certificate = phigrow.verify(folder, grown)
    assert certificate.passed is False
    assert np.isnan(certificate.max_abs_dlogit)


def test_a_sequence_that_costs_too_much_is_named_and_not_run():
    small, large = llama(2), llama(4, max_position_embeddings=1 << 20)
    lengths, not_run = verifying.long_lengths(small, large, 40, None)
    assert not_run == 1 << 20
    assert len(lengths) == 1
    assert 1000 < lengths[0] < 1 << 17
    assert verifying.long_lengths(small, large, 40, 1 << 20) == ((1 << 20,), None)
    assert verifying.long_lengths(small, large, 40, 30) == ((), 1 << 20)
    # A model so large that not one length beyond the source's context is affordable.
    phi = phi_config(10240, 80, 40960, 64, 64, 51200, max_position_embeddings=2048)
    assert verifying.long_lengths(phi, {**phi, "max_position_embeddings": 4096}, 128, None) == ((), 4096)
    assert verifying.long_lengths(phi, phi, 128, None) == ((), None)


def test_a_certificate_says_what_was_run(save_model, tmp_path, capsys):
    from phigrow.cli.printing import print_certificate

    folder = save_model(model_of(llama(2), torch.float32))
    grown = phigrow.expand(folder, llama(4, max_position_embeddings=200), tmp_path / "grown", method="lossless")
    certificate = phigrow.verify(folder, grown, longest=100)
    print_certificate(certificate)
    printed = capsys.readouterr().out
    assert "240 (random tokens), and sequences of 100 tokens" in " ".join(printed.replace("│", " ").split())
    note = "note: sequences of 200 tokens were not run, because that takes long. Add --longest 200 to run them.\n"
    assert note in printed
    assert certificate.to_json()["lengths"] == (100,)
    print_certificate(dataclasses.replace(certificate, lengths=(), not_run=None))
    assert "sequences" not in capsys.readouterr().out


SCALINGS = {
    "phi": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3, "original_max_position_embeddings": 10},
    "gpt_neox": DYNAMIC,
    "llama": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    "qwen2": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]},
}


if not reads_rope_parameters():
    SCALINGS["llama"] = {"rope_type": "linear", "factor": 2.0}  # proportional is new in transformers 5


@pytest.mark.parametrize("name", all_families())
def test_long_sequences_attend_block_by_block(name, save_model, monkeypatch):
    from phigrow.models import forward

    sizes = {"kv": 2, "group": 1, "q": 8, "rotary": 8, "mlp": 24, "layer": 2, "vocab": 31, "hidden": 16}
    ids = np.arange(90)[None] * 7 % 31
    flags = {"max_position_embeddings": 40, "bos_token_id": None, "eos_token_id": None}
    flags["rope_parameters"] = dict(SCALINGS[name])
    folder = save_model(model_of({**all_families()[name].config_of(sizes), **flags}, torch.float32))
    probes = [Probe(ids, 90), Probe(ids, 7)]
    (whole, last), _ = run_probes(folder, probes, "float32", "numpy")
    monkeypatch.setattr(forward, "MOST_SCORES", 1000)
    (blocks, _), _ = run_probes(folder, probes, "float32", "numpy")
    (theirs, ends), _ = run_probes(folder, probes, "float32", "transformers")
    assert whole.shape == blocks.shape == theirs.shape == (1, 90, 31)
    assert last.shape == ends.shape == (1, 7, 31)
    for one, two in ((whole, blocks), (whole[:, -7:], last), (whole, theirs), (last, ends)):
        assert np.abs(one - two).max() < 3e-5
    assert np.abs(whole[:, -7:] - whole[:, -8:-1]).max() > 0.1  # negative control: another position
