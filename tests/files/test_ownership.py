"""phigrow replaces and removes only what it wrote: folders, single files, and hidden names."""

import json

import pytest
from matplotlib.figure import Figure

from phigrow.errors import GrowthError
from phigrow.files.atomic import atomic_json, atomic_path, atomic_write
from phigrow.files.output import check_file, json_keys
from phigrow.files.picture import write_picture
from phigrow.files.staged_folder import JOURNAL, StagedFolder, staged_folder

FOREIGN = r"\.out\.partial exists, and phigrow did not make it"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["a folder with files", "a file", "a link", "a journal of another program"])
def test_a_hidden_name_that_a_user_owns_is_refused_and_kept(tmp_path, kind):
    hidden = tmp_path / ".out.partial"
    if kind == "a file":
        hidden.write_text("mine")
    elif kind == "a link":
        (tmp_path / "elsewhere").mkdir()
        hidden.symlink_to("elsewhere")
    else:
        hidden.mkdir()
        (hidden / "mine").write_text("mine")
    if kind.startswith("a journal"):
        (hidden / JOURNAL).write_text("Monday: nothing happened\n")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(GrowthError, match=FOREIGN), staged_folder(tmp_path / "out"):
        pass
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_an_empty_hidden_folder_is_no_obstacle(tmp_path):
    # A kill between making the folder and its journal leaves one. Negative control of the test before.
    (tmp_path / ".out.partial").mkdir()
    with staged_folder(tmp_path / "out") as folder:
        (folder / "new").touch()
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / JOURNAL).touch()
    with staged_folder(tmp_path / "out") as folder:
        (folder / "newer").touch()
    assert names(tmp_path / "out") == ["newer"]
    assert names(tmp_path) == ["out"]


def test_folders_beside_the_output_are_left_alone(tmp_path):
    for name in (".out.replaced", ".out.source"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    for _ in range(2):  # the second time, an older folder is replaced
        with staged_folder(tmp_path / "out") as folder:
            (folder / "new").touch()
    assert names(tmp_path) == [".out.replaced", ".out.source", "out"]
    assert (tmp_path / ".out.replaced" / "mine").read_text() == "mine"


def test_a_hidden_file_that_a_user_owns_is_kept(tmp_path):
    (tmp_path / ".a.json.partial.json").write_text("mine")
    atomic_json(tmp_path / "a.json", {"k": 1})

    def fail():
        with atomic_path(tmp_path / "a.json") as path:
            path.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names(tmp_path) == [".a.json.partial.json", "a.json"]
    assert (tmp_path / ".a.json.partial.json").read_text() == "mine"
    assert json.loads((tmp_path / "a.json").read_text()) == {"k": 1}


def test_what_a_kill_left_of_a_file_is_not_published(tmp_path):
    with StagedFolder(tmp_path / "out", {"a": 1}) as staged:
        (staged.path / ".a.json.partial.json").write_text("half")
        (staged.path / "whole").touch()
    with StagedFolder(tmp_path / "out", {"a": 1}) as staged:
        assert staged.resumed
        staged.finish(overwrite=False)
    assert names(tmp_path / "out") == ["whole"]


class Killed(BaseException):
    """A kill: nothing that follows is run."""


def kill_at_rename(monkeypatch, number):
    """Stop at the Nth rename of a folder, as if the process ended there."""
    from pathlib import Path

    rename, calls = Path.rename, []

    def counted(self, target):
        calls.append(self)
        if len(calls) >= number:
            raise Killed
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", counted)


@pytest.mark.parametrize("number", [1, 2])
def test_a_kill_during_the_replacement_loses_neither_folder(tmp_path, monkeypatch, number):
    out = tmp_path / "out"
    with staged_folder(out) as folder:
        (folder / "old").touch()
    with StagedFolder(out, {"a": 1}) as staged:
        (staged.path / "new").touch()
        staged.record("new", 0, "checksum")
        with monkeypatch.context() as patch:
            kill_at_rename(patch, number)
            with pytest.raises(Killed):
                staged.finish(overwrite=True)
    # The journal is still there, so the work is continued, and the older folder is where it was or comes back.
    with StagedFolder(out, {"a": 1}) as staged:
        assert names(out) == ["old"]
        assert staged.resumed
        assert staged.done == {("new", 0): "checksum"}
        staged.finish(overwrite=True)
    assert names(out) == ["new"]
    assert names(tmp_path) == ["out"]


def test_a_kill_after_the_rename_leaves_nothing_to_continue(tmp_path, monkeypatch):
    import phigrow.files.staged_folder as module

    out = tmp_path / "out"
    with StagedFolder(out, {"a": 1}) as staged:
        (staged.path / "new").touch()
        with monkeypatch.context() as patch:
            patch.setattr(module, "discard", lambda _: None)
            staged.finish(overwrite=False)
    with StagedFolder(out, {"a": 1}) as staged:
        assert not staged.resumed
        assert names(staged.path) == []
    assert names(out) == ["new"]


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_picture_replaces_a_picture_of_phigrow_only(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    figure = Figure(figsize=(1, 1))
    write_picture(figure, path, {})
    first = path.read_bytes()
    write_picture(figure, path, {})
    assert path.read_bytes() == first
    figure.savefig(path)  # without the mark: a picture of somebody else
    other = path.read_bytes()
    with pytest.raises(GrowthError, match=r"the output exists, and it is not a picture or table that phigrow wrote"):
        write_picture(figure, path, {})
    assert path.read_bytes() == other
    path.write_bytes(b"")
    write_picture(figure, path, {})
    with pytest.raises(GrowthError, match=r"'\.gif' is not a known picture format"):
        write_picture(figure, tmp_path / "a.gif", {})


def test_a_table_for_a_paper_replaces_its_own_kind_only(tmp_path):
    from phigrow.measure import save

    save("% Written by phigrow report.\n1 & 2", tmp_path / "a.tex")
    save("% Written by phigrow report.\n3 & 4", tmp_path / "a.tex")
    (tmp_path / "a.tex").write_text("\\section{My thesis}")
    with pytest.raises(GrowthError, match="not a picture or table that phigrow wrote"):
        save("% Written by phigrow report.\n5 & 6", tmp_path / "a.tex")
    assert (tmp_path / "a.tex").read_text() == "\\section{My thesis}"


@pytest.mark.parametrize("content", ["{}", "[1]", '{"format": 1}', "\x00", "[" * 100_000])
def test_a_file_is_known_by_its_content(tmp_path, content):
    path = tmp_path / "a.json"

    def check():
        check_file(path, lambda file: "mine" in json_keys(file), "a record", "--save")

    check()  # nothing is there
    atomic_write(path, content)
    with pytest.raises(GrowthError, match=r"not a record that phigrow wrote\n  where: .*\n.*\n  what to do: .*--save"):
        check()
    atomic_write(path, '{"mine": 1}')
    check()
    path.unlink()
    path.mkdir()
    with pytest.raises(GrowthError, match="not a record that phigrow wrote"):
        check()
