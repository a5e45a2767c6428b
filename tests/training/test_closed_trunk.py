"""A branch starts from a trunk that may not be written, as another user's trunk or an archive."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from phigrow.checkpoints.integrity import digests, write_marker
from phigrow.checkpoints.run_checkpoints import marked_checkpoints
from phigrow.errors import GrowthError
from phigrow.training import RunConfig
from phigrow.training.branches import branch
from phigrow.training.export_place import check_export


@pytest.fixture
def trunk(unprivileged: Path) -> Path:
    """A trunk of mode 555, with one checkpoint; its settings are those of a run without any."""
    folder = unprivileged / "trunk" / "checkpoints" / "step-4"
    folder.mkdir(parents=True)
    (folder / "weights.pt").write_bytes(b"weights")
    content = {"progress": {"step": 4}, "world_size": 1, "stage": 1}
    write_marker(folder, content, digests(folder))
    (unprivileged / "trunk" / "run.json").write_text("{}")
    for root, _, names in os.walk(unprivileged / "trunk", topdown=False):
        for name in names:
            Path(root, name).chmod(0o444)
        Path(root).chmod(0o555)
    return unprivileged / "trunk"


def test_a_branch_of_a_read_only_trunk_can_be_changed(trunk, unprivileged):
    config = RunConfig(branch_from=str(trunk), steps=6, decay=2, warmup=0, schedule="wsd", data="data")
    out = unprivileged / "branch"
    branch(config, {}, out)
    (checkpoint,), damaged = marked_checkpoints(out)
    assert (checkpoint.progress.step, damaged) == (4, [])
    assert (checkpoint.folder / "weights.pt").read_bytes() == b"weights"
    (checkpoint.folder / "weights.pt").unlink()  # as a run removes the checkpoints before its last
    assert (trunk / "checkpoints" / "step-4" / "weights.pt").read_bytes() == b"weights"
    assert json.loads((trunk / "run.json").read_text()) == {}


def test_an_export_that_cannot_be_written_is_refused_before_the_first_step(trunk, unprivileged):
    check_export(unprivileged / "run", "export")
    assert not (unprivileged / "run").exists()
    for out, export in ((unprivileged / "run", str(trunk / "export")), (trunk / "run", "export")):
        with pytest.raises(GrowthError, match=r"the output cannot be written\n  where: .*export\n  why: .*Permission"):
            check_export(out, export)
