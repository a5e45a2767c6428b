"""Recipes, studies and stages are found by name, in a checkout and in a wheel."""

from __future__ import annotations

from pathlib import Path

import pytest

from phigrow.errors import GrowthError
from phigrow.files.shipped import FOLDER, FOLDERS, find_shipped, shipped_files
from phigrow.study import load_stages, load_study
from phigrow.training import load_run_config

CHECKOUT = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("kind", FOLDERS)
def test_every_file_has_a_name_and_a_title(kind):
    files = shipped_files(kind)
    assert {file.path for file in files} == set((FOLDER / FOLDERS[kind]).glob("*.yaml"))
    for file in files:
        assert find_shipped(file.name, kind) == find_shipped(f"{file.name}.yaml", kind) == file.path
        assert file.title.endswith(".")


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("phi-2").write_text("steps: 77")
    assert load_run_config("phi-2").steps == 77
    Path("phi-2").unlink()
    assert load_run_config("phi-2").steps == load_run_config(FOLDER / "phi-2.yaml").steps > 77
    assert load_study("tiny") == load_study(FOLDER / "studies" / "tiny.yaml")
    assert load_stages("tiny") == load_stages(FOLDER / "stages" / "tiny.yaml")


def test_an_unknown_name_is_answered_with_the_known_ones():
    for load, names in (
        (load_run_config, "demo, notebook, phi-1, phi-1-small, phi-1_5, phi-1_5-web, phi-2"),
        (
            load_study,
            "miniature, phi-1.5-to-phi-2-miniature, phi-regime-m, phi-regime-s, phi-regime-s-arms, "
            "phi-regime-s-muon, phi-regime-s2, tiny",
        ),
        (load_stages, "tiny"),
    ):
        with pytest.raises(GrowthError, match=names):
            load("phi-9")
        with pytest.raises(GrowthError, match="no such"):
            load("folder/phi-2")


@pytest.mark.skipif(not CHECKOUT.is_symlink(), reason="not a checkout: an sdist holds the recipes once")
def test_the_folder_at_the_root_of_a_checkout_is_the_packages():
    assert CHECKOUT.resolve() == FOLDER.resolve()
