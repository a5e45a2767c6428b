import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import typer.main
from tiny_models import phi_config, phi_model
from typer.testing import CliRunner

from phigrow.cli import app, main
from phigrow.errors import GrowthError
from phigrow.growth.registry import all_methods

FROZEN = {
    "expand": "--src --dst-config --method --depth --rounding --seed --noise --maps --out --dtype --revision "
    "--shard-size --dry-run --overwrite --allow-nonfinite --quiet",
    "learn-growth": "--src --dst-config --depth --rounding --seed --out --data --method --steps --batch --micro-batch "
    "--lr --noise --dtype --zero --seq-len --threads --revision --overwrite --quiet",
    "grow-optimizer": "--checkpoint --grown --out --state --method --overwrite --quiet",
    "plan": "--src --dst-config --method --depth --rounding --seed --noise --maps --revision --seq-len --tokens --json "
    "--quiet",
    "diff": "first second --json --quiet",
    "capacity": "config --gpus --tokens --gpu --mfu --price --batch --micro-batch --seq-len --checkpointing "
    "--selective --optimizer --json --quiet",
    "inspect": "folder --tensor --plot --method --json --quiet",
    "verify": "src dst --dtype --text --tokens --longest --seed --revision --method --backend --save --certificate "
    "--json --quiet",
    "data": "source --out --seq-len --tokenizer --vocab-size --heldout --seed --across-sources --text-column --split "
    "--config --revision --workers --overwrite --json --quiet",
    "demo": "--out --ranks --steps --seed --quiet",
    "pretrain": "words --ranks --quiet",
    "compare": "study --only --seeds --workers --ranks --out --dry-run --quiet",
    "grow-train": "stages --ranks --out --dry-run --quiet",
    "report": "runs --out --baseline --budget --json --quiet",
    "recipes": "names --out --overwrite --quiet",
    "evaluate": "checkpoints --tasks --out --limit --batch-size --dtype --device --revision --json --quiet",
}


