"""Records from other training loops: a real Trainer on CPU, its resumption, and accelerate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import phi_config, phi_model
from transformers import Trainer, TrainingArguments

import phigrow
from phigrow.errors import GrowthError
from phigrow.integrations import RecordsCallback, RecordsTracker, RunRecorder
from phigrow.measure import compare, load_run, load_runs
from phigrow.models.cost import count_cost

LENGTH, BATCH = 12, 2
CONFIG = phi_config(32, 4, 48, 2, 4)
FLOPS = count_cost(CONFIG, LENGTH).training_flops


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    """Set the number of threads, because accelerate warns where nobody has set it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = [(index * 7 + k * 3) % 61 for k in range(LENGTH)]
        return {"input_ids": row, "labels": row}


def train(folder: Path, callback: RecordsCallback, *, resume: str | None = None, **settings: Any) -> Trainer:
    """Train a tiny Phi for six steps, with evaluations before the first step, after four and at the end."""
    settings = {"eval_strategy": "steps", "eval_steps": 4, "include_num_input_tokens_seen": "all"} | settings
    settings["eval_on_start"] = settings["eval_strategy"] != "no" and resume is None
    arguments = TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=BATCH, gradient_accumulation_steps=2, learning_rate=1e-2,
        logging_steps=1, save_steps=3, save_only_model=False, seed=3,
        report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, **settings,
    )  # fmt: skip
    model = phi_model(CONFIG, torch.float32)
    held_out = Rows()
    trainer = Trainer(model, arguments, train_dataset=Rows(), eval_dataset=held_out, callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("trainer") / "run"
    trainer = train(folder, RecordsCallback("scratch", "scratch", seq_len=LENGTH))
    return folder, trainer.state.log_history


def test_a_trainer_run_leaves_the_records_of_a_run(first):
    folder, history = first
    run = load_run(folder)
    evals = {row["step"]: row["eval_loss"] for row in history if "eval_loss" in row}
    assert run.evals["step"].tolist() == [0, 4, 6] == list(evals)
    assert run.evals["loss"].tolist() == list(evals.values())
    each = 2 * BATCH * LENGTH
    assert run.evals["tokens"].tolist() == [0, 4 * each, 6 * each]
    assert run.evals["flops"].tolist() == [0, 4 * each * FLOPS, 6 * each * FLOPS]
    assert run.steps["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert run.steps["loss"].tolist() == [row["loss"] for row in history if "loss" in row]
    assert run.steps["lr"][0] == pytest.approx(1e-2)
    assert run.steps["lr"][-1] < 2e-3  # negative control: the rate of the step, not the setting
    seconds = run.steps["seconds"]
    assert (seconds[1:] > seconds[:-1]).all()
    runtime = [row["train_runtime"] for row in history if "train_runtime" in row][-1]
    assert 0 < seconds[-1] < runtime
    assert run.evals["seconds"].tolist() == [0, seconds[3], seconds[5]]  # evaluations take no time of training
    assert (run.seed, run.schedule, run.budget, run.finished) == (3, "linear", 6, True)
    assert run.meta["parameters"] == count_cost(CONFIG).parameters
    assert (run.meta["source_tokens"], run.meta["config"]["batch"]) == (0, 4)


def test_a_resumed_run_goes_on_in_its_records(first, tmp_path):
    whole = load_run(first[0])
    folder = shutil.copytree(first[0], tmp_path / "run")
    train(folder, RecordsCallback("scratch", "scratch", seq_len=LENGTH), resume=str(folder / "checkpoint-3"))
    again = load_run(folder)
    for kind in ("steps", "evals"):
        for key in ("step", "tokens", "loss"):
            one, other = getattr(whole, kind)[key], getattr(again, kind)[key]
            assert other.tolist() == pytest.approx(one.tolist(), rel=1e-5), (kind, key)
    assert [record["step"] for record in again.resumes] == [3]


def test_a_grown_arm_has_the_cost_of_its_source_and_a_report(first, tmp_path):
    source, grown = tmp_path / "source", tmp_path / "grown"
    phi_model(phi_config(16, 2, 24, 2, 4), torch.float32).save_pretrained(source)
    (source / "training.json").write_text('{"tokens": 960, "flops": 1e6, "seconds": 2.5}')
    (tmp_path / "dst.json").write_text(json.dumps(CONFIG))
    phigrow.expand(source, tmp_path / "dst.json", method="wr", out=grown, dtype="float32")
    model = phi_model(CONFIG, torch.float32)
    settings = {"steps": 6, "lr": 1e-2}
    recorder = RunRecorder(tmp_path / "wr", "wr", grown, model, seed=3, settings=settings, seq_len=LENGTH)
    scratch = load_run(first[0])
    for step in (0, 4, 6):
        recorder.evaluation(step, 48 * step, scratch.held_out(step) - 0.2, seconds=0.1 * step)
    recorder.evaluation(6, 48 * 6, 9.0)  # a second evaluation of a step
    recorder.close()
    comparison = compare(load_runs([first[0], tmp_path / "wr"]))
    estimate = comparison["wr"].estimate("tokens", "charged")
    assert estimate.cost == pytest.approx(comparison["wr"].estimate("tokens", "sunk").cost + 960)
    assert comparison["wr"].runs[0].meta["growth"]["method"] == "wr"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"include_num_input_tokens_seen": "no"}, "Trainer does not count tokens"),
        ({"eval_strategy": "no"}, "Trainer does not evaluate"),
    ],
)
def test_a_trainer_that_records_too_little_is_refused(tmp_path, settings, message):
    with pytest.raises(GrowthError, match=message):
        train(tmp_path / "run", RecordsCallback("scratch", "scratch"), **settings)
    assert not (tmp_path / "run" / "records.jsonl").exists()


