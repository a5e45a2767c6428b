"""Options that several commands share, and the words they take."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Depth(StrEnum):
    interpose = "interpose"
    stack = "stack"
    identity = "identity"
    solar = "solar"
    llama_pro = "llama-pro"
    midas = "midas"


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


class State(StrEnum):
    scale = "scale"
    copy = "copy"
    asymmetric = "asymmetric"
    reset = "reset"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class Arithmetic(StrEnum):
    float32 = "float32"
    float64 = "float64"


SRC_HELP = (
    "Source: a Hugging Face folder, phi-1, phi-1_5, phi-2 (of microsoft), or any hub id. A folder of that name comes "
    "first."
)
DST_CONFIG_HELP = (
    "Destination configuration: a JSON file, a folder, or a shipped one: phi-1-small.json, phi-1.json, phi-1_5.json, "
    "phi2.json."
)

Src = Annotated[str, typer.Option(help=SRC_HELP)]
DstConfig = Annotated[str, typer.Option(help=DST_CONFIG_HELP)]
MethodName = Annotated[
    str,
    typer.Option(
        "--method",
        help="Width method: wr (weight reuse), lossless (function-preserving), tile or another of the README's table; "
        "tile:scale=preserve gives an option, hidden=lossless,mlp=tile one method an axis.",
    ),
]
MapsFolder = Annotated[
    Path | None, typer.Option("--maps", help="ligo: folder of learned maps, as phigrow learn-growth writes it.")
]
DepthName = Annotated[
    Depth | None,
    typer.Option("--depth", help="Depth method.  \\[default: the method's own, as the README's table has it]"),
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

Gpus = Annotated[
    str | None,
    typer.Option(help="Instead, or with --src besides: what fits on these GPUs, number x GiB (8x80), and the time."),
]
Tokens = Annotated[
    str | None, typer.Option(help="Of the whole run (100B, 1.4T): for advice and, with --gpus, for time and cost.")
]
Mfu = Annotated[float, typer.Option(help="With --gpus: share of the GPU's peak that the model's FLOPs reach.")]
GpuName = Annotated[str, typer.Option("--gpu", help="With --gpus: whose peak: a100, h100 or h200.")]
Price = Annotated[float | None, typer.Option(help="With --gpus: of one GPU for one hour.", min=0.0)]
Batch = Annotated[
    int | None,
    typer.Option(help="With --gpus: sequences a step over all GPUs.  \\[default: about 2^20 tokens]", min=1),
]
MicroBatch = Annotated[
    int | None,
    typer.Option(help="With --gpus: sequences a GPU holds at once.  \\[default: the most that fit]", min=1),
]
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing", help="With --gpus: recompute every layer in the backward pass.")
]


def shape_of(
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


def required(value: str | None, option: str) -> str:
    """The value of an option that only some uses of a command need."""
    if value is None:
        raise typer.BadParameter("it is required", param_hint=option)
    return value


def refuse_without(context: typer.Context, option: str, *names: str) -> None:
    """Refuse what was typed although it means something only with another option."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"it means nothing without --{option}", param_hint=parameter.opts[-1])


def refuse_others(context: typer.Context, option: str, *beside: str) -> None:
    """Refuse what was typed besides an option that replaces what the command usually does."""
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name not in (option, *beside) and source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"it means nothing with --{option}", param_hint=parameter.opts[-1])
