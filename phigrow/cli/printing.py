"""Print plans, capacities, certificates, differences and inspections."""

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
    """Print the axes, layers and costs of a plan, and remarks on it."""
    from phigrow.inspection.explain import axis_rows, cost_rows, layer_rows
    from phigrow.models.config import context_of

    console = _console()
    options = "".join(f", {name} {value}" for name, value in plan.options.items())
    noise = f", noise {plan.noise:g}" if plan.noise else ""
    console.print(
        f"[bold]{plan.method}[/]{options}{noise}, depth {plan.depth}, seed {plan.seed}, plan {plan.hash[:16]}"
    )
    _table("Axes", ["group: axis", "size", "coordinates", "write gain", "read gain"], axis_rows(plan))
    if len(plan.layers) > plan.src_sizes["layer"]:
        _table("Layers", ["layer", "source", "kind"] * _LAYER_BLOCKS, _side_by_side(layer_rows(plan), _LAYER_BLOCKS))
    context = seq_len or context_of(plan.dst_config)
    _table(f"Cost (context {context})", ["quantity", "source", "destination", "factor"], cost_rows(plan, seq_len))
    print_remarks(plan, advised)


def print_remarks(plan: Plan, advised: Sequence[Advice]) -> None:
    """Print a plan's claim, its notes, and advice about it."""
    from phigrow.inspection.explain import claim

    console = _console()
    console.print(escaped(claim(plan)))
    for note in plan.notes:
        console.print(escaped(f"note: {note}"))
    for each in advised:
        console.print(escaped(f"advice: {each}"))


def print_capacity(capacity: Capacity, fits_with: str | None = None) -> None:
    """Print the layouts that fit, GiB of each part, the largest micro-batch, and days and cost.

    Args:
        capacity: what to print.
        fits_with: the option with which something fits, if nothing does.
    """
    from phigrow.measure.wording import amount
    from phigrow.models.capacity import RESERVED, SELECTIVE

    console = _console()
    gib = 2**30
    console.print(
        f"{capacity.parameters / 1e9:.3f}B parameters on {capacity.gpus} GPUs of {capacity.gpu_bytes / gib:g} GiB, "
        f"sequences of {capacity.seq_len} tokens, {capacity.batch} per step, bf16, loss {capacity.loss}"
        + {False: "", SELECTIVE: ", cheap operations recomputed"}.get(capacity.checkpointing, ", layers recomputed")
    )
    rows = []
    for fit in capacity.fits:
        s = fit.states
        passing = s.buffers + s.reduction, fit.activations.peak
        if fit.activations.peak + s.reduction < s.step:
            passing = s.buffers, s.step
        parts = (s.weights, s.gradients, s.optimizer, *passing, fit.total, s.host)
        numbers = [f"{part / gib:.1f}" for part in parts]
        chosen = "chosen" if fit.layout == capacity.chosen else "yes" if fit.fits else "no"
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
    _table("GiB per GPU; host: GiB of host memory for each GPU", columns.split("|"), rows, right=True, narrow=True)
    if capacity.chosen is None:
        other = fits_with or "shorter sequences"
        console.print(f"nothing fits: use more GPUs, GPUs with more memory, or {other}")
    console.print(
        f"fits: 'in all' is at most {1 - RESERVED:.0%} of a GPU; buf: buffers; activ: activations, or the optimizer's "
        "step if that needs more; micro: sequences that a GPU processes at once; most: the largest micro that fits"
    )
    if capacity.recipe:
        keys = ", ".join(f"{key}: {str(value).lower()}" for key, value in capacity.recipe.items())
        console.print(f"chosen, as keys of a recipe: {keys}")
    if capacity.tokens is None or capacity.flops is None or capacity.seconds is None:
        return
    tokens = amount(capacity.tokens, "tokens")
    console.print(
        f"{tokens} tokens, {capacity.tokens / capacity.parameters:.1f} per parameter, {capacity.flops:.3g} FLOPs: "
        f"[bold]{capacity.seconds / 86400:.3g} days[/] at {capacity.mfu:.0%} of {capacity.peak_flops / 1e12:.0f} "
        f"TFLOP/s, {capacity.gpu_hours:,.0f} GPU hours"
        + ("" if capacity.cost is None else f", cost {capacity.cost:,.0f}")
    )


_LAYER_BLOCKS = 3
"""Blocks of layers that are printed beside each other, so that 32 layers fit on a screen."""


