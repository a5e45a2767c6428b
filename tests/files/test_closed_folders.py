"""Read-only inputs and places that cannot be written, as a user without root's rights meets them."""

from __future__ import annotations

import os
import re
import shutil
import stat
from pathlib import Path

import pytest

import phigrow
from phigrow.checkpoints.companions import Companions
from phigrow.errors import GrowthError
from phigrow.files.folder_copy import copy_folder
from phigrow.files.output import check_writable
from phigrow.files.staged_folder import remove, staged_folder


def close(folder: Path) -> Path:
    """Take the rights to write from a folder, as `chmod -R a-w` does."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            Path(root, name).chmod(0o444)
        Path(root).chmod(0o555)
    return folder


@pytest.fixture
def closed(unprivileged: Path) -> Path:
    folder = unprivileged / "closed"
    (folder / "inner" / "deep").mkdir(parents=True)
    (folder / "a").write_text("A")
    (folder / "inner" / "deep" / "b").write_text("B")
    return close(folder)


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_the_user_of_these_tests_has_no_rights_of_root(closed, unprivileged):
    with pytest.raises(PermissionError):
        (closed / "new").mkdir()
    shutil.copytree(closed, unprivileged / "copy")  # negative control: with its modes, the copy cannot be removed
    with pytest.raises(PermissionError):
        shutil.rmtree(unprivileged / "copy")


@pytest.mark.parametrize("link", [False, True])
def test_a_read_only_folder_is_copied_and_the_copy_can_be_changed(closed, unprivileged, link):
    for _ in range(2):  # the second time replaces the first
        with staged_folder(unprivileged / "out") as folder:
            copy_folder(closed, folder, link=link)
        assert files(unprivileged / "out") == {"a": "A", "inner/deep/b": "B"} == files(closed)
        modes = {
            stat.S_IMODE(path.stat().st_mode) & 0o200 for path in (unprivileged / "out").rglob("*") if path.is_dir()
        }
        assert modes == {0o200}
    assert (os.stat(unprivileged / "out" / "a").st_nlink == 2) == link
    remove(unprivileged / "out")
    assert sorted(path.name for path in unprivileged.iterdir()) == ["closed"]
    assert files(closed) == {"a": "A", "inner/deep/b": "B"}


def test_a_folder_that_a_copy_of_modes_left_behind_is_removed(closed, unprivileged):
    leftover = unprivileged / ".out.partial"
    (leftover / "content" / "step-1").mkdir(parents=True)
    (leftover / "content" / "step-1" / "weights").write_text("x")
    close(leftover / "content")
    with staged_folder(unprivileged / "out") as folder:
        (folder / "new").write_text("N")
    assert files(unprivileged / "out") == {"new": "N"}
    assert not leftover.exists()
    remove(closed)
    assert not closed.exists()


def test_tokenizer_files_of_a_read_only_data_folder_reach_an_export(closed, unprivileged):
    data = unprivileged / "data" / "tokenizer"
    data.mkdir(parents=True)
    (data / "tokenizer.json").write_text("{}")
    (data / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    close(data.parent)
    for _ in range(2):
        with staged_folder(unprivileged / "export") as folder:
            Companions({"model_type": "phi"}, {}, "card", data).write(folder)
    assert '"PreTrainedTokenizerFast"' in (unprivileged / "export" / "tokenizer_config.json").read_text()
    assert '"TokenizersBackend"' in (data / "tokenizer_config.json").read_text()


def test_places_are_tried_before_they_are_needed(closed, unprivileged):
    check_writable(unprivileged / "new" / "folder" / "export")
    assert sorted(path.name for path in unprivileged.iterdir()) == ["closed"]  # nothing is left behind
    for place in (closed / "export", closed / "new" / "export", closed / "a" / "export", Path("/proc/export")):
        with pytest.raises(GrowthError, match=rf"the output cannot be written\n  where: {place}\n"):
            check_writable(place)
    mine = unprivileged / "export"
    mine.mkdir()
    check_writable(close(mine))  # the owner may open it again


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files of another user")
@pytest.mark.parametrize("name", ["export", ".export.partial"])
def test_folders_of_another_user_are_named(unprivileged, name):
    os.seteuid(0)
    (unprivileged / name / "inner").mkdir(parents=True)
    (unprivileged / name).chmod(0o755)
    os.seteuid(unprivileged.stat().st_uid)
    with pytest.raises(GrowthError, match=rf"cannot be written\n  where: .*\n  why: .*{re.escape(name)} would have"):
        check_writable(unprivileged / "export")
    check_writable(unprivileged / "other")  # negative control


def test_modes_are_copied_nowhere():
    root = Path(phigrow.__file__).parent
    takes_modes = re.compile(r"shutil\.(copytree|copy2|copy|copymode|copystat|move)\(")
    assert [str(path) for path in root.rglob("*.py") if takes_modes.search(path.read_text(encoding="utf-8"))] == []
    assert takes_modes.search("shutil.copy2(source, target)")  # negative control
