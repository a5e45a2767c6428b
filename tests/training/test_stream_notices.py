"""A run says what it meets in a stream: a source that starts over, once, and documents without text, at its end."""

from __future__ import annotations

import json

import pytest
from scenarios import SETTINGS, TINY

from phigrow.corpus import train_tokenizer
from phigrow.training import RunConfig, train

# What torch's own modules say when DeepSpeed imports them in this process.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_a_run_says_what_it_meets_in_a_stream(alone, tmp_path, capsys):
    train_tokenizer(["text"], 257).save_pretrained(tmp_path / "bytes")
    for name, count in (("small", 20), ("large", 3000)):
        rows = [{"text": f"document {number} of {name}"} for number in range(count)]
        content = [*rows, {"text": None}, {"text": " "}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    sources = {name: {"ref": str(tmp_path / f"{name}.jsonl"), "weight": 1} for name in ("small", "large")}
    stream = {"tokenizer": str(tmp_path / "bytes"), "heldout": 8, "shuffle": 4, "sources": sources}
    more = {"model": TINY | {"vocab_size": 257}, "seq_len": 8, "warmup": 0, "zero": 1, "save_every": 4, "eval_every": 0}

    def run(steps: int, out: str) -> list[str]:
        settings = SETTINGS | more | {"data": None, "stream": stream, "steps": steps, "out": str(tmp_path / out)}
        assert train(RunConfig(**settings)).finished
        return [line for line in capsys.readouterr().out.splitlines() if "stream " in line and "data:" not in line]

    text = sum(len(f"document {number} of small") + 1 for number in range(8, 20)) / 8
    batch = SETTINGS["batch"]
    assert run(8, "run") == [
        f"warning: the stream small starts over after {text:,.0f} blocks, so this run reads it "
        f"{8 * batch / 2 / text:.1f} times",
        "stream small: Left out: 1 document that is null or not UTF-8, 1 empty document.",
    ]
    assert not any("starts over" in line for line in run(1, "short"))  # negative control
