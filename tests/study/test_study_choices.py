"""Data type and compilation are chosen once for a study: kept in its folder, and those of runs that it has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from studies import loaded

from phigrow.study import automatic, jobs_of
from phigrow.study.automatic import FILE, study_choices, threads_of_a_run, with_choices
from phigrow.training import RunConfig

TRAIN: dict[str, Any] = {"batch": 16, "warmup": 4, "lr": 4e-3}


@pytest.fixture
def made(monkeypatch) -> list[tuple[list[str], RunConfig, float, int]]:
    """What is asked of the hardware, which would choose bf16 and to compile."""
    calls: list[tuple[list[str], RunConfig, float, int]] = []

    def choices_of(names: list[str], config: RunConfig, model: Any, seq_len: int, device: Any, *more: Any) -> Any:
        calls.append((names, config, *more))
        values = {"dtype": "bf16", "compile": True}
        return {name: {"asked": "auto", "chosen": values[name], "reason": "r", "seconds": {}} for name in names}

    monkeypatch.setattr(automatic, "choices_of", choices_of)
    return calls


def chosen(study: Any, lines: list[str] | None = None) -> dict[str, Any]:
    found = study_choices(study, jobs_of(study), [].append if lines is None else lines.append)
    return {name: choice["chosen"] for name, choice in found.items()}


@pytest.mark.parametrize(
    ("asked", "threads"), [("4,2", 4), (" 3 , 1", 3), ("2", 2), ("", 5), ("0", 5), ("many", 5), (",2", 5), ("-1", 5)]
)
def test_a_timing_has_the_threads_of_the_first_level(monkeypatch, asked, threads):
    former = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        with threads_of_a_run(2):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == 5
        monkeypatch.delenv("OMP_NUM_THREADS")
        with monkeypatch.context() as alone:
            alone.setattr("phigrow.study.launch.cores", lambda: 6)
            with threads_of_a_run(2):
                assert torch.get_num_threads() == 3  # six cores, two processes
    finally:
        torch.set_num_threads(former)


def leave_records(folder: Path, **config: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "records.jsonl").write_text(json.dumps({"type": "run", "config": config}) + "\n")


def test_a_study_chooses_once_and_says_so(made, tmp_path):
    study, lines = loaded(tmp_path, train=TRAIN), []
    study.out.mkdir()
    assert chosen(study, lines) == {"dtype": "bf16", "compile": True}
    assert lines == ["dtype: bf16 chosen (r)", "compile: true chosen (r)"]
    assert set(json.loads((study.out / FILE).read_text())) == {"dtype", "compile"}
    ((names, _, flops, models),) = made
    assert names == ["dtype", "compile"]
    assert flops == pytest.approx(sum(job.flops for job in jobs_of(study)))
    assert models == 2 * study.layout().workers  # the source and the destination, on every worker
    assert chosen(study) == {"dtype": "bf16", "compile": True}
    assert len(made) == 1  # the hardware is not asked again


def test_a_study_goes_on_as_its_runs_were_trained(made, tmp_path):
    study = loaded(tmp_path, train=TRAIN)
    trained = [job for job in jobs_of(study) if job.trains]
    leave_records(trained[2].folder, dtype="fp16", compile=False)
    assert chosen(study) == {"dtype": "fp16", "compile": False}
    assert not made


def test_what_the_study_sets_is_not_chosen(made, tmp_path):
    study = loaded(tmp_path, train=TRAIN | {"dtype": "fp32"})
    study.out.mkdir()
    assert chosen(study) == {"compile": True}
    assert made[0][1].dtype == "fp32"
    job = next(job for job in jobs_of(study) if job.trains)
    keys = with_choices(job.keys, study_choices(study, jobs_of(study), print))
    assert (keys["dtype"], keys["compile"], keys["auto_choices"]["compile"]["chosen"]) == ("fp32", "auto", True)
    RunConfig(**keys)


def test_settings_of_a_study_that_no_choice_needs_are_not_read(made, tmp_path):
    study = loaded(tmp_path, train=TRAIN | {"warmup": 15, "zero": 0}, budgets=[40, 2000])
    study.out.mkdir()
    assert chosen(study) == {"dtype": "bf16", "compile": True}
    assert made[0][1].zero == 0
