"""The `phigrow` command: parsing and printing, no logic."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phigrow.errors import GrowthError

if TYPE_CHECKING:
    from phigrow.plan import Plan

app = typer.Typer(
    name="phigrow",
    help="Grow small pretrained Phi models into larger ones, pretrain them, and measure what growth saved.",
    epilog="Start with: phigrow demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


class Depth(StrEnum):
    interpose = "interpose"
    stack = "stack"
    identity = "identity"


class Rounding(StrEnum):
    half_even = "half-even"
    half_up = "half-up"
    floor = "floor"


class Anchor(StrEnum):
    edge = "edge"
    middle = "center"  # a member called center would hide str.center


class Scale(StrEnum):
    none = "none"
    preserve = "preserve"
    rms = "rms"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class Arithmetic(StrEnum):
    float32 = "float32"
    float64 = "float64"


Src = Annotated[
    str,
    typer.Option(
        help="Source: a Hugging Face folder, phi-1, phi-1_5, phi-2 (of microsoft), or any hub id. A folder of that "
        "name comes first."
    ),
]
DstConfig = Annotated[
    str,
    typer.Option(
        help="Destination configuration: a JSON file, a folder, or a shipped one: phi-1-small.json, phi-1.json, "
        "phi-1_5.json, phi2.json."
    ),
]
MethodName = Annotated[
    str, typer.Option("--method", help="Width method: tile, wr (weight reuse) or lossless (function-preserving).")
]
DepthName = Annotated[
    Depth | None, typer.Option("--depth", help="Depth method; by default interpose, and identity for lossless.")
]
RoundingName = Annotated[Rounding, typer.Option("--rounding", help="Rounding of the layer map of interpose.")]
AnchorName = Annotated[
    Anchor | None, typer.Option("--anchor", help="tile, wr: where the source lies on every axis.  \\[default: edge]")
]
ScaleName = Annotated[
    Scale | None,
    typer.Option(
        "--scale",
        help="tile: gain with which c copies are read: none 1 (as Phi), preserve 1/c, rms 1/sqrt(c).  "
        "\\[default: none]",
    ),
]
Noise = Annotated[
    float,
    typer.Option(
        min=0.0,
        help="tile: symmetry-breaking noise that copies cancel, as a fraction of each tensor's root mean square.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of all new random values.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the source on the hub.")]


def main() -> None:
    """Run the command; bad input ends with its message on stderr and exit code 2."""
    try:
        app()
    except GrowthError as error:
        from rich.console import Console

        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error:[/] {_escape(str(error))}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _version(shown: bool) -> None:
    if shown:
        from phigrow import __version__

        typer.echo(f"phigrow {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def expand(
    src: Src,
    dst_config: DstConfig,
    method: MethodName = "tile",
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
) -> None:
    """Grow a checkpoint into a larger one, streaming: neither model is ever in memory.

    The result is an ordinary Hugging Face folder, with phigrow.json beside the weights: the resolved plan, the hashes
    of the source, and the command that repeats it.

    phigrow expand --src phi-1_5 --dst-config phi2.json --method tile
    """
    import phigrow
    from phigrow.expand import default_out, preview

    shape = _shape(depth, rounding, noise, seed, revision, anchor, scale)
    if dry_run:
        plan, size, found_dtype = preview(src, dst_config, method=method, dtype=dtype, **shape)
        _print_plan(plan)
        target = out or default_out(src, dst_config, method)
        typer.echo(f"\ndry run: would write {size / 1e9:.3f} GB of {found_dtype} to {target}; wrote nothing")
        return
    written = phigrow.expand(
        src, dst_config, out, method=method, dtype=dtype, shard_size=shard_size, overwrite=overwrite, progress=True,
        **shape,
    )  # fmt: skip
    typer.echo(f"wrote {written}")
    typer.echo(f"check it with: phigrow verify {src} {written}")


@app.command()
def plan(
    src: Src,
    dst_config: DstConfig,
    method: MethodName = "tile",
    depth: DepthName = None,
    rounding: RoundingName = Rounding.half_even,
    anchor: AnchorName = None,
    scale: ScaleName = None,
    noise: Noise = 0.0,
    seed: Seed = 0,
    revision: Revision = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of context for FLOPs.  \\[default: max_position_embeddings]", min=1)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the resolved plan as JSON.")] = False,
) -> None:
    """Print what expand would do, axis by axis and layer by layer, from the configurations alone.

    phigrow plan --src phi-1_5 --dst-config phi2.json --method lossless
    """
    import phigrow
    from phigrow.explain import summary

    made = phigrow.plan(src, dst_config, method, **_shape(depth, rounding, noise, seed, revision, anchor, scale))
    if as_json:
        import json

        typer.echo(json.dumps(summary(made, seq_len), indent=1))
    else:
        _print_plan(made, seq_len)


@app.command()
def verify(
    src: Annotated[str, typer.Argument(help="Source: a folder or a hub name.")],
    dst: Annotated[str, typer.Argument(help="Grown folder.")],
    dtype: Annotated[Arithmetic, typer.Option(help="Of the arithmetic.")] = Arithmetic.float32,
    text: Annotated[
        Path | None, typer.Option(help="Probe text file.  \\[default: a paragraph, or random tokens]", exists=True)
    ] = None,
    tokens: Annotated[int, typer.Option(help="Probe positions.", min=2)] = 256,
    seed: Annotated[int, typer.Option(help="Of random probe tokens.")] = 0,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the certificate as JSON.")] = False,
) -> None:
    """Run source and grown model on the same tokens and print the certificate.

    Exit code 1 when the plan claims to preserve the function and it does not.
    """
    import phigrow

    probe = text.read_text(encoding="utf-8") if text else None
    certificate = phigrow.verify(src, dst, dtype=dtype, probe=probe, tokens=tokens, seed=seed, revision=revision)
    if as_json:
        import json

        typer.echo(json.dumps(certificate.to_json(), indent=1))
    else:
        verdicts = {
            None: "approximate by design: the plan claims nothing"
            if certificate.plan_hash
            else "no plan to hold it to",
            True: "PASSED: the plan claims to preserve the function, and does",
            False: "FAILED: the plan claims to preserve the function, and does not",
        }
        for key, value in certificate.to_json().items():
            typer.echo(f"{key:>20}  {value:.6g}" if isinstance(value, float) else f"{key:>20}  {value}")
        typer.echo(verdicts[certificate.passed])
    if certificate.passed is False:
        raise typer.Exit(1)


@app.command()
def data(
    source: Annotated[
        str,
        typer.Argument(
            help="'embedded' (the textbook of the Python installation), a text, JSONL or Parquet file or folder, or a "
            "hub dataset."
        ),
    ] = "embedded",
    out: Annotated[Path, typer.Option(help="New folder of packed blocks.")] = Path("data"),
    seq_len: Annotated[int, typer.Option(help="Tokens a block.", min=2)] = 2048,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder, file or hub name.  \\[default: a byte-level BPE trained on the text]")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Of a tokenizer trained here.", min=260)] = 4096,
    heldout: Annotated[float, typer.Option(help="Share of documents held out.", min=0.0, max=0.5)] = 0.05,
    seed: Annotated[int, typer.Option(help="Of the order of documents and of the split.")] = 0,
    text_column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a hub dataset.")] = "train",
    config: Annotated[str | None, typer.Option(help="Configuration of a hub dataset.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub dataset.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that tokenise.", min=1)] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --out.")] = False,
) -> None:
    """Turn text into packed blocks of tokens for pretraining, with documents held out for evaluation."""
    from phigrow.corpus import prepare

    info = prepare(
        source, out=out, seq_len=seq_len, tokenizer=tokenizer, vocab_size=vocab_size, heldout=heldout, seed=seed,
        text_column=text_column, split=split, config=config, revision=revision, num_proc=workers, overwrite=overwrite,
    )  # fmt: skip
    _print_json(info)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of all results; run again to resume.")] = Path("phigrow-demo"),
    ranks: Annotated[int | None, typer.Option(help="DeepSpeed ranks.  \\[default: chosen for this machine]")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of every arm.", min=4)] = None,
    seed: Annotated[int, typer.Option(help="Of data order and new weights.")] = 0,
) -> None:
    """Pretrain a small Phi, grow it by wr, tile and lossless, and measure each against training from scratch.

    Everything is real and small: the text is the Python installation's own documentation, training runs under
    DeepSpeed, the report is a picture and a table. Minutes on two CPU cores; an interrupted run resumes.
    """
    from phigrow.demo import run

    run(out, ranks=ranks, steps=steps, seed=seed)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders with records.jsonl, or a folder of them.")],
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("report"),
) -> None:
    """Compare grown arms with the from-scratch arm, from their records alone."""
    from phigrow.measure import findings
    from phigrow.measure import report as write_report

    for line in findings(write_report(runs, out)):
        typer.echo(line)
    typer.echo(f"wrote {out / 'report.md'}")


def _shape(
    depth: Depth | None,
    rounding: Rounding,
    noise: float,
    seed: int,
    revision: str | None,
    anchor: Anchor | None,
    scale: Scale | None,
) -> dict[str, Any]:
    """The arguments that `plan` and `expand` share; options of the method only where they were given."""
    shape: dict[str, Any] = {
        "depth": depth.value if depth else None,
        "rounding": rounding.value,
        "noise": noise,
        "seed": seed,
        "revision": revision,
    }
    return shape | {name: given.value for name, given in (("anchor", anchor), ("scale", scale)) if given is not None}


def _print_plan(plan: Plan, seq_len: int | None = None) -> None:
    from rich.console import Console
    from rich.table import Table

    from phigrow.explain import axis_rows, claim, cost_rows, layer_rows

    console = Console(highlight=False)

    def table(title: str, columns: list[str], rows: list[Any]) -> None:
        grid = Table(*columns, title=title, title_justify="left", title_style="bold")
        for row in rows:
            grid.add_row(*(str(cell) for cell in row))
        console.print(grid)

    options = "".join(f", {name} {value}" for name, value in plan.options.items())
    noise = f", noise {plan.noise:g}" if plan.noise else ""
    console.print(
        f"[bold]{plan.method}[/]{options}{noise}, depth {plan.depth}, seed {plan.seed}, plan {plan.hash[:16]}"
    )
    table("Axes", ["axis", "size", "coordinates", "write gain", "read gain"], axis_rows(plan))
    if len(plan.layers) > plan.src_sizes["layer"]:
        table("Layers", ["layer", "from", ""] * _LAYER_BLOCKS, _side_by_side(layer_rows(plan), _LAYER_BLOCKS))
    context = seq_len or plan.dst_config.get("max_position_embeddings", 2048)
    table(f"Cost (context {context})", ["", "source", "destination", "factor"], cost_rows(plan, seq_len))
    console.print(_escape(claim(plan)))
    for note in plan.notes:
        console.print(_escape(f"note: {note}"))


_LAYER_BLOCKS = 3
"""Blocks of layers printed beside each other, so that 32 layers fit on a screen."""


def _side_by_side(rows: list[Any], blocks: int) -> list[tuple[Any, ...]]:
    height = -(-len(rows) // blocks)
    columns = [rows[k * height : (k + 1) * height] for k in range(blocks)]
    return [
        tuple(cell for column in columns for cell in (column[k] if k < len(column) else ("",) * 3))
        for k in range(height)
    ]


def _print_json(info: Any) -> None:
    import dataclasses
    import json

    typer.echo(json.dumps(dataclasses.asdict(info), indent=1, default=str))


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
