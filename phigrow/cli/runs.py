"""Commands for text and runs: data, demo, compare, grow-train, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phigrow.cli.printing import print_json
from phigrow.cli.terminal import say, shows_progress


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
    across_sources: Annotated[
        bool,
        typer.Option("--across-sources", help="Pack documents of different sources into one block, in random order."),
    ] = False,
    text_column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a hub dataset.")] = "train",
    config: Annotated[str | None, typer.Option(help="Configuration of a hub dataset.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub dataset.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that tokenise.", min=1)] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts of data.json instead of sentences.")] = False,
) -> None:
    """Turn text into packed blocks of tokens for pretraining, with documents held out for evaluation.

    The documents of a source (the column "source", or else the file or folder) are packed together, so that a run can
    mix and measure sources. Pack each set into a folder of its own, with one --tokenizer, and give the folders weights
    in the recipe: "data: {textbooks: 0.8, code: 0.2}". What does not fit on disk is streamed instead: docs/data.md.
    """
    from phigrow.corpus import prepare

    info = prepare(
        source, out=out, seq_len=seq_len, tokenizer=tokenizer, vocab_size=vocab_size, heldout=heldout, seed=seed,
        across_sources=across_sources, text_column=text_column, split=split, config=config, revision=revision,
        num_proc=workers, overwrite=overwrite, progress=shows_progress(),
    )  # fmt: skip
    if as_json:
        print_json(info)
    else:
        typer.echo(info)


def demo(
    out: Annotated[Path, typer.Option(help="Folder of all results; run again to resume.")] = Path("phigrow-demo"),
    ranks: Annotated[int | None, typer.Option(help="DeepSpeed ranks of each run.  \\[default: 1]", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of every arm.", min=4)] = None,
    seed: Annotated[int, typer.Option(help="Of data order and new weights.")] = 0,
) -> None:
    """Pretrain a small Phi, grow it by wr, tile and lossless, and measure each against training from scratch.

    Everything is real and small: the text is the Python installation's own documentation, training runs under
    DeepSpeed, the report is a picture and a table. Minutes on two CPU cores; an interrupted run resumes.
    """
    from phigrow.study.demo import run

    run(out, ranks=ranks, steps=steps, seed=seed, say=say)


def compare(
    study: Annotated[Path, typer.Argument(help="YAML file of the study; recipes/studies has three.")],
    only: Annotated[list[str] | None, typer.Option(help="Arm to run; give it several times for several.")] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="Seed to run; give it several times for several.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Runs side by side.  \\[default: the file's, else one a GPU, or a core up to 4]", min=1),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(help="DeepSpeed ranks of each run.  \\[default: the file's, else 1]", min=1)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of everything.  \\[default: the file's]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, with tokens, FLOPs, time.")] = False,
) -> None:
    """Run a study: arms x seeds x budgets from one YAML file, trained under DeepSpeed and measured.

    Runs what is missing and goes on where it stopped; a run that fails stops no other. Exit code 1: something failed.
    """
    from phigrow.study import jobs_of, load_study, run_study
    from phigrow.study.runner import chosen
    from phigrow.study.table import listing

    loaded = load_study(study, out=out, workers=workers, ranks=ranks)
    if dry_run:
        for line in listing(loaded, chosen(loaded, jobs_of(loaded), only or (), seeds or ())):
            typer.echo(line)
        return
    outcome = run_study(loaded, only=only or (), seeds=seeds or (), say=say)
    typer.echo(f"report: {outcome.report / 'report.html'}" if outcome.report else outcome.why_no_report)
    for name, error in outcome.failed.items():
        typer.echo(f"failed: {name}: {error}", err=True)
    if outcome.blocked:
        typer.echo(f"not run, because they need these: {', '.join(outcome.blocked)}", err=True)
    if outcome.failed:
        raise typer.Exit(1)


def grow_train(
    stages: Annotated[Path, typer.Argument(help="YAML file of the stages; recipes/stages has one.")],
    ranks: Annotated[
        int | None, typer.Option(help="DeepSpeed ranks.  \\[default: the file's, else one a GPU or core]", min=1)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of everything.  \\[default: the file's]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, with tokens and FLOPs.")] = False,
) -> None:
    """Train in stages from one YAML file: train, grow weights and optimizer, train on, grow again.

    One order of data and one schedule over all stages. Goes on where it stopped; the stages' records are joined into
    one run that phigrow report reads.
    """
    from phigrow.study import load_stages, run_stages
    from phigrow.study.staged import described

    loaded = load_stages(stages, out=out, ranks=ranks)
    if dry_run:
        for stage in (*loaded.stages, *([loaded.scratch] if loaded.scratch else [])):
            typer.echo(described(loaded, stage))
        return
    typer.echo(f"wrote {run_stages(loaded, say=say)}")


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders with records.jsonl, or a folder of them.")],
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("report"),
    baseline: Annotated[str, typer.Option(help="Arm that sets the target.")] = "scratch",
    budget: Annotated[
        int | None, typer.Option(help="Steps, where the baseline was trained to several.  \\[default: the largest]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json instead of sentences.")] = False,
) -> None:
    """Measure grown arms against the from-scratch arm, from their records alone: a page, tables and figures.

    Speedup and saving at scratch's final held-out loss, in tokens, FLOPs and seconds, with the source's training left
    out and counted, with intervals over paired seeds. Writes report.html, .md, .tex, .json and figures.
    """
    from phigrow.measure import report as write_report
    from phigrow.measure.wording import finding_lines

    comparison = write_report(runs, out, baseline, budget)
    if as_json:
        typer.echo((out / "report.json").read_text(encoding="utf-8"), nl=False)
        return
    for line in finding_lines(comparison):
        typer.echo(line)
    for note in comparison.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"wrote {out / 'report.html'}, and report.md, report.tex, report.json and figures beside it")
