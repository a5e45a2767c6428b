"""Run stages: train, grow weights and optimizer, train on. Finished stages are kept, interrupted ones continue."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from phigrow.errors import GrowthError
from phigrow.files.output import check_file
from phigrow.files.paths import user_path
from phigrow.records.concatenation import is_concatenated, write_concatenated
from phigrow.records.readers.phigrow import last_record
from phigrow.records.schema import FILE
from phigrow.study.automatic import device, engine_settings, kept_choices, threads_of_a_run, with_choices
from phigrow.study.inputs import (
    Input,
    Ledger,
    Result,
    check_inputs,
    check_method_files,
    inputs_of_data,
    inputs_of_run,
)
from phigrow.study.launch import Ranks, default_ranks
from phigrow.study.places import given_inputs, keep_places, moved_lines
from phigrow.study.reading import check_text
from phigrow.study.results import check_result_files
from phigrow.study.runner import alone, wait_for_former
from phigrow.study.stages import Stage, Staged
from phigrow.study.table import clock, millions
from phigrow.training.automatic import Choices, choices_of
from phigrow.training.settings import AUTO

LINE_SECONDS = 30.0
"""Seconds between lines about a running stage."""

POLL_SECONDS = 0.2


def run_stages(staged: Staged, *, say: Callable[[str], None] = print) -> Path:
    """Run the missing stages of a recipe.

    A second call, or one after a kill, continues where the first stopped. ``records.jsonl`` in the folder of all
    results has all stages as one run.

    Args:
        staged: the result of `load_stages`.
        say: receives messages, line by line.

    Returns:
        The export of the last stage.

    Raises:
        GrowthError: the text does not exist, a stage failed, or another command works in this folder.
    """
    check_text(staged.data, staged.data_folder)
    with alone(staged.out):
        check_result_files(staged.out, sweeps=False)
        check_file(staged.out / FILE, is_concatenated, "the records of stages", "--out")
        ledger = check_inputs(staged.out, staged_results(staged), say)
        ledger.write()
        for stage in staged.stages:
            if stage.growing is not None and stage.growing.method_files:
                starts = staged.out.glob(f"stage{stage.number}-*-start/")
                check_method_files(starts, stage.growing.method_files, f"stage {stage.number} of {staged.name}")
        first = staged.stages[0].keys.get("init")
        given = given_inputs(staged.data, [user_path(first)] if first else [])
        keep_places(staged.out, given, staged.former_places)
        for line in moved_lines(staged.former_places):
            say(line)
        if isinstance(staged.data, dict) and not staged.data_folder.is_dir():
            from phigrow.corpus import prepare

            ledger.begin(_data(staged))
            say(f"data: packed blocks in {staged.data_folder}")
            prepare(**staged.data | {"out": staged.data_folder, "progress": False})
        ranks_wanted = staged.ranks or default_ranks(staged.batch)
        choices = _choices(staged, ranks_wanted, say)
        with Ranks(ranks_wanted, say=say) as ranks:
            for stage in staged.stages:
                say(described(staged, stage))
                if not stage.done:
                    _grow(staged, stage, say, ledger)
                    ledger.begin(_run(staged, stage))
                    try:
                        _train(ranks, stage, choices, say)
                    finally:
                        _concatenate(staged)
            _concatenate(staged)
            if staged.scratch is not None:
                say(described(staged, staged.scratch))
                if not staged.scratch.done:
                    ledger.begin(_run(staged, staged.scratch))
                    _train(ranks, staged.scratch, choices, say)
    if staged.scratch is not None:
        _report(staged, staged.scratch, say)
    return staged.stages[-1].folder / "export"


def staged_results(staged: Staged) -> list[Result]:
    """Return all results of a recipe with their inputs."""
    results = [_data(staged)]
    for stage in staged.stages:
        results += [*_grown(staged, stage), _run(staged, stage)]
    return results + ([_run(staged, staged.scratch)] if staged.scratch else [])


def _data(staged: Staged) -> Result:
    return Result("data", staged.data_folder, inputs_of_data(staged.data))


def _grown(staged: Staged, stage: Stage) -> list[Result]:
    """Return the grown weights and the grown state with which a stage begins."""
    if stage.growing is None:
        return []
    source = {"source": Input("checkpoint", str(staged.stages[stage.number - 2].folder / "export"))}
    name = _title(stage)
    return [Result(f"start of {name}", stage.start, source), Result(f"state of {name}", stage.state, source)]


def _run(staged: Staged, stage: Stage) -> Result:
    inputs = inputs_of_run(stage.keys) | inputs_of_data(staged.data)
    return Result(_title(stage), stage.folder, inputs, trains=True)


def _title(stage: Stage) -> str:
    return f"stage {stage.number}" if stage.number else "scratch"


def described(staged: Staged, stage: Stage) -> str:
    """Return one line about a stage: its model, growth, steps, tokens, FLOPs, and a note if it is done."""
    from phigrow.models.cost import count_cost

    size = f"{count_cost(stage.config).parameters / 1e6:.3g}M parameters"
    name = f"stage {stage.number}/{len(staged.stages)}" if stage.number else "scratch"
    how = f", grown by {stage.growing.method}, state {stage.growing.state}" if stage.growing else ""
    cost = f"steps {stage.first + 1} to {stage.first + stage.steps}, {millions(stage.tokens)} tokens, "
    return f"{name}: {size}{how}, {cost}{stage.flops:.2e} FLOPs{' (done before)' if stage.done else ''}"


def _grow(staged: Staged, stage: Stage, say: Callable[[str], None], ledger: Ledger) -> None:
    if stage.growing is None:
        return
    from phigrow.expansion.expand import OutputSpec, expand_checkpoint
    from phigrow.expansion.grow_optimizer import grow_optimizer

    former = staged.stages[stage.number - 2].folder
    for result in _grown(staged, stage):
        ledger.begin(result)
    if not stage.start.is_dir():
        output = OutputSpec(stage.start, dtype="float32")
        expand_checkpoint(former / "export", stage.config, stage.growing.spec, output)
        say(f"    grown into {stage.start}")
    if not stage.state.is_dir():
        grow_optimizer(former, stage.start, stage.state, state=stage.growing.state)
        say(f"    optimizer's state in {stage.state}")


def _choices(staged: Staged, ranks: int, say: Callable[[str], None]) -> Choices:
    """Return the choice of a data type for stages with ``dtype: auto``; it is made for the model of the last stage."""
    every = [*staged.stages, *([staged.scratch] if staged.scratch else [])]
    undecided = [stage for stage in every if stage.keys.get("dtype", AUTO) == AUTO]
    if not undecided or all(stage.done for stage in every):
        return {}
    last = staged.stages[-1]

    def make(names: list[str]) -> Choices:
        with threads_of_a_run(ranks):
            seq_len = last.tokens // (last.steps * int(last.keys["batch"]))
            return choices_of(names, engine_settings(last.keys), last.config, seq_len, device(), last.flops)

    return kept_choices(staged.out, ["dtype"], {"dtype": [stage.folder for stage in undecided]}, make, say)


def _train(ranks: Ranks, stage: Stage, choices: Choices, say: Callable[[str], None]) -> None:
    wait_for_former(stage.folder)
    began = told_at = time.monotonic()
    ranks.begin(with_choices(stage.keys, choices))
    while not ranks.ended():
        time.sleep(POLL_SECONDS)
        if time.monotonic() - told_at > LINE_SECONDS and (last := last_record(stage.folder, "step")):
            told_at = time.monotonic()
            say(f"    step {last['step']}/{stage.steps}, loss {last['loss']:.4f}")
    last = last_record(stage.folder, "eval")
    if not stage.done:
        step = last_record(stage.folder, "step") or {"step": 0}
        raise GrowthError(
            f"training stopped at step {step['step']} of {stage.steps}",
            where=str(stage.folder),
            fix="run the same command again: it resumes",
        )
    end = f", held-out loss {last['loss']:.4f}" if last else ""
    say(f"    done in {clock(time.monotonic() - began)}{end}")


def _concatenate(staged: Staged) -> None:
    steps = sum(stage.steps for stage in staged.stages)
    write_concatenated([stage.folder for stage in staged.stages], staged.out, staged.arm, steps)


def _report(staged: Staged, scratch: Stage, say: Callable[[str], None]) -> None:
    from phigrow.measure import report
    from phigrow.measure.wording import finding_lines

    comparison = report([staged.out, scratch.folder], staged.out / "report", "scratch")
    for line in finding_lines(comparison):
        say(line)
    say(f"report: {staged.out / 'report' / 'report.html'}")
