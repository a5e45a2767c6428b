"""Speed of a small run on one CPU thread: tokens a second by data type, plain and compiled, beside matrix products.

    python benchmarks/small_runs.py --folder /tmp/small --rounds 5 --out benchmarks/results/DATE-small-runs-DEVICE

Every arm trains the same Phi (6 layers of 64, 4 heads of 16, MLP 256, vocabulary 512) through phigrow's engine on the
embedded corpus: 32 sequences of 128 tokens a step, AdamW, ZeRO 1, one rank with one thread. `bf16` is what a run did
before `dtype: auto`, `fp32` what auto chooses on a CPU without bf16 instructions, and `fp32, compiled` what
`phigrow compare` chooses there for a study.

Every round runs each arm in a fresh process, one after the other, so that a ratio compares neighbours in time. The
first steps and the compilation are not counted. Other work on the machine takes wall time from a run, so that speeds
are also given per CPU second of the process. A round's speed is the median of its steps.

The peak is measured in the same process, before and after: the matrix products of one step alone, forward and
backward, at the model's shapes, those of attention included. A step's share of it is the ratio of their CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timed_runs import (
    PHI,
    loss_difference,
    median_and_range,
    on_every_step,
    prepare_data,
    ratios_to,
    read_records,
    run_process,
    show,
    step_losses,
    write_results,
)

BATCH, SEQ_LEN, WARMUP = 32, 128, 5
LAYERS, HIDDEN, HEADS, MLP, VOCAB = 6, 64, 4, 256, 512
MODEL: dict[str, Any] = {
    **PHI,
    "architectures": ["PhiForCausalLM"],
    "model_type": "phi",
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": SEQ_LEN,
    "vocab_size": VOCAB,
}
ARMS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bf16"},
    "fp32": {"dtype": "fp32"},
    "fp32, compiled": {"dtype": "fp32", "compile": True},
}
BASE = "bf16"


def products() -> Callable[[], None]:
    """Return a function that makes the matrix products of one step: one forward, two backward for each."""
    import torch

    tokens, blocks, head = BATCH * SEQ_LEN, BATCH * HEADS, HIDDEN // HEADS
    layer = [(HIDDEN, HIDDEN)] * 4 + [(MLP, HIDDEN), (HIDDEN, MLP)]
    linear = [
        (torch.randn(tokens, columns), torch.randn(rows, columns), torch.randn(tokens, rows))
        for rows, columns in [*layer * LAYERS, (VOCAB, HIDDEN)]
    ]
    query, scores = torch.randn(blocks, SEQ_LEN, head), torch.randn(blocks, SEQ_LEN, SEQ_LEN)

    def make() -> None:
        for values, weight, gradient in linear:
            values @ weight.T
            gradient @ weight
            gradient.T @ values
        for _ in range(LAYERS):
            for _ in range(2):  # forward: scores, values; backward: gradients of scores' and values' operands
                query @ query.transpose(1, 2)
            for _ in range(2):
                scores @ query
                scores.transpose(1, 2) @ query

    return make


def product_seconds(make: Callable[[], None], times: int = 9) -> float:
    """The median CPU seconds of the products of one step."""
    make()
    seconds = []
    for _ in range(times):
        began = time.process_time()
        make()
        seconds.append(time.process_time() - began)
    return statistics.median(seconds)


def child(arm: str, folder: Path, steps: int) -> dict[str, Any]:
    """Train in this process, and return speeds and losses."""
    from phigrow.training.allocator import keep_freed_memory

    keep_freed_memory()  # as the recipe's entry point does, before torch is loaded
    import torch

    from phigrow.training import RunConfig, train

    torch.set_num_threads(1)
    began, wall, cpu = [0.0, 0.0], [], []

    def before() -> None:
        began[:] = time.perf_counter(), time.process_time()

    def after(number: int) -> None:
        wall.append(time.perf_counter() - began[0])
        cpu.append(time.process_time() - began[1])

    on_every_step(before, after)
    make = products()
    peaks = [product_seconds(make)]
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    train(
        RunConfig(
            model=MODEL,
            data=str(folder / "data"),
            out=str(out),
            steps=steps,
            batch=BATCH,
            lr=8e-3,
            warmup=WARMUP,
            schedule="constant",
            eval_every=0,
            eval_blocks=16,
            save_every=0,
            export=None,
            zero=1,
            threads=1,
            **ARMS[arm],
        )
    )
    peaks.append(product_seconds(make))
    records = read_records(out)
    return {
        "tokens_per_second": BATCH * SEQ_LEN / statistics.median(wall[WARMUP:]),
        "tokens_per_cpu_second": BATCH * SEQ_LEN / statistics.median(cpu[WARMUP:]),
        "first_step_seconds": wall[0],
        "product_cpu_seconds": statistics.mean(peaks),
        "share_of_products": statistics.mean(peaks) / statistics.median(cpu[WARMUP:]),
        "flops_per_token": records[0]["flops_per_token"],
        "losses": step_losses(records),
    }


def run(arm: str, folder: Path, steps: int) -> dict[str, Any]:
    """One fresh process of one arm."""
    run_process(arm, [__file__, "--child", arm, "--folder", str(folder), "--steps", str(steps)], threads=1)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def table(records: list[dict[str, Any]]) -> str:
    """Medians over rounds, and ratios to the first arm of the same round: median (lowest to highest)."""
    lines = [
        "| | tokens/s | ratio | tokens per CPU second | ratio | share of the products' peak | first step, s |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for arm in ARMS:
        own = [record for record in records if record["arm"] == arm]
        if not own:
            continue
        speeds = []
        for key in ("tokens_per_second", "tokens_per_cpu_second"):
            ratios = ratios_to(BASE, own, records, key)
            speeds.append(f"{statistics.median(r[key] for r in own):,.0f}")
            speeds.append(median_and_range(ratios) if ratios else "")
        share = statistics.median(r["share_of_products"] for r in own)
        first = statistics.median(r["first_step_seconds"] for r in own)
        lines.append(f"| {arm} | {' | '.join(speeds)} | {100 * share:.0f} % | {first:.1f} |")
    peak = statistics.median(BATCH * SEQ_LEN * r["flops_per_token"] / r["product_cpu_seconds"] for r in records)
    lines += ["", f"Matrix products alone, at the model's shapes: {peak / 1e9:.1f} GFLOP/s on one thread."]
    difference = loss_difference(records, "fp32", "fp32, compiled")
    lines.append(f"Largest relative difference of a step's loss, fp32 compiled against plain: {difference:.1e}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a folder of this benchmark's own")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    parser.add_argument("--child", choices=ARMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder
    if arguments.child:
        result = child(arguments.child, folder, arguments.steps)
        (folder / "result.json").write_text(json.dumps(result))
        return
    prepare_data(folder, seq_len=SEQ_LEN, vocab_size=VOCAB)
    records: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        for arm in arguments.arms:
            load = os.getloadavg()[0]
            records.append({"round": number, "arm": arm, "load": load, **run(arm, folder, arguments.steps)})
            show(records[-1])
    shutil.rmtree(folder)
    text = table(records)
    print(text)
    if arguments.out:
        content = {"steps": arguments.steps, "records": records}
        write_results(arguments.out, content, text, "torch", "transformers", "deepspeed")


if __name__ == "__main__":
    main()
