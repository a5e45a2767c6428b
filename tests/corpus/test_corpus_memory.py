"""Packing needs no more memory for more text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from phigrow.corpus import train_tokenizer

WORK = """
import sys, threading, time
from pathlib import Path
from phigrow.corpus import prepare

text, out, tokenizer, hold = sys.argv[1:]
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
prepare(text, out, seq_len=256, tokenizer=tokenizer, progress=False)
held = Path(text).read_text() if hold else ""
print(max(peak, anonymous()))
"""
"""Prints the peak in kB of memory that is not pages of files; with ``hold`` all of the text is in memory at the end."""


def peak(folder: Path, name: str, hold: str = "") -> float:
    words = [
        sys.executable,
        "-c",
        WORK,
        str(folder / f"{name}.jsonl"),
        str(folder / f"{name}{hold}"),
        str(folder / "t"),
    ]
    done = subprocess.run([*words, hold], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1024


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from Linux's /proc")
def test_memory_does_not_grow_with_the_text(tmp_path):
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), 5)) for _ in range(3000)]
    train_tokenizer(words, 4000).save_pretrained(tmp_path / "t")
    # Short documents: what is held of a batch of them is small beside either text.
    for name, count in (("small", 6000), ("large", 48000)):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                file.write(json.dumps({"text": " ".join(rng.choice(words, 200))}) + "\n")
    text = (tmp_path / "large.jsonl").stat().st_size / 2**20
    assert text > 50
    small, large, held = peak(tmp_path, "small"), peak(tmp_path, "large"), peak(tmp_path, "large", "hold")
    assert large - small < text / 2
    assert held - small > 0.9 * text  # negative control
