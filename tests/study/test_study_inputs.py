"""Inputs of studies and stages are held by content: one that was replaced is named and refused, and never mixed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from studies import content, loaded
from tiny_models import phi_model
from typer.testing import CliRunner

from phigrow.cli import app
from phigrow.corpus import prepare
from phigrow.errors import GrowthError
from phigrow.expansion import verify as verifying
from phigrow.files.atomic import atomic_json
from phigrow.study import demo, jobs_of, load_stages, progress, run_study, runner
from phigrow.study.inputs import FILE, Ledger, check_inputs, result_of, results_of
from phigrow.study.job import Job
from phigrow.study.places import given_inputs, keep_places
from phigrow.study.results import NoBaselineYetError
from phigrow.study.runner import Outcome
from phigrow.study.settings import Study
from phigrow.study.staged import staged_results

STAGES = Path(__file__).parents[2] / "phigrow" / "recipes" / "stages" / "tiny.yaml"


def start(folder: Path, seed: int = 0) -> Path:
    """The tiny study's source, as a checkpoint."""
    phi_model(content()["source"]["model"], torch.float32, seed).save_pretrained(folder)
    return folder


def study_of(folder: Path, **more: Any) -> Study:
    """A study of a given checkpoint and a text file."""
    text = folder / "text.txt"
    if not text.is_file():
        text.write_text("of making many books there is no end")
        start(folder / "small")
    changes = {"data": content()["data"] | {"ref": str(text)}, "source": str(folder / "small")}
    return loaded(folder, **changes | more)


def finish(study: Study, names: str = "", *, ledger: bool = True) -> list[Job]:
    """Mark the jobs of a study as done whose names contain a word, without doing them."""
    jobs = [job for job in jobs_of(study) if names in job.name]
    written = Ledger(study.out)
    for job in jobs:
        study.out.mkdir(parents=True, exist_ok=True)
        if ledger:
            written.begin(result_of(study, job))
        job.folder.mkdir(parents=True, exist_ok=True)
        if job.trains:
            atomic_json(job.folder / "done.json", {"key": job.key, "step": job.steps, "heldout_loss": 1.0, "flops": 0})
    return jobs


def check(study: Study) -> list[str]:
    notes: list[str] = []
    check_inputs(study.out, results_of(study, jobs_of(study)), notes.append)
    return notes


def test_a_study_whose_inputs_were_replaced_is_refused_by_name(tmp_path):
    study = study_of(tmp_path)
    jobs = finish(study)
    assert check(study) == []
    text, source = tmp_path / "text.txt", tmp_path / "small" / "model.safetensors"
    original, weights = text.read_text(), source.read_bytes()

    text.write_text(original.replace("no end", "an end"))  # of the same size
    message = (
        r"(?s)inputs have changed since these results were made: text \(\w{12}, now \w{12}\).*"
        r"data, .* and \d more had another content of .*text.txt"
    )
    with pytest.raises(GrowthError, match=message):
        check(study)
    with pytest.raises(GrowthError, match="inputs have changed"):  # though no job is left to do
        run_study(study, say=print)
    text.write_text(original)

    shutil.rmtree(tmp_path / "small")
    start(tmp_path / "small", seed=1)
    with pytest.raises(GrowthError, match=r"(?s)have changed .*: source \(\w{12}, now \w{12}\)\n.*tile/seed0.*small"):
        check(study_of(tmp_path))
    # Also where what was made of the source itself is gone.
    shutil.rmtree(study.out / "starts")
    with pytest.raises(GrowthError, match=r"source \(\w{12}, now"):
        check(study_of(tmp_path))
    source.write_bytes(weights)
    assert check(study) == []
    # No content is part of a hash, so finished results keep their folders.
    assert [(job.folder, job.key) for job in jobs_of(study_of(tmp_path))] == [(job.folder, job.key) for job in jobs]


def ran(study: Study) -> None:
    """Run a study whose jobs are all done; there are no records for a report."""
    outcome = run_study(study, say=lambda line: None)
    assert (outcome.failed, outcome.blocked) == ({}, [])


def identities(study: Study) -> list[tuple[Path, str]]:
    return [(job.folder, job.key) for job in jobs_of(study)]


