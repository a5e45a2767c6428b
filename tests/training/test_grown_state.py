"""Optimizer state grown with the model: from a checkpoint to the engine of the destination, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import losses, records, run_scenarios
from safetensors.torch import load_file
from scenarios import SETTINGS, TINY, FakeBlocks, captured_state

import phigrow
from phigrow.checkpoints import universal
from phigrow.checkpoints.integrity import read_marker
from phigrow.checkpoints.run_checkpoints import UNIVERSAL, marked_checkpoints
from phigrow.errors import GrowthError
from phigrow.expansion import grow_optimizer as growing
from phigrow.growth.lift import InMemory, lift
from phigrow.growth.moments import POWER, STATES, moment_recipe, moment_source
from phigrow.inspection.plan_file import read_plan_file
from phigrow.training import RunConfig, train

# What torch's own modules say when DeepSpeed imports them in this process.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

LARGER = TINY | {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 100}
LARGER |= {"num_hidden_layers": 3}
FIRST = {"save_every": 3, "keep": 0, "export": "export", "export_dtype": "fp32", "eval_every": 0, "log_every": 1}


def run(out: Path, **settings: Any) -> Path:
    train(RunConfig(**SETTINGS | {"out": str(out), "zero": 1} | settings), FakeBlocks())
    return out


@pytest.fixture(scope="module")
def source(alone, tmp_path_factory) -> Path:
    """Six steps of a schedule of twelve, with checkpoints of steps 3 and 6, the latter converted as well."""
    folder = run(tmp_path_factory.mktemp("source") / "source", **FIRST, schedule_steps=12, zero=2)
    newest = marked_checkpoints(folder)[0][-1]
    universal.convert(newest.folder, folder / UNIVERSAL / newest.folder.name, newest.marker)
    return folder


@pytest.fixture(scope="module")
def grown(source) -> Path:
    return phigrow.expand(source / "export", LARGER, source.parent / "grown", method="tile", scale="rms", noise=0.1)


@pytest.fixture(scope="module")
def optimizer(source, grown) -> Path:
    return phigrow.grow_optimizer(source, grown, source.parent / "state")


def test_a_conversion_maps_the_files_of_ranks_instead_of_holding_them(source, tmp_path, monkeypatch):
    from torch.utils.serialization import config

    load, mapped = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *a, **k: (mapped.append(config.load.mmap), load(*a, **k))[1])
    newest = marked_checkpoints(source)[0][-1]
    universal.convert(newest.folder, tmp_path / "converted", newest.marker)
    assert mapped.count(True) == len(mapped) > 0
    assert not config.load.mmap  # as before
    for name in universal.parameters(tmp_path / "converted"):
        former = source / UNIVERSAL / newest.folder.name
        for kind in ("fp32", "exp_avg", "exp_avg_sq"):
            assert torch.equal(
                universal.stored(tmp_path / "converted", name, kind), universal.stored(former, name, kind)
            )


def expected(folder: Path, grown: Path, state: str) -> dict[str, dict[str, torch.Tensor]]:
    """Masters and moments of the destination, from a universal folder of the source, tensor by tensor."""
    plan, found = read_plan_file(grown).plan, {}
    shapes = plan.table.state_shapes(plan.src_config)

    def read(name: str, kind: str) -> InMemory:
        return InMemory(universal.stored(folder, name, kind).reshape(shapes[name]))

    for recipe in plan.recipes():
        masters = {name: read(name, "fp32") for name in recipe.sources}
        found[recipe.name] = {"fp32": lift(recipe, masters, torch.float32)}
        for moment in POWER:
            dual = moment_recipe(recipe, plan, moment, state)
            found[recipe.name][moment] = torch.zeros(recipe.shape)
            if dual:
                values = {recipe.source: moment_source(recipe, moment, read)}
                found[recipe.name][moment] = lift(dual, values, torch.float32)
        if recipe.is_dense:
            first, second = (found[recipe.name][moment] for moment in POWER)
            found[recipe.name]["exp_avg_sq"] = torch.maximum(second, first.square())
    return found


def same(values: dict[str, Any], wanted: dict[str, Any]) -> bool:
    assert values.keys() == wanted.keys()
    return all(
        torch.equal(values[name][key].reshape(value.shape), value)
        for name, kinds in wanted.items()
        for key, value in kinds.items()
    )


def held(folder: Path) -> dict[str, Any]:
    """All that a universal folder holds."""
    keys = ("fp32", *POWER)
    return {name: {key: universal.stored(folder, name, key) for key in keys} for name in universal.parameters(folder)}


@pytest.mark.parametrize("state", STATES)
def test_a_checkpoint_of_deepspeed_is_grown_value_by_value(source, grown, tmp_path, state):
    out = phigrow.grow_optimizer(source, grown, tmp_path / "out", state=state)
    assert same(held(out), expected(source / UNIVERSAL / "step-6", grown, state))
    weights = load_file(grown / "model.safetensors")
    assert all(torch.equal(value["fp32"], weights[name]) for name, value in held(out).items())  # of an fp32 export
    content = json.loads((out / "state.json").read_text())
    assert content["adam_step"] == (0 if state == "reset" else 6)
    assert content["grown"] == {"plan": read_plan_file(grown).plan.hash, "method": "tile", "state": state, "step": 6}
    assert (content["data"]["blocks"], content["data"]["data_fingerprint"]) == (48, "fake")
    assert read_marker(out)["files"].keys() == {
        path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file() and path.name != "complete.json"
    }
    assert torch.load(out / "zero" / "lm_head.weight" / "step.pt", weights_only=True) == content["adam_step"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # nothing is left beside it
    # Negative control: the other states hold other values.
    others = [other for other in STATES if other != state]
    assert not any(same(held(out), expected(source / UNIVERSAL / "step-6", grown, other)) for other in others)


@pytest.mark.parametrize("stage", [*(pytest.param(k, marks=pytest.mark.slow) for k in (0, 1, 2)), 3])
def test_every_stage_starts_with_the_grown_state(grown, optimizer, alone, tmp_path, stage):
    (tmp_path / "run").mkdir()
    more = {"init": str(grown), "model": None, "init_optimizer": str(optimizer), "zero": stage, "steps": 1, "warmup": 0}
    if stage == 0:  # DeepSpeed's accessors know no stage 0: its losses say the same
        run(tmp_path / "run", **more | {"steps": 3}, log_every=1)
        run(tmp_path / "other", **more | {"steps": 3, "zero": 2}, log_every=1)
        np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "other"), rtol=1e-6)
        run(tmp_path / "fresh", **more | {"steps": 3, "init_optimizer": None, "data_start": 48}, log_every=1)
        assert abs(losses(tmp_path / "fresh")[2] / losses(tmp_path / "run")[2] - 1) > 1e-4
        return
    with captured_state(tmp_path / "run"):
        run(tmp_path / "run", **more)
    found = torch.load(tmp_path / "run" / "captured.pt", weights_only=True)
    assert found["steps"] == [6.0]
    assert same(found["values"], held(optimizer))
    found["values"]["lm_head.bias"]["exp_avg_sq"][3] += 1e-12
    assert not same(found["values"], held(optimizer))  # negative control


def test_a_run_grown_into_itself_goes_on_to_the_bit(source, alone, tmp_path):
    """Same size, same state, same data, same schedule: the steps of a run that was never stopped."""
    whole = run(tmp_path / "whole", **FIRST | {"save_every": 0, "export": None}, steps=12, zero=2)
    start = phigrow.expand(source / "export", TINY, tmp_path / "start", method="tile")
    later = {"init": str(start), "model": None, "steps": 6, "schedule_start": 6, "eval_every": 0, "log_every": 1}
    ends = {}
    for state, more in {"scale": {}, "reset": {}, "copy": {"data_start": 0}}.items():
        optimizer = phigrow.grow_optimizer(source, start, tmp_path / state, state=state)
        run(tmp_path / f"run-{state}", **later | {"init_optimizer": str(optimizer), "zero": 2} | more)
        ends[state] = losses(tmp_path / f"run-{state}")
    assert losses(source) + ends["scale"] == losses(whole)
    rates = [record["lr"] for name in (source, tmp_path / "run-scale") for record in records(name, "step")]
    assert rates == [record["lr"] for record in records(whole, "step")]
    # Negative controls: without the moments, and with the text from the beginning.
    assert ends["reset"][0] == ends["scale"][0]
    assert ends["reset"][1] != ends["scale"][1]
    assert ends["copy"][0] != ends["scale"][0]
    (meta,) = records(tmp_path / "run-scale", "run")
    assert meta["growth"]["state"] == "scale"
    assert meta["expand_seconds"] >= json.loads((tmp_path / "scale" / "state.json").read_text())["seconds"]
    # What it saves says how far into the data it is, so that it can be grown again.
    run(tmp_path / "saved", **later | {"init_optimizer": str(tmp_path / "scale"), "zero": 2, "save_every": 4})
    assert [found.progress.blocks for found in marked_checkpoints(tmp_path / "saved")[0]] == [80, 96]


def test_the_rate_rises_again_where_it_is_asked_to(source):
    from phigrow.training.schedule import learning_rate_schedule

    def rates(**keys: Any) -> list[float]:
        config = RunConfig(**SETTINGS | keys)
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
        schedule, found = learning_rate_schedule(optimizer, config), []
        for _ in range(config.steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    whole = rates(steps=12)
    later = rates(steps=6, schedule_start=6)
    assert later == whole[6:]
    assert rates(steps=5, schedule_start=3, schedule_steps=12) == whole[3:8]
    risen = rates(steps=6, schedule_start=6, rewarm=3)
    np.testing.assert_allclose(risen, np.array(later) * [0, 1 / 3, 2 / 3, 1, 1, 1], rtol=1e-12)
    wsd = rates(steps=10, schedule="wsd", schedule_start=10, decay=5)
    assert wsd[:6] == [0.01] * 6
    assert wsd[-1] < wsd[-2] < 0.01


def test_what_does_not_belong_together_is_refused(source, grown, optimizer, alone, tmp_path):
    other = phigrow.expand(source / "export", LARGER, tmp_path / "other", method="wr")
    base = {"init": str(grown), "model": None, "init_optimizer": str(optimizer)}
    for changes, message in (
        ({"init": str(other)}, "by another plan than the weights"),
        ({"init": str(source / "export")}, "the weights have no phigrow.json"),
        ({"init_optimizer": str(tmp_path)}, "the folder holds no optimizer state"),
        ({"seed": 5}, r"not known[\s\S]*another order: seed \(0, now 5\)[\s\S]*data_start"),
        ({"batch": 5}, "starts after 48 blocks of its data, which is not a multiple of its batch size 5"),
    ):
        with pytest.raises(GrowthError, match=message):
            run(tmp_path / "run", **base | changes)
    assert not (tmp_path / "run" / "records.jsonl").exists()
    with pytest.raises(GrowthError, match="init_optimizer is set, but the run starts from scratch"):
        RunConfig(init_optimizer=str(optimizer))
    with pytest.raises(GrowthError, match="steps 7 to 16 do not fit into a schedule of 12 steps"):
        RunConfig(schedule_start=6, steps=10, schedule_steps=12)
    damaged = shutil.copytree(optimizer, tmp_path / "damaged")
    path = damaged / "zero" / "lm_head.bias" / "exp_avg.pt"
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.write_bytes(content)
    with pytest.raises(GrowthError, match=r"damaged[\s\S]*lm_head.bias/exp_avg.pt was changed after it was written"):
        run(tmp_path / "run", **base | {"init_optimizer": str(damaged)})


def test_a_checkpoint_that_does_not_fit_is_refused(source, grown, tmp_path):
    def refused(checkpoint: Path, folder: Path = grown, **more: Any) -> str:
        with pytest.raises(GrowthError) as error:
            phigrow.grow_optimizer(checkpoint, folder, tmp_path / "out", **more)
        assert not [path for path in tmp_path.iterdir() if "out" in path.name]  # nothing half-written
        return str(error.value)

    earlier = source / "checkpoints" / "step-3"
    assert "the checkpoint is of step 3, but the weights were grown from step 6" in refused(earlier)
    silent = tmp_path / "silent"
    shutil.copytree(grown, silent)
    record = json.loads((silent / "phigrow.json").read_text())
    del record["source"]["training"]
    (silent / "phigrow.json").write_text(json.dumps(record))
    assert "the grown weights do not come from this checkpoint" in refused(earlier, silent)
    assert "no checkpoint with an optimizer's state" in refused(source / "export")
    assert "there is no such folder" in refused(tmp_path / "nowhere")
    assert "state 'half' is unknown" in refused(source, state="half")
    wider = tmp_path / "wider"
    shutil.copytree(source, wider)
    file = next((wider / "checkpoints" / "step-6").glob("*optim_states.pt"))
    file.write_bytes(file.read_bytes()[:-1])
    assert "the checkpoint is damaged" in refused(wider)
    foreign = phigrow.expand(
        phigrow.expand(source / "export", LARGER, tmp_path / "once"), LARGER, tmp_path / "twice", method="tile"
    )
    assert "the checkpoint is not of the model that was grown" in refused(source, foreign)


def without_marker(checkpoint: Path, folder: Path) -> Path:
    """A checkpoint as DeepSpeed alone would have left it."""
    shutil.copytree(checkpoint, folder)
    (folder / "complete.json").unlink()
    return folder


@pytest.mark.parametrize("harm", ["junk", "cut", "empty", "no weights"])
def test_a_damaged_folder_of_deepspeed_is_refused_and_leaves_nothing(source, grown, tmp_path, harm):
    folder = without_marker(source / "checkpoints" / "step-6", tmp_path / "theirs")
    state = next(folder.glob("*optim_states.pt"))
    content = {"junk": b"junk" * 99, "cut": state.read_bytes()[:-1000], "empty": b""}
    if harm == "no weights":
        next(folder.glob("*model_states.pt")).unlink()
    else:
        state.write_bytes(content[harm])
    with pytest.raises(GrowthError, match=r"cannot be converted to DeepSpeed's universal format[\s\S]*theirs"):
        phigrow.grow_optimizer(folder, grown, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_full_disk_leaves_nothing(source, grown, tmp_path, monkeypatch):
    def full(value: torch.Tensor, path: Path) -> None:
        raise OSError(28, "No space left on device")

    folder = without_marker(source / "checkpoints" / "step-6", tmp_path / "theirs")
    monkeypatch.setattr(growing, "save_value", full)
    with pytest.raises(GrowthError, match=r"cannot be read or written[\s\S]*No space left"):
        phigrow.grow_optimizer(folder, grown, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_what_an_interrupted_growth_converted_is_not_taken_for_another_checkpoint(source, grown, tmp_path, monkeypatch):
    silent = shutil.copytree(grown, tmp_path / "silent")  # which does not say of what step it is
    record = json.loads((silent / "phigrow.json").read_text())
    del record["source"]["training"]
    (silent / "phigrow.json").write_text(json.dumps(record))
    folders = {k: without_marker(source / "checkpoints" / f"step-{k}", tmp_path / f"step-{k}") for k in (3, 6)}

    def interrupted(folder: Path) -> None:  # the conversion is made, and nothing is grown yet
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(growing, "StoredModel", interrupted)
        with pytest.raises(KeyboardInterrupt):
            phigrow.grow_optimizer(folders[3], silent, tmp_path / "out")
    assert (tmp_path / ".out.partial" / "source").is_dir()
    out = phigrow.grow_optimizer(folders[6], silent, tmp_path / "out")
    assert same(held(out), expected(source / UNIVERSAL / "step-6", grown, "scale"))
    assert not (tmp_path / ".out.partial").exists()


def test_a_grown_folder_may_be_the_current_one(source, grown, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(grown, tmp_path / "here"))
    assert phigrow.grow_optimizer(source, ".") == (tmp_path / "here-optimizer").resolve()


@pytest.mark.slow
def test_a_killed_growth_goes_on_and_ends_in_the_same_files(source, grown, tmp_path, monkeypatch):
    whole = phigrow.grow_optimizer(source, grown, tmp_path / "whole")
    source = shutil.copytree(source / "checkpoints" / "step-6", tmp_path / "moved")  # to be converted on the way
    real, made = growing.save_value, []

    def interrupted(value: torch.Tensor, path: Path) -> None:
        if len(made) == 20:
            raise KeyboardInterrupt
        made.append(path)
        real(value, path)

    monkeypatch.setattr(growing, "save_value", interrupted)
    with pytest.raises(KeyboardInterrupt):
        phigrow.grow_optimizer(source, grown, tmp_path / "cut")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cut.partial", "moved", "whole"]
    made[0].write_bytes(b"damaged since")
    again: list[str] = []
    monkeypatch.setattr(growing, "save_value", lambda value, path: (again.append(path.name), real(value, path)))
    cut = phigrow.grow_optimizer(source, grown, tmp_path / "cut")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "moved", "whole"]
    files = [read_marker(folder)["files"] for folder in (whole, cut)]
    for found in files:
        del found["state.json"]  # it says how long it took
    assert files[0] == files[1]
    assert len(again) == len(files[0]) - 19  # of 20 that were there, one was damaged
    with pytest.raises(GrowthError, match="the output folder exists"):
        phigrow.grow_optimizer(source, grown, cut)


@pytest.mark.slow
def test_a_folder_that_deepspeed_wrote_without_phigrow_is_grown_too(source, grown, tmp_path):
    from phigrow.training.initial_state import initial_state_of

    theirs = tmp_path / "theirs"
    shutil.copytree(source / "checkpoints" / "step-6", theirs / "global_step6")
    (theirs / "global_step6" / "complete.json").unlink()
    (theirs / "latest").write_text("global_step6")
    out = phigrow.grow_optimizer(theirs, grown, tmp_path / "out")
    assert same(held(out), expected(source / UNIVERSAL / "step-6", grown, "scale"))
    # It does not say what was read; a run asks, and takes an answer.
    keys = {"init": str(grown), "init_optimizer": str(out), "batch": 8}
    with pytest.raises(GrowthError, match="position in the data is not known"):
        initial_state_of(RunConfig(**keys), FakeBlocks())
    assert initial_state_of(RunConfig(**keys, data_start=16), FakeBlocks()).first == 2


def test_the_command_says_how_to_go_on(source, grown, tmp_path):
    from typer.testing import CliRunner

    from phigrow.cli import app

    words = ["grow-optimizer", "--checkpoint", source, "--grown", grown, "--out", tmp_path / "out", "--state", "copy"]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    assert f"wrote {tmp_path / 'out'}" in done.output
    assert f"--init {grown} --init-optimizer {tmp_path / 'out'}" in done.output
    assert json.loads((tmp_path / "out" / "state.json").read_text())["grown"]["state"] == "copy"
    done = CliRunner().invoke(app, list(map(str, words)))
    assert "the output folder exists" in str(done.exception)


def test_the_moments_of_a_turned_stream(source, alone, tmp_path):
    turned = phigrow.expand(source / "export", LARGER, tmp_path / "turned", method="isometric")
    with pytest.raises(
        GrowthError,
        match=r"state copy does not work with a plan that mixes[\s\S]*axis hidden[\s\S]*state scale, or reset",
    ):
        phigrow.grow_optimizer(source, turned, state="copy")
    out = phigrow.grow_optimizer(source, turned)
    reset = phigrow.grow_optimizer(source, turned, tmp_path / "r", state="reset")
    assert out == tmp_path / "turned-optimizer"
    assert same(held(out), expected(source / UNIVERSAL / "step-6", turned, "scale"))
    assert same(held(reset), expected(source / UNIVERSAL / "step-6", turned, "reset"))
    weights = load_file(turned / "model.safetensors")
    assert all(torch.equal(value["fp32"], weights[name]) for name, value in held(out).items())
    squares = held(out)["model.layers.0.mlp.fc1.weight"]["exp_avg_sq"]
    assert squares[: TINY["intermediate_size"]].min() > 0  # every column of an old row is a mixture of old columns
    start = {"init": str(turned), "model": None, "steps": 3, "warmup": 0, "log_every": 1}
    for name, folder in (("scale", out), ("reset", reset)):
        run(tmp_path / name, **start, init_optimizer=str(folder))
    one, other = losses(tmp_path / "scale"), losses(tmp_path / "reset")
    assert one[0] == other[0]
    assert abs(one[2] / other[2] - 1) > 1e-4


@pytest.mark.slow
def test_two_ranks_at_zero_2_grow_into_any_ranks_and_stage(tmp_path):
    """The whole way under DeepSpeed's launcher, with moments compared in the engines that are filled."""
    run_scenarios(2, tmp_path, [{**FIRST, "out": "source", "zero": 2}, {**FIRST, "out": "source-3", "zero": 3}])
    grown = phigrow.expand(tmp_path / "source" / "export", LARGER, tmp_path / "grown", method="lossless")
    optimizer = phigrow.grow_optimizer(tmp_path / "source", grown, tmp_path / "state")
    newest = marked_checkpoints(tmp_path / "source")[0][-1]
    universal.convert(newest.folder, tmp_path / "universal", newest.marker)
    wanted = expected(tmp_path / "universal", grown, "scale")
    start = {"init": str(grown), "model": None, "init_optimizer": str(optimizer), "captured": True, "log_every": 1}
    cases = {(1, 3): "fp32", (2, 3): "fp32", (2, 1): "bf16", (1, 2): "bf16"}
    for ranks in (1, 2):
        run_scenarios(
            ranks,
            tmp_path,
            [
                {**start, "out": f"r{ranks}-z{stage}", "zero": stage, "dtype": dtype}
                for (size, stage), dtype in cases.items()
                if size == ranks
            ],
        )
    for ranks, stage in cases:
        found = torch.load(tmp_path / f"r{ranks}-z{stage}" / "captured.pt", weights_only=True)
        assert found["steps"] == [6.0]
        assert same(found["values"], wanted), (ranks, stage)
    np.testing.assert_allclose(losses(tmp_path / "r1-z3"), losses(tmp_path / "r2-z3"), rtol=1e-6)
    # From ZeRO 3 the same values but for rounding; and another plan is another state (negative control).
    of_three = phigrow.expand(tmp_path / "source-3" / "export", LARGER, tmp_path / "grown-3", method="lossless")
    other = held(phigrow.grow_optimizer(tmp_path / "source-3", of_three, tmp_path / "state-3"))
    for key in ("fp32", *POWER):
        one, two = (torch.cat([kinds[name][key].flatten() for name in wanted]) for kinds in (wanted, other))
        assert float((one - two).norm() / one.norm()) < 1e-4, key
    assert not same(found["values"], expected(tmp_path / "universal", grown, "copy"))
