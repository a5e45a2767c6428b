"""Inputs of a run are held by content: replaced ones are refused, moved and deleted ones are no obstacle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import losses, records
from safetensors.torch import load_file, save_file
from scenarios import SETTINGS, TINY, FakeBlocks
from tiny_models import phi_model

import phigrow
from phigrow.corpus import prepare, train_tokenizer
from phigrow.errors import GrowthError
from phigrow.measure import load_run
from phigrow.records.writer import RecordWriter
from phigrow.training import RunConfig, train
from phigrow.training.branches import branch
from phigrow.training.checkpoints import changed_keys, claim
from phigrow.training.export_place import is_exported
from phigrow.training.inputs import CONTENTS, FOLDER, contents_of, with_kept_inputs

# What torch's own modules say when DeepSpeed imports them in this process.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def start(folder: Path, seed: int = 0) -> Path:
    """A tiny checkpoint."""
    phi_model(TINY, torch.float32, seed).save_pretrained(folder)
    return folder


def run(out: Path, **settings: Any) -> Any:
    more = {"out": str(out), "zero": 1, "steps": 4, "save_every": 2, "keep": 0, "eval_every": 2}
    return train(RunConfig(**SETTINGS | more | settings), FakeBlocks())


def cut(out: Path) -> None:
    """Take the last checkpoint away, so that the run resumes from the one before it."""
    shutil.rmtree(out / "checkpoints" / "step-4")


def test_a_run_continues_wherever_its_start_is(alone, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out, given = tmp_path / "run", {"model": None, "fresh_lr": 1.0}
    start(tmp_path / "g1")
    assert run(out, init="g1", **given).finished
    whole, first = losses(out), records(out, "run")
    shutil.copytree("g1", "elsewhere/g2")

    for place in ("./g1", str(tmp_path / "g1"), "elsewhere/g2"):
        cut(out)
        assert run(out, init=place, **given).finished
        assert losses(out) == whole
    assert "no longer exist" not in capsys.readouterr().out

    # A start of the same name whose weights differ, in one tensor only.
    weights = load_file("g1/model.safetensors")
    save_file(
        weights | {"model.layers.1.mlp.fc2.bias": -weights["model.layers.1.mlp.fc2.bias"]}, "g1/model.safetensors"
    )
    cut(out)
    with pytest.raises(GrowthError, match=r"these keys differ: content of init \('\w{12}', now '\w{12}'\)"):
        run(out, init="g1", **given)
    assert not (out / "checkpoints" / "step-4").exists()

    # As its own advice says, without the start it continues.
    shutil.rmtree("g1")
    assert run(out, init="g1", **given).finished
    assert losses(out) == whole
    assert records(out, "run") == first
    assert "the run continues from its checkpoint; these inputs no longer exist: g1\n" in capsys.readouterr().out
    # Negative control: no checkpoint holds the weights.
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(GrowthError, match="init does not exist any more, and the run has no checkpoint"):
        run(out, init="g1", **given)


def test_lost_records_and_exports_of_another_type_are_made_again(alone, tmp_path, capsys):
    assert run(tmp_path, export="export").finished
    (first,) = records(tmp_path, "run")
    whole = losses(tmp_path)

    assert run(tmp_path, export="export").finished
    assert "is complete, 4 steps" in capsys.readouterr().out
    assert load_file(tmp_path / "export" / "model.safetensors")["lm_head.weight"].dtype == torch.float32
    assert run(tmp_path, export="export", export_dtype="bf16").finished
    assert load_file(tmp_path / "export" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert losses(tmp_path) == whole
    assert is_exported(tmp_path / "export", "bf16")
    assert not is_exported(tmp_path / "export", "fp32")

    cut(tmp_path)
    (tmp_path / "records.jsonl").unlink()
    assert run(tmp_path, export="export", export_dtype="bf16").finished
    (again,) = records(tmp_path, "run")
    assert again == first | {"config": first["config"] | {"export_dtype": "bf16"}}
    assert losses(tmp_path) == whole[2:]
    assert load_run(tmp_path).steps["step"].tolist() == [3, 4]
    assert [record["step"] for record in records(tmp_path, "resume")] == [2]
    assert "the records of steps 1 to 2 are lost" in capsys.readouterr().err

    # Without a checkpoint it would have to train again, over its own records.
    shutil.rmtree(tmp_path / "checkpoints")
    content = (tmp_path / "records.jsonl").read_text()
    with pytest.raises(GrowthError, match="complete and has no checkpoint, so it cannot be exported in fp32"):
        run(tmp_path, export="export")
    assert (tmp_path / "records.jsonl").read_text() == content


def settings(tmp_path: Path, **more: Any) -> dict[str, Any]:
    """The identity that claims a run folder, as JSON data."""
    config = RunConfig(**SETTINGS | {"out": str(tmp_path / "run")} | more)
    keys = config.reproducibility_keys() | {CONTENTS: contents_of(config, FakeBlocks())}
    return json.loads(json.dumps(keys))


def trained(folder: Path, keys: dict[str, Any], **recorded: Any) -> None:
    """A run folder with a run record."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(keys))
    writer = RecordWriter(folder)
    writer.write("run", arm="scratch", seed=0, config=recorded)
    writer.close()


