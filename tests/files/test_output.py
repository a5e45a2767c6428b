"""An output that cannot be written is an error in words, wherever it is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from phigrow.errors import GrowthError
from phigrow.files.output import make_folder, writing


@pytest.fixture
def beyond(tmp_path) -> Path:
    """A folder that cannot be made, because a file stands above it."""
    (tmp_path / "file").write_text("text")
    return tmp_path / "file" / "out"


def test_only_what_the_operating_system_refuses_is_told(tmp_path, beyond):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(GrowthError) as error:
        make_folder(beyond)
    assert str(error.value) == (
        f"the output cannot be written\n  where: {beyond}\n  why: [Errno 20] Not a directory: '{beyond}'\n"
        "  what to do: choose a place where you may write and that has enough space"
    )
    with pytest.raises(KeyError), writing(tmp_path):  # negative control
        raise KeyError("something else")


def refused(beyond: Path):
    return pytest.raises(GrowthError, match=rf"the output cannot be written\n  where: {beyond}\S*\n  why: \[Errno")


def test_packed_blocks(tmp_path, beyond):
    from phigrow.corpus import prepare

    (tmp_path / "a.txt").write_text("text")
    with refused(beyond):
        prepare(tmp_path / "a.txt", beyond, progress=False)


def test_a_run(beyond):
    from phigrow.training import RunConfig
    from phigrow.training.checkpoints import claim
    from phigrow.training.process import forget_stop

    forget_stop(beyond / "stop")  # left to the claim, which every rank hears of
    with refused(beyond):
        claim(beyond, RunConfig().reproducibility_keys(), resume=True)
