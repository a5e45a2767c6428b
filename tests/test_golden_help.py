"""The text of every ``--help``, frozen at 80 columns.

``PHIGROW_WRITE_GOLDEN=1 pytest tests/test_golden_help.py`` writes the texts anew, after a change that is meant.
"""

from __future__ import annotations

import os
import re

import pytest
import typer.main
from golden_cases import FOLDER
from typer.testing import CliRunner

from phigrow.cli import app
from phigrow.cli.growth_flags import METHOD_PANEL
from phigrow.growth.registry import all_methods
from phigrow.training.options import usage

COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def text_of(*words: str) -> str:
    result = CliRunner(env={"COLUMNS": "80", "TERM": "dumb"}).invoke(app, [*words, "--help"])
    assert result.exit_code == 0
    return without_methods("".join(line.rstrip() + "\n" for line in result.output.splitlines()))


def without_methods(text: str) -> str:
    """The text without the panel that is generated from the registry of methods, so that a new one changes no file."""
    return re.sub(rf"╭─ {METHOD_PANEL} .*?\n╰─+╯\n", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("command", ["", *COMMANDS, "pretrain.py"])
def test_help_is_frozen(command):
    found = usage() + "\n" if command == "pretrain.py" else text_of(*command.split())
    path = FOLDER / "help" / f"{command or 'phigrow'}.txt"
    if os.environ.get("PHIGROW_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(found, encoding="utf-8")
    assert found == path.read_text(encoding="utf-8")


def test_no_frozen_help_is_left_over():
    names = {path.stem for path in (FOLDER / "help").glob("*.txt")}
    assert names == {"phigrow", "pretrain.py", *COMMANDS}


@pytest.mark.parametrize("command", ["expand", "plan"])
def test_the_panel_of_methods_has_every_method_and_option(command):
    result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, [command, "--help"])
    panel = " ".join(result.output[result.output.index(METHOD_PANEL) :].replace("│", " ").split())
    for name, method in all_methods().items():
        assert name in panel
        for option_name, option in method.options.items():
            assert f"--{option_name.replace('_', '-')}" in panel
            assert option.help in panel
            assert f"[default: {option.spell(option.default)}]" in panel
    assert METHOD_PANEL not in text_of(command)
