"""Methods from outside of phigrow: files, objects and installed packages."""

import hashlib
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from tiny_models import phi_config, phi_model

import phigrow
from phigrow.errors import GrowthError
from phigrow.files.entry_points import installed
from phigrow.growth.growth_spec import GrowthSpec
from phigrow.growth.method_spec import parse_method
from phigrow.growth.methods import built_in_methods
from phigrow.growth.planner import check_method_of
from phigrow.growth.registry import find_method, installed_methods
from phigrow.inspection.difference import differences
from phigrow.inspection.plan_file import inspection_json, origin, read_plan_file
from phigrow.models.families import built_in_families, family_of, installed_families
from phigrow.training.configuration import RunConfig
from phigrow.training.training_cost import source_of

SRC, DST = phi_config(32, 4, 48, 2, 4), phi_config(64, 8, 70, 3, 4)

GOOD = '''"""averaged: wrapped copies, read over their count."""
from phigrow.methods import Method, Option, average_maps, copy_reasons, wrap


def axis_maps(task, options):
    return average_maps(task, lambda name, src, dst: wrap(src, dst))


def approximations(task, options):
    src, dst = task.sizes(task.family.residual)
    return copy_reasons(task, even=dst % src == 0)


METHOD = Method(
    name="averaged", summary="averaged copies", depth="identity", axis_maps=axis_maps, approximations=approximations,
    options={"gain": Option(float, 1.0, "a gain", range=(0, 2))},
)
'''


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A function that writes a method file into the current folder, which is empty; it returns the sha256."""
    monkeypatch.chdir(tmp_path)

    def write(text=GOOD, name="mine.py"):
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / name).write_bytes(data)
        return hashlib.sha256(data).hexdigest()

    return write


def test_a_plan_of_a_file_holds_its_hash_and_survives_a_round_trip(written):
    digest = written()
    plan = phigrow.plan(SRC, DST, "mine.py", gain="0.5")
    assert (plan.method, plan.options, plan.depth) == ("averaged", {"gain": "0.5"}, "identity")
    assert plan.exact
    assert plan.method_files == {"averaged": digest}
    again = phigrow.Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert (again.hash, again.method_files) == (plan.hash, plan.method_files)
    assert phigrow.plan(SRC, DST, "./mine.py:gain=0.5").hash == plan.hash  # the content counts, not the path
    written(GOOD + "# changed\n")
    changed = phigrow.plan(SRC, DST, "mine.py", gain="0.5")
    assert changed.hash != plan.hash
    assert [(d.part, d.name, d.first) for d in differences(plan, changed)] == [("method file", "averaged", digest)]
    # Plans of phigrow's own methods have no such key, so their hashes are those of earlier releases.
    assert "method_files" not in phigrow.plan(SRC, DST, "tile").to_json()


def test_a_file_grows_one_group_of_axes(written):
    digest = written()
    plan = phigrow.plan(SRC, DST, "lossless,mlp=mine.py:gain=2")
    assert plan.method == "lossless,mlp=averaged:gain=2"
    assert plan.method_files == {"averaged": digest}
    assert np.array_equal(plan.axes["mlp"].source, np.arange(70) % 48)


@pytest.mark.parametrize("folder", ["a=b", "c:d", "e,f", "with space"])
def test_a_folder_may_have_any_name(written, tmp_path, folder):
    written()
    (tmp_path / folder).mkdir()
    (tmp_path / "mine.py").rename(tmp_path / folder / "mine.py")
    path = f"{folder}/mine.py"
    assert phigrow.plan(SRC, DST, path).method == "averaged"
    (entry,) = parse_method(f"{path}:gain=0.5")
    assert (entry.method, entry.options) == (path, (("gain", "0.5"),))


def test_an_object_is_as_good_as_its_file(written, tmp_path):
    digest = written()
    names = {}
    exec(compile(GOOD, str(tmp_path / "mine.py"), "exec"), names)
    plan = phigrow.plan(SRC, DST, names["METHOD"], gain=0.5)
    assert plan.hash == phigrow.plan(SRC, DST, "mine.py:gain=0.5").hash
    assert plan.method_files == {"averaged": digest}
    # A method of an interactive session has no file.
    exec(compile(GOOD, "<stdin>", "exec"), names)
    assert phigrow.plan(SRC, DST, names["METHOD"]).method_files == {"averaged": None}
    # An altered method of phigrow needs a name of its own, and is no longer phigrow's.
    own = built_in_methods()["tile"]
    assert phigrow.plan(SRC, DST, own).hash == phigrow.plan(SRC, DST, "tile").hash
    with pytest.raises(GrowthError, match="the name 'tile' is taken"):
        phigrow.plan(SRC, DST, replace(own, depth="stack"))
    assert phigrow.plan(SRC, DST, replace(own, name="tile2", depth="stack")).method_files == {"tile2": None}
    with pytest.raises(GrowthError, match="the method is a int"):
        phigrow.plan(SRC, DST, 3)


BROKEN = {
    "syntax": ("def axis_maps(task, options)\n    pass\n", r"not valid Python\n  where: .*mine.py:1\n  why: expected"),
    "null bytes": (b"x = 1\n\0", r"the method file is not valid Python\n  where: .*mine\.py:1\n"),
    "bytes": (b"x = '\xff'\n", r"the method file is not valid Python"),
    "import error": (
        GOOD.replace("\n\n\ndef axis", "\nboom = 1 / 0\n\ndef axis", 1),
        r"the method file stopped with an error\n  where: .*mine.py:3\n  why: ZeroDivisionError: division by zero",
    ),
    "exit": ("import sys\nsys.exit(3)\n", r"stopped with an error\n  where: .*mine.py:2\n  why: SystemExit: 3"),
    "missing package": (
        "import numpy\nimport quux.deep\n",
        r"imports quux, which is not installed\n  where: .*mine.py:2\n.*\n.*\(pip install quux\)",
    ),
    "no method": ("METHOD = {}\n", r"the method file defines no method\n  where: mine.py\n"),
    "only phigrow's": (
        "from phigrow.growth.methods.tile import METHOD\n", r"the method file defines no method"
    ),
    "two methods": (
        GOOD + "OTHER = Method('other', 's', 'stack', axis_maps, approximations)\n",
        r"defines several methods\n  where: mine.py\n  why: it has METHOD \(line 14\) and OTHER \(line 18\)",
    ),
    "collision": (
        GOOD.replace('name="averaged"', 'name="tile"'), r"the name 'tile' is taken\n  where: mine.py:14\n"
    ),
    "reserved": (GOOD.replace('name="averaged"', 'name="scratch"'), r"'scratch' is taken\n  where: mine.py:14\n"),
    "name": (GOOD.replace('name="averaged"', 'name="a,b"'), r"a method cannot be named 'a,b'\n  where: mine.py:14"),
    "depth": (GOOD.replace('depth="identity"', 'depth="deep"'), r"unknown depth method 'deep'\n  where: mine.py:14"),
    "summary": (GOOD.replace('"averaged copies"', "None"), r"method averaged has no summary\n  where: mine.py:14"),
    "function": (GOOD.replace("maps=axis_maps", "maps={}"), r"axis_maps of method averaged is \{"),
    "option": (GOOD.replace('{"gain": Option', '{"seed": Option'), r"cannot be named 'seed'\n  where: mine.py:14"),
    "an option of another type": (
        GOOD.replace('Option(float, 1.0, "a gain", range=(0, 2))', "1"), r"'gain' of method averaged is 1"
    ),
    "learns": (GOOD.replace("options={", "learns=True, options={"), r"method averaged cannot learn maps"),
    "raises": (
        GOOD.replace("    return average_maps", "    {}['hidden']\n    return average_maps"),
        r"method averaged stopped with an error\n  where: .*mine.py:6\n  why: KeyError: 'hidden'",
    ),
    "no dict": (
        GOOD.replace("return average_maps(", "return list("), r"stopped with an error\n  where: .*mine.py:6"
    ),
    "a list": (
        GOOD.replace("return average_maps", "return []\n    return average_maps"),
        r"axis_maps .* returned a list\n  where: .*mine.py:5",
    ),
    "a missing axis": (
        GOOD.replace("return average_maps", "return {}\n    return average_maps"),
        r"returned no map for vocab, hidden, .*\n  where: .*mine.py:5\n  why: the axes of a phi are vocab, hidden",
    ),
    "claims": (
        GOOD.replace("return copy_reasons", "return 'exact'\n    return copy_reasons"),
        r"approximations of method averaged returned 'exact'\n  where: .*mine.py:9\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_error_with_its_line(written, tmp_path, case):
    text, message = BROKEN[case]
    written(text)
    with pytest.raises(GrowthError, match=message) as refused:
        phigrow.plan(SRC, DST, "mine.py")
    assert refused.value.fix
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


WRONG_MAPS = {
    "sizes": ("axis_map(task.src['mlp'], [0, 1])", "source has shape [2], and the destination has 70 coordinates"),
    "source size": ("axis_map(47, wrap(47, 70))", "src_size is 47, and the source has 48 coordinates"),
    "a source out of range": (
        "axis_map(48, [*wrap(48, 70)[:69], 48])", "coordinate 69 copies source coordinate 48, and the source has 48",
    ),
    "NaN": ("axis_map(48, wrap(48, 70), write=float('nan'))", "the write gain of coordinate 0 is nan"),
    "infinity": (
        "replace(maps['mlp'], read=maps['mlp'].read / (np.arange(70) != 5))", "the read gain of coordinate 5 is inf"
    ),
    "dtype": ("replace(maps['mlp'], read=maps['mlp'].read.astype('f4'))", "read has dtype float32, not float64"),
    "a list of gains": ("replace(maps['mlp'], read=[1.0] * 70)", "read has shape of a list, and"),
    "bias": ("replace(maps['mlp'], fresh_bias=float('inf'))", "fresh_bias is inf"),
    "an array": ("np.arange(70)", "it is a ndarray, not an AxisMap"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_MAPS)
def test_a_wrong_map_is_named_with_axis_and_line(written, case):
    made, problem = WRONG_MAPS[case]
    text = GOOD.replace("import Method", "import axis_map, Method").replace(
        "from", "from dataclasses import replace\nimport numpy as np\nfrom", 1
    )
    text = text.replace(
        "return average_maps(task, lambda name, src, dst: wrap(src, dst))",
        f"maps = average_maps(task, lambda name, src, dst: wrap(src, dst))\n"
        f"    with np.errstate(all='ignore'):\n        return {{**maps, 'mlp': {made}}}",
    )
    written(text)
    place = r"mine.py:7, axis mlp, met first in model.layers.{layer}.mlp.fc1.weight"
    message = f"method averaged returned a wrong map for axis mlp: {problem}"
    with pytest.raises(GrowthError, match=rf"{re.escape(message)}.*\n  where: .*{re.escape(place)}"):
        phigrow.plan(SRC, DST, "mine.py")


def test_maps_that_do_not_go_together_are_named(written):
    text = GOOD.replace("import Method", "import MEAN, axis_map, Method")
    changed = (
        "{**average_maps(task, lambda *a: wrap(*a[1:])), 'kv': axis_map(task.src['kv'], [0, 1, 2, 3] + [MEAN] * 4)}"
    )
    written(text.replace("average_maps(task, lambda name, src, dst: wrap(src, dst))", changed))
    message = r"cannot be combined on the axis \(kv group q\)\n  where: .*mine.py:5, met .*q_proj.*\n  why: means"
    with pytest.raises(GrowthError, match=message):
        phigrow.plan(SRC, DST, "mine.py")


def test_a_missing_file_and_a_forgotten_suffix(written, tmp_path):
    with pytest.raises(GrowthError, match=r"there is no such method file\n  where: .*/gone.py"):
        phigrow.plan(SRC, DST, "gone.py")
    written()
    with pytest.raises(GrowthError, match=r"method 'mine' is unknown\n.*\n  what to do: write mine.py"):
        phigrow.plan(SRC, DST, "mine")
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(GrowthError, match="the method file cannot be read"):
        phigrow.plan(SRC, DST, "folder.py")


LAYERS = GOOD.replace(
    "METHOD = Method(", "def layers(task, options):\n    return LAYER_MAP\n\n\nMETHOD = Method(layers=layers,"
)


@pytest.mark.parametrize(
    ("layers", "reasons"),
    [
        ("(0, 1, 1), {2}", ()),
        ("(0, 0, 1), {0}", ()),
        ("(1, 0, 0), {2}", ("averaged applies the source's layers in another order",)),
        ("(0, -1, 1), ()", ("averaged adds 1 layers of new values, which change the function",)),
        ("(0, 1, 0), ()", ("averaged repeats 1 of 2 layers, which then act twice",)),
    ],
)
def test_a_method_may_have_its_own_layer_map(written, layers, reasons):
    written(LAYERS.replace("LAYER_MAP", layers))
    plan = phigrow.plan(SRC, DST, "mine.py")
    assert (plan.depth, plan.approximations) == ("averaged", reasons)
    assert phigrow.Plan.from_json(plan.to_json()).hash == plan.hash
    assert phigrow.plan(SRC, DST, "mine.py", depth="stack").layers == (0, 1, 0)


@pytest.mark.parametrize(
    "layers", ["(0, 1), ()", "(0, 1, 2), ()", "(0, 1, 1), {3}", "3", "(0, -1, 1), {1}", "('a', 0, 1), ()"]
)
def test_a_wrong_layer_map_is_refused(written, layers):
    written(LAYERS.replace("LAYER_MAP", layers))
    with pytest.raises(
        GrowthError,
        match=r"layers of method averaged returned .*\n  where: .*mine.py:14\n.*2 layers and the destination 3",
    ):
        phigrow.plan(SRC, DST, "mine.py")


def test_expand_verify_and_inspect_with_a_file(written, save_model, tmp_path, monkeypatch):
    digest = written()
    src = save_model(phi_model(SRC))
    out = phigrow.expand(src, DST, method="mine.py:gain=0.5")
    assert out.name.endswith("-to-grown-averaged:gain=0.5")
    made = read_plan_file(out)
    assert made.plan.method_files == {"averaged": digest}
    assert made.provenance.method_summary == "averaged copies"
    assert "--method mine.py:gain=0.5 --depth identity" in made.provenance.command
    assert dict(origin(made))["method file"] == f"of averaged: sha256 {digest}"
    assert inspection_json(made)["plan"]["method_files"] == {"averaged": digest}
    growth = source_of(RunConfig(init=str(out))).growth
    assert (growth["method"], growth["method_files"]) == ("averaged", {"averaged": digest})
    # The plan is data: it is verified without the file, which runs only where it is given.
    (tmp_path / "mine.py").rename(tmp_path / "moved.py")
    assert phigrow.verify(src, out, dtype="float64").passed
    assert phigrow.verify(src, out, dtype="float64", method=tmp_path / "moved.py").passed
    with pytest.raises(GrowthError, match="there is no such method file"):
        phigrow.verify(src, out, method="mine.py")
    written(GOOD.replace("averaged copies", "other copies"), "moved.py")
    with pytest.raises(
        GrowthError, match=rf"the file of method averaged has changed since the plan was made\n.*moved.py\n.*{digest}"
    ):
        phigrow.verify(src, out, method="moved.py")
    with pytest.raises(GrowthError, match="has changed since the plan was made"):
        phigrow.grow_optimizer(tmp_path / "run", out, method="moved.py")
    with pytest.raises(GrowthError, match="the given method is of phigrow's own method tile"):
        phigrow.verify(src, out, method="tile")


def test_a_method_that_draws_without_the_seed_is_noticed(written):
    text = GOOD.replace("wrap(src, dst))", "np.random.default_rng().integers(0, src, dst))")
    written(text.replace("from", "import numpy as np\nfrom", 1))
    with pytest.raises(GrowthError, match=r"method averaged makes another plan now"):
        check_method_of(phigrow.plan(SRC, DST, "mine.py"), "mine.py")


def test_a_downloaded_folder_never_runs_a_file(written, save_model, tmp_path):
    """A hostile phigrow.json may name any path as its method."""
    marker = "open('ran', 'w').close()\n"
    written()
    src = save_model(phi_model(SRC))
    out = phigrow.expand(src, DST, "out", method="mine.py")
    written(marker + GOOD, "evil.py")
    path = out / "phigrow.json"
    data = json.loads(path.read_text())
    plan = phigrow.Plan.from_json(data["plan"])
    evil = replace(plan, method=str(tmp_path / "evil.py"), depth=str(tmp_path / "evil.py"))
    data |= {"plan": {**evil.to_json(), "hash": evil.hash}, "command": f"phigrow expand --method {tmp_path}/evil.py"}
    path.write_text(json.dumps(data))
    assert read_plan_file(out).plan.method.endswith("evil.py")
    phigrow.verify(src, out)
    inspection_json(read_plan_file(out))
    differences(plan, read_plan_file(out).plan)
    source_of(RunConfig(init=str(out)))
    with pytest.raises(GrowthError, match=r"checkpoint"):
        phigrow.grow_optimizer(tmp_path, out)
    # A source whose own configuration names a method is grown by the method that the user names.
    phigrow.expand(out, phi_config(64, 8, 72, 3, 4), "again", method="mine.py")
    assert not (tmp_path / "ran").exists()
    find_method(str(tmp_path / "evil.py"))  # the control: where the user names it, it runs
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("digest", ["", "x" * 64, 3, {}])
def test_a_hash_that_is_none_is_refused(written, digest):
    written()
    data = phigrow.plan(SRC, DST, "mine.py").to_json()
    with pytest.raises(GrowthError, match="the hash of the file of method 'averaged' is"):
        phigrow.Plan.from_json(data | {"method_files": {"averaged": digest}})


def test_a_file_that_changes_during_a_command_is_noticed(written):
    digest = written()
    spec = GrowthSpec("mine.py")
    assert spec.pinned({"averaged": digest}).label == "averaged"
    pinned = spec.pinned()
    written(GOOD + "# changed\n")
    assert pinned.method_files == {"averaged": digest}
    with pytest.raises(GrowthError, match="the file of method averaged has changed while this command ran"):
        spec.pinned({"averaged": digest})


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that installs a package with entry points into a folder of the path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    caches = (installed, installed_methods, installed_families)

    def install(name, code, **groups):
        (tmp_path / f"{name}.py").write_text(code)
        info = tmp_path / f"{name}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        lines = [f"[phigrow.{group}]\n{point}\n" for group, point in groups.items()]
        (info / "entry_points.txt").write_text("".join(lines))
        for cached in caches:
            cached.cache_clear()

    yield install
    for cached in caches:
        cached.cache_clear()
    for name in [name for name in sys.modules if name.startswith("pkg_")]:
        del sys.modules[name]


def test_a_package_adds_a_method(package):
    package("pkg_good", GOOD, methods="averaged = pkg_good:METHOD")
    plan = phigrow.plan(SRC, DST, "averaged:gain=0.5")
    assert plan.method_files == {"averaged": hashlib.sha256(GOOD.encode()).hexdigest()}
    assert find_method("averaged").sources[0].package == "pkg_good 1.5"
    assert GrowthSpec("averaged").spelled() == "averaged:gain=1"
    with pytest.raises(GrowthError, match=r"choose one of aki, .*, averaged"):
        find_method("avreaged")


@pytest.mark.parametrize(
    ("code", "point", "message"),
    [
        (
            "import quux\n",
            "averaged = pkg_bad:METHOD",
            r"cannot be imported: ModuleNotFoundError: .*'quux'\n  where: .*of pkg_bad 1.5",
        ),
        ("METHOD = 3\n", "averaged = pkg_bad:METHOD", r"an entry point is a int, not a Method"),
        (GOOD, "other = pkg_bad:METHOD", r"the entry point is named 'other', but its method 'averaged'"),
        (
            GOOD.replace('"averaged"', '"tile"'),
            "tile = pkg_bad:METHOD",
            r"the name 'tile' is taken\n  where: entry point tile",
        ),
    ],
)
def test_a_broken_package_is_named_and_leaves_other_methods_alone(package, code, point, message):
    package("pkg_bad", code, methods=point)
    assert phigrow.plan(SRC, DST, "tile").method_files == {}
    with pytest.raises(GrowthError, match=message):
        phigrow.plan(SRC, DST, point.partition(" ")[0].replace("tile", "tile2"))


FAMILY = """
from dataclasses import replace
from phigrow.models.families.phi import FAMILY as PHI
FAMILY = replace(PHI, name="phi9", model_type="phi9", former_model_types=())
"""


def test_a_package_adds_a_family(package):
    package("pkg_family", FAMILY, families="phi9 = pkg_family:FAMILY")
    config = SRC | {"model_type": "phi9"}
    assert family_of(config, "test").name == "phi9"
    plan = phigrow.plan(config, DST | {"model_type": "phi9"}, "lossless")
    assert phigrow.Plan.from_json(plan.to_json()).table.name == "phi9"
    with pytest.raises(GrowthError, match="family tables for these model types: gpt_neox, llama, phi, phi9, qwen2"):
        family_of({"model_type": "gpt9"}, "test")


def test_a_family_that_takes_the_type_of_another_is_refused(package):
    package("pkg_family", FAMILY.replace('model_type="phi9"', 'model_type="phi"'), families="phi9 = pkg_family:FAMILY")
    assert family_of(SRC, "test") is built_in_families()["phi"]
    with pytest.raises(
        GrowthError,
        match=r"the family 'phi9' of model_type 'phi' cannot be added\n  where: entry point phi9 .* pkg_family 1.5",
    ):
        family_of({"model_type": "gpt9"}, "test")
