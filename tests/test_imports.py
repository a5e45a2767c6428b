"""The layers of the package, held by a walk over its imports."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import phigrow

ROOT = Path(phigrow.__file__).parent

ANYONE = {"errors", "config", "flops", "output"}
GROWTH = {
    "axes", "method", "methods", "copying", "extending", "mixing",
    "plan", "lift", "resolve", "expand", "verify", "explain", "advice",
    "inspection", "blocks", "pictures", "planfile", "difference", "moments", "trained", "optimizer",
    "legs", "folding", "pieces", "dense", "tallies", "maps", "learned", "blend", "unfolding",
    "growing", "learning",
}  # fmt: skip
MAY_IMPORT = {
    "errors": set(),
    "output": {"errors"},
    "allocator": set(),
    "untrusted": {"errors"},
    "config": {"errors", "untrusted"},
    "bounds": {"errors", "config"},
    "family": {"errors", "config"},
    "families": {"errors", "config", "bounds", "family"},
    "flops": {"config", "families"},
    "capacity": {"errors", "config", "flops"},
    "bits": set(),
    "draws": {"bits"},
    "legs": {"draws"},
    "axes": {"errors", "legs"},
    "folding": {"config", "family"},
    "maps": {"errors"},
    "learned": {"errors", "config", "axes", "family", "legs", "maps"},
    "plan": {"errors", "config", "flops", "axes", "family", "families", "folding", "learned", "maps"},
    "pieces": {"axes"},
    "dense": {"bits"},
    "blend": {"bits"},
    "lift": {"axes", "bits", "blend", "dense", "draws", "pieces", "plan"},
    "method": {"errors", "config", "axes", "family"},
    "copying": {"axes", "method"},
    "extending": {"axes", "method"},
    "methods": {"errors", "config", "axes", "copying", "extending", "family", "legs", "method"},
    "mixing": {"errors", "axes", "method", "methods"},
    "checkpoint": {"errors", "bits", "untrusted"},
    "pickles": {"errors", "bits", "checkpoint", "untrusted"},
    "hub": {"errors", "config", "untrusted"},
    "resolve": {"errors", "config", "hub", "families", "maps", "method", "methods", "mixing", "plan"},
    "provenance": {"config", "inspection", "plan", "untrusted"},
    "shards": {"bits", "checkpoint"},
    "journal": {"errors", "output"},
    "stream": {"errors", "bits", "checkpoint", "shards", "journal", "lift", "plan"},
    "expand": {
        "errors",
        "config",
        "hub",
        "checkpoint",
        "pickles",
        "shards",
        "journal",
        "lift",
        "maps",
        "plan",
        "resolve",
        "provenance",
        "stream",
    },
    "verify": {"errors", "config", "hub", "pickles", "families", "plan"},
    "certificates": {"errors", "bits", "checkpoint", "hub", "verify"},
    "explain": {"axes", "family", "plan"},
    "advice": {"axes", "plan"},
    "inspection": {"errors", "axes", "family", "plan"},
    "blocks": {"inspection"},
    "pictures": {"errors", "inspection", "blocks", "plan"},
    "tallies": {"inspection", "plan"},
    "planfile": {"errors", "untrusted", "inspection", "plan", "tallies"},
    "difference": {"axes", "plan"},
    "moments": {"axes", "inspection", "plan"},
    "unfolding": {"axes", "bits", "blend", "moments", "plan"},
    "corpus": ANYONE | {"hub"},
    "training": ANYONE | {"allocator", "bits", "corpus", "checkpoint", "families", "shards"},
    "trained": {"errors", "stream", "training"},
    "optimizer": {
        "errors",
        "bits",
        "checkpoint",
        "journal",
        "lift",
        "moments",
        "unfolding",
        "plan",
        "planfile",
        "provenance",
        "stream",
        "trained",
        "training",
    },
    "growing": {"axes", "family", "inspection", "learned", "lift", "plan", "training"},
    "learning": ANYONE | {"hub", "expand", "growing", "maps", "pickles", "plan", "provenance", "resolve", "training"},
    "measure": ANYONE,
    "study": ANYONE | {"hub", "corpus", "training", "measure", "methods", "resolve", "expand", "optimizer"},
    "demo": ANYONE | {"study", "corpus", "training", "measure", "expand", "verify"},
}


def imports_of(path: Path) -> set[str]:
    """First names below phigrow that a file imports, anywhere in it; `import phigrow` itself counts as 'phigrow'."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""] if node.module != "phigrow" else [f"phigrow.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {(name.split(".") + ["phigrow"])[1] for name in names if name.split(".")[0] == "phigrow"}
    return found


