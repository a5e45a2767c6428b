"""Write the report of a comparison into one folder: a page, Markdown, LaTeX, JSON and figures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from phigrow.errors import GrowthError
from phigrow.files.atomic import atomic_write
from phigrow.files.output import json_keys, writing
from phigrow.files.paths import user_path
from phigrow.files.picture import write_picture
from phigrow.measure.comparison import compare
from phigrow.measure.data import as_json
from phigrow.measure.estimates import Comparison
from phigrow.measure.figures import STYLE, curves
from phigrow.measure.latex_tables import latex
from phigrow.measure.page import page
from phigrow.measure.provenance import difference_rows, run_rows, version_lines
from phigrow.measure.study_figures import age_figure, frontier_figure
from phigrow.measure.tables import budget_rows, markdown, markdown_table
from phigrow.measure.trends import budget_figure, diagnostics_figure
from phigrow.measure.wording import all_notes, grouped_findings, mid_schedule_sentences, verdict
from phigrow.records import load_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
TEXTS = ("report.json", "report.md", "report.tex", "report.html")
ALWAYS = (*TEXTS, *(f"curves.{ending}" for ending in FORMATS))
"""Files of every report. Other figures depend on the runs."""

TARGET_OF_CURVES = (
    "The **target** is the final held-out loss of {baseline}. The **cost** C of an arm is its spending until a "
    "monotone fit of its evaluations comes down to the target. "
)
TARGET_OF_ENDS = (
    "A curve is fitted through the decayed ends of each arm. The **target** is the loss of {baseline}'s curve at its "
    "budget. The **cost** C of an arm is the cost at which its own curve comes down to the target. "
)
DEFINITIONS = (
    "**Speedup** is C_{baseline} / C_arm, and **saving** is 1 - C_arm / C_{baseline}. **Sunk** leaves out the training "
    "of the source model, and **charged** counts it. Both accountings include the seconds of the expansion."
)
PICTURES = {
    "curves": "Held-out loss against tokens",
    "budgets": "Speedup against budget",
    "frontier": "Held-out loss against FLOPs, with the flat frontier",
    "ages": "Saving against the source's age",
    "diagnostics": "Symmetry diagnostics",
}


def report(
    folders: str | Path | Iterable[str | Path],
    out: str | Path,
    baseline: str = "scratch",
    budget: int | None = None,
) -> Comparison:
    """Compare the runs in ``folders`` and write the report.

    ``report.html`` is a page that needs no network. ``report.md``, ``report.tex`` (booktabs) and ``report.json`` hold
    its tables and numbers. ``curves`` and ``budgets`` are figures as PNG, SVG and PDF. So are ``frontier`` (with flat
    models), ``ages`` (with sources of several ages) and ``diagnostics`` (where runs recorded them). Every file is
    written under a temporary name and then renamed, so a reader never sees half of one.

    Args:
        folders: run folders or parents of them, as for ``load_runs``. Folders without records become notes.
        out: a folder, made if it is missing. Files of an earlier report are replaced, and no others.
        baseline: the arm that sets the target.
        budget: in steps, where the baseline was trained to several; by default the largest.

    Returns:
        The comparison that was written.

    Raises:
        GrowthError: ``out`` cannot be written, or has a file of the same name that is not of an earlier report, which
            is checked first; as ``load_runs`` and ``compare``. Nothing is written then.

    >>> report("runs", "report").arms[0].name  # doctest: +SKIP
    'wr'
    """
    with _made(user_path(out)) as folder:
        check_out(folder)
        notes: list[str] = []
        comparison = compare(load_runs(folders, notes=notes), baseline, budget)
        comparison = replace(comparison, notes=(*notes, *comparison.notes))
        _write(comparison, folder)
    return comparison


def _write(comparison: Comparison, folder: Path) -> None:
    drawn = {
        "curves": curves(comparison),
        "budgets": budget_figure(comparison),
        "frontier": frontier_figure(comparison),
        "ages": age_figure(comparison),
        "diagnostics": diagnostics_figure(comparison),
    }
    figures: dict[str, Figure] = {name: figure for name, figure in drawn.items() if figure is not None}
    pictures = {f"{name}.{ending}": figure for name, figure in figures.items() for ending in FORMATS}
    files = sorted({*_own_files(folder, (*TEXTS, *pictures)), *TEXTS, *pictures})
    texts = {
        # First, because it names the files that a later report may replace.
        "report.json": json.dumps({**as_json(comparison), "files": files}, indent=1, allow_nan=False) + "\n",
        "report.md": markdown_report(comparison, figures),
        "report.tex": latex(comparison),
        "report.html": page(comparison, definitions(comparison)),
    }
    new = [folder / name for name in (*texts, *pictures) if not (folder / name).exists()]
    try:
        with writing(folder):
            for name, text in texts.items():
                atomic_write(folder / name, text)
            for name, figure in pictures.items():
                write_picture(figure, folder / name, STYLE, replace=True)
    except BaseException:
        for path in new:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        raise


def check_out(folder: Path) -> None:
    """Check that a report may be written into a folder.

    Raises:
        GrowthError: the folder has a file of the same name that is not of an earlier report.
    """
    _own_files(folder, ALWAYS)


def _own_files(folder: Path, names: Iterable[str]) -> list[str]:
    """Return the files of an earlier report in a folder.

    Raises:
        GrowthError: one of the names is a file or folder that is not of an earlier report.
    """
    known = json_keys(folder / "report.json")
    own: list[str] = []
    if known >= {"format", "baseline", "targets"}:
        listed_files = json.loads((folder / "report.json").read_bytes()).get("files")
        # Reports of format 2 list no files, and have no others than these.
        own = (
            listed_files
            if isinstance(listed_files, list)
            else [*TEXTS, *(f"{p}.{e}" for p in PICTURES for e in FORMATS)]
        )
    for name in names:
        if name not in own and (folder / name).exists():
            raise GrowthError(
                f"{name} exists, and it is not a file of an earlier report",
                where=str(folder / name),
                why="phigrow replaces only what it wrote",
                fix="choose another --out, or move the file away",
            )
    return [name for name in own if (folder / name).is_file()]


@contextmanager
def _made(folder: Path) -> Iterator[Path]:
    """Make a folder and check that it takes files. After an error, remove the folders made here that are empty."""
    made: list[Path] = []
    try:
        with writing(folder):
            made = [each for each in (folder, *folder.parents) if not each.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):  # a folder can exist and refuse files
                pass
        yield folder
    except BaseException:
        for each in made:
            with suppress(OSError):
                each.rmdir()
        raise


def definitions(comparison: Comparison) -> str:
    """Define the measured quantities in a paragraph of Markdown."""
    ends = any(arm.basis == "ends" for arm in comparison.arms)
    text = (TARGET_OF_ENDS if ends else TARGET_OF_CURVES) + DEFINITIONS
    return " ".join([text.format(baseline=comparison.baseline.name), *mid_schedule_sentences(comparison)])


def markdown_report(comparison: Comparison, figures: Iterable[str] = ("curves",)) -> str:
    """Return the text of ``report.md``: verdict, findings, figures, definitions, tables, notes and runs."""
    base = comparison.baseline
    arms = (base, *comparison.arms)
    notes = all_notes(comparison)
    names = ", ".join(arm.name for arm in arms)
    drawn = {name: f"![{words}, {names}]({name}.svg)" for name, words in PICTURES.items() if name in figures}
    points, differences = budget_rows(comparison, "tokens"), difference_rows(comparison)
    parts = [
        f"# Growth against {base.name}",
        verdict(comparison),
        "\n".join(_bullets(finding) for finding in grouped_findings(comparison)),
        drawn.get("curves", ""),
        "## Definitions",
        definitions(comparison),
        "## Costs at the target",
        markdown(comparison).rstrip(),
        *(["## Speedup against budget", drawn.get("budgets", ""), markdown_table(points)] if points else []),
        *(["## Flat frontier", drawn["frontier"]] if "frontier" in drawn else []),
        *(["## Saving against the source's age", drawn["ages"]] if "ages" in drawn else []),
        *(["## Diagnostics", drawn["diagnostics"]] if "diagnostics" in drawn else []),
        *(["## Notes", "\n".join(f"- {note}" for note in notes)] if notes else []),
        "## Runs",
        markdown_table(run_rows(comparison)),
        "\n".join(f"- {line}" for line in version_lines(comparison)),
        *(["Settings that differ:", markdown_table(differences)] if differences else []),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _bullets(finding: list[str]) -> str:
    first, *others = finding
    return "\n".join([f"- {first}", *(f"  - {line}" for line in others)])
