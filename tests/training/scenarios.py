"""Train tiny models under the real DeepSpeed: a script for its launcher, which gives it a JSON list of run settings.

Several runs share one launch, because starting DeepSpeed takes seconds. ``stop_at`` sends SIGTERM to one rank while
it reads the batch of that step; ``copy_of`` continues a copy of another run from the checkpoint before its last.
``poison`` makes losses or gradients NaN, as ``{"rank": 1, "calls": [2], "what": "loss"}``. ``count_reads`` counts what
is read from tensors during the steps, by the file that reads, into ``reads.json``. ``path`` goes to the front of
`sys.path`. ``captured`` writes what the engine holds once an optimizer's state is loaded to ``captured.pt``.
``updates`` writes every parameter before and after the last step to ``updates.pt``. ``collectives`` writes the data
types in which rank 0 sums more than ten values over ranks during the steps to ``collectives.json``. A `GrowthError` is
written to ``error-RANK.txt``, and the next scenario begins.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from phigrow.corpus.blocks import Blocks
from phigrow.corpus.splits import MixedSource

VOCAB, SEQ_LEN = 96, 16


class FakeSplit:
    """Blocks of a repetitive made-up language, so that a tiny model learns something in a few steps."""

    def __init__(self, blocks: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        start = rng.integers(0, VOCAB, (blocks, 1))
        steps = rng.choice([1, 5], (blocks, SEQ_LEN))
        self.ids = np.concatenate([start, (start + np.cumsum(steps, axis=1))], axis=1) % VOCAB
        self.calls, self.stop_at = 0, None
        self.sources = ["made up"]

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Any) -> np.ndarray:
        if self.calls == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        self.calls += 1
        return self.ids[np.asarray(indices)].astype(np.int64)

    def source_of(self, indices: Any) -> np.ndarray:
        return np.zeros(len(indices), np.int64)


@dataclass(frozen=True)
class FakeBlocks(Blocks):
    """Packed blocks that are in no folder."""

    folder: Path = Path("made up")
    train: FakeSplit = field(default_factory=lambda: FakeSplit(64, 1))
    heldout: FakeSplit = field(default_factory=lambda: FakeSplit(13, 2))
    seq_len: int = SEQ_LEN
    vocab_size: int = VOCAB
    eos_token_id: int = 0
    fingerprint: str = "fake"
    tokenizer_dir: Path = Path("no tokenizer")
    info: dict[str, Any] = field(default_factory=dict)
    mixture: tuple[Any, ...] = ()


MIXTURE = (
    MixedSource("most", 0.75, range(40), range(5)),
    MixedSource("rest", 0.25, range(40, 64), range(5, 13)),
)

TINY = {
    "architectures": ["PhiForCausalLM"],
    "model_type": "phi",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 32,
    "vocab_size": VOCAB,
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "resid_pdrop": 0.0,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
SETTINGS: dict[str, Any] = {
    "model": TINY,
    "steps": 6,
    "batch": 8,
    "lr": 1e-2,
    "warmup": 2,
    "eval_every": 3,
    "eval_blocks": 0,
    "save_every": 0,
    "log_every": 3,
    "export": None,
    "dtype": "fp32",
    "threads": 1,
}


def poisoned(poison: dict[str, Any], rank: int) -> Any:
    """`attach_loss`, with some training passes of one rank made NaN."""
    from phigrow.training.loss import attach_loss

    def attach(model: Any, mode: str, **more: Any) -> None:
        attach_loss(model, mode, **more)
        clean, calls = model.forward, 0

        def forward(blocks: Any, by_row: bool = False) -> Any:
            nonlocal calls
            loss = clean(blocks, by_row)
            if model.training:
                if calls in poison["calls"] and rank == poison["rank"]:
                    if poison["what"] == "loss":
                        loss = loss * float("nan")
                    else:
                        loss = loss * 1.0
                        loss.register_hook(lambda gradient: gradient * float("nan"))
                calls += 1
            return loss

        model.forward = forward

    return attach


READING = ("item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__int__")


@contextlib.contextmanager
def counted_reads(found: Counter[str]) -> Iterator[None]:
    """Count what Python reads from tensors while a step is taken or read, by package and file."""
    import torch

    from phigrow.training.step import Stepper

    inside, former = [False], {name: getattr(torch.Tensor, name) for name in READING}
    steps = {name: getattr(Stepper, name) for name in ("__call__", "read")}

    def noticed(name: str) -> Any:
        def read(self: Any, *words: Any, **more: Any) -> Any:
            path = Path(sys._getframe(1).f_code.co_filename)
            if inside[0] and "torch" not in path.parts:
                found["deepspeed" if "deepspeed" in path.parts else path.name] += 1
            return former[name](self, *words, **more)

        return read

    def stepping(name: str) -> Any:
        def step(self: Any, *words: Any) -> Any:
            inside[0] = True
            try:
                return steps[name](self, *words)
            finally:
                inside[0] = False

        return step

    try:
        for name in READING:
            setattr(torch.Tensor, name, noticed(name))
        for name in steps:
            setattr(Stepper, name, stepping(name))
        yield
    finally:
        for name, method in former.items():
            setattr(torch.Tensor, name, method)
        for name, method in steps.items():
            setattr(Stepper, name, method)


@contextlib.contextmanager
def stopping_stream(stop_at: int | None) -> Iterator[None]:
    """Send SIGTERM when the stream is read for a step."""
    from phigrow.corpus.feed import StreamFeed

    real = StreamFeed.read

    def read(self: StreamFeed, step: int, rank: int, world: int) -> Any:
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, step, rank, world)

    StreamFeed.read = read  # type: ignore[method-assign]
    try:
        yield
    finally:
        StreamFeed.read = real  # type: ignore[method-assign]


def shared_buffers() -> dict[str, int]:
    """Count DeepSpeed's shared buffers of this launch: those that this rank has mapped, and those that have a name."""
    own = f"deepspeed_allreduce_buffer_{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_"
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if f"/dev/shm/{own}" in line]
    return {"mapped": len(mapped), "named": len(list(Path("/dev/shm").glob(f"{own}*")))}


