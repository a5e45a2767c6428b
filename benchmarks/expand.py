"""Time and memory of `phigrow expand` at full size: phi-1.5 (random bf16 weights, 2.8 GB) to phi-2 (5.6 GB).

    python benchmarks/expand.py --folder /dev/shm/expand --rounds 5 --out benchmarks/results/DATE-DEVICE-expand

Every round copies the output with `cp -r` and expands by every method, each in a process of its own, so that the
ratios compare neighbours in time: on a shared machine absolute times drift. The order is shuffled in every round. The
first round warms up and is not counted. Peak memory is what the kernel reports of the finished process, mapped pages
included. On a disk, add --sync: `cp` is then followed by a `sync` of what it wrote, as `phigrow expand` ends with one.

    python benchmarks/expand.py --folder /dev/shm/expand --in-memory --out benchmarks/results/DATE-DEVICE-in-memory

compares tile with the plain way instead, both models in memory: load, tile, `save_pretrained`.

    python benchmarks/expand.py --folder /dev/shm/expand --memory --out benchmarks/results/DATE-DEVICE-expand

measures peak memory from 0.1B to 3B parameters instead, and

    python benchmarks/expand.py --folder /dev/shm/expand --blocks --out benchmarks/results/DATE-DEVICE-expand-blocks

times tile and wr by the size of a block, and tile by the number of threads: how both were chosen.

    python benchmarks/expand.py --folder /dev/shm/expand --mixtures --out benchmarks/results/DATE-DEVICE-expand-mixtures

times the methods that multiply matrices: isometric, and ligo with maps that are drawn, not learned. Minutes each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

METHODS = ("tile", "lossless", "wr")

IN_MEMORY = """
import json, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
src = AutoModelForCausalLM.from_pretrained("src", dtype=torch.bfloat16)
config = AutoConfig.for_model(**json.load(open("dst.json")))
dst = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
old = src.state_dict()
L, M = src.config.num_hidden_layers, config.num_hidden_layers
with torch.no_grad():
    for name, tensor in dst.state_dict().items():
        words = name.split(".")
        if words[1] == "layers":
            words[2] = str(min(L - 1, round(int(words[2]) * L / M)))
        values = old[".".join(words)]
        for dim, size in enumerate(tensor.shape):
            values = values.index_select(dim, torch.arange(size) % values.shape[dim])
        tensor.copy_(values)
dst.save_pretrained("out")
"""

SIZES = {  # destination: hidden, heads, layers; the source is half as wide and has half the layers
    "0.1B": (768, 12, 12),
    "0.4B": (1024, 16, 24),
    "1.4B": (2048, 32, 24),
    "2.8B": (2560, 40, 32),
}


def phi(hidden: int, heads: int, layers: int) -> dict[str, Any]:
    from phigrow.models.config import load_config

    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    rotary = {"partial_rotary_factor": 32 / (hidden // heads)}
    return load_config("phi2.json") | sizes | {"num_attention_heads": heads, "num_key_value_heads": heads} | rotary


def make_source(folder: Path, config: dict[str, Any]) -> None:
    """Write random bf16 weights in a process of its own: a child's peak memory starts at that of its parent."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(_write_source, folder, config).result()


def _write_source(folder: Path, config: dict[str, Any]) -> None:
    import torch

    from phigrow.checkpoints.bits import bits_of
    from phigrow.checkpoints.writer import CheckpointWriter
    from phigrow.models.families import family_of

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shapes = family_of(config, "benchmark").state_shapes(config)
    writer = CheckpointWriter(folder, shapes, "bfloat16", 5 * 10**9)
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        values = torch.empty(shape).normal_(0, 0.02, generator=generator)
        writer.write(name, 0, bits_of((values + 1 if "layernorm.weight" in name else values).bfloat16()))
    writer.close(sync=False)
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))


def run(command: list[str], folder: Path) -> dict[str, float]:
    """Seconds, CPU seconds and peak memory (MB) of one command."""
    started = time.perf_counter()
    child = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    errors = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        sys.exit(f"{command} failed: {errors[-2000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_mb": usage.ru_maxrss / 1024}


def expand(method: str) -> list[str]:
    words = ["expand", "--src", "src", "--dst-config", "dst.json", "--method", method, "--out", "out"]
    return [sys.executable, "-c", "from phigrow.cli import main; main()", *words]


def tuned(method: str, values: int, threads: int) -> list[str]:
    """`phigrow expand` with another block size and number of threads."""
    module = "phigrow.expansion.write_tensors"
    script = f"import os, {module}; {module}.BLOCK_VALUES = {values}; os.cpu_count = lambda: {threads}"
    command = expand(method)
    return [*command[:2], f"{script}; {command[2]}", *command[3:]]


def blocks() -> dict[str, list[str]]:
    """What is timed to choose block size and threads."""
    cores = os.cpu_count() or 1
    sizes = {f"{m}, blocks of 2^{k} values": tuned(m, 1 << k, cores) for m in ("tile", "wr") for k in (16, 18, 20, 22)}
    return sizes | {f"tile, {n} threads": tuned("tile", 1 << 20, n) for n in (1, 2, 4)}


