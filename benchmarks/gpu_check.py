"""Everything of phigrow that only a GPU can show, in one command, on one GPU of 80 GiB.

    python benchmarks/gpu_check.py --out benchmarks/results/DATE-gpu-check-DEVICE.jsonl
    python benchmarks/gpu_check.py --size toy --together        # the same steps on any machine, tiny

Each step runs in a process of its own and prints one line of JSON as it ends: its name, ``ok``, seconds, and what it
measured. A step that fails or takes too long does not stop the rest. The last line is the summary. The exit code is 1
if any step is not ok.

The sizes of ``toy`` test the script itself, and say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu_kernels import attention, ceilings, documents, loss, numbers
from gpu_place import HERE, Place, Result, largest, losses, middle, nominal_peak, records

STEP_SECONDS = 240
"""Most seconds of one step."""


def stages(place: Place) -> Result:
    """ZeRO 0 to 3, with and without overlapping communication and recomputation: losses, speed and memory."""
    import torch

    rows: list[Result] = []
    every = list(itertools.product(range(4), (False, True), (False, "selective", True)))
    toy = [(0, False, False), (1, True, "selective"), (2, True, True), (3, True, True)]
    for stage, overlap, recompute in toy if place.toy else every:
        if stage == 0 and (overlap or place.dtype_name == "fp16"):
            continue
        if stage == 3 and recompute == "selective":
            continue
        file = place.folder / f"overlap-{stage}-{overlap}.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": stage, "overlap_comm": overlap}}))
        row: Result = {"stage": stage, "overlap": overlap, "recompute": recompute}
        if place.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        name = f"zero-{stage}-{overlap}-{recompute}"
        more = {"activation_checkpointing": recompute, "zero": None, "deepspeed": str(file)}
        steps = place.train(name, steps=2 if place.toy else 4, **more)
        row |= {"losses": losses(steps), "tokens_per_second": steps[-1]["tokens_per_second"]}
        if place.device.type == "cuda":
            row["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        rows.append(row)
    worst = max(largest(row["losses"], rows[0]["losses"]) for row in rows)
    return {"ok": worst < 0.05, "largest_difference": worst, "rows": rows}


def resume(place: Place) -> Result:
    """A run that stops and resumes against one that does not, with default and deterministic kernels, and their cost.

    A step here is the median of the steps after the first two.
    """
    out: Result = {}
    half = 2 if place.toy else 8
    for deterministic in (False, True):
        more = {"deterministic": deterministic, "save_every": half, "keep": 0, "steps": 2 * half}
        whole = place.train(f"whole-{deterministic}", **more)
        cut_before_its_end(place.folder / f"whole-{deterministic}", place.folder / f"cut-{deterministic}", 2 * half)
        cut = place.train(f"cut-{deterministic}", **more)
        name = "deterministic" if deterministic else "default"
        rate = middle([record["tokens_per_second"] for record in whole[2:]])
        out[name] = {"difference": largest(losses(whole), losses(cut)), "seconds_per_step": 4 * place.seq_len / rate}
    cost = out["deterministic"]["seconds_per_step"] / out["default"]["seconds_per_step"] - 1
    ok = out["deterministic"]["difference"] == 0 and out["default"]["difference"] < 0.05
    return out | {"ok": ok, "deterministic_costs": cost}


def cut_before_its_end(whole: Path, cut: Path, steps: int) -> None:
    """Copy a finished run without its last checkpoint: it resumes from the one before."""
    shutil.copytree(whole, cut, ignore=shutil.ignore_patterns(f"step-{steps}"))


def launch(place: Place, name: str, count: int, *, on_cpu: bool, **changes: Any) -> str | None:
    """Train on several ranks in processes of their own; return None, or the output of ranks that failed."""
    settings = place.settings(name, **changes)
    words = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", _word(value))]
    env = os.environ | {"PYTHONPATH": str(HERE.parent), "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(20000 + os.getpid() % 20000), "WORLD_SIZE": str(count), "LOCAL_SIZE": str(count)}
    if on_cpu:
        env |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    logs = [place.folder / f"{name}-rank-{rank}.log" for rank in range(count)]
    with contextlib.ExitStack() as stack:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "phigrow.training", *words],
                env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=stack.enter_context(log.open("w", encoding="utf-8")),
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            problem, failed = wait_for(ranks, STEP_SECONDS - 20)  # `apart` ends this process at STEP_SECONDS
        finally:
            for each in ranks:
                each.kill()
                each.wait()
    texts = [problem, *(logs[rank].read_text(encoding="utf-8")[-2000:] for rank in failed)]
    return "\n".join(texts) if problem else None


def wait_for(ranks: Sequence[subprocess.Popen[bytes]], seconds: float) -> tuple[str, list[int]]:
    """Wait until all ranks have ended, one has failed, or the time is over.

    Returns:
        The problem, empty if all ranks ended well; and the ranks whose output shows it: those that failed first, or
        those that still run when the time is over.
    """
    end = time.monotonic() + seconds
    while True:
        codes = [rank.poll() for rank in ranks]
        if failed := [rank for rank, code in enumerate(codes) if code]:
            return f"ranks {failed} ended with codes {[codes[rank] for rank in failed]}", failed
        running = [rank for rank, code in enumerate(codes) if code is None]
        if not running:
            return "", []
        if time.monotonic() > end:
            return f"ranks {running} took more than {seconds:g} s", running
        time.sleep(0.05)


def universal(place: Place) -> Result:
    """A checkpoint of two CPU ranks, converted and continued on one rank of this device."""
    more = {"dtype": "fp32", "save_every": 2, "keep": 0, "steps": 4}
    if (error := launch(place, "two-ranks", 2, on_cpu=True, **more)) is not None:
        return {"ok": False, "error": error}
    whole = losses(records(place.folder / "two-ranks"))
    cut_before_its_end(place.folder / "two-ranks", place.folder / "one-rank", 4)
    continued = losses(place.train("one-rank", **more, universal=True))
    return {"ok": largest(continued, whole) < 1e-3, "difference": largest(continued, whole), "steps": len(continued)}


def _word(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def ranks(place: Place) -> Result:
    """All GPUs of this machine, with communication that overlaps the backward pass and without: losses and speed."""
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        return {"ok": True, "skipped": f"it takes two GPUs, and this machine has {count}"}
    return compared_ranks(place, count, on_cpu=False)


def compared_ranks(place: Place, count: int, *, on_cpu: bool) -> Result:
    """Train on several ranks at each ZeRO stage, with micro-batches of one sequence, two a step."""
    rows: list[Result] = []
    for stage, overlap in ((1, False), (2, False), (2, True), (3, False), (3, True)):
        name = f"ranks-{stage}-{overlap}"
        file = place.folder / f"{name}.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": stage, "overlap_comm": overlap}}))
        more = {
            "zero": None,
            "deepspeed": str(file),
            "batch": 2 * count,
            "micro_batch": 1,
            "steps": 3 if on_cpu else 10,
        }
        if (error := launch(place, name, count, on_cpu=on_cpu, **more)) is not None:
            return {"ok": False, "error": error, "rows": rows}
        steps = records(place.folder / name)
        rate = middle([record["tokens_per_second"] for record in steps[2:]])
        rows.append({"stage": stage, "overlap": overlap, "losses": losses(steps), "tokens_per_second": rate})
    worst = max(largest(row["losses"], rows[0]["losses"]) for row in rows)
    return {"ok": worst < 0.05, "largest_difference": worst, "ranks": count, "rows": rows}


def memory(place: Place) -> Result:
    """Three runs in one process, as a service runs them: what the first leaves allocated must not grow."""
    import gc

    import torch

    from phigrow.training.entry import run

    held = []
    for number in range(3):
        recipe = place.folder / f"memory-{number}.yaml"
        recipe.write_text(json.dumps(place.settings(f"memory-{number}", steps=1 if place.toy else 3)))
        code, finished = run([str(recipe)])
        if code or not finished:
            return {"ok": False, "error": f"run {number} ended with exit code {code}"}
        gc.collect()
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
        held.append(torch.cuda.memory_allocated() / 2**20 if place.device.type == "cuda" else 0.0)
    return {"ok": held[-1] <= held[0] + 1, "held_mib": held, "measured": place.device.type == "cuda"}


def speed(place: Place, name: str) -> Result:
    """Model FLOP/s of a model in a plain loop and under DeepSpeed, and memory beside the planner's."""
    import torch
    from mfu import measure, shape

    from phigrow.models.capacity import capacity
    from phigrow.models.cost import count_cost

    micro, batch = (2, 4) if place.toy else ((8, 16) if name == "phi-1_5" else (2, 8))
    config = shape("tiny" if place.toy else name)
    config |= {"max_position_embeddings": place.seq_len}
    layers = False if place.toy else "layers"  # toy sizes would compile longer than they run
    words = _mfu_words(place, batch // micro, compile="layers" if layers else "none")
    plain = measure(config, words, micro, place.device)
    plain.pop("kernels", None)
    if place.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    more = {"batch": batch, "micro_batch": micro, "zero": 1, "lr": 1e-4, "compile": layers}
    steps = place.train(f"speed-{name}", model=config, steps=4 if place.toy else 12, **more)
    rate = middle([record["tokens_per_second"] for record in steps[2:]])
    tflops = count_cost(config, place.seq_len).training_flops * rate / 1e12
    out: Result = {"model": name, "plain": plain, "deepspeed_tflops": tflops, "ok": "model_tflops" in plain}
    if "model_tflops" in plain:
        out["deepspeed_over_plain"] = tflops / plain["model_tflops"]
        out["share_of_measured_peak"] = tflops / plain["peak_tflops"]
    if place.device.type == "cuda":
        device = torch.cuda.get_device_name()
        if (peak := nominal_peak(device)) is not None:
            out["mfu"] = tflops * 1e12 / peak
        planned = capacity(config, "1x1000", batch=batch, micro_batch=micro, seq_len=place.seq_len)
        fit = next(fit for fit in planned.fits if fit.layout.stage == 1)
        out["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        out["planned_gib"] = fit.total / 2**30
        out["ok"] &= abs(out["memory_gib"] / out["planned_gib"] - 1) < 0.15
    return out


def _mfu_words(place: Place, accumulation: int, **changes: Any) -> argparse.Namespace:
    words = {
        "seq_len": place.seq_len, "accumulation": accumulation, "steps": 1 if place.toy else 6, "checkpointing": False,
        "compile": "none", "backend": place.backend, "attention": "sdpa", "loss": "auto",
    }  # fmt: skip
    return argparse.Namespace(**words | changes)


def fused(place: Place) -> Result:
    """A step of phi-1.5 plain, with recomputation, with compiled layers, and with Liger's kernels if it is installed.

    Every variant has the same weights and tokens, so the losses after the steps must agree.
    """
    import torch
    from mfu import Training, seconds, shape

    config = shape("tiny" if place.toy else "phi-1_5") | {"max_position_embeddings": place.seq_len}
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "selective": {"checkpointing": "selective"},
        "recomputed": {"checkpointing": True},
        "layers": {"compile": "layers"},
        "layers, selective": {"compile": "layers", "checkpointing": "selective"},
        "liger": {},
    }
    rows: dict[str, Result] = {}
    for name, changes in variants.items():
        if name == "liger" and (problem := liger_problem()) is not None:
            rows[name] = {"problem": problem}
            continue
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        words = _mfu_words(place, 1, **changes)
        with liger_kernels() if name == "liger" else contextlib.nullcontext():
            training = Training(config, words, 2 if place.toy else 8, place.device)
            took = seconds(training, place.device, words.steps)
        rows[name] = {"seconds": took, "loss": float(training.loss.detach())}
        if place.device.type == "cuda":
            rows[name]["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        del training
    expected = rows["plain"]["loss"]
    worst = max(abs(row["loss"] - expected) for row in rows.values() if "loss" in row)
    return {"ok": worst < 0.05, "largest_difference": worst, "rows": rows}


def liger_problem() -> str | None:
    """Return the reason for which Liger cannot be used; None if it can."""
    try:
        from liger_kernel.transformers.functional import liger_layer_norm
        from liger_kernel.transformers.rope import liger_rotary_pos_emb
    except Exception as error:  # of the package, or of Triton
        return f"{type(error).__name__}: {error}"
    return None if callable(liger_layer_norm) and callable(liger_rotary_pos_emb) else "not functions"


@contextlib.contextmanager
def liger_kernels() -> Iterator[None]:
    """Let Phi's LayerNorms and rotary embeddings run Liger's kernels; a context. Liger itself does not know Phi."""
    import torch
    from liger_kernel.transformers.functional import liger_layer_norm
    from liger_kernel.transformers.rope import liger_rotary_pos_emb
    from transformers.models.phi import modeling_phi

    def forward(norm: Any, values: Any) -> Any:
        return liger_layer_norm(values, norm.weight, norm.bias, norm.eps)

    layer_norm: Any = torch.nn.LayerNorm
    former, rotary = layer_norm.forward, modeling_phi.apply_rotary_pos_emb
    layer_norm.forward, modeling_phi.apply_rotary_pos_emb = forward, liger_rotary_pos_emb
    try:
        yield
    finally:
        layer_norm.forward, modeling_phi.apply_rotary_pos_emb = former, rotary


STEPS: dict[str, Callable[[Place], Result]] = {
    "ceilings": ceilings,
    "attention": attention,
    "numbers": numbers,
    "documents": documents,
    "loss": loss,
    "stages": stages,
    "resume": resume,
    "universal": universal,
    "ranks": ranks,
    "memory": memory,
    "fused": fused,
    "speed-phi-1_5": lambda place: speed(place, "phi-1_5"),
    "speed-phi2": lambda place: speed(place, "phi2"),
}


def one(name: str, place: Place) -> Result:
    """Run a step, and return its line."""
    began = time.perf_counter()
    try:
        result = STEPS[name](place)
    except Exception as error:  # the other steps go on
        text = traceback.format_exc().strip().splitlines()
        result = {"ok": False, "error": f"{type(error).__name__}: {error}", "traceback": text[-12:]}
    return {"step": name, "ok": bool(result.pop("ok")), "took": round(time.perf_counter() - began, 2)} | result


def apart(name: str, words: argparse.Namespace, folder: Path) -> Result:
    """Run a step in a process of its own."""
    command = [sys.executable, __file__, "--step", name, "--size", words.size, "--folder", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=STEP_SECONDS)
    except subprocess.TimeoutExpired:
        return {"step": name, "ok": False, "error": f"it took more than {STEP_SECONDS} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"step"')]
    if not lines:
        return {"step": name, "ok": False, "error": (done.stdout + done.stderr)[-2000:]}
    return dict(json.loads(lines[-1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="full", choices=("full", "toy"))
    parser.add_argument("--together", action="store_true", help="run all steps in this process")
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=list(STEPS), help="some steps only")
    parser.add_argument("--out", type=Path, help="also append the lines to this file")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    words = parser.parse_args()
    folder = words.folder or Path(tempfile.mkdtemp(prefix="gpu-check-"))
    place = Place(folder, words.size == "toy")
    if words.step:
        print(json.dumps(one(words.step, place)), flush=True)
        return 0
    began, lines = time.perf_counter(), []
    try:
        for name in words.steps:
            lines.append(one(name, place) if words.together else apart(name, words, folder))
            _say(lines[-1], words.out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    failed = [line["step"] for line in lines if not line["ok"]]
    took = round(time.perf_counter() - began, 1)
    _say({"step": "summary", "ok": not failed, "took": took, "size": words.size, "failed": failed}, words.out)
    return 1 if failed else 0


def _say(line: Result, out: Path | None) -> None:
    print(json.dumps(line), flush=True)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(main())
