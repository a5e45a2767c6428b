"""A notebook as a page with its outputs: every cell runs when the site is built."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import pprint
from pathlib import Path
from typing import Any


def pages(path: Path, name: str) -> dict[str, str | bytes]:
    """Path -> content, of the page and its figures."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    files: dict[str, str | bytes] = {}
    names: dict[str, Any] = {}
    parts = []
    with contextlib.chdir(path.parent):
        os.environ.setdefault("MPLBACKEND", "agg")
        for cell in cells:
            source = "".join(cell["source"])
            if cell["cell_type"] != "code":
                parts.append(source)
                continue
            parts.append(f"```python\n{source}\n```")
            printed, value = _run(source, names)
            if printed:
                parts.append(f"```text\n{printed.rstrip()}\n```")
            if value is not None:
                parts.append(_shown(value, files, name))
    where = "[examples/notebook.ipynb](../examples/notebook.ipynb)"
    page = "\n\n".join([parts[0], f"This page is {where}, run when the site was built.", *parts[1:]])
    return {f"{name}.md": page + "\n", **files}


def _run(source: str, names: dict[str, Any]) -> tuple[str, Any]:
    """Return the printed text of a cell and the value of its last line, as a notebook shows it."""
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), "cell", "exec"), names)
        value = None
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    return printed.getvalue(), value


def _shown(value: Any, files: dict[str, str | bytes], name: str) -> str:
    if hasattr(value, "savefig"):
        figure = io.BytesIO()
        value.savefig(figure, format="svg")
        path = f"{name}-{len(files) + 1}.svg"
        files[path] = figure.getvalue()
        return f"![Output of the cell above]({path})"
    if hasattr(value, "_repr_html_"):
        return f'<div class="output">{value._repr_html_()}</div>'
    return f"```text\n{pprint.pformat(value, width=88, compact=True)}\n```"
