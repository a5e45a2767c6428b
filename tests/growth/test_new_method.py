"""A width method with a numeric option is two files: the diff of CONTRIBUTING.md, applied to a copy of the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import phigrow

ROOT = Path(__file__).parents[2]
METHOD, TEST = "phigrow/growth/methods/damped.py", "tests/growth/test_damped.py"


def files_of_the_diff() -> dict[str, str]:
    """Path -> content of the new files in the diff under "Add a width method"."""
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Add a width method")[1]
    diff = re.search(r"```diff\n(.*?)```", section, re.DOTALL)[1]
    files = re.findall(r"--- /dev/null\n\+\+\+ b/(\S+)\n@@\n((?:\+.*\n)+)", diff)
    return {path: "".join(line[1:] + "\n" for line in content.splitlines()) for path, content in files}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of package and tests with the diff applied; every file that was there is unchanged."""
    if not (ROOT / "CONTRIBUTING.md").is_file():
        pytest.skip("CONTRIBUTING.md is not beside the tests")
    folder = tmp_path_factory.mktemp("copy")
    leave_out = shutil.ignore_patterns("__pycache__", "golden")
    shutil.copytree(Path(phigrow.__file__).parent, folder / "phigrow", ignore=leave_out)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=leave_out)
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copyfile(ROOT / name, folder / name)
    for path, content in files_of_the_diff().items():
        assert not (folder / path).exists()
        (folder / path).write_text(content, encoding="utf-8")
    return folder


def run(copy: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(copy), "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "TERM": "dumb"}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, cwd=copy, env=environment
    )


def command(copy: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run(copy, "-c", "from phigrow.cli import main; main()", *words)


def test_the_diff_is_a_method_and_its_test():
    assert set(files_of_the_diff()) == {METHOD, TEST}


def test_flag_and_help_are_generated(copy):
    for name in ("expand", "plan"):
        text = " ".join(command(copy, name, "--help").stdout.replace("│", " ").split())
        assert "--gain number damped: gain with which mlp units are written (a number from 0.1 to 1)." in text
        assert "[default: 0.5]" in text
        assert re.search(r"One of aki, damped, fpi", text)
    # Negative control: the package without the diff knows neither.
    assert "--gain" not in command(ROOT, "plan", "--help").stdout


def test_plan_takes_the_flag_and_checks_its_value(copy):
    words = ("plan", "--src", "phi-1_5", "--dst-config", "phi2.json", "--method", "damped", "--json")
    made = json.loads(command(copy, *words, "--gain", "0.25").stdout)
    assert (made["method"], made["options"]) == ("damped", {"gain": "0.25"})
    assert made["axes"]["mlp"]["runs"][0][2] == 0.25
    spelled = json.loads(command(copy, *words[:-2], "damped:gain=0.25", "--json").stdout)
    assert spelled["hash"] == made["hash"]
    refused = command(copy, *words, "--gain", "2")
    assert refused.returncode == 2
    assert "gain '2' is not allowed" in refused.stderr
    assert "give a number from 0.1 to 1" in refused.stderr


@pytest.mark.slow
def test_its_own_test_and_the_contract_test_run_it(copy):
    contract = "tests/growth/test_contract.py::test_every_method_keeps_its_claim_in_every_family[damped-phi]"
    done = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", contract, TEST)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("..")
