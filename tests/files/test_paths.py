"""Paths that a user typed: ~ is the home folder in every option, key and argument, through one function."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import phi_config, phi_model
from typer.testing import CliRunner

import phigrow
from phigrow.cli import app
from phigrow.errors import GrowthError
from phigrow.files.paths import user_path, user_text, utf8_path
from phigrow.study import load_stages, load_study
from phigrow.training import RunConfig, load_run_config
from phigrow.training.training_cost import run_folder, source_of

ROOT = Path(phigrow.__file__).parent
ODD = "a:b,c=d e"
"""Name of a folder with characters that have a meaning in methods, mappings and lists."""

LATIN = b"caf\xe9".decode("utf-8", "surrogateescape")
"""Name of a folder in Latin-1, as Python reads it: Linux allows any bytes, and UTF-8 does not have these."""


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home folder that is not the current folder."""
    for name in ("home", "work"):
        for folder in (ODD, LATIN):
            (tmp_path / name / folder).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def phigrow_command(*words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, (done.output, done.exception)
    assert not Path("~").exists()
    return done.output


def test_libraries_get_a_link_in_place_of_a_path_that_is_not_utf8(home):
    (home / LATIN / "a.json").write_text("{}")
    with utf8_path(home / LATIN) as folder, utf8_path(home / LATIN / "a.json") as file:
        assert [path.is_symlink() for path in (folder, file)] == [True, True]
        assert str(folder / "a.json").encode()
        assert (folder / "a.json").samefile(file)
        assert file.suffix == ".json"
    assert [path.parent.exists() for path in (folder, file)] == [False, False]
    assert (home / LATIN / "a.json").read_text() == "{}"
    with utf8_path(Path(ODD)) as path:
        assert path == Path(ODD)


def test_home_is_replaced_at_the_start_only(home):
    assert user_path("~/g1") == user_path(Path("~/g1")) == home / "g1"
    assert user_path("~") == home
    assert [user_text(text) for text in ("runs/~/x", "./~", "phi-2", "microsoft/phi-2")] == [
        "runs/~/x", "./~", "phi-2", "microsoft/phi-2",
    ]  # fmt: skip
    with pytest.raises(GrowthError, match=r"the home folder ~nobody-here is not known[\s\S]*write \./~nobody-here/x"):
        user_path("~nobody-here/x")


@pytest.mark.parametrize("place", ["~", f"~/{ODD}", ODD, LATIN])
def test_commands_read_and_write_below_home_and_in_folders_of_odd_names(home, place):
    folder = user_path(place)
    phi_model(phi_config(), torch.float32).save_pretrained(folder / "src")
    (folder / "dst.json").write_text(json.dumps(phi_config(48, 6)))
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("to be or not to be, that is the question. " * 40)
    (folder / "text" / "b.jsonl").write_text(json.dumps({"text": "all the world is a stage. " * 40}))
    src, dst = f"{place}/src", f"{place}/dst.json"
    phigrow_command("plan", "--src", src, "--dst-config", dst)
    phigrow_command("expand", "--src", src, "--dst-config", dst, "--method", "lossless", "--out", f"{place}/grown")
    phigrow_command("verify", src, f"{place}/grown", "--save", f"{place}/certificate.json")
    phigrow_command("verify", src, f"{place}/grown", "--certificate", f"{place}/certificate.json")
    phigrow_command("inspect", f"{place}/grown")
    phigrow_command("diff", f"{place}/grown", f"{place}/grown")
    phigrow_command("recipes", "phi-2", "--out", f"{place}/recipes")
    packing = ["--seq-len", "8", "--vocab-size", "300", "--heldout", "0.2"]
    phigrow_command("data", f"{place}/text/*", "--out", f"{place}/data", *packing)
    phigrow_command("data", f"{place}/text/b.jsonl", "--out", f"{place}/more", "--tokenizer", f"{place}/data/tokenizer",
                    "--heldout", "0", "--seq-len", "8")  # fmt: skip
    for name in ("grown/model.safetensors", "certificate.json", "recipes/phi-2.yaml", "data/data.json"):
        assert (folder / name).is_file(), name


PATH_KEYS = {field.name for field in dataclasses.fields(RunConfig) if field.metadata["path"]}


def test_every_path_of_a_run_is_replaced(home):
    assert {"init", "init_optimizer", "model", "data", "teacher", "deepspeed", "offload_dir", "out"} <= PATH_KEYS
    Path("recipe.yaml").write_text(yaml.safe_dump({key: f"~/{key}" for key in PATH_KEYS - {"branch_from"}}))
    words = ["--teacher-steps", "2", "--data={~/web:b: 0.5, ~/code: 0.5}", f"--out=~/{ODD}/run"]
    config = load_run_config("recipe.yaml", words)
    assert {key: getattr(config, key) for key in PATH_KEYS - {"data", "out", "branch_from"}} == {
        key: f"{home}/{key}" for key in PATH_KEYS - {"data", "out", "branch_from"}
    }
    assert config.data == {f"{home}/web:b": 0.5, f"{home}/code": 0.5}
    assert config.out == f"{home}/{ODD}/run"
    assert RunConfig(branch_from="~/trunk", schedule="wsd").branch_from == f"{home}/trunk"
    alone = RunConfig(out="~/runs/a")
    assert run_folder(alone, source_of(alone)) == home / "runs" / "a"
    # The names of the package are no paths.
    assert (RunConfig(model="phi-2").model, RunConfig().init) == ("phi-2", "scratch")


def test_studies_and_stages_take_home_in_every_path(home):
    folder = home / ODD
    (folder / "text.txt").write_text("to be or not to be")
    recipes = ROOT / "recipes"
    study = yaml.safe_load((recipes / "studies" / "tiny.yaml").read_text())
    (folder / "dst.json").write_text(json.dumps(study["dst"]))
    phi_model(study["source"]["model"], torch.float32).save_pretrained(folder / "src")
    study |= {"source": f"~/{ODD}/src", "dst": f"~/{ODD}/dst.json", "out": "~/results"}
    study["data"]["ref"] = f"~/{ODD}/text.txt"
    study.pop("sweep", None)
    (home / "study.yaml").write_text(yaml.safe_dump(study))
    loaded = load_study("~/study.yaml")
    assert (loaded.out, loaded.sources[0].path) == (home / "results", folder / "src")
    assert phigrow_command("compare", "~/study.yaml", "--dry-run", "--out", "~/elsewhere")
    stages = yaml.safe_load((recipes / "stages" / "tiny.yaml").read_text()) | {"out": "~/staged"}
    stages["stages"][0].pop("model")
    stages["stages"][0]["init"] = f"~/{ODD}/src"
    (home / "stages.yaml").write_text(yaml.safe_dump(stages))
    staged = load_stages("~/stages.yaml")
    assert (staged.out, staged.stages[0].keys["init"]) == (home / "staged", str(folder / "src"))


ALLOWED = {
    "checkpoints/hub.py": [
        "repository",  # an id on the hub
        "snapshot_download(repository, revision=revision, allow_patterns=patterns)",
    ],
    "corpus/embedded.py": ["folder or sysconfig.get_path('stdlib')", "parent, file"],
    "corpus/exchange.py": ["tempfile.gettempdir()"],
    "corpus/local_files.py": [
        "name",
        "found",
        "root, name",
        "f'{split}.jsonl'",  # results of glob and walk
        "os.path.normpath(folder / str(config['data_dir']))",  # of the data set's card
    ],
    "corpus/tokenizer.py": ["tokenizer.name_or_path"],
    "expansion/expand.py": ["f'{name}-to-{target}-{method}'"],
    "evaluation/run.py": ["FOLDER"],
    "files/folder_copy.py": ["root", "root, name"],  # results of walk
    "files/output.py": ["tempfile.mkdtemp(prefix=f'.{out.name}.', dir=out.parent)"],
    "files/foreign.py": ["name", "where"],  # names and places of files that were found
    "files/staged_folder.py": ["root, name"],
    "growth/method_files.py": ["file", "code.co_filename"],  # of a function, as Python tells it
    "study/launch.py": ["keys['out']", "tempfile.mkdtemp(prefix='phigrow-ranks-')", "sys.executable"],
    "study/runner.py": ["keys['branch_from']"],
    "training/callbacks.py": ["tokenizer"],
    "training/checkpoints.py": ["path"],  # of a mapping of this process
    "training/data.py": ["EMBEDDED"],
    "training/deepspeed_cleanup.py": ["_get_build_directory(extension, False)"],
    "training/export_files.py": ["blocks.tokenizer_dir"],
    "training/lost_ranks.py": ["frame.f_code.co_filename"],
    "training/monitors.py": ["files.log_dir"],
    "training/process.py": ["sys.executable"],
    "training/service.py": ["wanted['log']", "sys.argv[-1]"],
    "training/training_cost.py": ["f'runs/{config.model_name}-{source.arm}-seed{config.seed}'"],
    "expansion/grow_optimizer.py": ["latest.read_text(encoding='utf-8').strip()"],
}
"""File -> arguments of `Path` that no user typed: this process, results of libraries, and names that phigrow makes."""


def unread_paths(source: str, allowed: Collection[str] = ()) -> list[str]:
    """Return the places where a text becomes a path without `user_path`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        for passed in node.args:  # map(Path, words)
            if isinstance(passed, ast.Name) and passed.id == "Path" and name not in ("isinstance", "issubclass"):
                found.append(ast.unparse(node))
        if name == "expanduser":
            found.append(ast.unparse(node))
        if name != "Path" or not node.args or isinstance(node.args[0], ast.Constant):
            continue
        words = ", ".join(map(ast.unparse, node.args))
        owner, _, key = words.removeprefix("str(").removesuffix(")").rpartition(".")
        if words not in ("__file__", *allowed) and not (owner in ("config", "self") and key in PATH_KEYS):
            found.append(ast.unparse(node))
    return found


def test_text_of_users_becomes_a_path_in_one_place():
    found = {}
    for path in set(ROOT.rglob("*.py")) - {ROOT / "files" / "paths.py"}:
        name = path.relative_to(ROOT).as_posix()
        found[name] = unread_paths(path.read_text(), ALLOWED.get(name, ()))
    assert {file: places for file, places in found.items() if places} == {}


def test_a_path_that_is_made_elsewhere_is_noticed():
    # Negative control of the walk.
    source = (
        "Path(out)\nmap(Path, roots)\nPath(config.arm)\nuser_path(out)\nPath(config.init)\nPath(out).expanduser()\n"
    )
    assert sorted(unread_paths(source)) == [
        "Path(config.arm)", "Path(out)", "Path(out)", "Path(out).expanduser()", "map(Path, roots)",
    ]  # fmt: skip