@contextlib.contextmanager
def captured_state(out: Path | None) -> Iterator[None]:
    """Save masters and moments, whole, from the engine right after it was filled with a state."""
    import torch
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from phigrow.training import initial_state

    real = initial_state.load

    def load(engine: Any, folder: Path, world: Any, optimizer: Any) -> None:
        real(engine, folder, world, optimizer)
        found = {}
        for name, parameter in engine.module.named_parameters():
            moments = {key: safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")}
            found[name] = {"fp32": safe_get_full_fp32_param(parameter), **moments}
        steps = sorted({float(entry["step"]) for entry in engine.basic_optimizer.state.values()})
        if world.first and out is not None:
            torch.save({"values": found, "steps": steps}, out / "captured.pt")

    initial_state.load = load if out else real
    try:
        yield
    finally:
        initial_state.load = real


@contextlib.contextmanager
def captured_updates(out: Path | None) -> Iterator[None]:
    """Save all parameters, whole, before and after the last step, with the learning rate of Muon's group."""
    import torch

    from phigrow.training.step import Stepper
    from phigrow.training.zero import full_value

    real = Stepper.__call__

    def values(engine: Any) -> dict[str, Any]:
        return {name: full_value(p, engine.optimizer, master=True) for name, p in engine.module.named_parameters()}

    def call(self: Stepper, step: int) -> None:
        if step != self.config.steps - 1:
            return real(self, step)
        before, lr = values(self.engine), self.engine.get_lr()[0]
        real(self, step)
        after = values(self.engine)
        if own_rank() == 0 and out is not None:
            torch.save({"lr": lr, "before": before, "after": after}, out / "updates.pt")
        return None

    from phigrow.training.process import own_rank

    Stepper.__call__ = call if out else real  # type: ignore[method-assign]
    try:
        yield
    finally:
        Stepper.__call__ = real  # type: ignore[method-assign]


SUMS = ("all_reduce", "reduce", "reduce_scatter_fn", "reduce_scatter_tensor")


@contextlib.contextmanager
def logged_collectives(out: Path | None) -> Iterator[None]:
    """Save the data types of DeepSpeed's sums over ranks during the steps."""
    from deepspeed import comm

    from phigrow.training.process import own_rank
    from phigrow.training.step import Stepper

    found: Counter[str] = Counter()
    former = {name: getattr(comm, name) for name in SUMS}
    real = Stepper.__call__

    def logged(name: str) -> Any:
        def collective(*tensors: Any, **more: Any) -> Any:
            first = tensors[0] if tensors else more.get("tensor", more.get("output"))
            if first.numel() > 10:
                found[str(first.dtype).removeprefix("torch.")] += 1
            return former[name](*tensors, **more)

        return collective

    def call(self: Stepper, step: int) -> None:
        for name in SUMS:
            setattr(comm, name, logged(name))
        try:
            real(self, step)
        finally:
            for name, method in former.items():
                setattr(comm, name, method)

    Stepper.__call__ = call if out else real  # type: ignore[method-assign]
    try:
        yield
    finally:
        Stepper.__call__ = real  # type: ignore[method-assign]
    if out is not None and own_rank() == 0:
        (out / "collectives.json").write_text(json.dumps(found))


def main() -> int:
    from phigrow.errors import GrowthError
    from phigrow.training import RunConfig, model, train
    from phigrow.training.process import own_rank, prepare_environment

    prepare_environment()  # without a launcher too: a run leaves no variables behind, and DeepSpeed's buffers stay
    attach_loss = model.attach_loss
    (listed,) = [word for word in sys.argv[1:] if not word.startswith("--")]
    for scenario in json.loads(Path(listed).read_text()):
        settings = dict(scenario)
        stop_at = settings.pop("stop_at", None)
        blocks = FakeBlocks(mixture=MIXTURE) if settings.pop("mixed", False) else FakeBlocks()
        if (former := settings.pop("copy_of", None)) and own_rank() == 0:
            shutil.copytree(former, settings["out"], ignore=shutil.ignore_patterns(f"step-{SETTINGS['steps']}"))
        if "stream" in settings:
            with stopping_stream(stop_at if own_rank() == 0 else None):
                print(settings["out"], train(RunConfig(**SETTINGS | settings)), flush=True)
            continue
        if stop_at is not None and own_rank() == 0:
            blocks.train.stop_at = stop_at
        poison, counts = settings.pop("poison", None), settings.pop("count_reads", False)
        if path := settings.pop("path", None):
            sys.path.insert(0, path)
        model.attach_loss = poisoned(poison, own_rank()) if poison else attach_loss
        found: Counter[str] = Counter()
        out = Path(settings["out"])
        held = out if settings.pop("captured", False) else None
        moved = out if settings.pop("updates", False) else None
        wire = out if settings.pop("collectives", False) else None
        try:
            counting = counted_reads(found) if counts else contextlib.nullcontext()
            with captured_state(held), captured_updates(moved), logged_collectives(wire), counting:
                print(out, train(RunConfig(**SETTINGS | settings), blocks), flush=True)
        except GrowthError as error:
            out.mkdir(parents=True, exist_ok=True)
            (out / f"error-{own_rank()}.txt").write_text(str(error))
        if counts and own_rank() == 0:
            (out / "reads.json").write_text(json.dumps(found))
    ranks = os.environ.get("WORLD_SIZE", "1")  # training gives back the environment of a process without a launcher
    (Path(listed).parent / f"buffers-{ranks}-{own_rank()}.json").write_text(json.dumps(shared_buffers()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
