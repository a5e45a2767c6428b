"""The page about these tests names every helper, mark, golden file and variable; no two files have one name."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAGE = (HERE / "README.md").read_text(encoding="utf-8")


def helpers() -> set[str]:
    """Modules that hold no tests, by their path from this folder."""
    return {str(path.relative_to(HERE)) for path in HERE.rglob("*.py") if not path.name.startswith("test_")}


def golden() -> set[str]:
    """Golden files as the page names them: their folder, or their name up to the first hyphen."""
    folder = HERE / "golden"
    names = {path.relative_to(folder).parts[0] for path in folder.iterdir()}
    return {f"{name}/" if (folder / name).is_dir() else re.sub(r"-.*(\.\w+)$", r"-*\1", name) for name in names}


def variables() -> set[str]:
    sources = "".join(path.read_text(encoding="utf-8") for path in HERE.rglob("*.py"))
    return set(re.findall(r'environ\.get\("(PHIGROW_\w+)"', sources))


def test_every_helper_golden_file_and_variable_is_on_the_page(pytestconfig):
    marks = {line.partition(":")[0] for line in pytestconfig.getini("markers")} & {"launch", "slow", "long"}
    assert len(marks) == 3
    names = helpers() | golden() | variables() | marks
    assert {name for name in names if f"`{name}" not in PAGE} == set()


def test_every_helper_on_the_page_exists():
    rows = re.findall(r"^\| `([\w/]+\.py)` \|", PAGE, flags=re.MULTILINE)
    assert set(rows) == helpers()
    assert len(rows) == len(set(rows))


@pytest.mark.parametrize("path", re.findall(r"tests/[\w/]+\.py", PAGE))
def test_commands_on_the_page_name_files_that_exist(path):
    assert (HERE.parent / path).is_file()


def test_no_two_files_of_tests_have_one_name():
    # Without packages, pytest imports them by their name, and refuses the second of one name in a fresh checkout.
    names = Counter(path.name for path in HERE.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
