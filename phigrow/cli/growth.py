"""Commands that grow a model and inspect the result: expand, grow-optimizer, plan, diff, capacity, inspect, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from phigrow.checkpoints.reader import DTYPES
from phigrow.cli.growth_flags import growth_flags
from phigrow.cli.options import DST_CONFIG_HELP, DstConfig, Method, Revision, SeqLen, Src, choice, refuse_others
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
from phigrow.errors import GrowthError
from phigrow.expansion.logits import BACKENDS
from phigrow.expansion.verify import ARITHMETIC
from phigrow.growth.growth_spec import GrowthSpec
from phigrow.growth.moments import STATES
from phigrow.models.capacity import OPTIMIZERS, PEAK_FLOPS


@growth_flags()
def expand(
    src: Src,
    dst_config: DstConfig,
    growth: GrowthSpec,
    out: Annotated[
        Path | None, typer.Option(help="New folder.  \\[default: SRC-to-CONFIG-METHOD in the current folder]")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help=f"Data type of the new weights: {', '.join(DTYPES.values())}.  \\[default: the source's]",
            **choice(DTYPES.values()),
        ),
    ] = None,
    revision: Revision = None,
    shard_size: Annotated[str, typer.Option(help="Largest size of a safetensors file.")] = "5GB",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --out.")] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Accept NaN and infinities in the source.")
    ] = False,
) -> None:
    """Grow a checkpoint into a larger one.

    Weights are streamed, so neither model is in memory as a whole. The result is a Hugging Face folder. Beside the
    weights, phigrow.json holds the resolved plan, the hashes of the source and the command that repeats the growth.

    phigrow expand --src phi-1_5 --dst-config phi2.json --method tile
    """
    from phigrow.expansion.expand import OutputSpec, default_out, expand_checkpoint, preview
    from phigrow.inspection.advice import advice
    from phigrow.inspection.plan_file import read_plan_file
    from phigrow.training.allocator import keep_freed_memory

    if dry_run:
        plan, size, written_dtype = preview(src, dst_config, growth, dtype=dtype, revision=revision)
        print_plan(plan, advised=advice(plan, dtype=written_dtype))
        target = out or default_out(src, dst_config, growth.label)
        typer.echo(f"\ndry run: would write {size / 1e9:.3f} GB of {written_dtype} to {target}; wrote nothing")
        return
    keep_freed_memory()
    output = OutputSpec(out, dtype, shard_size, overwrite, allow_nonfinite, progress=shows_progress())
    written = expand_checkpoint(src, dst_config, growth, output, revision=revision)
    typer.echo(f"wrote {written}")
    if not is_quiet():
        made = read_plan_file(written)
        print_remarks(made.plan, advice(made.plan, dtype=made.provenance.dtype if made.provenance else None))
    say(f"check it with: phigrow verify {src} {written}")


def grow_optimizer(
    checkpoint: Annotated[
        Path,
        typer.Option(
            help="Checkpoint of the source: its run folder (for the newest one), one of its checkpoints/step-N, or a "
            "folder that DeepSpeed wrote at ZeRO 1 to 3."
        ),
    ],
    grown: Annotated[Path, typer.Option(help="Folder that phigrow expand wrote from the weights of that checkpoint.")],
    out: Annotated[Path | None, typer.Option(help="New folder.  \\[default: GROWN-optimizer]")] = None,
    state: Annotated[
        str,
        typer.Option(
            help="Growth of Adam's moments: scale (by the gains of their gradients), copy (unchanged, to every copy), "
            "asymmetric (unchanged, to the first copy alone), reset (zeros).",
            **choice(STATES),
        ),
    ] = "scale",
    method: Method = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --out.")] = False,
) -> None:
    """Grow fp32 masters and Adam's moments by the plan of a grown folder, tensor by tensor.

    The result is a universal checkpoint. A run starts from it with --init GROWN --init-optimizer OUT, on any number of
    ranks and at any ZeRO stage. It continues at the source's position in the data.

    phigrow grow-optimizer --checkpoint runs/small --grown small-to-large --state scale
    """
    import phigrow
    from phigrow.training.allocator import keep_freed_memory

    keep_freed_memory()
    written = phigrow.grow_optimizer(
        checkpoint, grown, out, state=state, overwrite=overwrite, progress=shows_progress(), method=method
    )
    typer.echo(f"wrote {written}")
    say(f"start from it with: phigrow pretrain RECIPE --init {grown} --init-optimizer {written}")


@growth_flags()
def plan(
    src: Src,
    dst_config: DstConfig,
    growth: GrowthSpec,
    revision: Revision = None,
    seq_len: SeqLen = None,
    tokens: Annotated[
        str | None, typer.Option(help="Training tokens of the grown model (100B, 1.4T), for advice about them.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Print the plan of a growth, axis by axis and layer by layer.

    Only the configurations are read, not the weights. Nothing is written.

    phigrow plan --src phi-1_5 --dst-config phi2.json --method lossless
    """
    from phigrow.growth.planner import make_plan
    from phigrow.inspection.advice import advice
    from phigrow.inspection.explain import summary
    from phigrow.models.capacity import parse_amount

    budget = parse_amount(tokens) if tokens else None
    made = make_plan(src, dst_config, growth, revision=revision)
    advised = advice(made, tokens=budget)
    if as_json:
        print_json(summary(made, seq_len) | {"advice": [each.to_json() for each in advised]})
    else:
        print_plan(made, seq_len, advised)


