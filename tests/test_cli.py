import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer.main
from models import phi_config, phi_model

from phigrow.cli import app

FROZEN = {
    "expand": "--src --dst-config --method --out --depth --rounding --anchor --scale --noise --seed --dtype --revision "
    "--shard-size --dry-run --overwrite",
    "plan": "--src --dst-config --method --depth --rounding --anchor --scale --noise --seed --revision --seq-len "
    "--json",
    "verify": "src dst --dtype --text --tokens --seed --revision --json",
    "data": "source --out --seq-len --tokenizer --vocab-size --heldout --seed --text-column --split --config "
    "--revision --workers --overwrite",
    "demo": "--out --ranks --steps --seed",
    "report": "runs --out",
}


def phigrow(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from phigrow.cli import main; main()", *map(str, words)]
    environment = {"HF_HUB_OFFLINE": "1", "COLUMNS": "120", "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


def test_the_command_line_is_frozen():
    group = typer.main.get_command(app)
    found = {
        name: [p.opts[-1] if p.param_type_name == "option" else p.name for p in command.params]
        for name, command in group.commands.items()
    }
    assert found == {name: words.split() for name, words in FROZEN.items()}


def test_every_option_has_help():
    for name, command in typer.main.get_command(app).commands.items():
        assert command.help, name
        assert all(getattr(parameter, "help", None) for parameter in command.params), name


def test_help_answers_at_once_and_says_where_to_start():
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        done = phigrow("--help")
        seconds.append(time.perf_counter() - started)
    assert done.returncode == 0
    assert "phigrow demo" in done.stdout
    assert min(seconds) < 0.5, seconds


def test_expand_as_typed_then_verify(tmp_path, save_model):
    """The command of the README, with a local folder of that name standing for the hub."""
    save_model(phi_model(phi_config(32, 4, 48, 2, 4), torch.float32), "phi-1_5")
    (tmp_path / "phi2.json").write_text(json.dumps(phi_config(64, 4, 60, 3, 4)))
    done = phigrow("expand", "--src", "phi-1_5", "--dst-config", "phi2.json", "--method", "tile", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "wrote phi-1_5-to-phi2-tile" in done.stdout
    assert "100%" in done.stderr  # the progress bar
    done = phigrow("verify", "phi-1_5", "phi-1_5-to-phi2-tile", cwd=tmp_path)
    assert done.returncode == 0
    assert "approximate by design" in done.stdout


def test_verify_fails_with_exit_code_1_when_a_claim_does_not_hold(tmp_path, save_model):
    from safetensors.torch import load_file, save_file

    save_model(phi_model(phi_config(32, 4, 48, 2, 4), torch.float32))
    (tmp_path / "dst.json").write_text(json.dumps(phi_config(48, 6, 60, 3, 4)))
    words = ("expand", "--src", "src", "--dst-config", "dst.json", "--method", "lossless", "--out", "grown")
    assert phigrow(*words, cwd=tmp_path).returncode == 0
    done = phigrow("verify", "src", "grown", "--json", cwd=tmp_path)
    assert done.returncode == 0
    certificate = json.loads(done.stdout)
    assert certificate["passed"] is True
    assert certificate["max_abs_dlogit"] < 1e-5
    weights = tmp_path / "grown" / "model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.bias"][0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    done = phigrow("verify", "src", "grown", cwd=tmp_path)
    assert done.returncode == 1
    assert "FAILED: the plan claims to preserve the function, and does not" in done.stdout


def test_dry_run_writes_nothing(tmp_path, save_model):
    save_model(phi_model(phi_config(), torch.float32))
    (tmp_path / "dst.json").write_text(json.dumps(phi_config(48, 6)))
    done = phigrow("expand", "--src", "src", "--dst-config", "dst.json", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0
    assert "of float32 to src-to-dst-tile; wrote nothing" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst.json", "src"]


def test_plan_prints_axes_layers_and_cost():
    done = phigrow("plan", "--src", "phi-1_5", "--dst-config", "phi2.json", "--method", "lossless")
    assert done.returncode == 0
    for text in ("2048 kept, 512 written as the mean", "identity layer", "2.780B", "exact: computes the source's"):
        assert text in done.stdout
    done = phigrow("plan", "--src", "phi-1_5", "--dst-config", "phi2.json", "--json")
    data = json.loads(done.stdout)
    assert data["exact"] is False
    assert data["depth"]["layers"][:4] == [0, 1, 2, 2]
    assert data["cost"]["destination"]["parameters"] == 2_779_683_840


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (
            ("expand", "--src", "nobody/nothing", "--dst-config", "phi2.json"),
            ("cannot reach the hub for 'nobody/nothing'", "give its folder as --src"),
        ),
        (("expand", "--src", "not a name", "--dst-config", "phi2.json"), ("no checkpoint 'not a name'",)),
        (("plan", "--src", "phi-1_5", "--dst-config", "phi9.json"), ("no configuration 'phi9.json'",)),
        (("plan", "--src", "phi2.json", "--dst-config", "phi-1.json"), ("is smaller: hidden 2560 -> 2048",)),
        (("plan", "--src", "phi-1", "--dst-config", "phi2.json", "--method", "best"), ("unknown method 'best'",)),
        (("verify", "nowhere", "nothing"), ("cannot reach the hub for 'nowhere'",)),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error_and_exit_code_2(words, messages, tmp_path):
    done = phigrow(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert all(message in done.stderr for message in messages), done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
