"""The layers of the package, held by a walk over its imports."""

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import phigrow

ROOT = Path(phigrow.__file__).parent

ORDER = (
    "errors", "files", "models", "checkpoints", "records", "growth", "methods", "inspection", "expansion", "testing",
    "corpus", "training", "integrations", "ligo", "evaluation", "measure", "study", "recipes", "cli", "__main__",
)  # fmt: skip
"""Packages from low to high: each imports only those before it."""
NEEDS_LITTLE = {
    "files": {"errors"},
    "models": {"errors", "files"},
    "checkpoints": {"errors", "files", "models"},
    "records": {"errors", "files", "models"},
    "growth": {"errors", "files", "models", "checkpoints"},
    "methods": {"errors", "growth"},
    "corpus": {"errors", "files", "models", "checkpoints"},
    "training": {"errors", "files", "models", "checkpoints", "records", "corpus"},
    "evaluation": {"errors", "files", "models", "checkpoints", "records", "expansion"},
    "measure": {"errors", "files", "records"},
}
"""Packages that import even less: training knows nothing of growth, and measuring nothing of models."""


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


def allowed(unit: str) -> set[str]:
    return NEEDS_LITTLE.get(unit, set(ORDER[: ORDER.index(unit)])) | {unit}


def test_every_import_goes_down():
    files = [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]
    assert {unit_of(path) for path in files} == set(ORDER)
    for path in files:
        unit = unit_of(path)
        # The command line calls the library as its users do: through the names in ``phigrow``.
        beyond = imports_of(path) - allowed(unit) - ({"phigrow", "__version__"} if unit == "cli" else set())
        assert not beyond, f"{path.relative_to(ROOT)} imports {sorted(beyond)}"


def test_the_rules_themselves_go_down():
    for unit, below in NEEDS_LITTLE.items():
        assert below <= set(ORDER[: ORDER.index(unit)]), unit


def test_methods_and_families_never_import_each_other():
    for package in ("growth/methods", "models/families"):
        modules = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
        name = "phigrow." + package.replace("/", ".")
        for path in (ROOT / package).glob("*.py"):
            if path.stem == "__init__":
                continue
            names = {
                node.module
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.ImportFrom) and node.module
            }
            assert not names & ({f"{name}.{m}" for m in modules} | {name}), path


def test_an_upward_import_is_noticed(tmp_path):
    # Negative control of the walk.
    file = tmp_path / "axes.py"
    file.write_text(
        "def f():\n    from phigrow.growth.lift import lift\n    import phigrow.training.loop\n    import phigrow\n"
    )
    assert imports_of(file) == {"growth", "training", "phigrow"}
    assert not imports_of(file) <= allowed("models")


