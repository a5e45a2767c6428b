import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
SAID = {
    "compare_plans.py": ["lossless: exact", "2048 kept, 512 written as the mean"],
    "grow_a_live_model.py": ["parameters, max |dlogit|"],
    "my_method.py": ["averaged-heads: exact"],
    "paper_table.py": ["\\toprule", "wr & 3.82", "1.43 & 0.83 & 1.43 & 1.04"],
    "reproduce_figure.py": [
        "after 0.86M of 1.23M tokens. Tokens: 1.43x [1.15, 1.77] speedup, 30 % [13, 44] saving",
        "after 0.8M of 1.23M tokens. Tokens: 1.54x [1.23, 1.92] speedup, 35 % [18, 48] saving",
        "wrote curves.pdf",
    ],
}


def test_every_example_is_expected_to_say_something():
    assert {path.name for path in EXAMPLES} == set(SAID)


def test_the_notebook_runs_cell_by_cell_and_shows_tables(monkeypatch):
    """Its last lines are evaluated, as a notebook does; no notebook server is needed."""
    monkeypatch.chdir(EXAMPLES[0].parent)
    cells = json.loads((EXAMPLES[0].parent / "notebook.ipynb").read_text())["cells"]
    names, shown = {}, []
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        assert not cell["outputs"]
        body = ast.parse("".join(cell["source"])).body
        last = ast.Expression(body.pop().value)
        exec(compile(ast.Module(body, []), "cell", "exec"), names)
        shown.append(eval(compile(last, "cell", "eval"), names))
    (exact, layers), reasons, sizes, same, comparison, finding, estimate, figure, *_ = shown
    assert exact
    assert len(layers) == 32
    assert "wr reads new random coordinates" in reasons[0]
    assert sizes == "165,888 parameters grown to 443,216"
    assert same
    assert "1.43x" in comparison._repr_html_()
    assert finding.startswith("wr reached scratch's final held-out loss (3.95) after 0.86M of 1.23M tokens")
    assert estimate == (
        "1.43x sunk, 1.04x charged, 4 % saved; 3 seeds: 95 % interval over paired seeds, not over the source or the "
        "held-out text"
    )
    assert len(figure.axes) == 2


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(path, tmp_path):
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(text in done.stdout for text in SAID[path.name]), done.stdout
    if path.name == "grow_a_live_model.py":
        assert float(done.stdout.split()[-1]) < 1e-5
