"""Study files of tests: the shipped tiny one, changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from phigrow.study import Study, load_study

RECIPES = Path(__file__).parents[2] / "phigrow" / "recipes" / "studies"


def content(**changes: Any) -> dict[str, Any]:
    """The tiny study as a mapping, with keys replaced, or left out where they are None."""
    found = yaml.safe_load((RECIPES / "tiny.yaml").read_text()) | changes
    return {key: value for key, value in found.items() if value is not None}


def written(folder: Path, **changes: Any) -> Path:
    """The tiny study as a file, changed."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content(**changes), sort_keys=False))
    return path


def loaded(folder: Path, **changes: Any) -> Study:
    """The tiny study, changed, with its results in the folder."""
    return load_study(written(folder, **changes), out=folder / "out")
