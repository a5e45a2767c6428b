"""The page "write your own method": its file is the example, and its commands print what it shows."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from console import BLOCK, COMMAND, FILE, without_numbers
from tiny_models import phi_config, phi_model
from typer.testing import CliRunner

import phigrow.methods
from phigrow.cli import app
from phigrow.growth.method import Method
from phigrow.growth.registry import find_method
from phigrow.study import load_study
from phigrow.testing import check_method

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "own-method.md").read_text(encoding="utf-8")
STUDY = ROOT / "phigrow" / "recipes" / "studies" / "tiny.yaml"


def run(command: str) -> str:
    words = shlex.split(command)
    assert words.pop(0) == "phigrow"
    result = CliRunner(env={"COLUMNS": "88", "TERM": "dumb", "NO_COLOR": "1"}).invoke(app, words)
    assert result.exit_code == 0, (command, result.output, result.exception)
    return result.stdout


def test_the_file_on_the_page_is_the_example():
    ((name, content),) = FILE.findall(PAGE)
    assert content == (ROOT / "examples" / name).read_text(encoding="utf-8")


def test_the_example_keeps_its_contract():
    for order in ("wrap", "random"):
        check_method(ROOT / "examples" / "my_method.py", families=["phi"], options={"order": order}, shapes=2)


def test_the_commands_of_the_page_print_what_it_shows(save_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in FILE.findall(PAGE):
        (tmp_path / name).write_text(content, encoding="utf-8")
    save_model(phi_model(phi_config(32, 4, 48, 2, 4), torch.float32), "small")
    (tmp_path / "large.json").write_text(json.dumps(phi_config(64, 8, 96, 3, 4)))
    shown = [each for block in BLOCK.findall(PAGE) for each in COMMAND.findall(block)]
    assert len(shown) == 2
    for command, output in shown:
        assert without_numbers(run(command)) == without_numbers(output), command
    checks = [
        line for line in PAGE.splitlines() if line.startswith("phigrow") and line.endswith("--method my_method.py")
    ]
    assert len(checks) == 3
    for command in checks[:2]:
        run(command)
    # The arm on the page is read as a study, and its option is known.
    arms = yaml.safe_load(re.search(r"```yaml\n(arms:.*?)```", PAGE, re.DOTALL)[1])
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(yaml.safe_load(STUDY.read_text()) | arms, sort_keys=False))
    (mine,) = [arm for arm in load_study(tmp_path / "study.yaml").arms if arm.name == "mine"]
    assert mine.method_files == {"averaged-heads": find_method("my_method.py").sources[0].sha256}


def test_the_page_names_every_field_that_a_method_may_set():
    internal = {"own_noise", "noise_on", "learns", "sources"}
    named = set(re.findall(r"^\| `(\w+)", PAGE, re.MULTILINE))
    assert set(Method.__dataclass_fields__) - internal <= named


@pytest.mark.parametrize("name", phigrow.methods.__all__)
def test_public_names_are_documented(name):
    value = getattr(phigrow.methods, name)
    assert not callable(value) or value.__doc__