def mixtures(folder: Path) -> dict[str, list[str]]:
    """The methods that multiply matrices; the maps of ligo are written to the folder."""
    import numpy as np

    import phigrow
    from phigrow.growth.matrices import write_maps

    plan = phigrow.plan(folder / "src" / "config.json", folder / "dst.json", "ligo")
    drawn, learned = np.random.default_rng(0), plan.learned
    assert learned is not None, "ligo learns"
    start = {f"width/{name}": learned.matrix(name) for name in learned.widths}
    start |= {f"depth/{line}": learned.depth(line) for line in learned.lines()}
    maps = {name: values + drawn.normal(0, 0.01, values.shape) for name, values in start.items()}
    said = {"options": plan.options, "depth": plan.depth, "rounding": "half-even", "seed": plan.seed}
    (folder / "maps").mkdir(exist_ok=True)
    write_maps(folder / "maps", maps, {"start": said, "cost": {"tokens": 0, "flops": 0.0, "seconds": 0.0}})
    return {"isometric": expand("isometric"), "ligo": [*expand("ligo"), "--maps", "maps"]}


def timings(
    folder: Path, rounds: int, *, in_memory: bool, sync: bool, tune: bool, mixing: bool
) -> list[dict[str, Any]]:
    """Records of every process of every counted round."""
    from phigrow.models.config import load_config

    make_source(folder / "src", load_config("phi-1_5.json"))
    (folder / "dst.json").write_text(json.dumps(load_config("phi2.json")))
    shutil.rmtree(folder / "out", ignore_errors=True)
    if tune:
        commands = blocks() | {"tile": expand("tile")}
    elif in_memory:
        commands = {"in memory": [sys.executable, "-c", IN_MEMORY], "tile": expand("tile")}
    else:
        run(expand("tile"), folder)
        (folder / "out").rename(folder / "reference")
        methods = mixtures(folder) if mixing else {method: expand(method) for method in METHODS}
        commands = {"cp -r": ["cp", "-r", "reference", "out"], **methods}
    if sync:
        commands["cp -r, sync"] = ["sh", "-c", "cp -r reference out && sync out/*"]
    records = []
    for number in range(rounds + 1):
        for name in random.Random(number).sample(list(commands), len(commands)):
            os.sync()  # nobody starts with another's pages still to be written
            record = {"round": number, "what": name, **run(commands[name], folder)}
            shutil.rmtree(folder / "out")
            print(record, flush=True)
            if number:
                records.append(record)
    return records


def table(records: list[dict[str, Any]], base: str) -> str:
    """Medians, and the ratio to ``base`` in the same round: median (lowest to highest)."""
    copies = {r["round"]: r["seconds"] for r in records if r["what"] == base}
    lines = [f"| | seconds | CPU seconds | peak MB | seconds, as a ratio to `{base}` |", "|---|--:|--:|--:|--:|"]
    for what in sorted({r["what"] for r in records}):
        own = [r for r in records if r["what"] == what]
        ratios = sorted(r["seconds"] / copies[r["round"]] for r in own)
        medians = [statistics.median(r[key] for r in own) for key in ("seconds", "cpu_seconds", "peak_mb")]
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        lines.append(f"| {what} | {medians[0]:.1f} | {medians[1]:.1f} | {medians[2]:.0f} | {spread} |")
    return "\n".join(lines) + "\n"


def memory(folder: Path) -> list[dict[str, Any]]:
    """Peak memory of every method at every size."""
    records = []
    for name, (hidden, heads, layers) in SIZES.items():
        make_source(folder / "src", phi(hidden // 2, heads // 2, layers // 2))
        (folder / "dst.json").write_text(json.dumps(phi(hidden, heads, layers)))
        for method in METHODS:
            shutil.rmtree(folder / "out", ignore_errors=True)
            records.append({"size": name, "what": method, **run(expand(method), folder)})
            print(records[-1], flush=True)
        shutil.rmtree(folder / "out")
    return records


def memory_table(records: list[dict[str, Any]]) -> str:
    lines = [f"| destination | {' | '.join(METHODS)} |", "|---|" + "--:|" * len(METHODS)]
    for size in SIZES:
        peaks = {r["what"]: r["peak_mb"] for r in records if r["size"] == size}
        lines.append(f"| {size} | {' | '.join(f'{peaks[method]:.0f} MB' for method in METHODS)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a folder of this benchmark's own; 14 GB free")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="peak memory from 0.1B to 3B instead of timings")
    parser.add_argument("--in-memory", action="store_true", help="tile against the plain way, instead of `cp -r`")
    parser.add_argument("--blocks", action="store_true", help="tile and wr by size of blocks and number of threads")
    parser.add_argument("--mixtures", action="store_true", help="isometric and ligo instead")
    parser.add_argument("--sync", action="store_true", help="also time `cp -r` and a sync of what it wrote (on a disk)")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.memory:
        records = memory(arguments.folder)
        text = memory_table(records)
    else:
        records = timings(
            arguments.folder,
            arguments.rounds,
            in_memory=arguments.in_memory,
            sync=arguments.sync,
            tune=arguments.blocks,
            mixing=arguments.mixtures,
        )
        text = table(records, "tile" if arguments.blocks else "in memory" if arguments.in_memory else "cp -r")
    shutil.rmtree(arguments.folder)
    print(text)
    if arguments.out:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        arguments.out.with_suffix(".json").write_text(json.dumps({"machine": machine, "records": records}, indent=1))
        arguments.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
