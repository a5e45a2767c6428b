"""API reference: one page for each package, which mkdocstrings fills from signatures and docstrings.

A package that names its public objects (``__all__``) shows these. Any other package shows its modules.
"""

from __future__ import annotations

import importlib
import pkgutil

import phigrow

LEFT_OUT = ("phigrow.cli",)
"""Packages that other pages describe: the commands have a page of their own."""


def pages() -> dict[str, str]:
    """Path -> Markdown, of the list of packages and of the reference of each."""
    names = [f"phigrow.{module.name}" for module in pkgutil.iter_modules(phigrow.__path__) if module.ispkg]
    names = ["phigrow", *(name for name in names if name not in LEFT_OUT)]
    lines = ["# API reference", "", "| package | purpose |", "|---|---|"]
    out = {}
    for name in names:
        lines.append(f"| [`{name}`]({name}.md) | {_summary(name)} |")
        out[f"api/{name}.md"] = _page(name)
    return {"api/index.md": "\n".join(lines) + "\n", **out}


def _summary(name: str) -> str:
    return (importlib.import_module(name).__doc__ or "").partition("\n\n")[0].replace("\n", " ")


def _page(name: str) -> str:
    package = importlib.import_module(name)
    if hasattr(package, "__all__"):
        return f"# {name}\n\n::: {name}\n"
    parts = [f"# {name}", _summary(name)]
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            parts.append(f"## {name}.{module.name}\n\n::: {name}.{module.name}\n    options:\n      heading_level: 3")
    return "\n\n".join(parts) + "\n"
