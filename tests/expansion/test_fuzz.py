"""Random damage to headers, indexes and configurations: only GrowthError ever escapes (tests/fuzzing.py).

``PHIGROW_FUZZ_SECONDS`` and ``PHIGROW_FUZZ_SEED`` make it run longer or elsewhere; ``PHIGROW_FUZZ_INPUT`` repeats one.
"""

import os
import shutil
import time
from collections import Counter

import pytest
from fuzzing import Escaped, sound_layouts, try_one

import phigrow
from phigrow.errors import GrowthError

SEED = int(os.environ.get("PHIGROW_FUZZ_SEED", "0"))
SECONDS = float(os.environ.get("PHIGROW_FUZZ_SECONDS", "5"))


@pytest.fixture
def layouts(tmp_path):
    return sound_layouts(tmp_path / "sound")


@pytest.fixture
def work(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def fuzz(work, layouts, seed, seconds, capsys, record_property):
    only = os.environ.get("PHIGROW_FUZZ_INPUT")
    outcomes: Counter[str] = Counter()
    started = time.monotonic()
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    if only is not None:
        outcomes[try_one(work, layouts, seed, int(only))] += 1
        return outcomes
    while time.monotonic() - started < seconds:
        outcomes[try_one(work, layouts, seed, outcomes.total())] += 1
    if descriptors is not None:
        assert len(os.listdir("/proc/self/fd")) <= descriptors + 2, "files were left open"
    record_property("inputs", outcomes.total())
    with capsys.disabled():
        said = ", ".join(f"{count} {what}" for what, count in outcomes.most_common())
        print(f"\nfuzz: {outcomes.total()} inputs in {seconds:g} s, seed {seed}: {said}")
    assert outcomes.total() >= 5 * seconds  # it was run, and not on one slow input
    assert outcomes["refused"] > outcomes.total() / 4
    assert outcomes["grown"] > 0
    return outcomes


def test_no_damage_escapes_as_anything_but_a_growth_error(work, layouts, capsys, record_property):
    fuzz(work, layouts, SEED, SECONDS, capsys, record_property)


@pytest.mark.slow
def test_no_damage_escapes_in_a_longer_run(work, layouts, capsys, record_property):
    fuzz(work, layouts, SEED + 1, max(SECONDS, 30), capsys, record_property)


# Negative controls: the harness notices what it is there to notice.


def first_escape(work, layouts, grow):
    for number in range(200):
        shutil.rmtree(work)
        work.mkdir()
        try:
            try_one(work, layouts, 0, number, grow=grow)
        except Escaped as escaped:
            return str(escaped) if f"PHIGROW_FUZZ_SEED=0 PHIGROW_FUZZ_INPUT={number} " in str(escaped) else "no number"
    return "nothing escaped"


def test_another_exception_is_noticed(work, layouts, monkeypatch):
    import phigrow.checkpoints.reader

    def careless(path, what):
        import json

        return json.loads(path.read_text())

    monkeypatch.setattr(phigrow.checkpoints.reader, "read_json_strict", careless)
    assert "Error: " in first_escape(work, layouts, phigrow.expand)


def test_what_a_refusal_leaves_behind_is_noticed(work, layouts):
    def untidy(src, dst, out, **how):
        (out.parent / "left").write_text("x")
        raise GrowthError("no")

    assert "a refusal that left ['left'] behind" in first_escape(work, layouts, untidy)


def test_a_grown_folder_that_is_not_whole_is_noticed(work, layouts):
    def careless(src, dst, out, **how):
        phigrow.expand(src, dst, out, **how)
        os.truncate(next(out.glob("*.safetensors")), 5000)

    assert "a grown folder that is not whole: the safetensors header gives a tensor a wrong shape" in first_escape(
        work, layouts, careless
    )


def test_a_message_that_a_terminal_would_obey_is_noticed(work, layouts):
    def rude(src, dst, out, **how):
        error = GrowthError("no")
        error.args = ("\x1b[2J",)
        raise error

    assert "a message that is no text for a terminal" in first_escape(work, layouts, rude)