def test_an_edited_model_file_is_another_model(tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(TINY))
    first = settings(tmp_path, model=str(path))
    assert changed_keys(first, settings(tmp_path, model=TINY)) == {}  # inlined or in a file
    path.write_text(json.dumps(TINY | {"transformers_version": "5.0.0"}, indent=4))
    assert changed_keys(first, settings(tmp_path, model=str(path))) == {}
    path.write_text(json.dumps(TINY | {"rope_theta": 5e5, "layer_norm_eps": 1e-6}))
    assert changed_keys(first, settings(tmp_path, model=str(path))) == {
        "model.layer_norm_eps": (1e-5, 1e-6),
        "model.rope_theta": (10000.0, 500000.0),
    }
    trained(tmp_path / "run", first)
    with pytest.raises(GrowthError, match=r"model.rope_theta \(10000.0, now 500000.0\)"):
        claim(tmp_path / "run", settings(tmp_path, model=str(path)), resume=True)
    # Deleted, it is the one that the run holds.
    path.unlink()
    kept, missing = with_kept_inputs(RunConfig(model=str(path)), tmp_path / "run")
    assert (kept.model, missing) == (TINY, {})


@pytest.mark.parametrize("name", ["init", "teacher", "init_optimizer"])
def test_every_folder_that_a_run_names_is_held_by_content(tmp_path, name):
    folder = start(tmp_path / "g1")
    if name == "init_optimizer":
        folder = tmp_path / "state"
        folder.mkdir()
        (folder / "complete.json").write_text("one")
    more = {name: str(folder), "model": None, "init": str(tmp_path / "g1")}
    more |= {"teacher_steps": 2} if name == "teacher" else {}
    first = settings(tmp_path, **more)
    moved = folder.rename(tmp_path / "moved")
    assert changed_keys(first, settings(tmp_path, **more)) == {}  # missing
    assert changed_keys(first, settings(tmp_path, **more | {name: str(moved)})) == {}
    if name == "init_optimizer":
        (moved / "complete.json").write_text("two")
    else:
        start(moved, seed=1)
    changed = changed_keys(first, settings(tmp_path, **more | {name: str(moved)}))
    assert [*changed] == [f"content of {name}"]
    assert {len(value) for value in changed[f"content of {name}"]} == {12}


def test_other_held_out_blocks_are_another_evaluation(tmp_path):
    trained(tmp_path / "run", settings(tmp_path, eval_blocks=8))
    with pytest.raises(GrowthError, match=r"these keys differ: eval_blocks \(8, now 16\)"):
        claim(tmp_path / "run", settings(tmp_path, eval_blocks=16), resume=True)
    assert claim(tmp_path / "run", settings(tmp_path, eval_blocks=8), resume=True)


