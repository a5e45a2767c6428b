"""Hostile and broken checkpoints: each one clear error, exit code 2, and nothing written or run."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from broken import BROKEN, SRC, config, value
from safetensors.torch import load_file
from tiny_models import phi_config, phi_model

import phigrow
import phigrow.cli
from phigrow.errors import MOST_CHARACTERS, GrowthError
from phigrow.files.untrusted import contained

DST = phi_config(48, 6, 60, 3, 4)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    phi_model(SRC, torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def place(sound, tmp_path, monkeypatch):
    """A folder with a sound checkpoint ``src``, a destination ``dst.json``, and something outside to point at."""
    work = tmp_path / "work"
    work.mkdir()
    shutil.copytree(sound, work / "src")
    (work / "dst.json").write_text(json.dumps(DST))
    (tmp_path / "secret.json").write_text('{"password": 1}')
    shutil.copyfile(sound / "model.safetensors", tmp_path / "other.safetensors")
    monkeypatch.chdir(work)
    return work


def tree(folder):
    return sorted((str(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*"))


def refused(monkeypatch, capsys, *words):
    """Run `phigrow expand` as typed, in this process; the message on stderr of a run that must end with 2."""
    command = ["phigrow", "expand", "--src", "src", "--dst-config", "dst.json", "--method", "lossless", *words]
    monkeypatch.setattr(sys, "argv", command)
    before = tree(Path.cwd())
    with pytest.raises(SystemExit) as done:
        phigrow.cli.main()
    said = capsys.readouterr().err
    assert done.value.code == 2, said
    assert tree(Path.cwd()) == before
    assert said.count("error: ") == 1
    assert "Traceback" not in said
    return said[said.index("error: ") :]


@pytest.mark.parametrize("case", BROKEN)
def test_every_broken_checkpoint_is_one_error_and_nothing_written(case, place, monkeypatch, capsys):
    break_it, message = BROKEN[case]
    ran = place.parent / "ran"
    (place / "src" / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Mine: pass\n")
    break_it(place / "src")
    said = refused(monkeypatch, capsys)
    assert message in said
    assert said.replace("\n", "").isprintable()
    assert not ran.exists()


def test_the_unbroken_folder_is_grown(place, monkeypatch):
    # Negative control of the table above: what is refused there is refused for its damage.
    words = ["phigrow", "expand", "--src", "src", "--dst-config", "dst.json", "--method", "lossless", "--out", "out"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as done:
        phigrow.cli.main()
    assert done.value.code in (0, None)
    assert phigrow.verify("src", "out", tokens=16).passed


@pytest.mark.parametrize("case", ["NaN", "Inf"])
def test_what_is_not_finite_passes_when_told_so(case, place):
    BROKEN[case][0](place / "src")
    out = phigrow.expand("src", DST, "out", method="wr", allow_nonfinite=True)
    assert not load_file(out / "model.safetensors")["model.layers.2.mlp.fc1.weight"].isfinite().all()


def test_overflow_of_float16_names_the_tensor(place, monkeypatch, capsys):
    value(1e6)(place / "src")
    said = refused(monkeypatch, capsys, "--dtype", "float16")
    assert "values do not fit float16\n  where: model.layers.2.mlp.fc1.weight" in said


def test_broken_destinations_are_refused(place, monkeypatch, capsys):
    for new, message in (
        ({"hidden_size": 1 << 40}, f"hidden_size is {1 << 40}, but phigrow accepts at most {1 << 20}"),
        ({"partial_rotary_factor": "half"}, "partial_rotary_factor is 'half'"),
        ({"partial_rotary_factor": 1.0}, "the part of a head that is not rotary, 4 -> 0 coordinates"),
        ({"hidden_act": "\ud800"}, "surrogates not allowed"),
        ({"initializer_range": -1}, "initializer_range is -1"),
        ({"resid_pdrop": [1]}, "resid_pdrop is [1]"),
    ):
        (place / "dst.json").write_text(json.dumps(DST | new))
        assert message in refused(monkeypatch, capsys)


def test_a_configuration_that_asks_for_remote_code_is_grown_without_it(place):
    ran = place.parent / "ran"
    (place / "src" / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config(auto_map=auto_map)(place / "src")
    plan = phigrow.plan("src", DST | {"auto_map": auto_map}, "lossless")
    asked = [note for note in plan.notes if "asks for remote code (auto_map): none was run" in note]
    assert [note.split()[1] for note in asked] == ["source", "destination"]
    out = phigrow.expand("src", DST | {"auto_map": auto_map}, "out", method="lossless")
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert not list(out.glob("*.py"))
    assert phigrow.verify("src", out, tokens=16).passed
    assert not ran.exists()


def test_the_cache_of_the_hub_is_made_of_links_and_works(place):
    repository = place / "cache" / "models--someone--phi"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for k, file in enumerate(sorted((place / "src").iterdir())):
        shutil.copyfile(file, repository / "blobs" / f"hash{k}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash{k}")
    expected = phigrow.expand("src", DST, "expected")
    out = phigrow.expand(snapshot, DST, "out")
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    # Not into another repository of the cache, and not to anything of its own but blobs.
    (place / "cache" / "models--someone--else" / "blobs").mkdir(parents=True)
    for target in ("../../../models--someone--else/blobs/x", "../../refs/main", "../../../../dst.json"):
        (snapshot / "tokenizer.json").unlink(missing_ok=True)
        (snapshot / "tokenizer.json").symlink_to(target)
        with pytest.raises(GrowthError, match="a symbolic link leads out of its folder"):
            phigrow.expand(snapshot, DST, "again")
    # A link inside the folder stays inside.
    (place / "src" / "tokenizer.json").symlink_to("config.json")
    phigrow.expand("src", DST, "inside")


def test_messages_are_bounded_and_have_no_control_characters():
    error = GrowthError("\x1b[31mred", where="x" * 10**6, why="\ud800 two\nlines")
    assert str(error).startswith("\\x1b[31mred\n  where: xxx")
    assert "\\ud800 two\n    | lines" in str(error)
    assert len(str(error)) < MOST_CHARACTERS + 200
    str(error).encode()


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "generation_config.json"])
def test_links_in_a_circle_are_refused_by_every_python(tmp_path, monkeypatch, name):
    (tmp_path / name).symlink_to("other")
    (tmp_path / "other").symlink_to(name)
    # Since Python 3.13 `resolve` does not raise for a circle.
    monkeypatch.setattr(Path, "resolve", lambda path, strict=False: Path(os.path.abspath(path)))
    with pytest.raises(GrowthError, match=r"the path cannot be resolved[\s\S]*replace the link with the file itself"):
        contained(tmp_path, name)
    (tmp_path / "self").symlink_to("self")
    with pytest.raises(GrowthError, match="the path cannot be resolved"):
        contained(tmp_path, "self")
    # A link to a file that is missing leads nowhere, and is no circle.
    (tmp_path / "dangling").symlink_to("missing")
    assert contained(tmp_path, "dangling") == tmp_path / "dangling"