def test_inputs_that_were_moved_keep_their_results(tmp_path):
    study = study_of(tmp_path)
    former = identities(study)
    finish(study)
    assert study.former_places == {}
    ran(study)
    moved = {"text.txt": tmp_path / "other.txt", "small": tmp_path / "elsewhere"}
    for name, place in moved.items():
        (tmp_path / name).rename(place)
    changes = {"data": content()["data"] | {"ref": str(moved["text.txt"])}, "source": str(moved["small"])}
    again = loaded(tmp_path, **changes)
    assert again.former_places == {str(place): str(tmp_path / name) for name, place in moved.items()}
    assert identities(again) == former
    assert runner.wanted(jobs_of(again)) == []
    lines: list[str] = []
    run_study(again, say=lines.append)
    assert f"{moved['small']} has the content of {tmp_path / 'small'}, so results of that place are used" in lines
    assert check(again) == []

    # One of them alone. A copy beside the original is another input: fingerprints only sample large files.
    start(tmp_path / "small")
    assert identities(loaded(tmp_path, **changes | {"source": str(tmp_path / "small")})) == former
    assert str(moved["small"]) not in loaded(tmp_path, **changes).former_places
    shutil.rmtree(tmp_path / "small")
    assert identities(loaded(tmp_path, **changes)) == former
    # Another content at the new place is another input, and without the file a place is all that is known.
    start(moved["small"], seed=1)
    other = loaded(tmp_path, **changes)
    assert str(moved["small"]) not in other.former_places
    assert {key for _, key in identities(other)} & {key for _, key in former} != {key for _, key in former}
    start(moved["small"])
    assert identities(loaded(tmp_path, **changes)) == former
    (again.out / "places.json").unlink()
    assert identities(loaded(tmp_path, **changes)) != former


def test_packed_blocks_that_were_moved_keep_their_results(tmp_path):
    blocks = tmp_path / "blocks"
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join(f"{number} bottles of beer on the wall. " * 40 for number in range(20)))
    prepare(text, blocks, seq_len=64, vocab_size=300, progress=False)
    study = loaded(tmp_path, data=str(blocks))
    former = identities(study)
    finish(study)
    ran(study)
    blocks.rename(tmp_path / "moved")
    again = loaded(tmp_path, data=str(tmp_path / "moved"))
    assert identities(again) == former
    text.write_text(text.read_text().replace("beer", "wine"))
    prepare(text, tmp_path / "new", seq_len=64, vocab_size=300, progress=False)
    assert identities(loaded(tmp_path, data=str(tmp_path / "new"))) != former  # negative control


def test_a_start_of_stages_that_was_moved_keeps_its_results(tmp_path):
    def stages(place: Path) -> Any:
        given = yaml.safe_load(STAGES.read_text()) | {"out": str(tmp_path / "staged")}
        given["stages"][0] = {"init": str(place), "steps": 30}
        (tmp_path / "stages.yaml").write_text(yaml.safe_dump(given))
        return load_stages(tmp_path / "stages.yaml")

    config = yaml.safe_load(STAGES.read_text())["stages"][0]["model"]
    phi_model(config, torch.float32).save_pretrained(tmp_path / "small")
    before = stages(tmp_path / "small")
    before.out.mkdir()
    keep_places(before.out, given_inputs(before.data, [tmp_path / "small"]), before.former_places)
    (tmp_path / "small").rename(tmp_path / "elsewhere")
    after = stages(tmp_path / "elsewhere")
    assert after.former_places == {str(tmp_path / "elsewhere"): str(tmp_path / "small")}
    assert [stage.folder for stage in after.stages] == [stage.folder for stage in before.stages]
    assert after.stages[0].keys["init"] == str(tmp_path / "elsewhere")
    phi_model(config, torch.float32, seed=1).save_pretrained(tmp_path / "elsewhere")
    other = stages(tmp_path / "elsewhere")
    assert [stage.folder for stage in other.stages] != [stage.folder for stage in before.stages]