def phigrow(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command's `main` in this process: no start-up of torch for each one."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    line = ["phigrow", *map(str, words)]
    with (
        mock.patch.dict(os.environ, COLUMNS="120"),
        mock.patch("sys.argv", line),
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),  # `main` prints warnings in its own way
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(line, code, out.getvalue(), err.getvalue())


def process(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command as a process of its own, without the hub."""
    command = [sys.executable, "-c", "from phigrow.cli import main; main()", *map(str, words)]
    environment = {"HF_HUB_OFFLINE": "1", "COLUMNS": "120", "PATH": "/usr/bin:/bin"}
    environment |= {name: value for name, value in os.environ.items() if name == "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


def run(*words):
    """Call the application in this process, past `main`: errors are raised."""
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, list(map(str, words)))


def test_the_command_line_is_frozen():
    group = typer.main.get_command(app)
    found = {
        name: [p.opts[-1] if p.param_type_name == "option" else p.name for p in command.params]
        for name, command in group.commands.items()
    }
    generated = {f"--{name.replace('_', '-')}" for method in all_methods().values() for name in method.options}
    assert {"--anchor", "--scale", "--snr", "--shrink", "--start"} <= generated
    assert generated <= set(found["expand"])
    assert generated <= set(found["plan"])
    found = {name: [flag for flag in flags if flag not in generated] for name, flags in found.items()}
    assert found == {name: words.split() for name, words in FROZEN.items()}


def test_every_option_has_help():
    for name, command in typer.main.get_command(app).commands.items():
        assert command.help, name
        assert all(getattr(parameter, "help", None) for parameter in command.params), name


def test_help_answers_at_once_and_says_where_to_start():
    """Under half a second; of processor time, which other work on the machine does not stretch as it does the clock."""

    def processor_seconds() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    seconds = []
    for _ in range(3):
        before = processor_seconds()
        done = process("--help")
        seconds.append(processor_seconds() - before)
    assert done.returncode == 0
    assert "phigrow demo" in done.stdout
    assert min(seconds) < 0.5, seconds


def test_expand_as_typed_then_verify(tmp_path, save_model):
    """The command of the README, with a local folder of that name standing for the hub."""
    save_model(phi_model(phi_config(32, 4, 48, 2, 4), torch.float32), "phi-1_5")
    (tmp_path / "phi2.json").write_text(json.dumps(phi_config(64, 4, 60, 3, 4)))
    done = process("expand", "--src", "phi-1_5", "--dst-config", "phi2.json", "--method", "tile", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "wrote phi-1_5-to-phi2-tile" in done.stdout
    assert done.stderr == ""  # no progress bar: stderr is no terminal
    assert "copies of hidden, mlp get equal gradients for ever" in " ".join(done.stdout.split())
    done = process("verify", "phi-1_5", "phi-1_5-to-phi2-tile", cwd=tmp_path)
    assert done.returncode == 0
    assert "approximate by design: the plan makes no claim" in done.stdout
    for label in ("largest difference of logits", "KL divergence", "loss of the grown model", "256 (random tokens)"):
        assert label in done.stdout
    assert "Loading weights" not in done.stderr


def test_a_learned_method_without_maps_says_what_it_wrote(tmp_path, save_model):
    save_model(phi_model(phi_config(32, 4, 48, 2, 4), torch.float32))
    (tmp_path / "dst.json").write_text(json.dumps(phi_config(64, 8, 60, 2, 4)))
    done = phigrow("expand", "--src", "src", "--dst-config", "dst.json", "--method", "ligo", cwd=tmp_path)
    assert "note: ligo without learned maps is the operator that it starts from" in " ".join(done.stdout.split())


def test_the_folder_of_a_run_is_not_taken_for_its_checkpoint(tmp_path, save_model):
    save_model(phi_model(phi_config(32, 4, 48, 2, 4), torch.float32), "run/export")
    for words in (("expand", "--src", "run", "--dst-config", "phi2.json"), ("verify", "run", "run/export")):
        done = phigrow(*words, cwd=tmp_path)
        assert done.returncode == 2
        assert "it is the folder of a training run\n  what to do: give run/export" in done.stderr


def test_verify_fails_with_exit_code_1_when_a_claim_does_not_hold(tmp_path, save_model, monkeypatch):
    from safetensors.torch import load_file, save_file

    save_model(phi_model(phi_config(32, 4, 48, 2, 4), torch.float32))
    (tmp_path / "dst.json").write_text(json.dumps(phi_config(48, 6, 60, 3, 4)))
    words = ("expand", "--src", "src", "--dst-config", "dst.json", "--method", "lossless", "--out", "grown")
    monkeypatch.chdir(tmp_path)
    assert run(*words).exit_code == 0
    done = run("verify", "src", "grown", "--json")
    assert done.exit_code == 0
    certificate = json.loads(done.stdout)
    assert certificate["passed"] is True
    assert certificate["max_abs_dlogit"] < 1e-5
    weights = tmp_path / "grown" / "model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.bias"][0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    done = phigrow("verify", "src", "grown", cwd=tmp_path)
    assert done.returncode == 1
    assert "FAILED: the plan claims to preserve the function, but the grown model does not" in done.stdout


def test_dry_run_writes_nothing(tmp_path, save_model):
    save_model(phi_model(phi_config(), torch.float32))
    (tmp_path / "dst.json").write_text(json.dumps(phi_config(48, 6)))
    done = phigrow("expand", "--src", "src", "--dst-config", "dst.json", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0
    assert "of float32 to src-to-dst-wr; wrote nothing" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst.json", "src"]


def test_data_says_in_two_sentences_what_it_packed_and_where(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("to be or not to be, that is the question. " * 40)
    words = ("data", text, "--seq-len", 16, "--vocab-size", 300, "--heldout", 0, "--out")
    done = run(*words, tmp_path / "first")
    assert done.exit_code == 0, done.output
    facts = json.loads((tmp_path / "first" / "data.json").read_text())
    tokens, blocks = facts["train"]["tokens_seen"], facts["train"]["blocks"]
    assert done.stdout == (
        f"1 document of 1 source, {tokens:,} tokens of a vocabulary of {facts['vocab_size']}, packed into blocks "
        f"of 16: {blocks} to train on and 0 held out.\nThey are in {tmp_path / 'first'}, with their tokenizer and "
        "data.json, which has every number.\n"
    )
    found = json.loads(run(*words, tmp_path / "second", "--json").stdout)
    assert found.pop("folder") == str(tmp_path / "second")
    assert found == facts


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


def test_capacity_prints_what_fits_and_how_long_it_takes():
    words = ("capacity", "phi2.json", "--gpus", "96x80", "--tokens", "1.4T", "--mfu", "0.69", "--price", "2")
    done = phigrow(*words)
    assert done.returncode == 0, done.stderr
    for text in ("3 + offload all", "chosen", "1.4T tokens, 503.7 per parameter", "14 days", "cost "):
        assert text in done.stdout
    found = json.loads(phigrow(*words, "--json").stdout)
    assert found["chosen"]["stage"] == 1
    assert found["recipe"] == {"zero": 1, "batch": 480, "micro_batch": found["fits"][1]["micro_batch"]}
    assert f"recipe: zero: 1, batch: 480, micro_batch: {found['recipe']['micro_batch']}\n" in done.stdout
    assert found["seconds"] / 86400 == pytest.approx(14.03, abs=0.01)
    assert found["cost"] == pytest.approx(2 * found["gpu_hours"])
    none = phigrow("capacity", "phi2.json", "--gpus", "1x12")
    assert "nothing fits: use more GPUs, GPUs with more memory, or --selective" in none.stdout
    assert none.returncode == 1
    rows = [line.rstrip() for line in done.stdout.splitlines() if line.startswith(" ")]
    assert max(map(len, rows)) <= 80  # a terminal is as wide: no cell is broken


def test_diff_says_what_differs_and_exits_as_diff_does(tmp_path):
    plans = {"a": (), "b": ("--scale", "preserve", "--seed", "3")}
    for name, words in plans.items():
        done = phigrow("plan", "--src", "phi-1_5", "--dst-config", "phi2.json", "--method", "tile", "--json", *words)
        (tmp_path / f"{name}.json").write_text(done.stdout)
    same = phigrow("diff", "a.json", "a.json", cwd=tmp_path)
    assert (same.returncode, same.stdout[:33]) == (0, "the plans are the same (hash 58cb")
    other = phigrow("diff", "a.json", "b.json", cwd=tmp_path)
    assert other.returncode == 1
    for text in ("seed", "preserve", "hidden, read gain", "0..511; 1024 differ", "approximations"):
        assert text in other.stdout
    found = json.loads(phigrow("diff", "a.json", "b.json", "--json", cwd=tmp_path).stdout)
    assert found["same"] is False
    assert found["differences"][0] == {"part": "seed", "name": "", "first": 0, "second": 3}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("plan", "--dst-config", "phi2.json"), "Missing option '--src'"),
        (("plan", "--src", "phi-1"), "Missing option '--dst-config'"),
        (("diff", "a.json"), "Missing argument 'B'"),
        (("capacity", "phi2.json"), "Missing option '--gpus'"),
        (("plan", "--src", "phi-1", "--dst-config", "phi2", "--mfu", "0.3"), "No such option: --mfu"),
        (
            ("plan", "--src", "phi-1", "--dst-config", "phi2", "--depth", "deep"),
            "'deep' is not one of interpose",
        ),
        (
            ("expand", "--src", "phi-1", "--dst-config", "phi2", "--dtype", "fp8"),
            "'fp8' is not one of float64",
        ),
        (
            ("verify", "a", "b", "--certificate", "c.json", "--tokens", "9"),
            "--tokens: it has no effect together with --certi",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, message, tmp_path):
    done = phigrow(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


def test_inspect_says_where_a_checkpoint_came_from(tmp_path, save_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(phi_model(phi_config(32, 4, 48, 2, 4), torch.float32))
    (tmp_path / "dst.json").write_text(json.dumps(phi_config(48, 6, 60, 3, 4)))
    words = ("expand", "--src", "src", "--dst-config", "dst.json", "--method", "lossless", "--out", "grown")
    assert run(*words).exit_code == 0
    done = run("inspect", "grown")
    assert done.exit_code == 0, done.output
    for text in ("src, revision", "sha256", "phigrow expand --src src", "(checked against its content)", "exact: comp"):
        assert text in done.stdout
    q = next(line for line in done.stdout.splitlines() if "self_attn.q_proj.weight" in line)
    assert [cell.strip() for cell in q.split("│")[2:-1]] == ["44.4 %", "-", "-", "55.6 %", "-", "-"]
    name = "model.layers.1.mlp.fc2.weight"
    done = run("inspect", "grown", "--tensor", name, "--plot", "fc2.svg")
    assert done.stdout.splitlines() == [
        f"{name} [48 x 60] <- {name.replace('1', '0')} [32 x 48], matrix",
        "  zero: it writes the residual stream of an identity layer",
        "  zero 100 %",
        "wrote fc2.svg",
    ]
    assert "<svg" in (tmp_path / "fc2.svg").read_text()
    done = run("inspect", "grown/phigrow.json", "--plot", "all.png", "--json")
    assert sum(json.loads(done.stdout)["all"].values()) == json.loads(done.stdout)["parameters"]["destination"]
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    said = json.loads(run("inspect", "grown", "--tensor", "*.0.mlp.fc2.*", "--json").stdout)
    assert [each["values"]["mean"] for each in said] == [16 * 48, 16]


def test_a_saved_certificate_names_a_tensor_that_was_altered(tmp_path, save_model, monkeypatch):
    from safetensors.torch import load_file, save_file

    monkeypatch.chdir(tmp_path)
    save_model(phi_model(phi_config(32, 4, 48, 2, 4), torch.float32))
    Path("dst.json").write_text(json.dumps(phi_config(48, 6, 60, 3, 4)))
    assert run("expand", "--src", "src", "--dst-config", "dst.json", "--out", "grown").exit_code == 0
    done = run("verify", "src", "grown", "--save", "certificate.json")
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "wrote certificate.json"), done.output
    check = ("verify", "src", "grown", "--certificate", "certificate.json")
    done = run(*check)
    assert (done.exit_code, done.stdout) == (0, "PASSED: every tensor equals that of the certificate\n")
    tensors = load_file("grown/model.safetensors")
    tensors["lm_head.bias"][0] += 1
    save_file(tensors, "grown/model.safetensors", metadata={"format": "pt"})
    done = run(*check)
    assert done.exit_code == 1
    assert done.stdout.splitlines() == [
        "destination: lm_head.bias was altered",
        "FAILED: tensors differ from those of the certificate",
    ]
    found = json.loads(run(*check, "--json").stdout)
    assert found == {"same": False, "differences": ["destination: lm_head.bias was altered"]}


def test_what_is_not_finite_passes_only_when_allowed(tmp_path, save_model):
    model = phi_model(phi_config(32, 4, 48, 2, 4), torch.float32)
    with torch.no_grad():
        model.lm_head.bias[0] = float("nan")
    src = save_model(model)
    (tmp_path / "dst.json").write_text(json.dumps(phi_config(48, 6, 60, 3, 4)))
    words = ("expand", "--src", src, "--dst-config", tmp_path / "dst.json", "--out", tmp_path / "grown")
    refused = run(*words).exception
    assert isinstance(refused, GrowthError)
    assert "lm_head.bias" in str(refused)
    assert run(*words, "--allow-nonfinite").exit_code == 0


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (("expand", "--src", "not a name", "--dst-config", "phi2.json"), ("no checkpoint 'not a name'",)),
        (("plan", "--src", "phi-1_5", "--dst-config", "phi9.json"), ("no configuration 'phi9.json'",)),
        (("plan", "--src", "phi2.json", "--dst-config", "phi-1.json"), ("is smaller: hidden 2560 -> 2048",)),
        (("plan", "--src", "phi-1", "--dst-config", "phi2.json", "--method", "best"), ("method 'best' is unknown",)),
        (
            ("plan", "--src", "phi-1", "--dst-config", "phi2.json", "--method", "hypercloning", "--snr", "loud"),
            ("snr 'loud' is not allowed", "where: method hypercloning", "give a number from 0 to 100, or none"),
        ),
        (("capacity", "phi2", "--gpus", "8by80"), ("'8by80' does not describe GPUs", "such as 8x80")),
        (("capacity", "phi2", "--gpus", "8x80", "--tokens", "many"), ("'many' is not a positive amount", "100B")),
        (("capacity", "phi2", "--gpus", "8x80", "--batch", "9"), ("divided among 8 GPUs", "multiple of 8")),
        (("capacity", "phi2", "--gpus", "8x80", "--mfu", "40"), ("the MFU is 40", "at most 1")),
        (("diff", "nowhere", "nothing"), ("there is no plan in 'nowhere'", "there is no such file or folder")),
        (("inspect", "nowhere"), ("there is no plan in 'nowhere'", "give a folder that phigrow expand wrote")),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error_and_exit_code_2(words, messages, tmp_path):
    one_clear_error(phigrow(*words, cwd=tmp_path), messages)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (
            ("expand", "--src", "nobody/nothing", "--dst-config", "phi2.json"),
            (
                "the model 'nobody/nothing' is not in the local cache",
                "HF_HUB_OFFLINE is set",
                "download the repository on another machine and give its folder",
            ),
        ),
        (("verify", "nowhere", "nothing"), ("the model 'nowhere' is not in the local cache",)),
    ],
)
def test_a_hub_that_cannot_be_reached_is_one_clear_error(words, messages, tmp_path):
    one_clear_error(process(*words, cwd=tmp_path), messages)
    assert not list(tmp_path.iterdir())


def one_clear_error(done: subprocess.CompletedProcess[str], messages: tuple[str, ...]) -> None:
    assert done.returncode == 2
    assert all(message in done.stderr for message in messages), done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
