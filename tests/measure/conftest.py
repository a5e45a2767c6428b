"""Run folders made up on the spot: power-law curves whose true speedup is known."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FLOPS_PER_TOKEN = 1.5e9
TOKENS_PER_SECOND = 4e3


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """Write the records of one run: its evaluations at the given token counts, and one step record for each."""

    def write(
        arm: str,
        losses: Sequence[float],
        tokens: Sequence[float],
        *,
        seed: int = 0,
        source_tokens: float | None = 0.0,
        config: dict[str, Any] | None = None,
        name: str | None = None,
        steps: Sequence[int] | None = None,
        **meta: Any,
    ) -> Path:
        folder = tmp_path / "runs" / (name or f"{arm}-{seed}")
        folder.mkdir(parents=True)
        run: dict[str, Any] = {"type": "run", "arm": arm, "seed": seed, "growth": None, "parameters": 1000}
        run["config"] = {"steps": len(tokens) - 1, "lr": 1e-3, "schedule": "cosine"} | (config or {})
        run["versions"] = {"torch": "2.11.0", "phigrow": "0.1.0"}
        if source_tokens is not None:
            run["source_tokens"] = source_tokens
            run["source_flops"] = source_tokens * FLOPS_PER_TOKEN / 3
            run["source_seconds"] = source_tokens / TOKENS_PER_SECOND / 2
        records = [run | meta]
        numbers = range(len(tokens)) if steps is None else map(int, steps)
        for step, cost, loss in zip(numbers, map(float, tokens), map(float, losses), strict=True):
            spent = {"tokens": cost, "flops": cost * FLOPS_PER_TOKEN, "seconds": cost / TOKENS_PER_SECOND}
            records.append({"type": "step", "step": step, **spent, "loss": loss + 0.1, "lr": 1e-3, "grad_norm": 1.0})
            records.append({"type": "eval", "step": step, **spent, "loss": loss})
        (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return folder

    return write


@pytest.fixture
def power_law() -> Callable[..., np.ndarray]:
    """Losses that fall as a power law in speed * tokens: an arm of speed s has a true speedup of s over speed 1."""

    def losses(tokens: np.ndarray, speed: float = 1.0, noise: float = 0.0, seed: int = 0) -> np.ndarray:
        clean = 2.5 + 1.2 * (speed * tokens / tokens[-1] + 0.02) ** -0.3
        return clean + noise * np.random.default_rng(seed).normal(size=tokens.size)

    return losses


@pytest.fixture
def experiment(write_run: Callable[..., Path], power_law: Callable[..., np.ndarray]) -> Callable[..., Path]:
    """A parent folder with scratch, a 2x arm called wr and a slower one called slow, for the given seeds."""

    def make(seeds: Sequence[int] = (0,), noise: float = 0.0) -> Path:
        tokens = np.linspace(0, 2.4e6, 61)
        for seed in seeds:
            for place, (arm, speed, source) in enumerate([("scratch", 1, 0), ("wr", 2, 6e5), ("slow", 0.8, 6e5)]):
                losses = power_law(tokens, speed, noise, seed=100 * place + seed)
                folder = write_run(arm, losses.tolist(), tokens.tolist(), seed=seed, source_tokens=source)
        return folder.parent

    return make
