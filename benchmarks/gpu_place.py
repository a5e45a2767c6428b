"""The device, the folder and the sizes of the steps of ``gpu_check.py``, and figures that several steps compute."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

Result = dict[str, Any]


@dataclass
class Place:
    """The device, the folder and the sizes of the steps.

    Attributes:
        folder: for data and runs.
        toy: tiny sizes.
    """

    folder: Path
    toy: bool

    @cached_property
    def device(self) -> Any:
        import torch

        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> Any:
        """bf16, or fp16 on a GPU without it."""
        import torch

        old = self.device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.float16 if old else torch.bfloat16

    @property
    def dtype_name(self) -> str:
        import torch

        return "fp16" if self.dtype is torch.float16 else "bf16"

    def model(self, **changes: Any) -> dict[str, Any]:
        """Phi, small enough to train in seconds."""
        from phigrow.models.config import load_config

        hidden, layers = (64, 2) if self.toy else (1024, 8)
        sizes = {
            "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers,
            "num_attention_heads": hidden // 32 if self.toy else hidden // 64, "vocab_size": 512,
            "num_key_value_heads": None, "max_position_embeddings": self.seq_len,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0,
        }  # fmt: skip
        return load_config("phi-1_5") | sizes | changes

    @property
    def seq_len(self) -> int:
        return 64 if self.toy else 2048

    def data(self) -> Path:
        """Packed blocks of random words."""
        from phigrow import corpus

        out = self.folder / "data"
        if not out.is_dir():
            draw = random.Random(0)
            words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 7))) for _ in range(400)]
            count, length = (60, 120) if self.toy else (600, 3000)
            texts = [" ".join(draw.choices(words, k=draw.randint(length // 2, length))) for _ in range(count)]
            file = self.folder / "text.jsonl"
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
            corpus.prepare(file, out, seq_len=self.seq_len, vocab_size=512, progress=False)
        return out

    @property
    def backend(self) -> str:
        """Backend of torch.compile. The toy sizes test the script, and inductor would compile for a minute."""
        return "eager" if self.toy else "inductor"

    def settings(self, name: str, **changes: Any) -> dict[str, Any]:
        """Settings of a short run in its own folder."""
        run = {
            "model": self.model(), "data": str(self.data()), "out": str(self.folder / name), "steps": 4, "batch": 4,
            "lr": 1e-3, "warmup": 0, "schedule": "constant", "eval_every": 0, "save_every": 0, "log_every": 1,
            "export": None, "dtype": self.dtype_name, "zero": 1, "compile": False,
        }  # fmt: skip
        return run | changes

    def train(self, name: str, **changes: Any) -> list[dict[str, Any]]:
        """Train here, and return the records of the steps."""
        from phigrow.training import RunConfig, train

        settings = self.settings(name, **changes)
        train(RunConfig(**settings))
        return records(Path(settings["out"]))


def records(out: Path, kind: str = "step") -> list[dict[str, Any]]:
    lines = (out / "records.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["type"] == kind]


def losses(steps: Sequence[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in steps]


def largest(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the largest difference of two equally long lists."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def relative(found: Any, expected: Any) -> float:
    """Return the largest difference of two tensors, over the largest expected value."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).abs().max() / expected.abs().max())


def middle(values: Sequence[float]) -> float:
    """Return the median; of an even number of values the upper one."""
    return sorted(values)[len(values) // 2]


def nominal_peak(name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a GPU from its data sheet, if phigrow knows it."""
    from phigrow.models.capacity import PEAK_FLOPS

    return next((peak for key, peak in PEAK_FLOPS.items() if key in name.lower()), None)
