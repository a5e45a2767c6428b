"""Everything that a user meets before any model: help, version, pipes, log files, --quiet and Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
import yaml
from tiny_models import phi_config, phi_model
from typer.testing import CliRunner

import phigrow
from phigrow.cli import app, terminal
from phigrow.errors import GrowthError
from phigrow.files.shipped import FOLDER, FOLDERS, shipped_files
from phigrow.training import load_run_config

COMMAND = [sys.executable, "-m", "phigrow"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def run(*words, env=None):
    return CliRunner(env={"COLUMNS": "80", "TERM": "dumb", **(env or {})}).invoke(app, list(map(str, words)))


def on_a_terminal(*words, cwd: Path) -> str:
    """Return the output of a command on a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*COMMAND, *map(str, words)], stdout=theirs, stderr=theirs, cwd=cwd, env=ENVIRONMENT)
    os.close(theirs)
    read = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # Linux: the last process that had it open has ended
            break
        if not part:
            break
        read += part
    os.close(ours)
    assert process.wait() == 0, read.decode()
    return read.decode()


def test_the_package_runs_as_a_module_and_tells_its_version():
    done = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"phigrow {phigrow.__version__}\n"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_short_help_is_the_help_and_flags_have_no_type(command):
    short, long = run(*command.split(), "-h"), run(*command.split(), "--help")
    assert short.exit_code == long.exit_code == 0
    assert short.output == long.output
    assert "<bool>" not in short.output
    assert max(map(len, short.output.splitlines())) <= 80


@pytest.mark.parametrize("words", ["--help", "plan --src phi-1_5 --dst-config phi2 --json"])
def test_a_reader_that_leaves_is_no_error(words):
    process = subprocess.Popen(
        [*COMMAND, *words.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait()


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ("gro", ["grow-optimizer", "grow-train"]),
        ("compare ti", ["tiny"]),
        ("pretrain phi-1_", ["phi-1_5", "phi-1_5-web"]),
    ],
)
def test_completion_completes_commands_and_shipped_names(words, completions):
    completed = {
        "_PHIGROW_COMPLETE": "complete_bash", "COMP_WORDS": f"phigrow {words}", "COMP_CWORD": str(len(words.split())),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", "from phigrow.cli import main; main()"], capture_output=True, text=True, check=False,
        env=ENVIRONMENT | completed,
    )  # fmt: skip
    assert done.stdout.split() == completions


@pytest.mark.slow
def test_a_bar_is_drawn_on_a_terminal_only(tmp_path, save_model):
    save_model(phi_model(phi_config(32, 4, 48, 2, 4), torch.float32))
    (tmp_path / "dst.json").write_text(json.dumps(phi_config(64, 4, 60, 3, 4)))
    words = ("expand", "--src", "src", "--dst-config", "dst.json", "--method", "tile", "--overwrite")
    assert "100%" in on_a_terminal(*words, cwd=tmp_path)
    assert "100%" not in on_a_terminal(*words, "--quiet", cwd=tmp_path)
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=True, cwd=tmp_path, env=ENVIRONMENT)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) > 2


def test_quiet_leaves_the_result(tmp_path, save_model, monkeypatch):
    save_model(phi_model(phi_config(32, 4, 48, 2, 4), torch.float32))
    (tmp_path / "dst.json").write_text(json.dumps(phi_config(64, 4, 60, 3, 4)))
    monkeypatch.chdir(tmp_path)
    done = run("expand", "--src", "src", "--dst-config", "dst.json", "--out", "grown", "-q")
    assert (done.exit_code, done.output) == (0, "wrote grown\n")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("compare", "Run the same command again to continue."), ("data", "Its output was not completed.")],
)
def test_an_interruption_is_one_sentence(name, sentence):
    def command() -> None:
        raise KeyboardInterrupt

    one = typer.Typer()
    one.command()(terminal.on_terminal(name, command))
    done = CliRunner().invoke(one)
    assert done.exit_code == 130
    assert done.output == f"\nstopped: phigrow {name} was interrupted. {sentence}\n"


