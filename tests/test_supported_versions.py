"""The supported versions: the lower bounds of setup.cfg are those that `make oldest` tests."""

from __future__ import annotations

import configparser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def requirements() -> list[Requirement]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = parser["options"]["install_requires"].split("\n") + parser["options.extras_require"]["test"].split("\n")
    return [Requirement(line) for line in lines if line]


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    return {package.lower().replace("-", "_"): version for package, version in (line.split("==") for line in lines)}


def lower_bound(requirement: Requirement) -> str | None:
    return next((each.version for each in requirement.specifier if each.operator == ">="), None)


def not_the_oldest(required: list[Requirement], pinned: dict[str, str]) -> list[str]:
    """Return the requirements whose pin is no release of the series that the lower bound names."""
    wrong = []
    for requirement in required:
        bound, pin = lower_bound(requirement), pinned.get(requirement.name.lower().replace("-", "_"))
        if bound is None or requirement.name in ("ruff", "mypy"):
            continue  # lint is checked with the newest alone
        series = Version(bound).release
        if pin is None or pin not in requirement.specifier or Version(pin).release[: len(series)] != series:
            wrong.append(f"{requirement}: {pin}")
    return wrong


def test_the_oldest_pins_are_the_lower_bounds():
    assert not_the_oldest(requirements(), pins("constraints-oldest.txt")) == []
    # Negative controls: a raised bound, a later release, a missing package.
    pinned = pins("constraints-oldest.txt")
    assert not_the_oldest([Requirement("torch>=2.7")], pinned) == ["torch>=2.7: 2.6.0"]
    assert not_the_oldest([Requirement("rich>=13.9")], pinned | {"rich": "13.10.0"}) == ["rich>=13.9: 13.10.0"]
    assert not_the_oldest([Requirement("tensorboard>=2")], pinned) == ["tensorboard>=2: None"]


def test_the_tested_versions_are_allowed():
    pinned = pins("constraints.txt")
    for requirement in requirements():
        assert pinned[requirement.name.lower().replace("-", "_")] in requirement.specifier, str(requirement)
    assert "5.2.0" not in next(each for each in requirements() if each.name == "transformers").specifier
