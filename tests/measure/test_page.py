"""The page: everything in one file, nothing from the network, names that are markup, and a real browser."""

import html.parser
import json
import math
import re

import browser as driven
import numpy as np
import pytest

from phigrow.measure import compare, load_runs
from phigrow.measure.data import as_json, curves_data
from phigrow.measure.page import page
from phigrow.measure.report_files import definitions

HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror=alert(1)>&"\''


class Elements(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for key, value in attributes if key in ("src", "href", "action", "srcset")]
        assert not [key for key, _ in attributes if key.startswith("on") or key == "style"]

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def hostile(write_run):
    """scratch, a grown arm and one whose every name is markup; three seeds, sources and diagnostics."""
    tokens = np.linspace(0, 2e6, 21)
    for seed in range(3):
        for arm, speed in (("scratch", 1.0), ("wr", 2.0 + 0.05 * seed), (HOSTILE, 0.7)):
            losses = 2.5 + 1.2 * (speed * tokens / 2e6 + 0.02) ** -0.3
            folder = write_run(
                arm, losses, tokens, seed=seed, name=f"{'x' if arm == HOSTILE else arm}-{seed}", commit=HOSTILE,
                config={"init": HOSTILE if arm == HOSTILE else arm}, source_tokens=0 if arm == "scratch" else 4e5,
            )  # fmt: skip
            path = folder / "records.jsonl"
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            for line in lines:
                if line["type"] == "eval":
                    line["sources"] = {"code": line["loss"] - 1, HOSTILE: line["loss"]}
            if arm != "scratch":
                lines += [{"type": "diagnostics", "step": s, "copy_cosine": 1 - s / 40} for s in range(0, 21, 5)]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder.parent


@pytest.fixture
def written(hostile, tmp_path):
    comparison = compare(load_runs(hostile))
    (tmp_path / "report.html").write_text(page(comparison, definitions(comparison)))
    return tmp_path / "report.html"


def test_nothing_leaves_the_page_and_names_stay_text(written):
    text = written.read_text()
    found = Elements(text)
    assert found.links == ["data:,"]
    assert found.tags.count("script") == 2
    assert "img" not in found.tags
    assert HOSTILE in "".join(found.text)  # as text, in the tables
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert "{{" not in text
    for line in compare(load_runs(written.parent / "runs")).baseline.notes:
        assert line in "".join(found.text)


def test_the_page_without_escaping_would_have_been_owned(hostile, monkeypatch):
    """Negative control: the same page with escaping switched off has more elements."""
    monkeypatch.setattr("phigrow.measure.page.html.escape", lambda text: text)
    text = page(compare(load_runs(hostile)), "")
    with pytest.raises(AssertionError):
        Elements(text)


def test_the_data_of_the_page_are_those_of_the_report(written):
    text = written.read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    numbers = as_json(compare(load_runs(written.parent / "runs")))
    assert [arm["arm"] for arm in data["arms"]] == [arm["arm"] for arm in numbers["arms"]]
    assert data["arms"][1]["estimates"] == numbers["arms"][1]["estimates"]
    run = data["curves"][2]["runs"][0]
    assert run["evals"]["tokens"][:2] == [0, 1e5]
    assert set(run["sources"]) == {"code", HOSTILE}
    assert run["diagnostics"]["copy_cosine"][-1] == 0.5
    assert data["range"][0] < data["target"] < data["range"][1]


def test_long_training_curves_are_thinned_to_means(write_run):
    tokens = np.arange(5001) * 1000.0
    folder = write_run("scratch", 5 - tokens / 1e6 * 0.5, tokens)
    comparison = compare(load_runs(folder))
    (run,) = curves_data(comparison)[0]["runs"]
    assert len(run["train"]["loss"]) == len(run["evals"]["loss"]) == 400
    assert run["evals"]["tokens"][-1] == 5e6
    assert np.mean(run["train"]["loss"]) == pytest.approx(5.1 - 1.25, abs=1e-3)


def test_a_diverged_arm_and_an_arm_alone_make_pages(write_run):
    line, costs = [5.0, 4.0, 3.0], [0, 1e6, 2e6]
    folder = write_run("scratch", line, costs)
    assert "There is nothing to compare." in page(compare(load_runs(folder)), "")
    write_run("wr", [5.0, math.inf, math.nan], costs, source_tokens=None)
    assert "NaN" not in page(compare(load_runs(folder.parent)), "")


needs_browser = pytest.mark.skipif(driven.missing() is not None, reason=str(driven.missing()))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with driven.Browser(tmp_path_factory.mktemp("profile")) as session:
        yield session