@pytest.mark.parametrize(
    "module",
    [
        "phigrow",
        "phigrow.cli",
        "phigrow.methods",
        "phigrow.testing",
        "phigrow.training",
        "phigrow.integrations",
        "phigrow.corpus",
        "phigrow.evaluation",
        "phigrow.measure",
        "phigrow.study",
    ],
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
        "import sys; from phigrow.models.capacity import capacity; found = capacity('phi2', '8x80', tokens=1e11); "
        "print(found.chosen.stage, 'torch' in sys.modules, 'deepspeed' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1 False False"


def test_inspecting_needs_no_torch():
    script = (
        "import sys, phigrow; from phigrow.inspection.tallies import by_line; "
        "from phigrow.inspection.difference import differences; "
        "import phigrow.inspection.pictures, phigrow.inspection.plan_file; "
        "plan = phigrow.plan('phi-1_5', 'phi2.json', 'lossless'); "
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


INTERNALS = ("ds_id", "ds_shape", "ds_tensor", "_hp_mapping", "fp16_groups", "_z3_optimizer", "GatheredParameters")


def test_one_file_knows_the_internals_of_zero():
    def knows(path):
        text = path.read_text(encoding="utf-8")
        return {name for name in INTERNALS if re.search(rf"\b{name}\b", text)}

    one = ROOT / "training" / "zero.py"
    assert knows(one) == set(INTERNALS)
    assert not [path for path in ROOT.rglob("*.py") if path != one and knows(path)]


def test_files_are_named_for_what_they_hold():
    for path in ROOT.rglob("*.py"):
        assert path.read_text(encoding="utf-8").count("\n") <= 600, path
        assert path.stem not in ("utils", "common", "helpers", "misc"), path


def test_the_arithmetic_of_expanding_safetensors_needs_no_torch(save_model, tmp_path):
    from tiny_models import phi_config, phi_model

    folder = save_model(phi_model(phi_config(32, 4, 48, 2, 4)))
    (tmp_path / "dst.json").write_text(json.dumps(phi_config(72, 6, 70, 3, 4)))
    for method in ("tile", "lossless", "wr", "isometric"):
        words = ["expand", "--src", str(folder), "--dst-config", "dst.json", "--method", method, "--out", method]
        # transformers checks the destination's configuration, with torch; here it is not asked.
        script = (
            "import sys\nfrom types import SimpleNamespace\nimport phigrow.expansion.expand as module\n"
            "from phigrow.cli import main\n"
            "module.resolve_config = lambda config, where: SimpleNamespace("
            "check_tensors=lambda shapes: None, stored=lambda dtype, ids: config)\n"
            "try: main()\nfinally: print('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=tmp_path)
        assert (tmp_path / method / "model.safetensors").is_file(), done.stderr
        assert done.stdout.splitlines()[-1] == "False"


def file_imports(path: Path, modules: set[str]) -> set[str]:
    """Modules among ``modules`` that a file names in an import, lazy and TYPE_CHECKING ones included."""
    named = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            named |= (members & modules) or {node.module}
        elif isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
    return named & modules


def circle(imports: dict[str, set[str]]) -> list[str]:
    """One import circle, from a module back to itself; empty if there is none."""
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in done:
            for other in sorted(imports[module]):
                if closed := search(other, [*path, module]):
                    return closed
            done.add(module)
        return []

    return next((closed for module in imports if (closed := search(module, []))), [])


def graph(root: Path) -> dict[str, set[str]]:
    def name(path: Path) -> str:
        return ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")

    files = {name(path): path for path in root.rglob("*.py")}
    return {module: file_imports(path, set(files)) - {module} for module, path in files.items()}


def test_no_file_is_in_an_import_circle():
    assert circle(graph(ROOT)) == []


def test_a_circle_of_lazy_and_typing_imports_is_noticed(tmp_path):
    # Negative control: a -> b in a function, b -> c for types only, c -> a through the package.
    package = tmp_path / "phigrow"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("def f():\n    from phigrow.b import g\n")
    (package / "b.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from phigrow.c import C\ndef g(): ...\n"
    )
    (package / "c.py").write_text("from phigrow import a\nclass C: ...\n")
    assert circle(graph(package)) == ["phigrow.a", "phigrow.b", "phigrow.c", "phigrow.a"]
    (package / "c.py").write_text("class C: ...\n")
    assert circle(graph(package)) == []


def shadowed(folder: Path, public: set[str]) -> set[str]:
    """Public names of a package that are also names of its submodules."""
    return public & {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}


PACKAGES = sorted(".".join(path.parent.relative_to(ROOT.parent).parts) for path in ROOT.rglob("__init__.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_do_not_shadow_submodules(package):
    module = importlib.import_module(package)
    defined = {name for name, value in vars(module).items() if name[0] != "_" and not inspect.ismodule(value)}
    assert not shadowed(Path(module.__file__).parent, defined | set(getattr(module, "__all__", ())))


def test_a_shadowed_submodule_is_noticed():
    # Negative control.
    assert shadowed(ROOT / "measure", {"compare", "comparison"}) == {"comparison"}
    assert shadowed(ROOT, {"plan", "growth"}) == {"growth"}


OTHERS = {"_repr_html_", "_replace", "_getframe", "_exit", "_hp_mapping", "_WORLD_GROUP", "_dynamo", "_python_dispatch"}
"""Names with an underscore that belong to Jupyter, Python, DeepSpeed and torch."""


def private_names(source: str) -> list[str]:
    """Private names of modules and objects that a test file imports, reads or replaces."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names += [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            names.append(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "getattr")):
            words = [word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
            names += [part for word in words for part in word.split(".")]
    return [name for name in names if name.startswith("_") and not name.startswith("__") and name not in OTHERS]


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_no_test_uses_private_names(path):
    assert private_names(path.read_text(encoding="utf-8")) == []


def test_a_private_name_is_noticed():
    # Negative control.
    source = "from phigrow.growth import _a\nfrom phigrow._b import c\nmodel._d()\npatch.setattr('phigrow.e._f', 1)\n"
    assert private_names(source + "self._g = model.__class__, patch.setattr(model, '_h', 1)\n") == [
        "_a", "_b", "_f", "_d", "_h",
    ]  # fmt: skip
