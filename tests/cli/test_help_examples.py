"""Every example that `--help` prints is run as it is printed, with tiny models under the names of the example."""

import json
import re
import shlex

import pytest
import typer
from tiny_models import phi_config, phi_model
from typer.testing import CliRunner

from phigrow.cli import app

TRAINS = {
    "grow-optimizer": "phigrow.grow_optimizer",
    "learn-growth": "phigrow.ligo.train.learn",
    "pretrain": "phigrow.study.foreground.pretrain",
}
"""Commands that need DeepSpeed -> the function that a test replaces. Their words are parsed as printed."""


def run(*words):
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, list(words))


def examples():
    """Return the commands in the help texts, and the methods in the help of --method."""
    commands = typer.main.get_command(app).commands
    lines = [
        line.strip()
        for command in commands.values()
        for line in (command.help or "").splitlines()
        if re.match(r"\s*phigrow [a-z-]+ ", line)
    ]
    (help_of_method,) = [p.help for p in commands["plan"].params if p.name == "method"]
    methods = re.findall(r"[a-z]+(?:[:=,][a-z]+)+", help_of_method)
    return lines, methods


@pytest.fixture
def workplace(tmp_path, save_model, monkeypatch):
    """A folder with a tiny model named phi-1_5, a configuration phi2.json, and both grown forms of the examples."""
    save_model(phi_model(phi_config(32, 4, 48, 2, 4)), "phi-1_5")
    (tmp_path / "phi2.json").write_text(json.dumps(phi_config(72, 6, 70, 3, 4)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_example_runs_as_it_is_printed(workplace):
    lines, _ = examples()
    commands = {shlex.split(line)[1] for line in lines}
    assert commands > {"expand", "plan", "diff", "capacity", "inspect", "verify", "compare", "grow-train", "recipes"}
    assert set(TRAINS) <= commands
    grow = ["expand", "--src", "phi-1_5", "--dst-config", "phi2.json"]
    for method, out in (("tile", "grown-by-tile"), ("wr", "grown-by-wr"), ("lossless", "phi-1_5-to-phi2-lossless")):
        assert run(*grow, "--method", method, "--out", out).exit_code == 0
    # The examples begin with expand, whose output inspect reads.
    for line in lines:
        _, command, *words = shlex.split(line)
        if command in TRAINS:
            continue
        done = run(command, *words)
        assert done.exit_code == (1 if command == "diff" else 0), (line, done.output, done.exception)
    assert (workplace / "phi-1_5-to-phi2-tile" / "phigrow.json").is_file()
    assert (workplace / "q_proj.png").stat().st_size > 1000
    assert (workplace / "recipes" / "phi-2.yaml").is_file()


@pytest.mark.parametrize("command", TRAINS)
def test_the_words_of_an_example_that_trains_are_options_of_its_command(command):
    (line,) = [line for line in examples()[0] if line.startswith(f"phigrow {command} ")]
    flags = [word for word in shlex.split(line) if word.startswith("--")]
    if command == "pretrain":
        from phigrow.training.configuration import RunConfig

        known = {f"--{field}" for field in RunConfig.__dataclass_fields__}
    else:
        known = {flag for p in typer.main.get_command(app).commands[command].params for flag in p.opts}
    assert flags
    assert set(flags) <= known
    assert "--no-such-flag" not in known  # negative control


def test_every_method_in_the_help_is_a_method(workplace):
    _, methods = examples()
    assert methods == ["tile:scale=preserve", "hidden=lossless,mlp=tile"]
    for method in methods:
        done = run("plan", "--src", "phi-1_5", "--dst-config", "phi2.json", "--method", method)
        assert done.exit_code == 0, (done.output, done.exception)
    # Groups that the last one does not name take its first method, and the plan says so.
    words = " ".join(done.output.split())
    assert re.search(r"heads, head: not named in the method, so grown by its first entry, lossless", words), words
    for label in ("hidden: normed", "heads: kv", "head: q"):
        assert label in done.output
    refused = run("plan", "--src", "phi-1_5", "--dst-config", "phi2.json", "--method", "hidden=lossless,kv=tile")
    assert "'kv' is one axis of the group heads" in str(refused.exception)