def test_the_ranks_of_a_launch_tell_of_an_interruption_once(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    terminal.tell_interrupted("learn-growth")
    assert capsys.readouterr() == ("", "")


def heed_ctrl_c() -> None:
    """Undo what a shell does to processes in the background: they ignore Ctrl-C, and so do those that they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_shows_no_traceback_and_leaves_no_folder(tmp_path):
    process = subprocess.Popen(
        [*COMMAND, "data", "--out", "packed"], cwd=tmp_path, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    time.sleep(4)  # in the middle of loading its libraries, or of tokenising
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode in (130, -signal.SIGINT)  # a shell shows 130 for both
    assert errors == "\nstopped: phigrow data was interrupted. Its output was not completed.\n"
    assert not list(tmp_path.iterdir())


def test_recipes_are_listed_by_the_command_that_takes_them():
    done = run("recipes")
    assert done.exit_code == 0
    heads = [line for line in done.output.splitlines() if line.startswith("phigrow")]
    assert heads == ["phigrow pretrain NAME", "phigrow compare NAME", "phigrow grow-train NAME"]
    for kind in FOLDERS:
        assert all(f"\n  {file.name}\n" in done.output for file in shipped_files(kind))
    assert max(map(len, done.output.splitlines())) <= 80


def test_a_copied_recipe_comes_with_the_file_that_it_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("recipes", "phi-2", "studies/tiny", "--out", "mine").exit_code == 0
    copied = sorted(path.relative_to("mine").as_posix() for path in Path("mine").rglob("*") if path.is_file())
    assert copied == ["deepspeed/zero1.json", "phi-2.yaml", "studies/tiny.yaml"]
    assert load_run_config("mine/phi-2.yaml", ["--deepspeed", "none"]) == load_run_config(
        "phi-2", ["--deepspeed", "none"]
    )
    Path("mine/phi-2.yaml").write_text("steps: 77")
    again = run("recipes", "phi-2", "--out", "mine")
    assert isinstance(again.exception, GrowthError)
    assert "the file exists already" in str(again.exception)
    assert Path("mine/phi-2.yaml").read_text() == "steps: 77"
    assert run("recipes", "--out", "mine", "--overwrite").exit_code == 0
    assert Path("mine/phi-2.yaml").read_bytes() == (FOLDER / "phi-2.yaml").read_bytes()
    assert Path("mine/slurm/pretrain.sbatch").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("recipes", "phi-9", "--out", "mine"), "phigrow ships no file named 'phi-9'"),
        (("pretrain", "--stepz", "3"), "did you mean steps"),
        (("pretrain", "phi-9"), "the name of a shipped recipe (demo, notebook, phi-1,"),
        (("compare", "smal"), "or a shipped name: phi-1-small-to-phi-1-miniature"),
        (("grow-train", "smal"), "or a shipped name: tiny"),
    ],
)
def test_a_wrong_name_is_answered_with_what_exists(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*words)
    assert isinstance(done.exception, GrowthError)
    assert message in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_recipes_without_a_folder_to_copy_into_are_refused():
    done = run("recipes", "phi-2")
    assert done.exit_code == 2
    assert "give the folder to copy them into" in done.output


@pytest.mark.launch
def test_ctrl_c_lets_ranks_save_and_the_same_command_resumes(tmp_path):
    from phigrow.corpus import prepare

    prepare("embedded", out=tmp_path / "data", seq_len=16, vocab_size=300, progress=False)
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "model": phi_config(32, 4, 48, 2, 4) | {"vocab_size": 300},
                "batch": 4,
                "dtype": "fp32",
                "eval_every": 0,
                "warmup": 2,
            }
        )
    )
    words = ["pretrain", "recipe.yaml", "--data", "data", "--out", "run", "--log-every", "10", "--export", "none"]
    words += ["--ranks", "2", "--steps"]
    process = subprocess.Popen(
        [*COMMAND, *words, "100000"], cwd=tmp_path, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 10/"):
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "\nstopping: the run saves a checkpoint first\n")
    assert "as asked; the same command resumes from the checkpoint" in output
    assert not (tmp_path / "run" / "stop").exists()