def test_runs_of_earlier_releases_go_on(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    now = settings(tmp_path, eval_blocks=8, init=str(start(tmp_path / "g1")), model=None)
    former = {key: value for key, value in now.items() if key not in (CONTENTS, "eval_blocks")}
    trained(tmp_path / "run", former | {"init": "./g1"}, eval_blocks=8)
    # What it evaluated on stands in its run record alone.
    with pytest.raises(GrowthError, match=r"eval_blocks \(8, now 9\)"):
        claim(tmp_path / "run", now | {"eval_blocks": 9}, resume=True)
    assert "note" not in capsys.readouterr().out
    assert claim(tmp_path / "run", now, resume=True)
    assert "kept no fingerprints of its inputs" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == now
    assert claim(tmp_path / "run", now, resume=True)
    assert "note" not in capsys.readouterr().out
    # Negative control: without fingerprints, the path counts.
    trained(tmp_path / "run", former | {"init": "g2"}, eval_blocks=8)
    with pytest.raises(GrowthError, match=r"init \('g2', now "):
        claim(tmp_path / "run", now, resume=True)


def test_a_branch_compares_the_contents_of_its_trunk(tmp_path):
    wsd = {"schedule": "wsd", "warmup": 1, "branch_from": str(tmp_path / "trunk")}
    config = RunConfig(**SETTINGS | wsd | {"decay": 2, "out": str(tmp_path / "run")})
    now = config.reproducibility_keys() | {CONTENTS: contents_of(config, FakeBlocks())}
    trained(tmp_path / "trunk", now | {"decay": 0, "steps": None})
    with pytest.raises(GrowthError, match="the trunk has no checkpoint of step 4"):  # all that is wrong with it
        branch(config, now, tmp_path / "branch")
    other = now | {CONTENTS: now[CONTENTS] | {"model": TINY | {"layer_norm_eps": 1e-6}}}
    with pytest.raises(GrowthError, match=r"model.layer_norm_eps \(1e-05, now 1e-06\)"):
        branch(config, other, tmp_path / "branch")


def test_the_kept_files_are_small(alone, tmp_path):
    start(tmp_path / "g1")
    run(tmp_path / "run", init=str(tmp_path / "g1"), model=None, steps=2, warmup=1)
    kept = sorted(
        path.relative_to(tmp_path / "run" / FOLDER).as_posix() for path in (tmp_path / "run" / FOLDER).rglob("*.*")
    )
    assert kept == ["init/config.json", "init/generation_config.json"]


def test_a_branch_that_lost_its_records_takes_none_of_the_trunk_past_their_parting(alone, tmp_path, capsys):
    wsd = {"schedule": "wsd", "warmup": 1, "save_every": 1, "eval_every": 1, "trunk": "t"}
    run(tmp_path / "trunk", **wsd, decay=0, steps=6)
    branch = {"decay": 3, "steps": 5, "branch_from": str(tmp_path / "trunk")}
    run(tmp_path / "branch", **wsd, **branch)
    whole, trunk = losses(tmp_path / "branch"), losses(tmp_path / "trunk")
    held, other = losses(tmp_path / "branch", "eval"), losses(tmp_path / "trunk", "eval")
    assert (whole[:3], held[:3]) == (trunk[:3], other[:3])
    assert held[4] != other[4]  # the rate has begun to fall

    shutil.rmtree(tmp_path / "branch" / "checkpoints" / "step-5")
    (tmp_path / "branch" / "records.jsonl").unlink()
    run(tmp_path / "branch", **wsd, **branch)
    found = {record["step"]: record["loss"] for record in records(tmp_path / "branch", "step")}
    assert found == {1: whole[0], 2: whole[1], 5: whole[4]}  # steps 3 and 4 are lost, and the trunk's are not theirs
    assert losses(tmp_path / "branch", "eval") == [*held[:3], held[5]]
    assert "the records of steps 3 to 4 are lost" in capsys.readouterr().err
    assert [record["step"] for record in records(tmp_path / "branch", "resume")] == [4]


def test_text_of_the_same_size_is_another_text(alone, tmp_path):
    text = tmp_path / "books.txt"
    text.write_text("of making many books there is no end " * 100)
    train_tokenizer(["of making many books there is no end " * 9], 260).save_pretrained(tmp_path / "tokenizer")
    stream = {"ref": str(text), "tokenizer": str(tmp_path / "tokenizer"), "heldout": 0, "shuffle": 4}
    model = TINY | {"vocab_size": 512, "max_position_embeddings": 64}
    more = {"stream": stream, "seq_len": 16, "model": model, "eval_every": 0, "batch": 2}

    def read(out: str) -> Any:
        config = RunConfig(
            **SETTINGS | {"out": str(tmp_path / out), "zero": 1, "steps": 4, "save_every": 2, "keep": 0} | more
        )
        return train(config)

    assert read("one").finished
    (first,) = records(tmp_path / "one", "run")
    text.write_text("of taking many looks there is no end " * 100)
    cut(tmp_path / "one")
    with pytest.raises(GrowthError, match=r"these keys differ: content of data \('\w{12}', now '\w{12}'\)"):
        read("one")
    assert read("two").finished
    (second,) = records(tmp_path / "two", "run")
    assert first["data_fingerprint"] == second["data_fingerprint"]
    assert first["content_fingerprint"] != second["content_fingerprint"]


@pytest.mark.parametrize("zero", [0, 3])
def test_a_run_at_another_stage_needs_no_start_either(alone, tmp_path, zero):
    given = {"model": None, "zero": zero, "init": str(start(tmp_path / "g1"))}
    run(tmp_path / "run", **given)
    whole = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "g1")
    cut(tmp_path / "run")
    run(tmp_path / "run", **given)
    assert losses(tmp_path / "run") == whole
    cut(tmp_path / "run")
    run(tmp_path / "run", **given | {"zero": 1, "universal": True})
    assert losses(tmp_path / "run") == pytest.approx(whole, rel=1e-5)


