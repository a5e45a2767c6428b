"""Exports replace nothing but exports: neither the run itself nor files of the user."""

from __future__ import annotations

import pytest

from phigrow.errors import GrowthError
from phigrow.training.export_place import check_export


@pytest.fixture
def run(tmp_path):
    out = tmp_path / "runs" / "one"
    (out / "checkpoints").mkdir(parents=True)
    (out / "run.json").write_text("{}")
    return out


@pytest.mark.parametrize("export", [".", "..", "../..", "checkpoints/.."])
def test_the_run_itself_is_never_replaced(run, export):
    with pytest.raises(GrowthError, match="would replace the run folder"):
        check_export(run, export)
    with pytest.raises(GrowthError, match="would replace the run folder"):
        check_export(run, str(run.parent))


def test_a_folder_of_the_user_is_never_replaced(run, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    check_export(run, str(mine))  # empty
    (mine / "thesis.tex").write_text("x")
    with pytest.raises(GrowthError, match=r"(?s)it is not an export of a run.*replaces only what it wrote"):
        check_export(run, str(mine))
    with pytest.raises(GrowthError, match="it is not an export of a run"):
        check_export(run, str(mine / "thesis.tex"))


def test_an_export_may_be_made_again(run):
    check_export(run, "export")
    check_export(run, None)
    (run / "export").mkdir()
    (run / "export" / "training.json").write_text("{}")
    (run / "export" / "config.json").write_text("{}")
    check_export(run, "export")
