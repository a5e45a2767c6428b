"""The text of every ``--help``, frozen at 80 columns.

``PHIGROW_WRITE_GOLDEN=1 pytest tests/test_golden_help.py`` writes the texts anew, after a change that is meant.
"""

from __future__ import annotations

import os

import pytest
import typer.main
from golden_cases import FOLDER
from typer.testing import CliRunner

from phigrow.cli import app
from phigrow.training.options import usage

COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def text_of(*words: str) -> str:
    result = CliRunner(env={"COLUMNS": "80", "TERM": "dumb"}).invoke(app, [*words, "--help"])
    assert result.exit_code == 0
    return "".join(line.rstrip() + "\n" for line in result.output.splitlines())


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
