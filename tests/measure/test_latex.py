"""LaTeX tables: their structure, what is escaped, and that LaTeX takes them."""

import shutil
import subprocess

import pytest

from phigrow.measure import compare, latex, load_runs
from phigrow.measure.latex_tables import escaped

COSTS = [0, 1_000_000, 2_000_000]
SPECIAL = r"a_b & 100% $x^2$ #1 {c} ~ \input{/etc/passwd} [2] <|>"


@pytest.fixture
def comparison(write_run):
    for seed, shift in enumerate((0.0, 0.05, 0.1)):
        write_run("scratch", [5.0, 4.0, 3.0], COSTS, seed=seed)
        write_run("wr", [5.0, 2.0 + shift, 1.0], COSTS, seed=seed, source_tokens=400_000)
        parent = write_run(SPECIAL, [5.0, 4.5, 4.0], COSTS, seed=seed, name=f"special-{seed}").parent
    return compare(load_runs(parent))


def test_tables(comparison):
    text = latex(comparison)
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 2
    assert r"\multicolumn{2}{c}{tokens} & \multicolumn{2}{c}{FLOPs} & \multicolumn{2}{c}{seconds} \\" in text
    assert r"\cmidrule(lr){2-3} \cmidrule(lr){4-5} \cmidrule(lr){6-7}" in text
    estimate = comparison["wr"].estimate("tokens", "sunk")
    low, high = estimate.speedup_interval
    cell = rf"{estimate.speedup:.2f}$\times$ {{\scriptsize {{[}}{low:.2f}, {high:.2f}{{]}}}}"
    assert f"wr & {cell} & " in text
    assert r"& $<$ 1.00$\times$ &" in text
    assert r"3 seeds, 95 \% interval over paired seeds" in text


def test_escaping():
    assert escaped(r"50% of a_b\c") == r"50\% of a\_b\textbackslash{}c"
    assert escaped("[1]") == "{[}1{]}"


def compiled(text, folder):
    document = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n%s\n\\end{document}\n"
    (folder / "paper.tex").write_text(document % text)
    return subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "paper.tex"],
        cwd=folder, capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_takes_it(comparison, tmp_path):
    done = compiled(latex(comparison), tmp_path)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "paper.pdf").read_bytes().startswith(b"%PDF")
    # Negative control: what is not escaped stops LaTeX.
    assert compiled(latex(comparison).replace(r"\_", "_"), tmp_path).returncode != 0
