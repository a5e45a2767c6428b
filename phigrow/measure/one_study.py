"""Check that the runs of a report belong to one study: same training text and same held-out text for each seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from phigrow.errors import GrowthError
from phigrow.records.run import Run

TEXTS = {
    "data_fingerprint": "text",
    "eval_fingerprint": "held-out text",
    "content_fingerprint": "text, which was replaced or damaged,",
}
"""Keys of the run record that identify a text. Records of earlier releases have no content fingerprint."""

MOST_FOLDERS = 6
"""Most folders of a study that a message names one by one."""


def check_one_study(runs: Iterable[Run]) -> None:
    """Refuse runs of two studies.

    Raises:
        GrowthError: two runs of one seed have different fingerprints of a text. The message sorts the folders by study.
    """
    runs = list(runs)
    for key, text in TEXTS.items():
        prints: dict[int, set[str]] = {}
        for run in runs:
            if run.meta.get(key) is not None:
                prints.setdefault(run.seed, set()).add(str(run.meta[key]))
        if all(len(found) == 1 for found in prints.values()):
            continue
        studies: dict[str, list[Path]] = {}
        for run in runs:
            if run.meta.get(key) is not None:
                studies.setdefault(str(run.meta[key]), []).append(run.folder)
        raise GrowthError(
            f"these folders hold runs of {len(studies)} studies: their {text} differs ({key})",
            where="; ".join(
                f"{fingerprint[:12]}: {_named(covering_folders(folders, runs))} ({_count(len(folders))})"
                for fingerprint, folders in studies.items()
            ),
            why="arms are compared only on the same text",
            fix="make one report for each of these groups: give phigrow report only the folders of one group",
        )


def covering_folders(folders: Sequence[Path], runs: Iterable[Run]) -> list[Path]:
    """Return the fewest folders that hold these run folders and none of the other runs."""
    mine = set(folders)
    others = {parent for run in runs if run.folder not in mine for parent in (run.folder, *run.folder.parents)}
    covering: dict[Path, None] = {}
    for folder in folders:
        highest = folder
        for parent in folder.parents:
            if parent in others or sum(parent in each.parents for each in mine) < 2:
                break
            highest = parent
        covering[highest] = None
    return [each for each in covering if not any(other in each.parents for other in covering)]


def _named(folders: Sequence[Path]) -> str:
    named = ", ".join(map(str, folders[:MOST_FOLDERS]))
    return named + (f" and {len(folders) - MOST_FOLDERS} more" if len(folders) > MOST_FOLDERS else "")


def _count(runs: int) -> str:
    return f"{runs} run{'' if runs == 1 else 's'}"


def check_held_out_groups(arms: Mapping[str, Iterable[Run]]) -> None:
    """Refuse runs with different groups of held-out blocks, because they were evaluated on different text.

    Raises:
        GrowthError: two runs recorded groups of different sizes.
    """
    first: Run | None = None
    for runs in arms.values():
        for run in runs:
            if not len(run.group_blocks):
                continue
            first = first or run
            if run.group_blocks.tolist() != first.group_blocks.tolist():
                raise GrowthError(
                    f"{run.name}, and {first.name}, were evaluated on different groups of held-out blocks",
                    where=f"{run.folder} and {first.folder}",
                    why=f"{len(run.group_blocks)} groups of {run.group_blocks.sum():.0f} blocks against "
                    f"{len(first.group_blocks)} groups of {first.group_blocks.sum():.0f} blocks",
                    fix="use the same eval_blocks and eval_part in all runs, or leave one of these runs out",
                )
