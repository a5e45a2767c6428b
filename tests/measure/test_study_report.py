"""The committed records of the README's study still give the figures that were published."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

STUDY = Path(__file__).parents[2] / "benchmarks" / "results" / "2026-11-21-study-phi-2-2xAMD-EPYC"
FINAL_LOSS_OF_SCRATCH = 3.9516465105
FIGURES = {
    "wr-fresh": (3.7893801977, (1.5974960825, 1.3380668709, 1.9072243615), (1.1246854135, 0.9930231584, 1.2738044109)),
    "lossless-fresh": (
        3.8092058748,
        (1.5322833150, 1.3138745157, 1.7869987807),
        (1.0919668467, 0.9787419492, 1.2182900664),
    ),
    "wr": (3.8237892501, (1.4904778031, 1.2467862473, 1.7818002775), (1.0705678887, 0.9419611346, 1.2167334321)),
    "lossless": (3.8407437863, (1.4292207398, 1.2000555965, 1.7021477415), (1.0385942919, 0.9148676475, 1.1790537200)),
    "tile-preserve-noise": (
        3.8475968763,
        (1.4227203443, 1.1796541502, 1.7158700096),
        (1.0351573417, 0.9034968531, 1.1860038233),
    ),
    "tile-preserve": (
        3.8481759280,
        (1.4209598896, 1.1779591986, 1.7140890876),
        (1.0342250649, 0.9025078728, 1.1851658219),
    ),
    "tile-rms": (3.8495725828, (1.4166042220, 1.1779849298, 1.7035595881), (1.0319157472, 0.9024010293, 1.1800187221)),
    "tile": (3.8580340085, (1.3816200332, 1.1597010669, 1.6460051394), (1.0132267694, 0.8912876639, 1.1518486429)),
    "tile-center": (
        3.8580644876,
        (1.3810579206, 1.1430739078, 1.6685893772),
        (1.0129244217, 0.8818861385, 1.1634335084),
    ),
    "continued": (3.8899525677, (1.2588149182, 1.0332765309, 1.5335826867), (1.4678638736, 1.3008654850, 1.6563006524)),
}
"""Arm -> final held-out loss; speedup and 95 % interval in tokens, sunk; the same in FLOPs, charged.

Copied from the report that was written when the study had run.
"""

COMMAND = """
import sys

class NotInstalled:
    def find_spec(name, path=None, target=None):
        if name in ("torch", "transformers", "deepspeed"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled)
from phigrow.cli import main
main()
"""
"""The command line where torch, transformers and DeepSpeed cannot be imported."""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder that `phigrow report` writes from the committed records."""
    out = tmp_path_factory.mktemp("study") / "report"
    words = ("report", str(STUDY / "records"), "--out", str(out))
    done = subprocess.run([sys.executable, "-c", COMMAND, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def estimates_of(arm):
    return {(each["unit"], each["accounting"]): each for each in arm["estimates"]}


def test_every_arm_has_the_published_loss_speedups_and_intervals(written):
    arms = {arm["arm"]: arm for arm in json.loads((written / "report.json").read_text())["arms"]}
    assert arms.keys() == {"scratch", *FIGURES}
    assert arms["scratch"]["final_loss"] == pytest.approx(FINAL_LOSS_OF_SCRATCH, rel=1e-8)
    for name, (loss, tokens_sunk, flops_charged) in FIGURES.items():
        assert arms[name]["seeds"] == [0, 1, 2]
        assert arms[name]["final_loss"] == pytest.approx(loss, rel=1e-8)
        estimates = estimates_of(arms[name])
        for key, published in ((("tokens", "sunk"), tokens_sunk), (("flops", "charged"), flops_charged)):
            measured = (estimates[key]["speedup"], *estimates[key]["speedup_interval"])
            assert measured == pytest.approx(published, rel=1e-8), (name, key)


def test_the_page_tables_and_figures_are_there_and_show_these_figures(written):
    names = {path.name for path in written.iterdir()}
    assert names >= {
        "report.html",
        "report.md",
        "report.tex",
        "report.json",
        "curves.svg",
        "budgets.svg",
        "diagnostics.svg",
    }
    for name in ("report.html", "report.md"):
        text = (written / name).read_text(encoding="utf-8")
        for figure in ("1.60x [1.34, 1.91]", "1.12x [0.99, 1.27]", "1.49x [1.25, 1.78]", "1.47x [1.30, 1.66]"):
            assert figure in text, (name, figure)


def test_another_loss_in_the_records_gives_other_figures():
    """A control: the comparison above fails where a record differs."""
    from phigrow.measure import compare, load_runs

    runs = load_runs(STUDY / "records" / arm for arm in ("scratch", "wr"))
    for run in runs:
        if run.arm == "wr":
            run.evals["loss"][-1] -= 0.01
    altered = compare(runs)["wr"].estimate("tokens", "sunk").speedup
    assert altered != pytest.approx(FIGURES["wr"][1][0], rel=1e-3)