def _side_by_side(rows: list[Any], blocks: int) -> list[tuple[Any, ...]]:
    height = -(-len(rows) // blocks)
    columns = [rows[k * height : (k + 1) * height] for k in range(blocks)]
    return [
        tuple(cell for column in columns for cell in (column[k] if k < len(column) else ("",) * 3))
        for k in range(height)
    ]


def print_certificate(certificate: Certificate) -> None:
    """Print the measurements of `verify`, and its verdict."""
    c = certificate
    if c.plan_hash is None:
        plan, verdict = "none", "NOT CHECKED: the grown folder has no phigrow.json, so there is no claim to check"
    elif c.passed is None:
        plan, verdict = f"{c.method} ({c.plan_hash[:16]})", "approximate by design: the plan makes no claim"
    elif c.passed:
        plan = f"{c.method} ({c.plan_hash[:16]})"
        verdict = "PASSED: the grown model preserves the function"
    else:
        plan = f"{c.method} ({c.plan_hash[:16]})"
        verdict = "FAILED: the plan claims to preserve the function, but the grown model does not"
    bound = f", at most {c.tolerance:.4g} allowed" if c.claims_exact else ""
    tokens = f"{c.tokens} ({c.probe})"
    if c.lengths:
        tokens += f", and sequences of {', '.join(map(str, c.lengths))} tokens"
    rows = [
        ("plan", plan),
        ("tokens", tokens),
        ("dtype", f"computed in {c.compute_dtype}; stored as {c.source_dtype}, grown {c.destination_dtype}"),
        ("backend", c.backend),
        ("largest difference of logits", f"{c.max_abs_dlogit:.3g}{bound}"),
        ("mean difference of logits", f"{c.mean_abs_dlogit:.3g}"),
        ("largest logit of the source", f"{c.max_abs_logit:.4g}"),
        ("KL divergence", f"{c.kl:.3g} nats per token"),
        ("loss of the source", f"{c.source_loss:.6g} nats per token"),
        ("loss of the grown model", f"{c.destination_loss:.6g} nats per token"),
    ]
    _table("Certificate", ["measure", "value"], rows)
    typer.echo(verdict)
    if c.not_run is not None:
        typer.echo(
            f"note: sequences of {c.not_run} tokens were not run, because that takes long. "
            f"Add --longest {c.not_run} to run them."
        )


def print_check(problems: Sequence[str], as_json: bool) -> None:
    """Print the tensors that differ from those of a saved certificate."""
    if as_json:
        print_json({"same": not problems, "differences": list(problems)})
        return
    for problem in problems:
        typer.echo(problem)
    typer.echo(
        "FAILED: tensors differ from those of the certificate"
        if problems
        else "PASSED: every tensor equals that of the certificate"
    )


def print_differences(first: str, second: str, old: Plan, new: Plan, differences: Sequence[Difference]) -> None:
    """Print a table of differences, or one line."""
    from phigrow.growth.axis_groups import stored_label

    if not differences:
        typer.echo(f"the plans are the same (hash {old.hash[:16]})")
        return
    for letter, name, plan in (("A", first, old), ("B", second, new)):
        typer.echo(f"{letter}  {name}  (hash {plan.hash[:16]})")
    names = [stored_label(each.name) if each.part == "axis" else each.name for each in differences]
    rows = [
        (each.part, name, _value(each.first), _value(each.second), _place(each))
        for each, name in zip(differences, names, strict=True)
    ]
    _table("", ["part", "name", "A", "B", "coordinates"], rows)


def _place(each: Difference) -> str:
    if each.span is None:
        return ""
    return f"{each.span[0]}..{each.span[1] - 1}; {each.coordinates} differ"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "none"
    return "null" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def print_inspection(read: PlanFile) -> None:
    """Print the origin of a grown folder, and the kinds of values in each parameter of its family."""
    from phigrow.inspection.explain import claim
    from phigrow.inspection.plan_file import origin
    from phigrow.inspection.tallies import by_line, totals

    for name, value in origin(read):
        typer.echo(f"{name:<12} {value}")
    typer.echo(f"{'claim':<12} {claim(read.plan)}")
    lines = by_line(read.plan)
    _print_shares({**lines, "all": totals(lines)})


def _print_shares(lines: Mapping[str, Mapping[Kind, int]]) -> None:
    from phigrow.growth.origins import WORDS, Kind
    from phigrow.inspection.tallies import percent

    used = [kind for kind in Kind if any(counts[kind] for counts in lines.values())]
    rows = [(line, *(percent(counts, kind) for kind in used)) for line, counts in lines.items()]
    _table("Percent of values", ["parameter", *(WORDS[kind] for kind in used)], rows, right=True)


def print_tensors(tensors: Sequence[Anatomy]) -> None:
    """Print each tensor: shapes, source, spans of its axes, and percents."""
    from phigrow.growth.origins import span_lines
    from phigrow.inspection.tallies import shares

    for each in tensors:
        recipe = each.recipe
        shapes = [" x ".join(map(str, shape)) for shape in (recipe.shape, recipe.source_shape)]
        typer.echo(f"{recipe.name} [{shapes[0]}] <- {recipe.source} [{shapes[1]}], {recipe.kind}")
        if recipe.is_zero:
            typer.echo("  zero: it writes the residual stream of an identity layer")
        elif recipe.is_new:
            typer.echo("  new: nothing comes from the source in this layer")
        else:
            for line in span_lines(each):
                typer.echo(f"  {line}")
        noise = f"; copies carry noise of {each.noise:g} x root mean square" if each.noise else ""
        typer.echo("  " + ", ".join(f"{word} {share}" for word, share in shares(each.counts)) + noise)


def _console() -> Console:
    """Return a console as wide as the terminal or COLUMNS; 120 columns for a file or a pipe."""
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
    """Print a dataclass or plain values as JSON."""
    import dataclasses
    import json

    plain = dataclasses.asdict(info) if dataclasses.is_dataclass(info) and not isinstance(info, type) else info
    typer.echo(json.dumps(plain, indent=1, default=str))


def escaped(text: str) -> str:
    """Escape the square brackets that rich reads as markup."""
    from rich.markup import escape

    return escape(text)
