"""Pages keep up with the code: shown output is real, generated pages are made, lists are complete."""

import importlib
import json
import re
from pathlib import Path

import pytest
import yaml
from console import run_page, without_numbers

import phigrow
from phigrow.growth.registry import all_methods
from phigrow.records.schema import FIELDS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


@pytest.fixture
def hook(monkeypatch):
    """A module of docs/hooks by its name."""
    monkeypatch.syspath_prepend(str(DOCS))
    return lambda name: importlib.import_module(f"hooks.{name}")


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_pages_show_what_their_commands_print(page, tmp_path):
    """`python tests/console.py PAGE --write` puts the new output into the page."""
    for command, shown, printed in run_page(ROOT / page, tmp_path):
        assert without_numbers(shown) == without_numbers(printed), command


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) < 900
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        assert target.startswith("http") or (ROOT / target.partition("#")[0]).exists(), target


def test_every_method_has_a_page_with_its_formula_claims_and_cost(hook):
    pages = hook("methods").pages()
    for name, method in all_methods().items():
        page = pages[f"methods/{name}.md"]
        assert f"[`{name}`]({name}.md) | {method.summary}" in pages["methods/index.md"]
        for option in method.options:
            assert f"| `{option}` |" in page
        assert "| twice the width |" in page
        assert f"| `{name}` | uneven |" in page
    assert "| more layers | exact | exact | exact | exact |" in pages["methods/lossless.md"]
    assert "approximate" in pages["methods/wr.md"]
    assert "| twice the width | exact" in pages["methods/staged.md"]
    assert "| uneven width | refused" in pages["methods/staged.md"]


def test_the_page_of_commands_has_every_option_of_their_help(hook):
    page = hook("commands").page()
    for path in (ROOT / "tests" / "golden" / "help").glob("*.txt"):
        if path.name in ("phigrow.txt", "pretrain.py.txt", "pretrain.txt"):
            continue  # the page of settings has the options of pretraining
        for option in re.findall(r"--[a-z][a-z-]+", path.read_text(encoding="utf-8")):
            assert option in page, (path.name, option)


def test_the_reference_has_every_package(hook):
    pages = hook("api").pages()
    packages = {f"phigrow.{path.parent.name}" for path in (ROOT / "phigrow").glob("*/__init__.py")}
    assert packages - {"phigrow.cli"} == {Path(path).stem for path in pages} - {"api/index", "index"} - {"phigrow"}


def test_the_tutorial_shows_tables_figures_and_values(hook, tmp_path):
    cells = [["# Title"], ["print('one')\n", "1 + 1"]]
    kinds = ["markdown", "code"]
    path = tmp_path / "book.ipynb"
    book = {"cells": [{"cell_type": kind, "source": cell} for kind, cell in zip(kinds, cells, strict=True)]}
    path.write_text(json.dumps(book))
    page = hook("notebook").pages(path, "book")["book.md"]
    assert page.startswith("# Title\n")
    assert page.endswith("```python\nprint('one')\n1 + 1\n```\n\n```text\none\n```\n\n```text\n2\n```\n")


def test_links_between_pages_lead_to_pages_and_headings():
    made = {"methods/index.md", "methods/depth.md", "api/phigrow.methods.md", "commands.md", "tutorial.md"}
    made |= {"contributing.md", "changelog.md"}
    anchors = {page.name: _anchors(page.read_text(encoding="utf-8")) for page in PAGES}
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if target.startswith(("http", "mailto:")):
                continue
            file, _, anchor = target.partition("#")
            file = file or page.name
            assert file in made or (DOCS / file).exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors[file], f"{page.name} links to {target}"


def _anchors(text):
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_every_field_of_records_is_described():
    text = (DOCS / "records.md").read_text(encoding="utf-8")
    sections = {match[1]: match[2] for match in re.finditer(r"^## `(\w+)`.*?\n(.*?)(?=^## |\Z)", text, re.M | re.S)}
    records = (ROOT / "benchmarks" / "results").glob("*/records/**/records.jsonl.gz")
    written = {(record.pop("type"), *record) for path in records for record in _records(path)}
    assert written
    for kind, *names in [*written, *((kind, *names) for kind, names in FIELDS.items())]:
        for name in names:
            assert f"`{name}`" in sections[kind], (kind, name)


def _records(path):
    import gzip

    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_continuous_integration_runs_what_the_script_runs():
    script = re.findall(r"^make \w+", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    steps = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    assert script
    assert set(script) <= set(steps)
    assert "mkdocs build --quiet --strict" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_citation_names_the_version_of_the_package():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == phigrow.__version__