def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="Grown folder, phigrow.json, or output of plan --json.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The other plan, in any of these forms.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the differences as JSON.")] = False,
) -> None:
    """Print the differences between two plans. The exit code is 0 if there are none, and 1 otherwise.

    phigrow diff grown-by-tile grown-by-wr
    """
    from phigrow.inspection.difference import differences
    from phigrow.inspection.plan_file import read_plan_file

    old, new = (read_plan_file(path).plan for path in (first, second))
    changed = differences(old, new)
    if as_json:
        rows = [difference.to_json() for difference in changed]
        print_json({"same": not changed, "hashes": [old.hash, new.hash], "differences": rows})
    else:
        print_differences(str(first), str(second), old, new, changed)
    if changed:
        raise typer.Exit(1)


def capacity(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help=DST_CONFIG_HELP.replace("Destination c", "C"))],
    gpus: Annotated[str, typer.Option(help="Number of GPUs x GiB of each, such as 8x80.")],
    tokens: Annotated[
        str | None, typer.Option(help="Tokens of the whole run (100B, 1.4T), to estimate time and cost.")
    ] = None,
    gpu: Annotated[
        str, typer.Option(help="Model of the GPU, which sets the peak FLOP/s.", **choice(PEAK_FLOPS))
    ] = "a100",
    mfu: Annotated[float, typer.Option(help="Share of the peak FLOP/s that the training reaches.")] = 0.4,
    price: Annotated[
        float | None, typer.Option(help="Price of one GPU for one hour, in any currency.", min=0.0)
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Sequences per step, over all GPUs.  \\[default: about 2^20 tokens]", min=1)
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Sequences that a GPU processes at once.  \\[default: the most that fit]", min=1)
    ] = None,
    seq_len: SeqLen = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute every layer in the backward pass.")
    ] = False,
    selective: Annotated[
        bool,
        typer.Option("--selective", help="Recompute only normalisations, rotary embeddings and activations."),
    ] = False,
    optimizer: Annotated[
        str, typer.Option(help="Optimizer, which sets the state of each parameter.", **choice(OPTIMIZERS))
    ] = "adamw",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Print the ZeRO stages with which a model fits on given GPUs, and the time of its training.

    Only the configuration is read. The exit code is 1 if nothing fits.

    phigrow capacity phi2.json --gpus 8x80 --tokens 100B
    """
    from phigrow.models.capacity import SELECTIVE, lightest_recomputation, parse_amount
    from phigrow.models.capacity import capacity as computed

    if checkpointing and selective:
        raise GrowthError("--checkpointing and --selective are both given", where="--selective", fix="give one of them")
    options: dict[str, Any] = {
        "gpus": gpus, "tokens": parse_amount(tokens) if tokens else None, "mfu": mfu, "peak": gpu, "price": price,
        "batch": batch, "micro_batch": micro_batch, "seq_len": seq_len, "optimizer": optimizer,
    }  # fmt: skip
    result = computed(config, checkpointing=SELECTIVE if selective else checkpointing, **options)
    if as_json:
        print_json(result.to_json())
    else:
        needed = None if result.chosen else lightest_recomputation(result, config, **options)
        print_capacity(result, None if needed is None else "--checkpointing" if needed is True else "--selective")
    if result.chosen is None:
        raise typer.Exit(1)


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Grown folder, or its phigrow.json.")],
    tensor: Annotated[
        str | None, typer.Option(help="Print these tensors in detail: a name, or a pattern such as '*.layers.0.*'.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw the blocks of --tensor, at most 12 tensors, into this .png, .svg or .pdf file. Without "
            "--tensor, draw the matrices of layer 0 and those outside the layers."
        ),
    ] = None,
    method: Method = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with counts of values.")] = False,
) -> None:
    """Print the origin of a grown checkpoint, and the shares of copied, tiled, scaled, fresh and zero values.

    Only phigrow.json is read, not the weights. Counts are exact.

    phigrow inspect phi-1_5-to-phi2-tile --tensor '*.layers.0.self_attn.q_proj.weight' --plot q_proj.png
    """
    from phigrow.growth.origins import matching
    from phigrow.inspection.plan_file import inspection_json, read_plan_file

    read = read_plan_file(folder)
    if method is not None:
        from phigrow.growth.planner import check_method_of

        check_method_of(read.plan, method)
    tensors = matching(read.plan, tensor) if tensor is not None else []
    if plot is not None:
        from phigrow.inspection.pictures import default_tensors, picture, save

        save(picture(read.plan, tensors or default_tensors(read.plan)), plot)
    if as_json:
        print_json([each.to_json() for each in tensors] if tensor is not None else inspection_json(read))
    elif tensor is not None:
        print_tensors(tensors)
    else:
        print_inspection(read)
    if plot is not None:
        typer.echo(f"wrote {plot}", err=as_json)


def verify(
    context: typer.Context,
    src: Annotated[str, typer.Argument(help="Source: a folder or a hub name.")],
    dst: Annotated[str, typer.Argument(help="Grown folder.")],
    dtype: Annotated[
        str, typer.Option(help="Data type to compute in, whatever the stored one.", **choice(ARITHMETIC))
    ] = ARITHMETIC[0],
    text: Annotated[
        Path | None,
        typer.Option(help="File of text to run on.  \\[default: a paragraph; random tokens without a tokenizer]"),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to run on.", min=2)] = 256,
    longest: Annotated[
        int | None,
        typer.Option(
            help="Longest sequence to run, where the function can change with the length or the context grows.  "
            "\\[default: the destination's context, if that takes a few minutes at most]",
            min=1,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of random tokens.")] = 0,
    revision: Revision = None,
    method: Method = None,
    backend: Annotated[
        str,
        typer.Option(
            help="Run the models in numpy (fast to start) or in transformers (the reference). auto is numpy up to 100M "
            "parameters.",
            **choice(BACKENDS),
        ),
    ] = BACKENDS[0],
    save: Annotated[
        Path | None,
        typer.Option(help="Save the certificate to this file, with a hash of every tensor of both models."),
    ] = None,
    certificate: Annotated[
        Path | None,
        typer.Option(help="Check tensor hashes against a saved certificate. No model is run."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Run the source and the grown model on the same tokens, and compare their logits.

    The exit code is 1 if the plan claims to preserve the function but the grown model does not. It is 1, too, if a
    tensor differs from a saved certificate.

    phigrow verify phi-1_5 phi-1_5-to-phi2-lossless
    """
    import phigrow

    if certificate is not None:
        refuse_others(context, "certificate", "src", "dst", "revision", "as_json")
        from phigrow.expansion.certificates import check_certificate

        problems = check_certificate(certificate, src, dst, revision)
        print_check(problems, as_json)
        raise typer.Exit(1 if problems else 0)
    if save is not None:
        from phigrow.expansion.certificates import check_place

        check_place(save)
    probe = _text_of(text) if text else None
    measured = phigrow.verify(
        src, dst, dtype=dtype, probe=probe, tokens=tokens, seed=seed, revision=revision, backend=backend,
        longest=longest, method=method,
    )  # fmt: skip
    if as_json:
        print_json(measured.to_json())
    else:
        print_certificate(measured)
    if save is not None:
        from phigrow.expansion.certificates import save_certificate

        save_certificate(save, measured, src, dst, revision)
        typer.echo(f"wrote {save}", err=as_json)
    if measured.passed is False:
        raise typer.Exit(1)


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{file} cannot be read: {error}", param_hint="--text") from error
