"""The command evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phigrow.cli.options import Revision
from phigrow.cli.printing import print_json
from phigrow.cli.terminal import say, shows_progress


def evaluate(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CKPT...",
            help="Hugging Face folders, run folders (their model, or else their export), or hub ids. Differences are "
            "from the first.",
        ),
    ],
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Task. Repeat the option, or separate names by commas.  \\[default: all shipped tasks]"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the results.  \\[default: evaluations in the run's folder, else here]"),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="First documents of every task.  \\[default: all]", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.", min=1)] = 16,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Device of torch.  \\[default: the accelerator, or cpu]")] = None,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON instead of a table.")] = False,
) -> None:
    """Evaluate checkpoints on benchmark tasks that need no network, and compare them document by document.

    The tasks are phigrow_answers, phigrow_cloze, phigrow_arithmetic and phigrow_code. A table has every metric with
    its standard error, and the paired differences from the first checkpoint. Results are kept: the same command goes
    on after an interruption, and computes nothing twice.
    """
    from phigrow.evaluation import evaluate as run
    from phigrow.measure.evaluation_tables import ERRORS, PAIRED, UNPAIRED, evaluation_rows
    from phigrow.measure.tables import markdown_table
    from phigrow.records.evaluations import as_data, same_documents

    results = run(
        checkpoints, tasks=[name.strip() for each in tasks or () for name in each.split(",") if name.strip()], out=out,
        limit=limit, dtype=dtype, device=device, batch_size=batch_size, revision=revision, progress=shows_progress(),
        say=(lambda _: None) if as_json else say,
    )  # fmt: skip
    if as_json:
        print_json([as_data(each) for each in results])
        return
    typer.echo(markdown_table(evaluation_rows(results)))
    first = {each.task: each for each in reversed(results)}
    notes = [ERRORS]
    if len({each.name for each in results}) > 1:
        notes.append(PAIRED)
        if not all(same_documents(each, first[each.task]) for each in results):
            notes.append(UNPAIRED)
    typer.echo(" ".join(notes))