def test_records_are_not_replaced_and_folders_must_exist(first, tmp_path):
    model = phi_model(CONFIG, torch.float32)
    with pytest.raises(GrowthError, match="has the records of a run"):
        RunRecorder(first[0], "scratch", "scratch", model)
    with pytest.raises(GrowthError, match="which is no folder"):
        RunRecorder(tmp_path / "run", "mine", tmp_path / "none", model)
    RunRecorder(tmp_path / "run", "mine", "scratch", model).close()
    RunRecorder(tmp_path / "run", "mine", "scratch", model, overwrite=True).close()


def test_several_held_out_sets_become_sources(tmp_path):
    from transformers import TrainerState

    callback = RecordsCallback("mine", "scratch", folder=tmp_path / "run", tokens_per_step=10)
    arguments = TrainingArguments(str(tmp_path), max_steps=2, eval_strategy="steps", report_to="none", use_cpu=True)
    state = TrainerState(max_steps=2, is_world_process_zero=True)
    callback.on_train_begin(arguments, state, None, model=phi_model(CONFIG, torch.float32))
    callback.on_evaluate(arguments, state, None, metrics={"eval_books_loss": 4.0, "eval_books_runtime": 1.0})
    callback.on_evaluate(arguments, state, None, metrics={"eval_code_loss": 2.0})
    callback.on_train_end(arguments, state, None)
    run = load_run(tmp_path / "run")
    assert run.evals["loss"].tolist() == [3.0]
    assert {name: values.tolist() for name, values in run.sources.items()} == {"books": [4.0], "code": [2.0]}


@pytest.mark.parametrize(("counted", "resumed"), [(12, 0), (0, 0), (12, 24)])
def test_an_evaluation_has_the_tokens_of_its_step_in_every_version_of_transformers(tmp_path, counted, resumed):
    """Version 4 counts the next micro-batch before a step begins, version 5 after it."""
    from transformers import TrainerState

    callback = RecordsCallback("mine", "scratch", folder=tmp_path / "run")
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, eval_strategy="steps", include_num_input_tokens_seen="all", report_to="none",
        use_cpu=True,
    )  # fmt: skip
    control: Any = SimpleNamespace(should_evaluate=False, should_save=False)
    state = TrainerState(max_steps=2, is_world_process_zero=True, num_input_tokens_seen=resumed)
    callback.on_train_begin(arguments, state, control, model=phi_model(CONFIG, torch.float32))
    for step in range(2):
        callback.on_evaluate(arguments, state, control, metrics={"eval_loss": 4.0 - step})
        state.num_input_tokens_seen += counted
        callback.on_step_begin(arguments, state, control)
        state.num_input_tokens_seen += 24 - counted
        state.global_step = step + 1
        callback.on_step_end(arguments, state, control)
        callback.on_log(arguments, state, control, logs={"loss": 3.0})
    callback.on_train_end(arguments, state, control)
    run = load_run(tmp_path / "run")
    assert run.evals["tokens"].tolist() == [resumed, resumed + 24]
    assert run.steps["tokens"].tolist() == [resumed + 24, resumed + 48]


def test_accelerate_logs_become_records(tmp_path):
    from accelerate import Accelerator

    model = phi_model(CONFIG, torch.float32)
    tracker = RecordsTracker(tmp_path / "run", "mine", "scratch", model, steps=2, tokens_per_step=24, seq_len=LENGTH)
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("mine", config={"lr": 1e-2})
    accelerator.log({"eval_loss": 4.0}, step=0)
    for step in (1, 2):
        accelerator.log({"loss": 4.0 - step, "lr": 1e-2, "other": 1}, step=step)
    accelerator.log({"eval_loss": 2.5}, step=2)
    with pytest.raises(GrowthError, match="a loss has no step"):
        accelerator.log({"loss": 1.0})
    accelerator.end_training()
    run = load_run(tmp_path / "run")
    assert run.steps["loss"].tolist() == [3.0, 2.0]
    assert (run.evals["loss"].tolist(), run.evals["tokens"].tolist()) == ([4.0, 2.5], [0, 48])
    assert (run.meta["config"]["lr"], run.budget, run.finished) == (1e-2, 2, True)
    assert run.evals["flops"].tolist() == [0, 48 * FLOPS]
