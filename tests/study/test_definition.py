"""A study file says what it means, or is refused by key."""

from __future__ import annotations

from pathlib import Path

import pytest
from studies import RECIPES, content, loaded, written

from phigrow.cli import app
from phigrow.errors import GrowthError
from phigrow.study import jobs_of, load_study

ARM_NAMES = {
    "scratch", "continued", "wr", "tile", "tile-center", "tile-preserve", "tile-preserve-noise", "tile-rms", "lossless",
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_load_and_name_their_command(path):
    study = load_study(path)
    assert f"phigrow compare {path.stem} --dry-run" in path.read_text()
    if "miniature" in study.name:
        assert {arm.name for arm in study.arms} >= ARM_NAMES
        assert (len(study.seeds), len(study.budgets)) == (3, 5)
        source, dst = study.sources[0].config, study.dst
        heads = [config["hidden_size"] // config["num_attention_heads"] for config in (source, dst)]
        rotary = [
            int(head * config["partial_rotary_factor"]) for head, config in zip(heads, (source, dst), strict=True)
        ]
        ratio = dst["num_hidden_layers"] / source["num_hidden_layers"], dst["hidden_size"] / source["hidden_size"]
        assert rotary == [16, 16]
        assert ratio == ((6 / 5, 2) if "phi-1-small" in study.name else (4 / 3, 1.25))


def test_values_are_read_with_their_defaults(tmp_path):
    study = loaded(tmp_path, budgets={"tokens": ["2e4", 50_000]}, sweep=None)
    assert study.budgets == (20, 49)  # 1,024 tokens a step, rounded up
    assert study.decay_steps(49) == 10
    assert study.train["lr"] == 5e-3
    assert study.train["eval_at"] == [1, 10, 100]
    assert (study.baseline, study.seeds, study.ranks) == ("scratch", (0,), None)
    tile = content()["arms"] | {"noisy": {"method": "tile", "noise": 0.1, "train": {"warmup": 2}}}
    noisy = loaded(tmp_path, arms=tile).arms[-1]
    assert (noisy.method, noisy.growth, noisy.train) == ("tile", {"noise": 0.1}, {"warmup": 2})


def test_an_arm_may_have_one_method_an_axis(tmp_path):
    mixed = {"method": "lossless,mlp=tile", "scale": "rms"}
    arm = loaded(tmp_path, **arms(mixed=mixed)).arms[-1]
    assert (arm.method, arm.growth, arm.grows) == ("lossless,mlp=tile", {"scale": "rms"}, True)
    with pytest.raises(GrowthError, match=r"method 'tiel' is unknown\n  where: arm mixed in .*study.yaml"):
        loaded(tmp_path, **arms(mixed={"method": "lossless,mlp=tiel"}))


def arms(**more):
    return {"arms": {"scratch": None, **more}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgest": [3]}, r"no key 'budgest'\n  where: .*study.yaml\n  what to do: did you mean budgets"),
        ({"dst": None}, r"the study has no 'dst'"),
        ({"budgets": []}, r"budgets is \[\]"),
        ({"budgets": [20, 20]}, r"budgets has a value twice"),
        ({"budgets": [1.5]}, r"budgets is \[1.5\]\n.*\n  what to do: give whole numbers, 2 or more"),
        ({"budgets": {"steps": [3]}}, r"no key 'steps'\n  where: budgets in"),
        ({"budgets": [4]}, r"warmup 4 and decay 2 do not fit into 4 steps\n  where: scratch/seed0/4 in .*: warmup"),
        ({"seeds": [-1]}, r"seeds is \[-1\]"),
        ({"decay": 1}, r"decay is 1\n.*\n  what to do: give a fraction of each budget"),
        ({"decay": "much"}, r"decay is 'much'"),
        ({"baseline": "scrach"}, r"no arm 'scrach'\n.*\n  what to do: did you mean scratch"),
        ({"data": {"ref": "embedded", "seqlen": 5}}, r"no key 'seqlen'\n  where: data in .*\n.*did you mean seq_len"),
        ({"data": "nowhere"}, r"the folder of packed blocks does not exist"),
        ({"source": {"model": "phi-1"}}, r"the source has no 'steps'"),
        ({"train": {"batch": 16, "lr": 1e-3, "steps": 5}}, r"steps cannot be set here\n  where: train in"),
        ({"train": {"batch": 16, "lrr": 1e-3}}, r"no key 'lrr'\n  where: train in .*\n  what to do: did you mean lr"),
        ({"train": {"batch": "many"}}, r"batch is 'many'\n  where: batch in train in"),
        ({"sweep": {"lr": [1e-3], "steps": 9}}, r"lr and sweep are both set"),
        ({"sweep": {"lr": [1e-3]}}, r"the sweep has no 'steps'"),
        (arms(tilee={}), r"no method 'tilee'\n  where: arm tilee in .*\n  what to do: did you mean tile"),
        (arms(tile={"scal": "rms"}), r"no key 'scal'\n  where: arm tile in .*\n  what to do: did you mean scale"),
        (arms(tile={"scale": "half"}), r"scale 'half' is not allowed\n  where: arm tile in"),
        (arms(tile={"train": {"lr": 1}}), r"lr cannot be set here\n.*\n  why: it is the same for every arm"),
        (arms(tile={"state": "half"}), r"state 'half' is unknown\n  where: arm tile in"),
        (
            arms(isometric={"state": "copy"}),
            r"state copy does not work with a plan that mixes coordinates[\s\S]*arm isometric in",
        ),
        (arms(ligo={"state": "scale"}), r"moments cannot be grown by a learned plan \(ligo\)[\s\S]*arm ligo in"),
        (arms(ligo={"maps": "m", "steps": 3}), r"maps and steps are both set\n  where: arm ligo in"),
        (arms(ligo={"maps": "nowhere"}), r"there are no learned maps in 'nowhere'\n  where: arm ligo in"),
        (arms(ligo={"steps": 0}), r"steps is \[?0"),
        (arms(tile={"maps": "m"}), r"no key 'maps'\n  where: arm tile in"),
        ({"arms": {"scratch": {"state": "scale"}}}, r"no key 'state'\n  where: arm scratch"),
        ({"train": {"init_optimizer": "x"}}, r"init_optimizer cannot be set here"),
        ({"arms": {"scratch": {"noise": 1}}}, r"no key 'noise'\n  where: arm scratch"),
        ({"arms": {"../tile": {"method": "tile"}}}, r"'../tile' is not a valid name\n  where: ../tile in"),
        ({"arms": ["tile"]}, r"\['tile'\] is not a mapping\n  where: arms in"),
    ],
)
def test_what_is_wrong_is_said_by_key(tmp_path, changes, message):
    with pytest.raises(GrowthError, match=message):
        load_study(written(tmp_path, **changes) if "dst" not in changes else written(tmp_path, dst=None))


def test_an_arm_that_cannot_be_grown_is_refused_before_anything_runs(tmp_path):
    smaller = content()["dst"] | {"hidden_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    with pytest.raises(GrowthError, match=r"the destination is smaller: hidden 32 -> 16\n  where: arm tile in"):
        load_study(written(tmp_path, dst=smaller))
    with pytest.raises(GrowthError, match="there is no such study"):
        load_study(tmp_path / "none.yaml")


def test_the_dry_run_lists_arms_and_writes_nothing(tmp_path):
    from typer.testing import CliRunner

    path = written(tmp_path, flops_per_second="1e9")
    done = CliRunner().invoke(
        app, ["compare", str(path), "--dry-run", "--only", "tile", "--out", str(tmp_path / "out")]
    )
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert lines[0].split() == ["jobs", "done", "tokens", "FLOPs", "time"]
    assert [line.split()[0] for line in lines[1:-3]] == ["data", "source", "tile"]
    jobs = [job for job in jobs_of(load_study(path)) if job.arm is None or job.arm.name == "tile"]
    total, own = sum(job.flops for job in jobs), sum(job.flops for job in jobs if job.arm is not None)
    assert lines[3].split()[1:5] == ["4", "0", "0.0451M", f"{own:.2e}"]
    assert lines[-3].startswith(f"6 jobs, 0.086M tokens, {total:.2e} FLOPs in all")
    assert "1.00e+09 FLOPs per second" in lines[-1]
    assert max(map(len, lines)) <= 80
    assert [path.name for path in Path(tmp_path).iterdir()] == ["study.yaml"]
    unknown = CliRunner().invoke(app, ["compare", str(path), "--dry-run", "--only", "tle"])
    assert str(unknown.exception) == (
        "there is no arm 'tle'\n  where: study study\n  what to do: choose one of scratch, tile, lossless"
    )


def test_a_learned_arm_says_how_it_is_learned(tmp_path):
    keys, starts = {}, {}
    for steps in (5, 6):
        study = load_study(written(tmp_path, **arms(ligo={"steps": steps, "map_lr": 0.01, "start": "tile"})))
        arm = next(arm for arm in study.arms if arm.name == "ligo")
        keys[steps], expected = arm.learn, {"steps": steps, "lr": 0.01}
        assert arm.learn == expected
        assert arm.growth == {"start": "tile"}
        (start,) = (job for job in jobs_of(study) if job.kind == "expand" and job.arm.name == "ligo")
        starts[steps] = start.key
        assert start.needs == ("data", "source")  # text, which other growths do not need
    assert starts[5] != starts[6]


def test_a_method_spelled_with_options_is_learned_too(tmp_path):
    for name, expected in (("ligo:start=tile", {"steps": 7}), ("tile:scale=preserve", None)):
        learn = {"steps": 7} if expected else {}
        study = load_study(written(tmp_path, **arms(spelled={"method": name} | learn)))
        assert next(arm for arm in study.arms if arm.name == "spelled").learn == expected


def test_yaml_that_older_readers_misunderstand(tmp_path):
    """Arms called `1.0`, `1.00` and `no`, rates that were pasted, and one number where a list of seeds belongs."""
    path = written(tmp_path)
    text = path.read_text().replace("lossless:", "1.0: {method: lossless}\n  1.00: {method: tile}\n  no:")
    assert "  no:" in text
    path.write_text(text.replace("no: {", "no: {method: lossless, ").replace("no: null", "no: {method: lossless}"))
    assert [arm.name for arm in load_study(path).arms] == ["scratch", "tile", "1.0", "1.00", "no"]
    path.write_text(text + "\nseeds: [1]\n")
    with pytest.raises(GrowthError, match="the key 'seeds' stands twice"):
        load_study(path)
    with pytest.raises(GrowthError, match=r"(?s)seeds is 3.*give a list: \[3\] or \[0, 1, 2\]"):
        loaded(tmp_path, seeds=3)
