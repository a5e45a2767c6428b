"""The command learn-growth, which learns the maps of a growth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from phigrow.cli.growth_flags import growth_flags, learning_methods
from phigrow.cli.options import DstConfig, Revision, Src
from phigrow.cli.terminal import say
from phigrow.growth.growth_spec import GrowthSpec


@growth_flags(only=("depth", "rounding", "seed"), methods=learning_methods())
def learn_growth(
    src: Src,
    dst_config: DstConfig,
    growth: GrowthSpec,
    out: Annotated[Path, typer.Option(help="New folder of learned maps.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder written by 'phigrow data' with the source's tokenizer, or the word embedded for the "
            "documentation of Python.  \\[required]"
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help=f"Method whose maps are learned: {', '.join(learning_methods())}.")
    ] = "ligo",
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 100,
    batch: Annotated[int, typer.Option(help="Sequences per step, over all ranks.", min=1)] = 16,
    micro_batch: Annotated[int | None, typer.Option(help="Sequences that a rank processes at once.", min=1)] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.", min=0.0)] = 2e-3,
    noise: Annotated[
        float, typer.Option(help="Random part of every row of an initial map, as a fraction.", min=0.0)
    ] = 0.03,
    dtype: Annotated[
        str | None,
        typer.Option(help="Data type of the large model: fp32 or bf16.  \\[default: bf16 on a GPU, else fp32]"),
    ] = None,
    zero: Annotated[int, typer.Option(help="DeepSpeed ZeRO stage, 0 or 1.", min=0, max=1)] = 1,
    seq_len: Annotated[int, typer.Option(help="Tokens per block of the embedded corpus.", min=2)] = 256,
    threads: Annotated[int | None, typer.Option(help="CPU threads per rank.", min=1)] = None,
    revision: Revision = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --out.")] = False,
) -> None:
    """Learn linear maps that grow width and depth (LiGO), in a short training run under DeepSpeed.

    The source does not change. Apply the maps with phigrow expand --method ligo --maps OUT. To use several GPUs, run
    deepspeed --no_local_rank --module phigrow.cli learn-growth ...

    phigrow learn-growth --src phi-1_5 --dst-config phi2.json --data data --out maps
    """
    from phigrow.ligo.train import learn_growth as learn
    from phigrow.training.allocator import keep_freed_memory
    from phigrow.training.process import environment_kept, leave, own_rank

    keep_freed_memory()
    given: dict[str, Any] = {
        "data": data, "method": method, "depth": growth.depth, "rounding": growth.rounding, "steps": steps,
        "batch": batch, "micro_batch": micro_batch, "lr": lr, "noise": noise, "seed": growth.seed, "dtype": dtype,
        "zero": zero, "seq_len": seq_len, "threads": threads, "revision": revision, "overwrite": overwrite,
    }  # fmt: skip
    rank = own_rank()
    with environment_kept():
        try:
            learned = learn(src, dst_config, out, **given, **growth.options)
        finally:
            leave()
    if rank == 0:
        typer.echo(f"wrote {out}: {learned.tokens:,} tokens, {learned.flops:.3g} FLOPs, {learned.seconds:.1f} s")
        say(f"apply it with: phigrow expand --src {src} --dst-config {dst_config} --method ligo --maps {out}")
