"""Choose the data type and compilation once for all runs of a study, whose arms must be trained alike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.files.atomic import atomic_json
from phigrow.files.untrusted import read_json_strict
from phigrow.study.job import Job
from phigrow.study.launch import environment, gpus
from phigrow.study.settings import Study
from phigrow.training.automatic import Choices, choice_lines, choices_of, recorded_choices
from phigrow.training.configuration import RunConfig
from phigrow.training.settings import AUTO

if TYPE_CHECKING:
    import torch

FILE = "choices.json"
"""File with the choices in the study's folder; later commands keep these choices on any machine."""

NAMES = ("dtype", "compile")
"""Settings that a study chooses for all of its runs if they are auto."""


def study_choices(study: Study, jobs: Sequence[Job], say: Callable[[str], None]) -> Choices:
    """Return the choices of a study, which every run gets as ``auto_choices``.

    They come from the study's folder, else from one of its runs, else from this machine. A study compiles if the saving
    over all of its runs is larger than the cost of one compilation per model and worker.
    """
    trained = [job for job in jobs if job.trains]
    undecided = {name: [job for job in trained if job.keys.get(name, AUTO) == AUTO] for name in NAMES}
    layout = study.layout()
    models = {job.flops / job.tokens for job in trained if job.tokens}  # models of one size share what is compiled
    flops = sum(job.flops for job in trained) / layout.ranks

    def make(names: list[str]) -> Choices:
        settings = engine_settings(study.train)
        with threads_of_a_run(layout.workers * layout.ranks):
            return choices_of(names, settings, study.dst, study.seq_len, device(), flops, len(models) * layout.workers)

    return kept_choices(
        study.out,
        [name for name in NAMES if undecided[name]],
        {name: [job.folder for job in which] for name, which in undecided.items()},
        make,
        say,
    )


def kept_choices(
    out: Path,
    names: list[str],
    runs: dict[str, list[Path]],
    make: Callable[[list[str]], Choices],
    say: Callable[[str], None],
) -> Choices:
    """Return the choices in a folder. Missing ones are read from its runs or made, and then stored in the folder.

    Args:
        out: folder of the study or of the stages.
        names: settings to choose.
        runs: for each setting, folders of runs whose records may have the choice; they need not exist.
        make: makes the choices of the given settings.
        say: receives one line for each new choice.
    """
    path = out / FILE
    choices: Choices = read_json_strict(path, "the choices of a study") if path.is_file() else {}
    missing = [name for name in names if name not in choices]
    new: Choices = {}
    for name in missing:
        recorded = (recorded_choices(folder).get(name) for folder in runs.get(name, []))
        if (choice := next(filter(None, recorded), None)) is not None:
            new[name] = choice
    if unknown := [name for name in missing if name not in new]:
        new |= make(unknown)
    if new:
        choices = choices | new
        atomic_json(path, choices)
        for line in choice_lines(new):
            say(line)
    return {name: choices[name] for name in names}


def with_choices(keys: dict[str, Any], choices: Choices) -> dict[str, Any]:
    """Return the keys of one run, with the study's choices for settings that are auto.

    >>> with_choices({"dtype": "fp32"}, {"compile": {"chosen": False}})
    {'compile': 'auto', 'dtype': 'fp32', 'auto_choices': {'compile': {'chosen': False}}}
    """
    return dict.fromkeys(choices, AUTO) | keys | {"auto_choices": choices}


def engine_settings(train: dict[str, Any]) -> RunConfig:
    """Return a run with only those settings of a study on which the choices depend."""
    return RunConfig(**{key: train[key] for key in ("zero", "deepspeed", *NAMES) if key in train})


def device() -> torch.device:
    """Return the device on which runs of this machine train."""
    import torch

    return torch.device("cuda" if gpus() else "cpu")


@contextlib.contextmanager
def threads_of_a_run(processes: int) -> Iterator[None]:
    """Give this process, inside the context, as many threads as a rank has when so many processes share the machine."""
    import torch

    former = torch.get_num_threads()
    first = environment(processes).get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # OpenMP takes 4,2 by level
    torch.set_num_threads(int(first) if first.isdecimal() and int(first) else former)
    try:
        yield
    finally:
        torch.set_num_threads(former)
