"""Commands for text and runs: data, demo, pretrain, compare, grow-train, report, recipes."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from phigrow.cli.printing import print_json
from phigrow.cli.terminal import complete_shipped, is_quiet, say, shows_progress
from phigrow.errors import GrowthError

COMMANDS = {"recipe": "pretrain", "study": "compare", "stages": "grow-train"}
"""Kind of shipped file -> the command that takes it."""


def data(
    source: Annotated[
        str,
        typer.Argument(
            help="'embedded' (the textbook of the Python installation), a text, JSONL or Parquet file or folder, or a "
            "hub dataset."
        ),
    ] = "embedded",
    out: Annotated[Path, typer.Option(help="New folder of packed blocks.")] = Path("data"),
    seq_len: Annotated[int, typer.Option(help="Tokens per block.", min=2)] = 2048,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder, file or hub name.  \\[default: a byte-level BPE trained on the text]")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Vocabulary of a tokenizer trained here.", min=260)] = 4096,
    heldout: Annotated[float, typer.Option(help="Share of documents held out.", min=0.0, max=0.5)] = 0.05,
    seed: Annotated[int, typer.Option(help="Seed of the order of documents and of the held-out split.")] = 0,
    across_sources: Annotated[
        bool,
        typer.Option("--across-sources", help="Pack documents of different sources into one block, in random order."),
    ] = False,
    text_column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a hub dataset.")] = "train",
    config: Annotated[str | None, typer.Option(help="Configuration of a hub dataset.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub dataset.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that tokenise the text.", min=1)] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print data.json instead of sentences.")] = False,
) -> None:
    """Turn text into packed blocks of tokens for pretraining, and hold out documents for evaluation.

    Documents of one source are packed together, so that a run can mix sources and measure each. The source of a
    document is its column "source", or else its file or folder.

    To mix several data sets, pack each into its own folder with the same --tokenizer. Then give the folders weights in
    the recipe: "data: {textbooks: 0.8, code: 0.2}". Text that does not fit on disk can be streamed: see docs/data.md.
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
    out: Annotated[Path, typer.Option(help="Folder of all results.")] = Path("phigrow-demo"),
    ranks: Annotated[int | None, typer.Option(help="DeepSpeed ranks per run.  \\[default: 1]", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of every arm.", min=4)] = None,
    seed: Annotated[int, typer.Option(help="Seed of data order and new weights.")] = 0,
) -> None:
    """Pretrain a small Phi, grow it by wr, tile and lossless, and compare each with training from scratch.

    The text is the documentation of the Python installation. Training runs under DeepSpeed and takes minutes on two
    CPU cores. The result is a report with a table and figures. Run the command again to resume.
    """
    from phigrow.study.demo import run

    run(out, ranks=ranks, steps=steps, seed=seed, say=say)


def pretrain(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [--KEY VALUE]",
            help="YAML file or name of a recipe, then any of the keys listed below.  \\[default: the recipe demo]",
            autocompletion=complete_shipped("recipe"),
        ),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(help="DeepSpeed ranks.  \\[default: one per GPU, or 1 without a GPU]", min=1)
    ] = None,
) -> None:
    """Pretrain one model under DeepSpeed on this machine, from scratch or from a checkpoint.

    Keys override those of the recipe. Run the same command again to continue an interrupted run from its last
    checkpoint. For several machines, see docs/clusters.md.

    phigrow pretrain phi-2 --data data --init phi-1_5-to-phi2-wr --out runs/grown
    """
    from phigrow.study.foreground import pretrain as run

    code = run(words or [], ranks, shown=not is_quiet())
    if code:
        raise typer.Exit(code)


def compare(
    study: Annotated[
        str,
        typer.Argument(
            help="YAML file of the study, or its name, as phigrow recipes lists it.",
            autocompletion=complete_shipped("study"),
        ),
    ],
    only: Annotated[list[str] | None, typer.Option(help="Arm to run. Repeat the option for several arms.")] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="Seed to run. Repeat the option for several seeds.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Runs side by side.  \\[default: the file's, else one per GPU, or per core up to 4]", min=1),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(help="DeepSpeed ranks per run.  \\[default: the file's, else 1]", min=1)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of all results.  \\[default: the file's, else runs/NAME]")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the runs with tokens, FLOPs, time. Start none.")
    ] = False,
) -> None:
    """Run a study: train all arms, seeds and budgets of one YAML file under DeepSpeed, and write the report.

    Finished runs are kept, and interrupted ones continue. If a run fails, the others still finish. The exit code is
    then 1.

    phigrow compare tiny --dry-run
    """
    from phigrow.study import jobs_of, load_study, run_study
    from phigrow.study.inputs import check_inputs, results_of
    from phigrow.study.runner import check_text_of, chosen, wanted
    from phigrow.study.table import listing

    loaded = load_study(study, out=out, workers=workers, ranks=ranks)
    if dry_run:
        everything = jobs_of(loaded)
        jobs = chosen(loaded, everything, only or (), seeds or ())
        for line in listing(loaded, jobs):
            typer.echo(line)
        _name_missing_text(partial(check_text_of, loaded, wanted(jobs)))
        check_inputs(loaded.out, results_of(loaded, everything), say)
        return
    outcome = run_study(loaded, only=only or (), seeds=seeds or (), say=say)
    if outcome.report:
        typer.echo(f"report: {outcome.report / 'report.html'}")
    else:
        typer.echo(outcome.why_no_report, err=not outcome.waits)
    for name, error in outcome.failed.items():
        typer.echo(f"failed: {name}: {error}", err=True)
    if outcome.blocked:
        typer.echo(f"not run, because they need a failed run: {', '.join(outcome.blocked)}", err=True)
    if outcome.report and outcome.stale:
        typer.echo(f"in the report, of arms with a failed run: {', '.join(outcome.stale)}", err=True)
    if outcome.old_report:
        typer.echo(f"{outcome.old_report} is the report of an earlier command", err=True)
    if not outcome.succeeded:
        raise typer.Exit(1)


