"""Pretraining by phigrow's recipe against the Hugging Face `Trainer`: tokens a second and memory, as paired ratios.

    python benchmarks/pretrain.py --folder /tmp/pretrain --rounds 5 --out benchmarks/results/DATE-DEVICE-pretrain

Both train the same Phi (8 layers, hidden 256, 4 heads of 64, vocabulary 4,096) from the same weights on the same blocks
of the embedded corpus in the same order: 16 sequences of 256 tokens a step, AdamW with the same settings and clipping,
mixed precision (bf16 arithmetic, fp32 masters). Every round runs each in a fresh process, one after the other, so that
a ratio compares neighbours in time; on a shared machine absolute speeds drift. The first steps are not counted. The
losses of the steps must agree: what is timed is the same training.

`trainer` is `Trainer(bf16=True, optim="adamw_torch_fused")` as its documentation has it. `trainer, tuned` also gets the
allocator setting of phigrow's entry point and thus shows what of the ratio is not the allocator. CPU seconds are those
of the counted steps; memory is the peak of the process, all ranks together.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import time
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

BATCH, SEQ_LEN, VOCAB, WARMUP = 16, 256, 4096, 5
ARMS = ("phigrow", "trainer", "trainer, tuned")
SETTINGS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "grad_clip": 1.0}
MODEL: dict[str, Any] = {
    **PHI,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": SEQ_LEN,
    "vocab_size": VOCAB,
    "bos_token_id": None,
    "eos_token_id": None,
}


def prepare(folder: Path) -> None:
    """Write the weights and the blocks that both train."""
    import torch
    from transformers import PhiConfig, PhiForCausalLM

    prepare_data(folder, seq_len=SEQ_LEN, vocab_size=VOCAB)
    torch.manual_seed(0)
    PhiForCausalLM(PhiConfig(**MODEL)).save_pretrained(folder / "init")


class Clock:
    """Wall and CPU seconds at the beginning of every step."""

    def __init__(self) -> None:
        self.ticks: list[tuple[float, float, float]] = []

    def tick(self) -> None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.ticks.append((time.perf_counter(), usage.ru_utime, usage.ru_stime))

    def result(self, losses: list[float]) -> dict[str, Any]:
        (w0, u0, s0), (w1, u1, s1) = self.ticks[WARMUP], self.ticks[-1]
        steps = len(self.ticks) - 1 - WARMUP
        return {
            "tokens_per_second": steps * BATCH * SEQ_LEN / (w1 - w0),
            "user_seconds": (u1 - u0) / steps,
            "system_seconds": (s1 - s0) / steps,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "losses": losses,
        }


def by_phigrow(folder: Path, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    from phigrow.training.allocator import keep_freed_memory

    keep_freed_memory()  # as the recipe's entry point does, before torch is loaded
    from phigrow.training import RunConfig, train

    clock = Clock()
    on_every_step(clock.tick, lambda number: clock.tick() if number == steps - 1 else None)
    out = folder / "run"
    if os.environ.get("RANK", "0") == "0":
        shutil.rmtree(out, ignore_errors=True)
    settings = {
        "init": str(folder / "init"),
        "data": str(folder / "data"),
        "out": str(out),
        "steps": steps,
        "batch": BATCH,
        "schedule": "constant",
        "warmup": 0,
        "eval_blocks": 16,
        "save_every": 0,
        "export": None,
    }
    train(RunConfig(**(settings | SETTINGS | options)))
    return clock.result(step_losses(read_records(out)))


def by_trainer(folder: Path, steps: int, *, tuned: bool) -> dict[str, Any]:
    from phigrow.training.allocator import keep_freed_memory

    if tuned:
        keep_freed_memory()
    import torch
    from torch.utils.data import SequentialSampler
    from transformers import PhiForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from phigrow import corpus
    from phigrow.corpus.order import step_rows

    blocks, clock = corpus.load_blocks(folder / "data"), Clock()
    order = [int(row) for number in range(steps) for row in step_rows(0, number, BATCH, len(blocks.train))]

    class Blocks(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return len(order)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            ids = torch.from_numpy(blocks.train.batch([order[index]])[0])
            return {"input_ids": ids[:-1], "labels": ids[:-1], "shift_labels": ids[1:]}

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    class Ticks(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.tick()

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        use_cpu=not torch.accelerator.is_available(),
        bf16=True,
        optim="adamw_torch_fused",
        max_steps=steps,
        per_device_train_batch_size=BATCH // ranks,
        learning_rate=SETTINGS["lr"],
        lr_scheduler_type="constant",
        weight_decay=SETTINGS["weight_decay"],
        adam_beta1=SETTINGS["beta1"],
        adam_beta2=SETTINGS["beta2"],
        adam_epsilon=SETTINGS["eps"],
        max_grad_norm=SETTINGS["grad_clip"],
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
    )
    model = PhiForCausalLM.from_pretrained(folder / "init", dtype=torch.float32)
    trainer = InOrder(model=model, args=arguments, train_dataset=Blocks(), callbacks=[Ticks()])
    trainer.train()
    clock.tick()
    return clock.result([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def child(arm: str, folder: Path, steps: int, out: Path, options: dict[str, Any]) -> None:
    """Train in this process, and write its speed, memory and losses."""
    rank = os.environ.get("RANK", "0")
    if arm == "phigrow":
        result = by_phigrow(folder, steps, options)
    else:
        result = by_trainer(folder, steps, tuned=arm == "trainer, tuned")
    out.with_name(f"{out.name}.{rank}").write_text(json.dumps(result))
    if "WORLD_SIZE" in os.environ:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def run(arm: str, folder: Path, steps: int, ranks: int, options: dict[str, Any]) -> dict[str, Any]:
    """One process (or ``ranks`` of them) of one arm."""
    for old in folder.glob("result.*"):
        old.unlink()
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=29611"] if ranks > 1 else []
    words = ["--child", arm, "--folder", str(folder), "--steps", str(steps), "--options", json.dumps(options)]
    cores = len(os.sched_getaffinity(0))
    run_process(arm, [*launcher, __file__, *words], threads=max(1, cores // ranks))
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("result.*"))]
    return {
        "tokens_per_second": results[0]["tokens_per_second"],
        "losses": results[0]["losses"],
        **{key: sum(r[key] for r in results) for key in ("user_seconds", "system_seconds", "peak_mb")},
    }


def compare(records: list[dict[str, Any]]) -> str:
    """Medians, and ratios to the Trainer of the same round: median (lowest to highest)."""
    lines = [
        "| | tokens/s | ratio | user CPU s/step | system CPU s/step | peak MB | ratio |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for arm in dict.fromkeys(record["arm"] for record in records):
        own = [record for record in records if record["arm"] == arm]
        median = {key: statistics.median(r[key] for r in own) for key in own[0] if isinstance(own[0][key], float)}
        speed, memory = (
            median_and_range(ratios_to("trainer", own, records, key)) for key in ("tokens_per_second", "peak_mb")
        )
        lines.append(
            f"| {arm} | {median['tokens_per_second']:,.0f} | {speed} | {median['user_seconds']:.2f} | "
            f"{median['system_seconds']:.2f} | {median['peak_mb']:.0f} | {memory} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a folder of this benchmark's own")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--ranks", type=int, default=1, help="ranks of both; they share the cores")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--options", type=json.loads, default={}, help="JSON of more keys for phigrow's run")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    parser.add_argument("--child", choices=ARMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder
    if arguments.child:
        child(arguments.child, folder, arguments.steps, folder / "result", arguments.options)
        return
    prepare(folder)
    records: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        for arm in arguments.arms:
            options = arguments.options if arm == "phigrow" else {}
            record = {"round": number, "arm": arm, **run(arm, folder, arguments.steps, arguments.ranks, options)}
            records.append(record)
            show(record)
    shutil.rmtree(folder)
    text = compare(records) if "trainer" in arguments.arms else ""
    if {"phigrow", "trainer"} <= set(arguments.arms):
        difference = loss_difference(records, "phigrow", "trainer")
        text += f"\nLargest relative difference of a step's loss, phigrow against Trainer: {difference:.1e}.\n"
    print(text)
    if arguments.out:
        settings = {"ranks": arguments.ranks, "steps": arguments.steps, "options": arguments.options}
        content = {"settings": settings, "records": records}
        write_results(arguments.out, content, text, "torch", "transformers", "deepspeed", "accelerate")


if __name__ == "__main__":
    main()
