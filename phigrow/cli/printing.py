"""What the commands print: plans, certificates and differences, as tables that a person reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from phigrow.expansion.verify import Certificate
    from phigrow.growth.origins import Anatomy, Kind
    from phigrow.growth.plan import Plan
    from phigrow.inspection.advice import Advice
    from phigrow.inspection.difference import Difference
    from phigrow.inspection.plan_file import PlanFile
    from phigrow.models.capacity import Capacity


def print_plan(plan: Plan, seq_len: int | None = None, advised: Sequence[Advice] = ()) -> None:
    from phigrow.inspection.explain import axis_rows, cost_rows, layer_rows

    console = _console()
    options = "".join(f", {name} {value}" for name, value in plan.options.items())
    noise = f", noise {plan.noise:g}" if plan.noise else ""
    console.print(
        f"[bold]{plan.method}[/]{options}{noise}, depth {plan.depth}, seed {plan.seed}, plan {plan.hash[:16]}"
    )
    _table("Axes", ["axis", "size", "coordinates", "write gain", "read gain"], axis_rows(plan))
    if len(plan.layers) > plan.src_sizes["layer"]:
        _table("Layers", ["layer", "from", ""] * _LAYER_BLOCKS, _side_by_side(layer_rows(plan), _LAYER_BLOCKS))
    context = seq_len or plan.dst_config.get("max_position_embeddings", 2048)
    _table(f"Cost (context {context})", ["", "source", "destination", "factor"], cost_rows(plan, seq_len))
    print_remarks(plan, advised)


def print_remarks(plan: Plan, advised: Sequence[Advice]) -> None:
    """What a plan claims, notes and is advised."""
    from phigrow.inspection.explain import claim

    console = _console()
    console.print(escaped(claim(plan)))
    for note in plan.notes:
        console.print(escaped(f"note: {note}"))
    for each in advised:
        console.print(escaped(f"advice: {each}"))


def print_capacity(found: Capacity) -> None:
    """Which layouts fit, GiB of each part, the largest micro-batch, and days and cost."""
    from phigrow.measure.wording import amount
    from phigrow.models.capacity import RESERVED

    console = _console()
    gib = 2**30
    console.print(
        f"{found.parameters / 1e9:.3f}B parameters on {found.gpus} GPUs of {found.gpu_bytes / gib:g} GiB, sequences of "
        f"{found.seq_len} tokens, {found.batch} a step, bf16, loss {found.loss}"
        + (", layers recomputed" if found.checkpointing else "")
    )
    rows = []
    for fit in found.fits:
        s = fit.states
        parts = (s.weights, s.gradients, s.optimizer, s.buffers, max(fit.activations.peak, s.step), fit.total, s.host)
        numbers = [f"{part / gib:.1f}" for part in parts]
        chosen = "chosen" if fit.layout == found.chosen else "yes" if fit.fits else "no"
        rows.append(
            (
                fit.layout.name.removeprefix("ZeRO "),
                *numbers[:5],
                fit.micro_batch,
                numbers[5],
                chosen,
                fit.largest or "-",
                numbers[6],
            )
        )
    columns = "ZeRO|weights|grads|optim|buf|activ|micro|in all|fits|most|host"
    _table("GiB a GPU, and of the host for each", columns.split("|"), rows, right=True, narrow=True)
    if found.chosen is None:
        where = "with fewer tokens a sequence" if found.checkpointing else "with --checkpointing"
        console.print(f"nothing fits: more GPUs, more memory, or {where}")
    console.print(
        f"fits: in all at most {1 - RESERVED:.0%} of a GPU; buf: buffers; activ: activations, or the optimizer's step "
        "if that is more; micro: sequences a GPU holds at once, most: the most of these"
    )
    if found.recipe:
        keys = ", ".join(f"{key}: {str(value).lower()}" for key, value in found.recipe.items())
        console.print(f"chosen, as keys of a recipe: {keys}")
    if found.tokens is None or found.flops is None or found.seconds is None:
        return
    tokens = amount(found.tokens, "tokens")
    console.print(
        f"{tokens} tokens, {found.tokens / found.parameters:.1f} a parameter, {found.flops:.3g} FLOPs: "
        f"[bold]{found.seconds / 86400:.3g} days[/] at {found.mfu:.0%} of {found.peak_flops / 1e12:.0f} TFLOP/s, "
        f"{found.gpu_hours:,.0f} GPU hours" + ("" if found.cost is None else f", cost {found.cost:,.0f}")
    )


_LAYER_BLOCKS = 3
"""Blocks of layers printed beside each other, so that 32 layers fit on a screen."""


def _side_by_side(rows: list[Any], blocks: int) -> list[tuple[Any, ...]]:
    height = -(-len(rows) // blocks)
    columns = [rows[k * height : (k + 1) * height] for k in range(blocks)]
    return [
        tuple(cell for column in columns for cell in (column[k] if k < len(column) else ("",) * 3))
        for k in range(height)
    ]


def print_certificate(certificate: Certificate) -> None:
    """What `verify` measured, and its verdict."""
    verdicts = {
        None: "approximate by design: the plan claims nothing"
        if certificate.plan_hash
        else "no plan to hold it to: the second folder is none that phigrow expand wrote",
        True: "PASSED: the plan claims to preserve the function, and does",
        False: "FAILED: the plan claims to preserve the function, and does not",
    }
    for key, value in certificate.to_json().items():
        typer.echo(f"{key:>20}  {value:.6g}" if isinstance(value, float) else f"{key:>20}  {value}")
    typer.echo(verdicts[certificate.passed])


def print_check(problems: Sequence[str], as_json: bool) -> None:
    """Which tensors are not those of a saved certificate."""
    if as_json:
        print_json({"same": not problems, "differences": list(problems)})
        return
    for problem in problems:
        typer.echo(problem)
    typer.echo(
        "FAILED: these are not the tensors that were certified"
        if problems
        else "PASSED: every tensor is the one that was certified"
    )


def print_differences(first: str, second: str, old: Plan, new: Plan, found: Sequence[Difference]) -> None:
    """A table of what differs, or one line."""
    if not found:
        typer.echo(f"the plans are the same (hash {old.hash[:16]})")
        return
    for letter, name, plan in (("A", first, old), ("B", second, new)):
        typer.echo(f"{letter}  {name}  (hash {plan.hash[:16]})")
    rows = [(each.part, each.name, _value(each.first), _value(each.second), _place(each)) for each in found]
    _table("", ["", "", "A", "B", "coordinates"], rows)


def _place(each: Difference) -> str:
    if each.span is None:
        return ""
    return f"{each.span[0]}..{each.span[1] - 1}; {each.coordinates} differ"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "none"
    return "null" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def print_inspection(read: PlanFile) -> None:
    """Where a grown folder came from, and what every line of the family table holds."""
    from phigrow.inspection.explain import claim
    from phigrow.inspection.plan_file import origin
    from phigrow.inspection.tallies import by_line, totals

    for what, value in origin(read):
        typer.echo(f"{what:<12} {value}")
    typer.echo(f"{'claim':<12} {claim(read.plan)}")
    lines = by_line(read.plan)
    _print_shares({**lines, "all": totals(lines)})


def _print_shares(lines: Mapping[str, Mapping[Kind, int]]) -> None:
    from phigrow.growth.origins import WORDS, Kind
    from phigrow.inspection.tallies import percent

    used = [kind for kind in Kind if any(counts[kind] for counts in lines.values())]
    rows = [(line, *(percent(counts, kind) for kind in used)) for line, counts in lines.items()]
    _table("Percent of values", ["parameter", *(WORDS[kind] for kind in used)], rows, right=True)


def print_tensors(found: Sequence[Anatomy]) -> None:
    """Every tensor: shapes, source, spans of its axes, and percents."""
    from phigrow.growth.origins import span_lines
    from phigrow.inspection.tallies import shares

    for each in found:
        recipe = each.recipe
        shapes = [" x ".join(map(str, shape)) for shape in (recipe.shape, recipe.source_shape)]
        typer.echo(f"{recipe.name} [{shapes[0]}] <- {recipe.source} [{shapes[1]}], {recipe.kind}")
        if recipe.is_zero:
            typer.echo("  zero: it writes the residual stream of an identity layer")
        else:
            for line in span_lines(each):
                typer.echo(f"  {line}")
        noise = f"; copies carry noise of {each.noise:g} x root mean square" if each.noise else ""
        typer.echo("  " + ", ".join(f"{word} {share}" for word, share in shares(each.counts)) + noise)


def _console() -> Console:
    """A console as wide as the terminal, or as COLUMNS says now; 120 columns into a file or a pipe."""
    import shutil

    from rich.console import Console

    return Console(highlight=False, width=shutil.get_terminal_size((120, 24)).columns)


def _table(title: str, columns: list[str], rows: Sequence[Any], right: bool = False, narrow: bool = False) -> None:
    from rich.box import HEAVY_HEAD, SIMPLE_HEAD
    from rich.table import Table

    look: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": 0, "pad_edge": False} if narrow else {"box": HEAVY_HEAD}
    grid = Table(title=title or None, title_justify="left", title_style="bold", **look)
    for place, column in enumerate(columns):
        grid.add_column(escaped(column), justify="right" if right and place else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(escaped(str(cell)) for cell in row))
    _console().print(grid)


def print_json(info: Any) -> None:
    """A dataclass or plain values, as JSON."""
    import dataclasses
    import json

    plain = dataclasses.asdict(info) if dataclasses.is_dataclass(info) and not isinstance(info, type) else info
    typer.echo(json.dumps(plain, indent=1, default=str))


def escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
