"""Peak memory and speed of `phigrow data`: the same text once, 4 and 16 times as much, each in a process of its own.

    python benchmarks/data.py books.parquet --copies 1 4 16

Every copy gets a number in front of each document, so that none counts as a duplicate. ``anonymous`` is memory that the
process cannot give back (RssAnon); ``resident`` counts the pages of memory-mapped files too, which the system takes
back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

CHILD = """
import json, sys
from phigrow.corpus import prepare
folder, out, tokenizer, workers = sys.argv[1:]
info = prepare(folder, out, seq_len=2048, tokenizer=tokenizer, num_proc=int(workers), progress=False)
print(json.dumps([info.train.tokens_seen + info.heldout.tokens_seen, info.packing_efficiency]))
"""


def status(pid: int) -> dict[str, int]:
    """Memory of one process in kB, by the names of /proc; nothing where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "VmRSS"))}


def measure(folder: Path, out: Path, tokenizer: Path, workers: int) -> dict[str, float]:
    """Prepare a folder in a child, looking at its memory twenty times a second."""
    began = time.perf_counter()
    words = [sys.executable, "-c", CHILD, str(folder), str(out), str(tokenizer), str(workers)]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    peak = {"RssAnon": 0, "VmRSS": 0}
    while child.poll() is None:
        for name, value in status(child.pid).items():
            peak[name] = max(peak[name], value)
        time.sleep(0.05)
    seconds = time.perf_counter() - began
    assert child.stdout is not None
    tokens, efficiency = json.loads(child.stdout.read())
    return {
        "tokens": tokens,
        "packing_efficiency": efficiency,
        "seconds": round(seconds, 1),
        "anonymous_MB": round(peak["RssAnon"] / 1024),
        "resident_MB": round(peak["VmRSS"] / 1024),
    }


def main() -> None:
    """Measure, and print a line of JSON for every size."""
    from phigrow.corpus import train_tokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="a Parquet file with a column text")
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    table = pq.read_table(options.text)
    texts = table.column("text").to_pylist()
    with tempfile.TemporaryDirectory() as root:
        tokenizer = Path(root) / "tokenizer"
        train_tokenizer(texts, 4096).save_pretrained(tokenizer)
        for copies in options.copies:
            folder = Path(root) / f"text-{copies}"
            folder.mkdir()
            for copy in range(copies):
                numbered = pa.array([f"{copy} {text}" for text in texts])
                place = table.column_names.index("text")
                pq.write_table(table.set_column(place, "text", numbered), folder / f"{copy}.parquet")
            found = measure(folder, Path(root) / f"out-{copies}", tokenizer, options.workers)
            print(json.dumps({"copies": copies, "workers": options.workers, **found}), flush=True)


if __name__ == "__main__":
    main()
