"""Packing and streaming need no more memory for more text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from phigrow.corpus import train_tokenizer

WATCH = """
import sys, threading, time
from pathlib import Path

peak = 0

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.01)

threading.Thread(target=watch, daemon=True).start()
"""
PACK = """
from phigrow.corpus import prepare

text, out, tokenizer, hold = sys.argv[1:]
prepare(text, out, seq_len=256, tokenizer=tokenizer, progress=False)
held = Path(text).read_text() if hold else ""
print(max(peak, anonymous()))
"""
STREAM = """
from phigrow.corpus import open_stream, stream_settings
from phigrow.corpus.streaming import ShuffledStream

text, _, tokenizer, hold = sys.argv[1:]
opened = open_stream(stream_settings({"ref": text, "tokenizer": tokenizer, "heldout": 20, "shuffle": 256}), 256)
shuffled, held, epoch = ShuffledStream(opened.streams[0], 256, (0,)), [], 0
while not epoch:
    blocks = shuffled.take(64)
    held += [blocks] if hold else []
    epoch = shuffled.stream.position()["epoch"]
print(max(peak, anonymous()))
"""
"""Both print the peak in kB of memory that is not pages of files; with ``hold`` all of the text is in memory at the end
(of a stream its blocks)."""


def peak(folder: Path, work: str, name: str, hold: str = "") -> float:
    words = [
        sys.executable,
        "-c",
        WATCH + work,
        str(folder / f"{name}.jsonl"),
        str(folder / f"{name}{hold}"),
        str(folder / "t"),
    ]
    done = subprocess.run([*words, hold], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three lengths of one kind of text, and a tokenizer."""
    folder, rng = tmp_path_factory.mktemp("memory"), np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), 5)) for _ in range(3000)]
    train_tokenizer(words, 4000).save_pretrained(folder / "t")
    # Short documents: what is held of a batch of them is small beside either text.
    for name, count in (("small", 6000), ("middle", 18000), ("large", 48000)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                file.write(json.dumps({"text": " ".join(rng.choice(words, 200))}) + "\n")
    return folder


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from Linux's /proc")
@pytest.mark.parametrize(
    ("work", "less"),
    [
        (PACK, "small"),
        (STREAM, "middle"),
    ],
    ids=["packing", "streaming"],
)
def test_memory_does_not_grow_with_the_text(folder, work, less):
    text, before = ((folder / f"{name}.jsonl").stat().st_size / 2**20 for name in ("large", less))
    assert text > 50
    small, large, held = peak(folder, work, less), peak(folder, work, "large"), peak(folder, work, "large", "hold")
    print(f"text of {before:.0f} MB: {small:.0f} MB; of {text:.0f} MB: {large:.0f} MB; all of it held: {held:.0f} MB")
    assert large - small < (text - before) / 2
    assert held - small > 0.9 * text  # negative control; of a stream, tokens of four bytes take more than the text
