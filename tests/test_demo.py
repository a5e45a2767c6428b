import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from phigrow.demo import DESTINATION, METHODS, SOURCE, Settings, run
from phigrow.errors import GrowthError
from phigrow.families import family_of
from phigrow.measure import load_runs


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


def test_a_folder_of_other_settings_is_left_alone(tmp_path):
    (tmp_path / "demo.json").write_text(json.dumps({"steps": 5, "seed": 0, "ranks": 1}))
    with pytest.raises(GrowthError, match=r"a demo of other settings\n(.*\n)+  what to do: give the same settings"):
        run(tmp_path, steps=6, ranks=1)
    assert [path.name for path in tmp_path.iterdir()] == ["demo.json"]
    assert Settings(5, 0, 1) == Settings(**json.loads((tmp_path / "demo.json").read_text()))


@pytest.mark.slow
def test_the_demo_in_miniature_runs_and_resumes(tmp_path):
    out = tmp_path / "demo"
    said = demo(out, steps=10)
    for method in METHODS:
        assert (out / "runs" / method / "export" / "model.safetensors").is_file()
    assert said.rstrip().splitlines()[-1].endswith(f"Picture: {out / 'report' / 'curves.png'}")
    certificates = json.loads((out / "certificates.json").read_text())
    assert certificates["lossless"]["passed"] is True
    assert certificates["wr"]["passed"] is None
    report = (out / "report" / "report.md").read_text()
    assert all(arm in report for arm in ("scratch", *METHODS))
    assert (out / "report" / "curves.png").stat().st_size > 10_000

    runs = {each.arm: each for each in load_runs([out / "runs" / arm for arm in ("source", "scratch", *METHODS)])}
    assert len({each.meta["data_fingerprint"] for each in runs.values()}) == 1  # one data order for all
    source = runs["source"]
    for arm in METHODS:
        assert runs[arm].meta["source_tokens"] == source.steps["tokens"][-1]
        assert runs[arm].meta["source_flops"] == pytest.approx(source.steps["flops"][-1])
    # What the certificate says of the start is what training saw: the source's loss, to bf16.
    assert runs["lossless"].evals["loss"][0] == pytest.approx(source.evals["loss"][-1], abs=0.02)
    assert runs["scratch"].evals["loss"][0] > runs["lossless"].evals["loss"][0]

    # Interrupted after training, before the export and the report: the second run does only that.
    losses = {arm: each.steps["loss"].tolist() for arm, each in runs.items()}
    shutil.rmtree(out / "runs" / "tile" / "export")
    shutil.rmtree(out / "report")
    said = demo(out, steps=10)
    assert said.count("(done before)") == 8
    assert (out / "runs" / "tile" / "export" / "model.safetensors").is_file()
    assert (out / "report" / "report.md").is_file()
    again = load_runs([out / "runs" / arm for arm in ("source", "scratch", *METHODS)])
    assert {each.arm: each.steps["loss"].tolist() for each in again} == losses