@needs_browser
def test_in_a_real_browser(chromium, written, tmp_path):
    chromium.open(written)
    assert chromium.run("return document.documentElement.dataset.ready") == "yes"
    assert chromium.run("return document.title") == "Growth against scratch"
    assert chromium.run("return document.querySelector('.lead').textContent").startswith(
        "wr reached scratch's final loss with "
    )
    names = "return [...document.querySelectorAll('#legend button')].map(b => b.textContent)"
    assert chromium.run(names) == ["scratch", "wr", HOSTILE]
    dots = "return document.querySelectorAll('#speedup circle').length"
    assert chromium.run(dots) == 2  # wr, sunk and charged; the other arm has triangles
    assert chromium.run("return document.querySelectorAll('#speedup polygon').length") == 2
    count = "return document.querySelectorAll('#loss polyline').length"
    assert (
        chromium.run(count) == 13
    )  # three arms of three seeds, their means, and the fit of the one that met the target
    assert chromium.run("return document.querySelectorAll('#loss circle').length") == 1  # the other is censored
    assert chromium.run("return document.querySelectorAll('#diagnostics svg').length") == 1

    axis = "return document.querySelector('#loss svg').textContent"
    assert "training tokens" in chromium.run(axis)
    first = chromium.run("return document.querySelector('#loss circle').getAttribute('cx')")
    click = "document.querySelector('input[value={}]').click();"
    chromium.run(click.format("charged"))
    assert "source's included" in chromium.run(axis)
    assert float(chromium.run("return document.querySelector('#loss circle').getAttribute('cx')")) > float(first)
    chromium.run(click.format("flops"))
    assert "training FLOPs" in chromium.run(axis)
    for name in ("xlog", "ylog", "whole"):
        chromium.run(f"document.querySelector('[name={name}]').click()")
        assert chromium.run(count) == 13
    choose = "const s = document.querySelector('select'); s.value = {};"
    choose += "s.dispatchEvent(new Event('change', {{bubbles: true}}))"
    for value, title in (("train", "Training loss"), ("s:code", "Held-out loss, code")):
        chromium.run(choose.format(json.dumps(value)))
        assert title in chromium.run(axis)
    chromium.run("document.querySelectorAll('#legend button')[1].click()")
    assert chromium.run(count) == 8
    assert chromium.complaints() == []


@needs_browser
def test_the_best_five_curves_are_drawn_and_the_others_one_click_away(chromium, write_run, tmp_path):
    tokens = np.linspace(0, 2e6, 21)
    for place, arm in enumerate(("scratch", "a", "b", "c", "d", "e", "f", "g")):
        losses = 2.5 + 1.2 * ((1 + 0.1 * place) * tokens / 2e6 + 0.02) ** -0.3
        folder = write_run(arm, losses, tokens)
    comparison = compare(load_runs(folder.parent))
    (tmp_path / "report.html").write_text(page(comparison, definitions(comparison)))
    chromium.open(tmp_path / "report.html")
    pressed = "return [...document.querySelectorAll('#legend [aria-pressed=true]')].map(b => b.textContent)"
    assert chromium.run(pressed) == ["scratch", "g", "f", "e", "d", "c"]
    # Every cost is on a drawn line: rings and the points of fits meet.
    drawn = """
        const rings = [...document.querySelectorAll('#loss circle')].map(
          c => [+c.getAttribute('cx'), +c.getAttribute('cy')]);
        const points = [...document.querySelectorAll('#loss .fit')].flatMap(
          f => f.getAttribute('points').split(' ').map(p => p.split(',').map(Number)));
        return rings.map(([x, y]) => Math.min(...points.map(([a, b]) => Math.hypot(a - x, b - y))));"""
    assert len(chromium.run(drawn)) == 5
    assert max(chromium.run(drawn)) < 0.2
    chromium.run("document.getElementById('more').click()")
    assert len(chromium.run(pressed)) == 8
    assert len(chromium.run(drawn)) == 7
    chromium.run("document.getElementById('more').click()")
    assert len(chromium.run(pressed)) == 6
    assert chromium.complaints() == []


@needs_browser
def test_hovering_reads_off_values(chromium, written):
    chromium.open(written)
    chromium.run("document.getElementById('loss').scrollIntoView()")
    box = chromium.run(
        "const b = document.querySelector('#loss svg').getBoundingClientRect(); return [b.x, b.y, b.width]"
    )
    chromium.hover(box[0] + box[2] - 17, box[1] + 100)  # the end of the budget
    tip = chromium.run("return document.querySelector('#loss .tip').innerText")
    assert tip.splitlines()[0] == "2M"
    final = 2.5 + 1.2 * 1.02**-0.3
    assert f"scratch: {final:.3f}" in tip
    assert HOSTILE in tip


@needs_browser
@pytest.mark.parametrize("width", [360, 1200])
def test_it_fits_the_screen_and_a_screenshot_has_colours(chromium, written, tmp_path, width):
    from matplotlib.image import imread

    chromium.open(written, width=width)
    assert chromium.run("return document.documentElement.scrollWidth") == width
    chromium.screenshot(tmp_path / "page.png")
    picture = (imread(tmp_path / "page.png")[:, :, :3] * 255).astype(int)
    for colour in ((34, 34, 34), (194, 78, 0), (0, 105, 168)):  # scratch and the two arms
        assert (np.abs(picture - colour).max(axis=2) < 3).sum() > 200


@needs_browser
def test_a_page_that_was_tampered_with_does_not_run(chromium, written):
    """Negative control of the policy: one more script, or another one, is refused, and that is noticed here."""
    other = written.with_name("other.html")
    other.write_text(written.read_text().replace("</main>", "</main><script>document.title = 'owned'</script>"))
    chromium.open(other)
    assert chromium.run("return document.title") == "Growth against scratch"
    assert any("Content Security Policy" in line for line in chromium.complaints())
