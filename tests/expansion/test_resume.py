"""Kills, full disks, locks and renames: the destination is complete, or visibly not there."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import phi_config, phi_model

import phigrow
from phigrow.errors import GrowthError
from phigrow.files.staged_folder import JOURNAL, StagedFolder

SRC, DST = phi_config(32, 4, 48, 2, 4), phi_config(72, 6, 70, 3, 4)

# Blocks of 300 values and a pause at every write, so that a tiny expansion lasts long enough to be killed anywhere.
SLOW = """
import json, phigrow, shutil, sys, time
phigrow.expand("src", json.load(open("dst.json")), "warm", method=sys.argv[1])  # transformers is imported here
shutil.rmtree("warm")
import phigrow.expansion.write_tensors, phigrow.checkpoints.writer
phigrow.expansion.write_tensors.BLOCK_VALUES = 300
write = phigrow.checkpoints.writer.CheckpointWriter.write
def slow(self, *arguments):
    time.sleep(0.004)
    return write(self, *arguments)
phigrow.checkpoints.writer.CheckpointWriter.write = slow
print("ready", flush=True)
phigrow.expand("src", json.load(open("dst.json")), "out", method=sys.argv[1], shard_size="60KB")
"""


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "phigrow.json"}


@pytest.fixture
def workplace(tmp_path, save_model, monkeypatch):
    save_model(phi_model(SRC, torch.float32))
    (tmp_path / "dst.json").write_text(json.dumps(DST))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("phigrow.expansion.write_tensors.BLOCK_VALUES", 300)
    return tmp_path


def start(method: str) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", SLOW, method], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.slow
def test_kill_at_any_moment_then_resume_to_the_same_bytes(workplace):
    rng = random.Random(0)
    whole = {
        m: content(phigrow.expand("src", DST, f"whole-{m}", method=m, shard_size="60KB")) for m in ("wr", "lossless")
    }
    kept, unfinished = [], 0
    for trial in range(6):
        method = ("wr", "lossless")[trial % 2]
        for _ in range(3):
            with start(method) as child:
                time.sleep(rng.uniform(0.0, 0.6))
                child.send_signal(signal.SIGKILL)
            if (workplace / "out").exists():
                break
            unfinished += 1
            journal = workplace / ".out.partial" / JOURNAL
            kept.append(journal.read_text().count("\n") if journal.exists() else 0)
        phigrow.expand("src", DST, "out", method=method, shard_size="60KB", overwrite=True)
        assert content(workplace / "out") == whole[method]
        assert sorted(p.name for p in workplace.iterdir() if p.name.startswith(".")) == []
        shutil.rmtree(workplace / "out")
    assert unfinished >= 6  # most kills came in the middle ...
    assert max(kept) > 20  # ... and found work that was kept


def test_a_resumed_run_writes_only_what_is_missing(workplace, monkeypatch):
    import phigrow.checkpoints.writer

    write = phigrow.checkpoints.writer.CheckpointWriter.write
    calls: list[str] = []

    def interrupted(self, name, row, values):
        calls.append(name)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return write(self, name, row, values)

    monkeypatch.setattr(phigrow.checkpoints.writer.CheckpointWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        phigrow.expand("src", DST, "out", method="wr")
    assert not (workplace / "out").exists()
    before = len((workplace / ".out.partial" / JOURNAL).read_text().splitlines()) - 1
    assert before >= 30
    calls.clear()
    calls.extend([""] * 100)  # past the interruption
    phigrow.expand("src", DST, "out", method="wr")
    written = len(calls) - 100
    fresh = phigrow.expand("src", DST, "fresh", method="wr")
    total = len(calls) - 100 - written
    assert written == total - before
    assert content(workplace / "out") == content(fresh)


def test_damage_to_what_was_finished_is_noticed_and_mended(workplace, monkeypatch):
    import phigrow.checkpoints.writer

    calls: list[int] = []
    write = phigrow.checkpoints.writer.CheckpointWriter.write

    def interrupted(self, name, row, values):
        calls.append(row)
        if len(calls) == 60:
            raise KeyboardInterrupt
        return write(self, name, row, values)

    monkeypatch.setattr(phigrow.checkpoints.writer.CheckpointWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        phigrow.expand("src", DST, "out", method="tile")
    shard = workplace / ".out.partial" / "content" / "model.safetensors"
    data = bytearray(shard.read_bytes())
    length = int.from_bytes(data[:8], "little")
    data[8 + length + 100] ^= 1  # one bit of the embedding, which is written first
    shard.write_bytes(data)
    phigrow.expand("src", DST, "out", method="tile")
    assert content(workplace / "out") == content(phigrow.expand("src", DST, "fresh", method="tile"))


def test_what_is_left_of_another_expansion_is_not_continued(workplace, monkeypatch):
    import phigrow.checkpoints.writer

    def interrupted(self, name, row, values):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(phigrow.checkpoints.writer.CheckpointWriter, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            phigrow.expand("src", DST, "out", method="wr", seed=1)
    out = phigrow.expand("src", DST, "out", method="wr", seed=2, shard_size="60KB")
    assert content(out) == content(phigrow.expand("src", DST, "fresh", method="wr", seed=2, shard_size="60KB"))


def test_a_source_that_was_replaced_is_not_mixed_into_what_is_left(workplace, monkeypatch):
    import phigrow.checkpoints.writer

    calls: list[int] = []
    write = phigrow.checkpoints.writer.CheckpointWriter.write

    def interrupted(self, name, row, values):
        calls.append(row)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return write(self, name, row, values)

    with monkeypatch.context() as patch:
        patch.setattr(phigrow.checkpoints.writer.CheckpointWriter, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            phigrow.expand("src", DST, "out", method="wr")
    (file,) = (workplace / "src").glob("*.safetensors")
    stat, tensors = file.stat(), load_file(file)
    save_file({name: -value for name, value in tensors.items()}, file, {"format": "pt"})
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    out = phigrow.expand("src", DST, "out", method="wr")
    assert content(out) == content(phigrow.expand("src", DST, "fresh", method="wr"))


@pytest.mark.slow
def test_two_writers_of_one_output(workplace):
    with start("wr") as child:
        deadline = time.monotonic() + 120  # the child imports transformers first, which checks the configuration
        while not (workplace / ".out.partial" / JOURNAL).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(GrowthError, match=r"another process is writing this output\n  where: .*out"):
            phigrow.expand("src", DST, "out", method="wr")
    assert child.returncode == 0
    assert load_file(next((workplace / "out").glob("*.safetensors")))


def test_an_interrupted_replacement_keeps_one_of_the_two(workplace, monkeypatch):
    out = phigrow.expand("src", DST, "out", method="wr", seed=1)
    old = content(out)
    rename = Path.rename

    def broken(self, target):
        if self.name == "content":
            os.kill(os.getpid(), 0)
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(KeyboardInterrupt):
        phigrow.expand("src", DST, "out", method="wr", seed=2, overwrite=True)
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    assert content(workplace / "out") == old
    again = phigrow.expand("src", DST, "out", method="wr", seed=2, overwrite=True)
    assert content(again) != old
    assert sorted(p.name for p in workplace.iterdir() if p.name.startswith(".")) == []


def test_too_little_space_is_said_before_anything_is_written(workplace, monkeypatch):
    usage = shutil.disk_usage(workplace)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        GrowthError, match=r"too little space is left for the output: it needs 0\.000 GB, 0\.000 GB are free"
    ):
        phigrow.expand("src", DST, "out")
    assert sorted(p.name for p in workplace.iterdir()) == ["dst.json", "src"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_fills_up(workplace, monkeypatch):
    small = workplace / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(small)], check=False)
    if mounted.returncode != 0:
        pytest.skip("this machine does not let root mount")
    try:
        with pytest.raises(GrowthError, match="too little space is left"):
            phigrow.expand("src", DST, small / "out")
        # Another writer takes the space after the check: the writes themselves fail.
        usage = shutil.disk_usage(small)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**12))
        with pytest.raises(GrowthError, match=r"the output cannot be written\n(.*\n)*.*No space left on device"):
            phigrow.expand("src", DST, small / "out")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_folder_that_cannot_be_written(workplace, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(GrowthError, match=r"the output cannot be written\n(.*\n)*.*Permission denied"):
        phigrow.expand("src", DST, "locked/out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_unless_allowed(workplace, save_model, value):
    model = phi_model(SRC, torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.fc2.weight[3, 5] = value
    save_model(model, "broken")
    with pytest.raises(
        GrowthError, match=r"the weights hold NaN or infinities\n  where: model.layers.1.mlp.fc2.weight"
    ) as caught:
        phigrow.expand("broken", DST, "out")
    assert "--allow-nonfinite" in str(caught.value)
    assert not (workplace / "out").exists()
    assert not list(workplace.glob(".out*"))
    out = phigrow.expand("broken", DST, "out", allow_nonfinite=True)
    assert not bool(torch.isfinite(load_file(out / "model.safetensors")["model.layers.2.mlp.fc2.weight"]).all())


def test_the_journal_decides_whether_a_hidden_folder_is_continued(tmp_path):
    folder = tmp_path / ".out.partial"
    folder.mkdir()
    (folder / JOURNAL).write_bytes(b"\x00\xff nothing\n")
    (folder / "kept").write_text("x")
    with pytest.raises(GrowthError, match=r".out.partial exists, and phigrow did not make it"):
        StagedFolder(tmp_path / "out", {"a": 1})
    (folder / JOURNAL).write_bytes(b'{"a": 0}\n')
    with StagedFolder(tmp_path / "out", {"a": 1}) as partial:
        assert not partial.resumed
        assert sorted(p.name for p in folder.iterdir()) == ["content", JOURNAL]
        partial.record("t", 0, "abc")
    (folder / JOURNAL).write_bytes((folder / JOURNAL).read_bytes() + b'["t", 5, "cut of')
    with StagedFolder(tmp_path / "out", {"a": 1}) as partial:
        assert partial.resumed
        assert partial.done == {("t", 0): "abc"}
    with StagedFolder(tmp_path / "out", {"a": 2}) as partial:  # negative control: another identity
        assert partial.done == {}
