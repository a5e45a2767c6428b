"""API reference: one page for each public package, filled by mkdocstrings from docstrings."""

from __future__ import annotations

PACKAGES = {
    "phigrow": "Grow a model, and check the result.",
    "phigrow.training": "Train a model under DeepSpeed.",
    "phigrow.corpus": "Turn text into packed token blocks.",
    "phigrow.measure": "Measure runs from their records. Needs no torch.",
}


def pages() -> dict[str, str]:
    """Path -> Markdown, of the reference of each package."""
    lines = ["# API reference", "", "| package | what for |", "|---|---|"]
    lines += [f"| [`{name}`]({name}.md) | {what} |" for name, what in PACKAGES.items()]
    out = {"api/index.md": "\n".join(lines) + "\n"}
    for name, what in PACKAGES.items():
        out[f"api/{name}.md"] = f"# {name}\n\n{what}\n\n::: {name}\n"
    return out
