"""Commands that grow and look at what was grown: expand, plan, inspect, verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phigrow.cli.options import (
    DST_CONFIG_HELP,
    SRC_HELP,
    AnchorName,
    Arithmetic,
    Batch,
    Checkpointing,
    DepthName,
    DstConfig,
    Dtype,
    GpuName,
    Gpus,
    MapsFolder,
    MethodName,
    Mfu,
    MicroBatch,
    Noise,
    Price,
    Revision,
    Rounding,
    RoundingName,
    ScaleName,
    Seed,
    Src,
    State,
    Tokens,
    refuse_others,
    refuse_without,
    required,
    shape_of,
)  # fmt: skip
from phigrow.cli.printing import (
    print_capacity,
    print_certificate,
    print_check,
    print_differences,
    print_inspection,
    print_json,
    print_plan,
    print_remarks,
    print_tensors,
)
from phigrow.cli.terminal import is_quiet, say, shows_progress

if TYPE_CHECKING:
    from phigrow.models.capacity import Capacity


def expand(
    src: Src,
    dst_config: DstConfig,
    method: MethodName = "wr",
    out: Annotated[
        Path | None, typer.Option(help="New folder.  \\[default: SRC-to-CONFIG-METHOD in the current folder]")
    ] = None,
    depth: DepthName = None,
    rounding: RoundingName = Rounding.half_even,
    anchor: AnchorName = None,
    scale: ScaleName = None,
    noise: Noise = 0.0,
    seed: Seed = 0,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the new weights.  \\[default: the source's]")] = None,
    revision: Revision = None,
    shard_size: Annotated[str, typer.Option(help="Most bytes a safetensors file.")] = "5GB",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --out.")] = False,
    maps: MapsFolder = None,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Let NaN and infinities of the source through.")
    ] = False,
) -> None:
    """Grow a checkpoint into a larger one, streaming: neither model is ever in memory.

    The result is an ordinary Hugging Face folder, with phigrow.json beside the weights: the resolved plan, the hashes
    of the source, and the command that repeats it.

    phigrow expand --src phi-1_5 --dst-config phi2.json --method tile
    """
    import phigrow
    from phigrow.expansion.expand import default_out, preview
    from phigrow.inspection.advice import advice
    from phigrow.inspection.plan_file import read_plan_file
    from phigrow.training.allocator import keep_freed_memory

    shape = shape_of(depth, rounding, noise, seed, revision, anchor, scale) | {"maps": maps}
    if dry_run:
        plan, size, found_dtype = preview(src, dst_config, method=method, dtype=dtype, **shape)
        print_plan(plan, advised=advice(plan, dtype=found_dtype))
        target = out or default_out(src, dst_config, method)
        typer.echo(f"\ndry run: would write {size / 1e9:.3f} GB of {found_dtype} to {target}; wrote nothing")
        return
    keep_freed_memory()
    written = phigrow.expand(
        src, dst_config, out, method=method, dtype=dtype, shard_size=shard_size, overwrite=overwrite,
        progress=shows_progress(), allow_nonfinite=allow_nonfinite, **shape,
    )  # fmt: skip
    typer.echo(f"wrote {written}")
    if not is_quiet():
        made = read_plan_file(written)
        print_remarks(made.plan, advice(made.plan, dtype=made.provenance.dtype if made.provenance else None))
    say(f"check it with: phigrow verify {src} {written}")


def grow_optimizer(
    checkpoint: Annotated[
        Path,
        typer.Option(
            help="Folder of the run that trained the source (its newest checkpoint), one of its checkpoints/step-N, or "
            "one that DeepSpeed wrote at ZeRO 1 to 3."
        ),
    ],
    grown: Annotated[Path, typer.Option(help="Folder that phigrow expand made of that checkpoint's weights.")],
    out: Annotated[Path | None, typer.Option(help="New folder.  \\[default: GROWN-optimizer]")] = None,
    state: Annotated[
        State,
        typer.Option(
            help="Of the moments: scale (by the gains of gradients), copy (as they are, to every copy), asymmetric (to "
            "the first copy alone), reset (zeros)."
        ),
    ] = State.scale,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --out.")] = False,
) -> None:
    """Grow fp32 masters and Adam's moments by the plan of a grown folder, tensor by tensor.

    The result is a universal checkpoint: a run on any number of ranks, at any ZeRO stage, starts from it with --init
    GROWN --optimizer OUT, and goes on with the data where the source stood.

    phigrow grow-optimizer --checkpoint runs/small --grown small-to-large --state scale
    """
    import phigrow
    from phigrow.training.allocator import keep_freed_memory

    keep_freed_memory()
    written = phigrow.grow_optimizer(
        checkpoint, grown, out, state=state.value, overwrite=overwrite, progress=shows_progress()
    )
    typer.echo(f"wrote {written}")
    say(f"start from it with: phigrow pretrain RECIPE --init {grown} --optimizer {written}")


def plan(
    context: typer.Context,
    src: Annotated[str | None, typer.Option(help=SRC_HELP + " Required, but for --diff and --gpus.")] = None,
    dst_config: Annotated[str | None, typer.Option(help=DST_CONFIG_HELP + " Required, but for --diff.")] = None,
    method: MethodName = "wr",
    depth: DepthName = None,
    rounding: RoundingName = Rounding.half_even,
    anchor: AnchorName = None,
    scale: ScaleName = None,
    noise: Noise = 0.0,
    seed: Seed = 0,
    revision: Revision = None,
    maps: MapsFolder = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of context for FLOPs.  \\[default: max_position_embeddings]", min=1)
    ] = None,
    diff: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="A B",
            help="Instead: print what differs between two plans, each a grown folder, its phigrow.json or what --json "
            "printed. Exit code 0 if they are the same, 1 if not.",
        ),
    ] = None,
    gpus: Gpus = None,
    tokens: Tokens = None,
    mfu: Mfu = 0.4,
    gpu: GpuName = "a100",
    price: Price = None,
    batch: Batch = None,
    micro_batch: MicroBatch = None,
    checkpointing: Checkpointing = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan, or what differs, as JSON.")] = False,
) -> None:
    """Print what expand would do, axis by axis and layer by layer, from the configurations alone; or what it would
    take to train the destination.

    phigrow plan --src phi-1_5 --dst-config phi2.json --method lossless

    phigrow plan --diff grown-by-tile grown-by-wr

    phigrow plan --dst-config phi2.json --gpus 8x80 --tokens 100B
    """
    import phigrow
    from phigrow.inspection.advice import advice
    from phigrow.inspection.explain import summary
    from phigrow.models.capacity import parse_amount

    if diff is not None:
        refuse_others(context, "diff", "as_json")
        if _print_differences(*diff, as_json):
            raise typer.Exit(1)
        return
    found: Capacity | None = None
    budget = parse_amount(tokens) if tokens else None
    if gpus is None:
        refuse_without(context, "gpus", "mfu", "gpu", "price", "batch", "micro_batch", "checkpointing")
    else:
        from phigrow.models.capacity import capacity

        if src is None:
            growth_only = ("method", "depth", "rounding", "anchor", "scale", "noise", "seed", "revision", "maps")
            refuse_without(context, "src", *growth_only)
        found = capacity(
            required(dst_config, "--dst-config"), gpus, tokens=budget, mfu=mfu,
            peak=gpu, price=price, batch=batch, micro_batch=micro_batch, seq_len=seq_len, checkpointing=checkpointing,
        )  # fmt: skip
    if found is not None and src is None:
        print_json(found.to_json()) if as_json else print_capacity(found)
        if found.chosen is None:
            raise typer.Exit(1)
        return
    made = phigrow.plan(
        required(src, "--src"), required(dst_config, "--dst-config"), method,
        maps=maps, **shape_of(depth, rounding, noise, seed, revision, anchor, scale),
    )  # fmt: skip
    advised = advice(made, tokens=budget)
    if as_json:
        said = {"advice": [each.to_json() for each in advised]}
        print_json(summary(made, seq_len) | said | ({"capacity": found.to_json()} if found else {}))
        return
    print_plan(made, seq_len, advised)
    if found is not None:
        print_capacity(found)


def _print_differences(first: Path, second: Path, as_json: bool) -> bool:
    """Print what differs between two plans; whether anything does."""
    from phigrow.inspection.difference import differences
    from phigrow.inspection.plan_file import read_plan_file

    old, new = (read_plan_file(path).plan for path in (first, second))
    found = differences(old, new)
    if as_json:
        print_json({"same": not found, "hashes": [old.hash, new.hash], "differences": [d.to_json() for d in found]})
    else:
        print_differences(str(first), str(second), old, new, found)
    return bool(found)


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Grown folder, or its phigrow.json.")],
    tensor: Annotated[
        str | None, typer.Option(help="Of which tensors to say more: a name, or a pattern such as '*.layers.0.*'.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw the blocks of --tensor (at most 12; without it the matrices of layer 0 and outside layers) into "
            "this .png, .svg or .pdf."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON, with counts of values.")] = False,
) -> None:
    """Say where a grown checkpoint came from, and which of its values are copied, tiled, scaled, fresh or zero.

    Reads phigrow.json alone, not the weights, and counts exactly.

    phigrow inspect phi-1_5-to-phi2-tile --tensor '*.layers.0.self_attn.q_proj.weight' --plot q_proj.png
    """
    from phigrow.growth.origins import matching
    from phigrow.inspection.plan_file import inspection_json, read_plan_file

    read = read_plan_file(folder)
    found = matching(read.plan, tensor) if tensor is not None else []
    if plot is not None:
        from phigrow.inspection.pictures import default_tensors, picture, save

        save(picture(read.plan, found or default_tensors(read.plan)), plot)
    if as_json:
        print_json([each.to_json() for each in found] if tensor is not None else inspection_json(read))
    elif tensor is not None:
        print_tensors(found)
    else:
        print_inspection(read)
    if plot is not None:
        typer.echo(f"wrote {plot}", err=as_json)


def verify(
    context: typer.Context,
    src: Annotated[str, typer.Argument(help="Source: a folder or a hub name.")],
    dst: Annotated[str, typer.Argument(help="Grown folder.")],
    dtype: Annotated[Arithmetic, typer.Option(help="Of the arithmetic.")] = Arithmetic.float32,
    text: Annotated[
        Path | None, typer.Option(help="Probe text file.  \\[default: a paragraph, or random tokens]", exists=True)
    ] = None,
    tokens: Annotated[int, typer.Option(help="Probe positions.", min=2)] = 256,
    seed: Annotated[int, typer.Option(help="Of random probe tokens.")] = 0,
    revision: Revision = None,
    save: Annotated[
        Path | None,
        typer.Option(help="Write the certificate, with a hash of every tensor of both sides, to this file."),
    ] = None,
    certificate: Annotated[
        Path | None,
        typer.Option(help="Instead of running: are these the tensors that this saved certificate was measured on?"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Run source and grown model on the same tokens and print the certificate.

    Exit code 1 when the plan claims to preserve the function and it does not, or when a tensor is not the one that a
    saved certificate was measured on.
    """
    import phigrow

    if certificate is not None:
        refuse_others(context, "certificate", "src", "dst", "revision", "as_json")
        from phigrow.expansion.certificates import check_certificate

        problems = check_certificate(certificate, src, dst, revision)
        print_check(problems, as_json)
        raise typer.Exit(1 if problems else 0)
    probe = text.read_text(encoding="utf-8") if text else None
    found = phigrow.verify(src, dst, dtype=dtype, probe=probe, tokens=tokens, seed=seed, revision=revision)
    if as_json:
        print_json(found.to_json())
    else:
        print_certificate(found)
    if save is not None:
        from phigrow.expansion.certificates import save_certificate

        save_certificate(save, found, src, dst, revision)
        typer.echo(f"wrote {save}", err=as_json)
    if found.passed is False:
        raise typer.Exit(1)