def unit_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_import_goes_down():
    files = [path for path in ROOT.rglob("*.py") if unit_of(path) not in ("__init__", "cli")]
    assert len(files) > 20
    for path in files:
        unit = unit_of(path)
        beyond = imports_of(path) - MAY_IMPORT[unit] - {unit}
        assert not beyond, f"{path.relative_to(ROOT)} imports {sorted(beyond)}"


def test_the_rules_themselves_have_no_cycle_and_keep_the_arms_apart():
    closure = {unit: set(direct) for unit, direct in MAY_IMPORT.items()}
    for _ in closure:
        for reached in closure.values():
            reached |= set().union(*(closure[unit] for unit in reached)) if reached else set()
    assert not any(unit in reached for unit, reached in closure.items())
    assert not closure["training"] & GROWTH  # the from-scratch arm cannot be contaminated
    assert not closure["checkpoint"] & GROWTH
    assert not closure["hub"] & GROWTH
    assert not closure["shards"] & GROWTH
    assert not closure["measure"] & (GROWTH | {"training"})


def test_methods_and_families_never_import_each_other():
    for package in ("methods", "families"):
        modules = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
        for path in (ROOT / package).glob("*.py"):
            if path.stem == "__init__":
                continue
            names = {
                node.module
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.ImportFrom) and node.module
            }
            assert not names & ({f"phigrow.{package}.{m}" for m in modules} | {f"phigrow.{package}"}), path


def test_an_upward_import_is_noticed(tmp_path):
    # Negative control of the walk.
    file = tmp_path / "axes.py"
    file.write_text(
        "def f():\n    from phigrow.lift import lift\n    import phigrow.training.loop\n    import phigrow\n"
    )
    assert imports_of(file) == {"lift", "training", "phigrow"}


@pytest.mark.parametrize(
    "module", ["phigrow", "phigrow.cli", "phigrow.training", "phigrow.corpus", "phigrow.measure", "phigrow.study"]
)
def test_importing_is_light(module):
    heavy = ("torch", "transformers", "deepspeed", "datasets", "matplotlib", "pandas", "scipy", "accelerate")
    script = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def test_planning_needs_no_torch():
    planned = "phigrow.plan('phi-1_5', 'phi2.json', 'lossless')"
    script = f"import sys, phigrow; print({planned}.exact, 'torch' in sys.modules)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "True False"


def test_capacity_needs_no_torch():
    script = (
        "import sys; from phigrow.capacity import capacity; found = capacity('phi2', '8x80', tokens=1e11); "
        "print(found.chosen.stage, 'torch' in sys.modules, 'deepspeed' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1 False False"


def test_inspecting_needs_no_torch():
    script = (
        "import sys, phigrow; from phigrow.tallies import by_line; from phigrow.difference import differences; "
        "import phigrow.pictures, phigrow.planfile; plan = phigrow.plan('phi-1_5', 'phi2.json', 'lossless'); "
        "print(len(by_line(plan)), differences(plan, plan), 'torch' in sys.modules, 'matplotlib' in sys.modules)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "19 [] False False"


def test_public_names_are_frozen():
    assert sorted(phigrow.__all__) == [
        "Certificate", "GrowthError", "Plan", "expand", "expand_model", "grow_optimizer", "plan", "verify",
    ]  # fmt: skip
    assert all(getattr(phigrow, name).__doc__ for name in phigrow.__all__)


def test_files_stay_small_and_named_for_what_they_hold():
    for path in ROOT.rglob("*.py"):
        assert path.read_text(encoding="utf-8").count("\n") <= 400, path
        assert path.stem not in ("utils", "common", "helpers", "misc"), path


def test_expanding_safetensors_needs_no_torch(save_model, tmp_path):
    from models import phi_config, phi_model

    folder = save_model(phi_model(phi_config(32, 4, 48, 2, 4)))
    (tmp_path / "dst.json").write_text(json.dumps(phi_config(72, 6, 70, 3, 4)))
    for method in ("tile", "lossless", "wr", "isometric"):
        words = ["expand", "--src", str(folder), "--dst-config", "dst.json", "--method", method, "--out", method]
        script = "import sys\nfrom phigrow.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=tmp_path)
        assert (tmp_path / method / "model.safetensors").is_file(), done.stderr
        assert done.stdout.splitlines()[-1] == "False"
