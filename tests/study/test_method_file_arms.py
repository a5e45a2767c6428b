"""Arms and stages that are grown by a method file of the user's."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml
from studies import content, loaded

from phigrow.errors import GrowthError
from phigrow.study import jobs_of, load_stages
from phigrow.study.inputs import check_method_files

TEXT = (Path(__file__).parents[2] / "examples" / "my_method.py").read_text(encoding="utf-8")


@pytest.fixture
def study(tmp_path):
    """A function that writes the method file, and loads a study with an arm of it."""

    def load(text=TEXT, **arm):
        (tmp_path / "mine.py").write_text(text)
        return loaded(tmp_path, arms=content()["arms"] | {"mine": {"method": "mine.py", "order": "random", **arm}})

    return load


def keys(study):
    return {job.name: (job.key, job.folder.name) for job in jobs_of(study)}


def test_hashes_hold_the_content_of_the_file_and_those_of_other_arms_stay(study, tmp_path):
    first = study()
    (mine,) = [arm for arm in first.arms if arm.name == "mine"]
    assert mine.method_files == {"averaged-heads": hashlib.sha256(TEXT.encode()).hexdigest()}
    assert mine.growth == {"order": "random"}
    before, after = keys(first), keys(study(TEXT + "# changed\n"))
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if name.startswith("mine/")}
    assert before == keys(study())  # the same content, the same hashes
    plain = keys(loaded(tmp_path))
    assert plain == {name: key for name, key in before.items() if not name.startswith("mine/")}


@pytest.mark.parametrize(
    ("arm", "text", "message"),
    [
        ({"method": "gone.py"}, TEXT, r"there is no such method file\n  where: arm mine in .*study.yaml: .*gone.py"),
        (
            {"ordre": "random"},
            TEXT,
            r"there is no key 'ordre'\n  where: arm mine in .*\n  what to do: did you mean order",
        ),
        ({}, "def f(\n", r"the method file is not valid Python\n  where: arm mine in .*study.yaml: .*mine.py:1"),
        ({"method": "lossless,heads=gone.py"}, TEXT, r"no such method file\n  where: arm mine in"),
    ],
)
def test_a_wrong_file_is_an_error_of_its_arm(study, arm, text, message):
    with pytest.raises(GrowthError, match=message):
        study(text, **arm)


def test_a_file_that_changes_while_the_study_runs_is_refused(study, tmp_path):
    (mine,) = [arm for arm in study().arms if arm.name == "mine"]
    assert mine.spec(seed=1).method.name == "averaged-heads"
    (tmp_path / "mine.py").write_text(TEXT + "# changed\n")
    with pytest.raises(
        GrowthError, match=r"method averaged-heads has changed while this command ran\n  where: .*mine.py"
    ):
        mine.spec(seed=1)
    (tmp_path / "mine.py").unlink()
    with pytest.raises(GrowthError, match="there is no such method file"):
        mine.spec(seed=1)


def test_results_of_another_content_are_refused(tmp_path):
    start = tmp_path / "seed0-abc"
    start.mkdir()
    check_method_files([start], {"mine": "b" * 64}, "arm mine")  # nothing was made yet
    (start / "phigrow.json").write_text(json.dumps({"format": 1, "plan": {"method_files": {"mine": "a" * 64}}}))
    check_method_files([start], {"mine": "a" * 64}, "arm mine")
    check_method_files([start], {"other": "b" * 64}, "arm mine")
    message = (
        r"method mine has changed since results were made of it \(aaaaaaaaaaaa, now bbbbbbbbbbbb\)\n  where: arm mine\n"
    )
    with pytest.raises(GrowthError, match=message) as refused:
        check_method_files([start], {"mine": "b" * 64}, "arm mine")
    assert "choose another --out" in refused.value.fix


STAGES = Path(__file__).parents[2] / "phigrow" / "recipes" / "stages" / "tiny.yaml"


def test_a_stage_grows_by_a_file(tmp_path):
    recipe = yaml.safe_load(STAGES.read_text())
    recipe["stages"][1]["grow"] |= {"method": "mine.py", "order": "random"}
    recipe["stages"][1]["grow"].pop("scale", None)

    def stages(text):
        (tmp_path / "mine.py").write_text(text)
        (tmp_path / "stages.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        return load_stages(tmp_path / "stages.yaml", out=tmp_path / "out").stages

    first, changed = stages(TEXT), stages(TEXT + "# changed\n")
    assert changed[1].growing.method_files == {
        "averaged-heads": hashlib.sha256((TEXT + "# changed\n").encode()).hexdigest()
    }
    assert changed[1].growing.spec.method.name == "averaged-heads"
    assert [one.folder == two.folder for one, two in zip(first, changed, strict=True)][:2] == [True, False]
    with pytest.raises(GrowthError, match="has changed while this command ran"):
        first[1].growing.spec.resolve()
    (tmp_path / "mine.py").unlink()
    with pytest.raises(GrowthError, match=r"there is no such method file\n  where: grow of stage 2"):
        load_stages(tmp_path / "stages.yaml", out=tmp_path / "out")