def test_the_tokenizer_of_a_study_is_an_input(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    file = tmp_path / "tokenizer" / "tokenizer.json"
    file.write_text('{"model": 1}')
    text = tmp_path / "text.txt"
    study = study_of(tmp_path)
    data = {"ref": str(text), "seq_len": 64, "tokenizer": str(tmp_path / "tokenizer")}
    study = dataclasses.replace(study, data=data)
    finish(study, "data")
    assert check(study) == []
    file.write_text('{"model": 2}')
    with pytest.raises(GrowthError, match=r"have changed .*: tokenizer \(\w{12}, now \w{12}\)"):
        check(study)


def test_the_text_of_a_study_is_that_of_its_split_and_configuration(tmp_path):
    books = tmp_path / "books"
    for name in ("en/train.jsonl", "en/test.jsonl", "de/train.jsonl"):
        (books / name).parent.mkdir(parents=True, exist_ok=True)
        (books / name).write_text(json.dumps({"text": f"text of {name}"}) + "\n")
    listed = "- {config_name: en, data_dir: en}\n- {config_name: de, data_dir: de}\n"
    (books / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    base = study_of(tmp_path)
    for split, file in (("train", "en/train.jsonl"), ("test", "en/test.jsonl")):
        data = {"ref": str(books), "seq_len": 64, "config": "en", "split": split}
        study = dataclasses.replace(base, data=data, out=tmp_path / split)
        finish(study, "data")
        assert check(study) == []
        original = (books / file).read_text()
        for other in {"en/train.jsonl", "en/test.jsonl", "de/train.jsonl"} - {file}:
            former = (books / other).read_text()
            (books / other).write_text(former.replace("text", "word"))
            assert check(study) == []  # negative control: text that the study does not read
            (books / other).write_text(former)
        (books / file).write_text(original.replace("text of", "word of"))  # of the same size
        with pytest.raises(GrowthError, match=r"have changed .*: text \(\w{12}, now \w{12}\)\n"):
            check(study)
        (books / file).write_text(original)
        assert check(study) == []


def test_packed_blocks_and_first_weights_that_a_study_made_are_inputs_too(tmp_path):
    study = study_of(tmp_path)
    jobs = {job.name: job for job in jobs_of(study)}
    shutil.copytree(tmp_path / "small", jobs["tile/seed0/start"].folder)
    finish(study, "tile/seed0/trunk")
    start(jobs["tile/seed0/start"].folder, seed=1)
    with pytest.raises(
        GrowthError, match=r"(?s)have changed .*: init \(\w{12}, now \w{12}\)\n.*why: tile/seed0/trunk had"
    ):
        check(study)
    shutil.rmtree(jobs["tile/seed0/start"].folder)
    assert check(study) == []  # deleted after it was used


def test_other_arms_of_a_replaced_source_do_not_begin(tmp_path):
    study = study_of(tmp_path)
    begun = finish(study, "tile/seed0/start")
    start(tmp_path / "small", seed=1)
    with pytest.raises(GrowthError, match="tile/seed0/start had another content"):
        check(study)
    # As its advice says: without the results it is a new beginning.
    for job in begun:
        shutil.rmtree(job.folder)
    assert check(study) == []
    finish(study, "start")
    assert check(study) == []


def test_an_input_that_changes_while_a_study_runs_stops_the_job(tmp_path):
    study = study_of(tmp_path)
    (job,) = finish(study, "tile/seed0/20")
    (job.folder / "done.json").unlink()
    (job.folder / "records.jsonl").touch()  # interrupted
    start(tmp_path / "small", seed=1)
    with pytest.raises(GrowthError, match="tile/seed0/20 had another content"):
        Ledger(study.out).begin(result_of(study, job))
    # A run that failed to start has made nothing of its inputs.
    (job.folder / "records.jsonl").unlink()
    Ledger(study.out).begin(result_of(study, job))
    assert check(study) == []


def test_results_of_earlier_releases_are_taken_as_they_are(tmp_path):
    study = study_of(tmp_path)
    finish(study, ledger=False)
    (note,) = check(study)
    assert note == (
        f"note: an earlier phigrow made {len(jobs_of(study))} results in {study.out} and kept no fingerprints. phigrow "
        "assumes that their inputs have not changed."
    )
    assert not (study.out / FILE).exists()  # the dry run writes nothing
    ledger = check_inputs(study.out, results_of(study, jobs_of(study)), print)
    ledger.write()
    assert check(study) == []
    start(tmp_path / "small", seed=1)
    with pytest.raises(GrowthError, match="source"):
        check(study)


def test_maps_that_were_learned_from_another_source_are_refused(tmp_path):
    arms = {"scratch": None, "ligo": {"method": "ligo", "steps": 2}}
    study = study_of(tmp_path, arms=arms)
    (job,) = finish(study, "ligo/seed0/start")
    job.folder.rename(job.folder.with_name(job.folder.name + "-maps"))  # learned, and then interrupted
    assert check(study) == []
    text = tmp_path / "text.txt"
    text.write_text(text.read_text()[::-1])
    with pytest.raises(GrowthError, match=r"ligo/seed0/start had another content of .*text.txt"):
        check(study)


def test_stages_hold_their_inputs_by_content(tmp_path):
    start(tmp_path / "small")
    (tmp_path / "text.txt").write_text("of making many books there is no end")
    recipe = yaml.safe_load(STAGES.read_text())
    recipe["data"]["ref"] = str(tmp_path / "text.txt")
    recipe["stages"][0] = {"init": str(tmp_path / "small"), "steps": 30}
    del recipe["stages"][1:]
    recipe["scratch"] = False
    (tmp_path / "stages.yaml").write_text(json.dumps(recipe))
    staged = load_stages(tmp_path / "stages.yaml", out=tmp_path / "out")
    results = staged_results(staged)
    assert [(result.name, sorted(result.inputs)) for result in results] == [
        ("data", ["text"]),
        ("stage 1", ["data", "init", "text"]),
    ]
    ledger = Ledger(staged.out)
    staged.out.mkdir()
    ledger.begin(results[1])
    (staged.stages[0].folder / "checkpoints").mkdir(parents=True)
    assert check_inputs(staged.out, results, print).entries == ledger.entries
    start(tmp_path / "small", seed=1)
    with pytest.raises(GrowthError, match=r"(?s)init \(\w{12}, now \w{12}\)\n.*stage 1 had another content of .*small"):
        check_inputs(staged.out, results, print)
    done = CliRunner().invoke(app, ["grow-train", str(tmp_path / "stages.yaml"), "--out", str(staged.out), "--dry-run"])
    assert "inputs have changed" in str(done.exception) + done.output


def test_certificates_of_the_demo_belong_to_weights(tmp_path, monkeypatch):
    study = demo.demo_study(tmp_path, steps=10)
    jobs = {job.name: job for job in jobs_of(study)}
    source, grown = jobs["source"].folder / "export", jobs["tile/seed0/start"].folder
    for folder in (source, *(job.folder for job in jobs.values() if job.kind == "expand")):
        start(folder)
    verified: list[Path] = []

    def verify(source: Path, folder: Path) -> Any:
        verified.append(folder)
        found = {"max_abs_dlogit": 0.0, "source_loss": 1.0, "destination_loss": 1.0}
        return SimpleNamespace(to_json=lambda: dict(found))

    monkeypatch.setattr(verifying, "verify", verify)
    demo.certify(study, print)
    assert len(verified) == len(demo.METHODS)
    demo.certify(study, print)
    assert len(verified) == len(demo.METHODS)
    start(grown, seed=1)
    demo.certify(study, print)
    assert verified[len(demo.METHODS) :] == [grown]
    # Those of earlier releases do not say of which weights they are.
    path = tmp_path / "certificates.json"
    former = {
        key: {k: v for k, v in each.items() if k != "contents"} for key, each in json.loads(path.read_text()).items()
    }
    path.write_text(json.dumps(former))
    demo.certify(study, print)
    assert len(verified) == 2 * len(demo.METHODS) + 1


def test_a_study_without_a_report_has_not_succeeded(tmp_path, monkeypatch):
    study = study_of(tmp_path)
    finish(study)

    def outcome(error: GrowthError | None) -> Outcome:
        def write_results(*_: Any) -> Path:
            if error is not None:
                raise error
            return study.out / "report"

        monkeypatch.setattr(runner, "write_results", write_results)
        return run_study(study, say=print)

    assert outcome(None).succeeded
    assert outcome(NoBaselineYetError("there is no report yet")).succeeded
    failed = outcome(GrowthError("the disk is full"))
    assert (failed.succeeded, failed.old_report) == (False, None)
    (study.out / "report").mkdir()
    files = {"format": 3, "baseline": "scratch", "targets": {}, "files": ["report.html", "report.json"]}
    for name, text in (("report.json", json.dumps(files)), ("report.html", "")):
        (study.out / "report" / name).write_text(text)
    assert outcome(GrowthError("the disk is full")).old_report == study.out / "report"


def test_the_command_fails_with_a_failed_arm_and_names_what_is_stale(tmp_path, monkeypatch):
    study = study_of(tmp_path)
    jobs = finish(study)
    missing = next(job for job in jobs if job.name == "tile/seed0/40")
    stale = runner.stale_ends([job for job in jobs if job is not missing], {missing.name})
    assert stale == []
    assert runner.stale_ends(jobs, {missing.name}) == ["tile/seed0/20", "tile/seed0/40"]
    (missing.folder / "done.json").unlink()
    assert runner.stale_ends(jobs, {missing.name}) == ["tile/seed0/20"]
    assert progress.done(missing) is None

    def run(given: Outcome) -> Any:
        monkeypatch.setattr("phigrow.study.run_study", lambda *_, **__: given)
        return CliRunner().invoke(app, ["compare", str(tmp_path / "study.yaml"), "--out", str(study.out)])

    done = run(Outcome(report=study.out / "report"))
    assert (done.exit_code, "report.html" in done.output) == (0, True)
    done = run(Outcome(why_no_report="there is no report yet", waits=True))
    assert (done.exit_code, "no report yet" in done.output) == (0, True)
    done = run(Outcome(why_no_report="the disk is full", old_report=study.out / "report"))
    assert (done.exit_code, "the disk is full" in done.output) == (1, True)
    assert "is the report of an earlier command" in done.output
    done = run(Outcome({missing.name: GrowthError("no")}, [], ["tile/seed0/20"], study.out / "report"))
    assert (done.exit_code, "in the report, of arms with a failed run: tile/seed0/20" in done.output) == (1, True)
