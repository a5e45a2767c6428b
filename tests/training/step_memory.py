"""Measure the memory of training steps, tensor by tensor: a script for DeepSpeed's launcher.

It takes a JSON file: a list of run settings, each with ``name`` and ``out``. PyTorch's profiler counts every byte that
a CPU tensor is given or gives back, so that peaks are those of tensors, free of allocators, libraries and Python; what
a rank holds at a moment is the sum. Every rank writes ``<out>/<name>-rank<K>.json``, in bytes:

- ``states``: after the last step, with the model and the optimizer's state;
- ``before_step``: between a backward pass and its step, with gradients;
- ``activations``: what the forward pass kept for the backward pass of the second step;
- ``backward_peak``: the most at any moment of a backward pass;
- ``step_peak``: the most at any moment of a step, from its forward pass on.

With ``split``, the sums of ranks at stages 0 and 1 have buckets of that many values. DeepSpeed's have 500 million, more
than a test can hold.
"""

from __future__ import annotations

import gc
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

STEPS = 4


class Ledger:
    """Bytes of live tensors over time, from when the profiler started."""

    def __init__(self) -> None:
        from torch.profiler import ProfilerActivity, profile, record_function

        self._mark = record_function
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)

    def __enter__(self) -> Ledger:
        self._profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._profile.__exit__(*error)  # type: ignore[arg-type]

    def mark(self, name: str) -> None:
        import torch

        gc.collect()
        # Each of gloo's threads keeps the tensor that it reduced last until it has reduced another.
        for _ in range(8):
            torch.distributed.all_reduce(torch.zeros(1))
        with self._mark(name):
            pass

    def read(self) -> tuple[dict[str, int], dict[tuple[str, str], int]]:
        """Live bytes at every mark, and a function of the highest between two."""
        events = self._profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        timeline = sorted((e.start_ns(), e.name(), e.nbytes()) for e in events if wanted(e.name()))
        live, at, peaks, since = 0, {}, {}, ("", 0)
        for _, name, size in timeline:
            if name == "[memory]":
                live += size
                since = (since[0], max(since[1], live))
            else:
                peaks[since[0], name] = since[1]
                at[name], since = live, (name, live)
        return at, peaks


def wanted(name: str) -> bool:
    return name == "[memory]" or name.startswith("mark-")


def measure(settings: dict[str, Any]) -> dict[str, int]:
    import torch

    from phigrow.training import RunConfig
    from phigrow.training.engine import engine_config, make_engine, micro_batch
    from phigrow.training.model import build_model
    from phigrow.training.process import start

    world = start(1)
    seq_len, split = settings.pop("seq_len"), settings.pop("split", None)
    model_dict = settings["model"]
    config = RunConfig(steps=STEPS, warmup=1, **settings)
    micro = micro_batch(config, world.size, seq_len)
    engine_dict = engine_config(config, world.size, micro)
    torch.manual_seed(0)
    blocks = torch.randint(0, model_dict["vocab_size"], (micro, seq_len + 1))
    with Ledger() as ledger:
        ledger.mark("mark-start")
        model = build_model(config, model_dict, world, "sdpa", engine_dict)
        engine = make_engine(model, config, engine_dict)
        if split:
            engine.buffered_allreduce_fallback = partial(
                engine.buffered_allreduce_fallback.__func__, engine, elements_per_buffer=split
            )
            engine.allreduce_gradients = lambda *_, **__: engine.buffered_allreduce_fallback()
        ledger.mark("mark-made")
        for step in range(STEPS):
            for piece in range(config.batch // (micro * world.size)):
                ledger.mark(f"mark-forward-{step}-{piece}")
                loss = engine(blocks)
                ledger.mark(f"mark-backward-{step}-{piece}")
                engine.backward(loss)
                loss = None
                ledger.mark(f"mark-step-{step}-{piece}")
                engine.step()
        ledger.mark("mark-end")
    at, peaks = ledger.read()
    engine.destroy()
    engine = model = None
    gc.collect()
    start_bytes = at["mark-start"]
    later = range(1, STEPS)  # the first step makes the optimizer's state
    last = config.batch // (micro * world.size) - 1
    found = {
        "made": at["mark-made"] - start_bytes,
        "states": at["mark-end"] - start_bytes,
        "activations": at["mark-backward-1-0"] - at["mark-forward-1-0"],
        # Of several steps the least: what a thread has not yet given back is chance.
        "before_step": min(at[f"mark-step-{step}-{last}"] for step in later) - start_bytes,
        "backward_peak": min(peaks[f"mark-backward-{step}-{last}", f"mark-step-{step}-{last}"] for step in later)
        - start_bytes,
        "step_peak": min(max(peak for (first, _), peak in peaks.items() if f"-{step}-" in first) for step in later)
        - start_bytes,
    }
    return found


def main() -> int:
    from phigrow.training.process import own_rank

    (path,) = [word for word in sys.argv[1:] if not word.startswith("--")]
    for scenario in json.loads(Path(path).read_text()):
        settings = dict(scenario)
        name, out = settings.pop("name"), Path(settings.pop("out"))
        found = measure(settings)
        (out / f"{name}-rank{own_rank()}.json").write_text(json.dumps(found))
        if own_rank() == 0:
            print(name, found, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
