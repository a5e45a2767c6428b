"""The script for a GPU: every step runs here at toy size, and a step that fails does not stop the rest."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ORDER = [(1, False), (2, False), (2, True), (3, False), (3, True)]
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_check.py"


@pytest.fixture
def gpu_check(monkeypatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    monkeypatch.setattr(sys, "path", [str(SCRIPT.parent), *sys.path])  # as for a script
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_step_runs_at_toy_size(tmp_path):
    alone = {"PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    out = tmp_path / "lines.jsonl"
    command = [sys.executable, str(SCRIPT), "--size", "toy", "--together", "--out", str(out)]
    done = subprocess.run(command, env=os.environ | alone, capture_output=True, text=True, timeout=900)
    lines = {line["step"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert {name: line.get("error", line) for name, line in lines.items() if not line["ok"]} == {}
    assert done.returncode == 0
    print({name: line["took"] for name, line in lines.items()})
    assert len(lines) == 14
    assert lines["documents"]["sdpa"]["crossing_gradient"] == 0 < lines["documents"]["sdpa"]["own_gradient"]
    assert [row["stage"] for row in lines["stages"]["rows"]] == [0, 1, 2, 3]
    assert lines["resume"]["deterministic"]["difference"] == 0
    assert lines["resume"]["deterministic_costs"] > -1
    assert lines["numbers"]["logits"] < 1e-3
    fused = lines["fused"]["rows"]
    assert set(fused) == {"plain", "selective", "recomputed", "layers", "layers, selective", "liger"}
    assert fused["liger"].keys() in ({"problem"}, {"seconds", "loss"})
    assert set(lines["ceilings"]["batch_copies"]) == {"pageable", "pinned"}


def test_stages_are_compared_on_all_ranks(gpu_check, monkeypatch, tmp_path):
    """Without training: `launch` itself runs in the step `universal`."""
    asked = []

    def launch(place: object, name: str, count: int, *, on_cpu: bool, **more: object) -> str | None:
        asked.append((name, count, more["batch"], json.loads(Path(str(more["deepspeed"])).read_text())))
        (tmp_path / name).mkdir()
        loss = 3.5 if name == "ranks-3-True" else 3.0
        steps = [{"type": "step", "loss": loss - step, "tokens_per_second": 100.0 * step} for step in range(3)]
        (tmp_path / name / "records.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        return None

    monkeypatch.setattr(gpu_check, "launch", launch)
    place = gpu_check.Place(tmp_path, True)
    found = gpu_check.compared_ranks(place, 4, on_cpu=True)
    zero = {"zero_optimization": {"stage": 2, "overlap_comm": True}}
    assert [call[:3] for call in asked] == [(f"ranks-{k}-{on}", 4, 8) for k, on in ORDER]
    assert asked[2][3] == zero
    assert (found["ok"], found["largest_difference"]) == (False, 0.5)  # stage 3 computes something else here
    assert [row["tokens_per_second"] for row in found["rows"]] == [200.0] * 5
    monkeypatch.setattr(gpu_check, "launch", lambda *_, **__: "NCCL is not there")
    assert gpu_check.compared_ranks(place, 4, on_cpu=True)["error"] == "NCCL is not there"


def test_a_rank_that_fails_ends_the_wait_for_the_others(gpu_check, monkeypatch, tmp_path):
    lasting = "import sys, time; print('rank', flush=True); time.sleep(float(sys.argv[1])); sys.exit(int(sys.argv[2]))"

    def ranks(*each: tuple[float, int]) -> list[subprocess.Popen[bytes]]:
        words = [[sys.executable, "-c", lasting, str(seconds), str(code)] for seconds, code in each]
        return [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in words]

    for each, limit, expected in (
        (((60, 0), (0, 3)), 30, ("ranks [1] ended with codes [3]", [1])),
        (((60, 0), (60, 0)), 0.3, ("ranks [0, 1] took more than 0.3 s", [0, 1])),
        (((0, 0), (0, 0)), 30, ("", [])),
    ):
        began, started = time.monotonic(), ranks(*each)
        try:
            found = gpu_check.wait_for(started, limit)
        finally:
            for rank in started:
                rank.kill()
                rank.wait()
        assert found == expected
        assert time.monotonic() - began < 25
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert gpu_check.ranks(gpu_check.Place(tmp_path, True))["skipped"] == "it takes two GPUs, and this machine has 1"


def test_phi_runs_ligers_kernels_while_a_context_lasts(gpu_check, monkeypatch):
    """Stand-ins with the signatures of Liger 0.8.5, whose kernels need Triton and a GPU."""
    import torch
    from torch.nn import functional as F
    from transformers.models.phi import modeling_phi

    calls: list[str] = []
    own = modeling_phi.apply_rotary_pos_emb

    def liger_layer_norm(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        calls.append("norm")
        return F.layer_norm(values, values.shape[-1:], weight, bias, eps)

    def liger_rotary_pos_emb(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append("rotary")
        rotated: tuple[torch.Tensor, torch.Tensor] = own(q, k, cos, sin)
        return rotated

    assert "ModuleNotFoundError" in (gpu_check.liger_problem() or "ModuleNotFoundError")
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, function in (("functional", liger_layer_norm), ("rope", liger_rotary_pos_emb)):
        module = ModuleType(name)
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, f"liger_kernel.transformers.{name}", module)
    assert gpu_check.liger_problem() is None
    config = modeling_phi.PhiConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    model = modeling_phi.PhiModel(config).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        with gpu_check.liger_kernels():
            found = model(ids).last_hidden_state
        assert sorted(calls) == ["norm"] * 3 + ["rotary"] * 2
        assert torch.equal(found, expected)
        model(ids)
    assert len(calls) == 5  # Phi's own again


def test_a_step_that_fails_does_not_stop_the_rest(gpu_check, monkeypatch, tmp_path, capsys):
    def broken(place: object) -> dict[str, object]:
        raise RuntimeError("no kernel image is available")

    steps = {"first": broken, "second": lambda place: {"ok": True, "value": 3}, "third": lambda place: {"ok": False}}
    monkeypatch.setattr(gpu_check, "STEPS", steps)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--together", "--out", str(tmp_path / "lines.jsonl")])
    assert gpu_check.main() == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["step"], line["ok"]) for line in lines] == [
        ("first", False), ("second", True), ("third", False), ("summary", False),
    ]  # fmt: skip
    assert lines[0]["error"] == "RuntimeError: no kernel image is available"
    assert (lines[1]["value"], lines[-1]["failed"]) == (3, ["first", "third"])
    assert (tmp_path / "lines.jsonl").read_text().splitlines() == [json.dumps(line) for line in lines]
    monkeypatch.setattr(gpu_check, "STEPS", {"second": steps["second"]})
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--together"])
    assert gpu_check.main() == 0