def grow_train(
    stages: Annotated[
        str,
        typer.Argument(
            help="YAML file of the stages, or its name, as phigrow recipes lists it.",
            autocompletion=complete_shipped("stages"),
        ),
    ],
    ranks: Annotated[
        int | None, typer.Option(help="DeepSpeed ranks.  \\[default: the file's, else one per GPU or core]", min=1)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of all results.  \\[default: the file's, else runs/NAME]")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the stages with tokens, FLOPs. Start none.")
    ] = False,
) -> None:
    """Train in stages from one YAML file: train a model, grow weights and optimizer, and train the larger model.

    All stages share one order of data and one schedule. Finished stages are kept, and an interrupted one continues. The
    records of all stages are joined into one run for phigrow report.

    phigrow grow-train tiny --dry-run
    """
    from phigrow.study import load_stages, run_stages
    from phigrow.study.inputs import check_inputs
    from phigrow.study.reading import check_text
    from phigrow.study.staged import described, staged_results

    loaded = load_stages(stages, out=out, ranks=ranks)
    if dry_run:
        for stage in (*loaded.stages, *([loaded.scratch] if loaded.scratch else [])):
            typer.echo(described(loaded, stage))
        _name_missing_text(partial(check_text, loaded.data, loaded.data_folder))
        check_inputs(loaded.out, staged_results(loaded), say)
        return
    typer.echo(f"wrote {run_stages(loaded, say=say)}")


def _name_missing_text(check: Callable[[], None]) -> None:
    """Print one line if the text that a study packs does not exist. A dry run lists the jobs all the same."""
    try:
        check()
    except GrowthError as error:
        typer.echo(f"before you run it: {error.what} ({error.where})", err=True)


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run folders with records.jsonl, folders that contain them, or YAML files that name logs of other "
            "trainers (docs/other-trainers.md)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("report"),
    baseline: Annotated[str, typer.Option(help="Arm whose final loss is the target.")] = "scratch",
    budget: Annotated[
        int | None,
        typer.Option(help="Budget to compare at, in steps, if the baseline has several.  \\[default: the largest]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json instead of sentences.")] = False,
) -> None:
    """Compare grown arms with the from-scratch arm, from the records of their runs.

    The target is the final held-out loss of the from-scratch arm. The report gives the speedup and the saving of every
    arm in tokens, FLOPs and seconds, without and with the source's training. From three seeds on, most have an
    interval.

    It writes report.html, report.md, report.tex, report.json and figures.
    """
    from phigrow.measure import report as write_report
    from phigrow.measure.wording import finding_lines

    comparison = write_report(runs, out, baseline, budget)
    if as_json:
        typer.echo((out / "report.json").read_text(encoding="utf-8"), nl=False)
        return
    for line in finding_lines(comparison):
        typer.echo(line)
    typer.echo(f"wrote {out / 'report.html'}, and report.md, report.tex, report.json and figures in the same folder")


def recipes(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Files to copy, such as phi-2 or studies/tiny.  \\[default: all]"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to copy the files into, so that you can edit them.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist in --out.")] = False,
) -> None:
    """List the recipes, studies and stages that phigrow contains, or copy them into a folder.

    phigrow recipes phi-2 --out recipes
    """
    from phigrow.files.shipped import copy_shipped, shipped_files

    if out is not None:
        for path in copy_shipped(names or [], out, overwrite=overwrite):
            typer.echo(f"wrote {path}")
        return
    if names:
        raise typer.BadParameter("give the folder to copy them into", param_hint="--out")
    width = shutil.get_terminal_size((100, 24)).columns
    for kind, command in COMMANDS.items():
        typer.echo(f"phigrow {command} NAME")
        for file in shipped_files(kind):
            typer.echo(f"  {file.name}")
            typer.echo(textwrap.fill(file.title, width, initial_indent=" " * 6, subsequent_indent=" " * 6))
        typer.echo()
    say("To edit them, copy all of them: phigrow recipes --out recipes")