def test_a_teacher_is_needed_as_long_as_it_teaches(alone, tmp_path):
    start(tmp_path / "small")
    given = {"teacher": str(tmp_path / "small"), "teacher_steps": 2, "export": "export"}
    run(tmp_path / "run", **given)
    whole, cost = losses(tmp_path / "run"), (tmp_path / "run" / "export" / "training.json").read_text()
    shutil.copytree(tmp_path / "run", tmp_path / "early")
    (tmp_path / "small").rename(tmp_path / "moved")
    cut(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "export")
    run(tmp_path / "run", **given)
    assert losses(tmp_path / "run") == whole
    again = json.loads((tmp_path / "run" / "export" / "training.json").read_text())
    assert {**again, "seconds": 0} == {**json.loads(cost), "seconds": 0}
    # Negative control: it still has to teach.
    for step in (2, 4):
        shutil.rmtree(tmp_path / "early" / "checkpoints" / f"step-{step}")
    with pytest.raises(
        GrowthError, match="the teacher does not exist any more, and the run learns from it until step 2"
    ):
        run(tmp_path / "early", **given)


def test_a_run_continues_without_its_grown_optimizer(alone, tmp_path):
    source = run(tmp_path / "source", export="export", export_dtype="fp32").export
    wide = TINY | {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 96}
    grown = phigrow.expand(source, wide, tmp_path / "grown", method="tile", dtype="float32")
    state = phigrow.grow_optimizer(tmp_path / "source", grown, tmp_path / "state")
    given = {"model": None, "init": str(grown), "init_optimizer": str(state)}
    run(tmp_path / "run", **given)
    whole = losses(tmp_path / "run")
    for folder in (grown, state):
        shutil.rmtree(folder)
    cut(tmp_path / "run")
    run(tmp_path / "run", **given)
    assert losses(tmp_path / "run") == whole
    # Grown again from the same checkpoint, both are the same content. From another, they are not.
    phigrow.expand(source, wide, grown, method="tile", dtype="float32")
    phigrow.grow_optimizer(tmp_path / "source", grown, state)
    cut(tmp_path / "run")
    run(tmp_path / "run", **given)
    assert losses(tmp_path / "run") == whole
    shutil.rmtree(state)
    phigrow.grow_optimizer(tmp_path / "source", grown, state, state="copy")
    cut(tmp_path / "run")
    with pytest.raises(GrowthError, match=r"these keys differ: content of init_optimizer \('\w{12}', now '\w{12}'\)"):
        run(tmp_path / "run", **given)


@pytest.mark.parametrize("mixed", [False, True])
def test_packed_blocks_that_were_damaged_are_not_trained_on(alone, tmp_path, mixed):
    (tmp_path / "books.txt").write_text("of making many books there is no end " * 300)
    prepare(tmp_path / "books.txt", tmp_path / "data", seq_len=16, vocab_size=270, heldout=0, progress=False)
    data = {str(tmp_path / "data"): 1.0} if mixed else str(tmp_path / "data")
    more = {"data": data, "model": TINY | {"vocab_size": 512}, "steps": 4, "batch": 2, "eval_every": 0, "save_every": 2}

    def read(out: str) -> Any:
        return train(RunConfig(**SETTINGS | {"out": str(tmp_path / out), "zero": 1, "keep": 0} | more))

    assert read("run").finished
    cut(tmp_path / "run")
    (file,) = (tmp_path / "data" / "train").glob("*.arrow")
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    file.write_bytes(content)
    for out in ("run", "new"):
        with pytest.raises(GrowthError, match="the packed blocks have changed since they were packed"):
            read(out)
    # Packed by an earlier release, it is the run that knows.
    path = tmp_path / "data" / "data.json"
    former = json.loads(path.read_text())
    del former["content_fingerprint"]
    path.write_text(json.dumps(former))
    with pytest.raises(GrowthError, match=r"these keys differ: content of data \('\w{12}', now '\w{12}'\)"):
        read("run")
    assert read("new").finished
