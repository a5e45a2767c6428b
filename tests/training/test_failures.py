"""Ranks that are killed and runs that are stopped, at random moments: nothing before the last checkpoint is lost."""

from __future__ import annotations

import functools
import random
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from jobs import SAVE_EVERY, STEPS, finish, last_step, launcher, prepared, ranks_of, start, wait_for, words
from launching import losses, records

from phigrow.checkpoints.integrity import MARKER, damage
from phigrow.checkpoints.run_checkpoints import FOLDER, marked_checkpoints
from phigrow.measure import load_run

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = prepared(tmp_path_factory.mktemp("failures"))
    code, output = finish(start([*launcher(2), *words(folder, "whole")]))
    assert code == 0, output[-6000:]
    return folder


def saving(out: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any(not (path / MARKER).exists() for path in (out / FOLDER).glob("step-*"))


def reached_step(out: Path, step: int) -> bool:
    return last_step(out) >= step


def test_killed_at_random_moments_a_run_loses_no_checkpoint_and_repeats_every_bit(folder):
    out, rng = folder / "killed", random.Random(7)
    for attempt in range(4):
        job = start([*launcher(2), *words(folder, "killed")])
        target = min(last_step(out) + rng.randint(3, 17), STEPS - 8)
        wait_for(functools.partial(reached_step, out, target), job)
        if attempt % 2:  # during a save
            wait_for(lambda: saving(out), job)
        victim = rng.randrange(2)
        ranks_of(job)[victim].send_signal(signal.SIGKILL)
        code, output = finish(job, 90)
        assert code != 0
        reached, found = last_step(out), marked_checkpoints(out)[0]
        # At most the steps since the last checkpoint: one that was due was being written.
        assert found[-1].progress.step >= reached - SAVE_EVERY
        assert not damage(found[-1].folder, found[-1].marker["files"])
        assert f"rank {1 - victim} lost another rank" in output
        assert f"The same command continues from the checkpoint of step {found[-1].progress.step}" in output
    code, output = finish(start([*launcher(2), *words(folder, "killed")]))
    assert code == 0, output[-6000:]
    assert [r["step"] for r in records(out, "step")] == list(range(1, STEPS + 1))
    assert losses(out) == losses(folder / "whole")
    assert losses(out, "eval") == losses(folder / "whole", "eval")
    assert len(records(out, "resume")) >= 1
    assert not load_run(out).notes


def test_after_a_lost_rank_it_goes_on_with_fewer_by_one_flag(folder):
    out = folder / "fewer"
    job = start([*launcher(2), *words(folder, "fewer")])
    wait_for(lambda: last_step(out) >= 13, job)
    ranks_of(job)[1].send_signal(signal.SIGKILL)
    assert finish(job, 90)[0] != 0
    code, output = finish(start([*launcher(1), *words(folder, "fewer")]))
    assert code == 2
    assert "add --universal" in output
    code, output = finish(start([*launcher(1), *words(folder, "fewer"), "--universal"]))
    assert code == 0, output[-6000:]
    assert [r["step"] for r in records(out, "step")] == list(range(1, STEPS + 1))
    np.testing.assert_allclose(losses(out), losses(folder / "whole"), rtol=1e-5)
    # The negative control of the tolerance: neighbouring steps differ by far more.
    assert np.median(np.abs(np.diff(losses(out)))) > 1e-3


@pytest.mark.parametrize("how", ["SIGTERM", "SIGHUP", "SIGUSR1", "file"])
def test_a_run_that_is_asked_to_stop_saves_and_exits_with_code_0(folder, how):
    out = folder / f"asked-{how}"
    shutil.rmtree(out, ignore_errors=True)
    job = start([*launcher(2), *words(folder, out.name, save_every=1000)])
    wait_for(lambda: last_step(out) >= 7, job)
    if how == "file":
        (out / "stop").touch()
    else:
        for rank in ranks_of(job)[1:]:
            rank.send_signal(getattr(signal, how))
            rank.send_signal(getattr(signal, how))  # launchers do
    code, output = finish(job)
    assert code == 0, output[-6000:]
    assert "as asked; the same command resumes from the checkpoint of step" in output
    (found,), _ = marked_checkpoints(out)
    assert 7 <= last_step(out) == found.progress.step < STEPS
    assert not (out / "stop").exists()
    if how != "file":
        return  # the same from here on
    code, output = finish(start([*launcher(2), *words(folder, out.name, save_every=1000)]))
    assert code == 0, output[-6000:]
    assert losses(out) == losses(folder / "whole")


def test_a_rank_that_stops_is_named_before_the_timeout_and_the_other_says_where_it_waited(folder):
    out = folder / "halted"
    job = start([*launcher(2), *words(folder, out.name)], DEEPSPEED_TIMEOUT="1")
    wait_for(lambda: last_step(out) >= 7, job)
    halted = ranks_of(job)[1]
    halted.send_signal(signal.SIGSTOP)
    try:
        wait_for(lambda: not ranks_of(job)[:-1] or ranks_of(job)[0] == halted, job, 120)
    finally:
        halted.send_signal(signal.SIGKILL)
    code, output = finish(job, 90)
    assert code != 0
    assert re.search(
        r"notice: no step has ended for 3\d s\n  rank 0: step \d+, .*phigrow/training/.*\n  rank 1: no ans", output
    )
    assert re.search(r"error: rank 0 lost another rank\n  where: step \d+ .*after [56]\d s\n  why: .*imed out", output)
    assert "The same command continues from the checkpoint of step" in output
