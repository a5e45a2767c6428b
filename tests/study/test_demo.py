import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from phigrow.measure import load_run
from phigrow.models.families import family_of
from phigrow.study import jobs_of
from phigrow.study.demo import DESTINATION, METHODS, SOURCE, demo_study


def demo(out: Path, steps: int) -> str:
    command = [
        sys.executable,
        "-c",
        "from phigrow.cli import main; main()",
        "demo",
        "--out",
        str(out),
        "--steps",
        str(steps),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_demo_grows_every_kind_of_axis():
    old, new = (family_of(config, "demo").sizes_of(config) for config in (SOURCE, DESTINATION))
    assert all(new[axis] > old[axis] for axis in ("hidden", "kv", "mlp", "layer"))
    assert old["rotary"] == new["rotary"]


def test_the_demo_is_a_study_whose_shortest_run_has_room_for_warmup_and_decay(tmp_path):
    for steps, budgets in ((None, (17, 35, 70, 140)), (4, (4,)), (10, (4, 5, 10))):
        study = demo_study(tmp_path, steps=steps)
        assert study.budgets == budgets
        assert study.train["warmup"] + study.decay_steps(budgets[0]) <= budgets[0]
        assert [job.name for job in jobs_of(study)][:3] == [
            "data", "source", f"scratch/seed0/{'trunk' if len(budgets) > 1 else budgets[0]}",
        ]  # fmt: skip


@pytest.mark.slow
def test_the_demo_in_miniature_runs_and_resumes(tmp_path):
    out = tmp_path / "demo"
    said = demo(out, steps=4)
    assert said.rstrip().splitlines()[-1].endswith(f"Picture: {out / 'report' / 'curves.png'}")
    study = demo_study(out, steps=4)
    jobs = {job.name: job for job in jobs_of(study)}
    certificates = json.loads((out / "certificates.json").read_text())
    passed = {name.partition("/")[0]: found["passed"] for name, found in certificates.items()}
    assert passed == {"wr": None, "tile": None, "lossless": True}
    report = (out / "report" / "report.md").read_text()
    assert all(arm in report for arm in ("scratch", *METHODS))
    assert (out / "report" / "curves.png").stat().st_size > 10_000

    ends = {arm: load_run(jobs[f"{arm}/seed0/4"].folder) for arm in ("scratch", *METHODS)}
    source = load_run(jobs["source"].folder)
    assert len({each.meta["data_fingerprint"] for each in [source, *ends.values()]}) == 1  # one data order for all
    for arm in METHODS:
        assert ends[arm].meta["source_tokens"] == source.steps["tokens"][-1]
        assert ends[arm].meta["source_flops"] == pytest.approx(source.steps["flops"][-1])
    # The loss at the start of training is the one in the certificate: the source's, to the rounding of fp32.
    assert ends["lossless"].evals["loss"][0] == pytest.approx(source.evals["loss"][-1], abs=1e-4)
    assert ends["scratch"].evals["loss"][0] > ends["lossless"].evals["loss"][0]

    # Interrupted after training, before the end of one run and the report: the second run does only that.
    losses = {arm: each.steps["loss"].tolist() for arm, each in ends.items()}
    (jobs["tile/seed0/4"].folder / "done.json").unlink()
    shutil.rmtree(out / "report")
    said = demo(out, steps=4)
    assert f"1 of {len(jobs)} jobs to do" in said
    assert (out / "report" / "report.md").is_file()
    again = {arm: load_run(jobs[f"{arm}/seed0/4"].folder).steps["loss"].tolist() for arm in losses}
    assert again == losses
