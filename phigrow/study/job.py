"""`Job`: one piece of work of a study, with one result in one folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from phigrow.study.settings import Arm

Kind = Literal["data", "source", "expand", "state", "sweep", "trunk", "end"]


@dataclass(frozen=True)
class Job:
    """One piece of work with one result.

    Attributes:
        name: name for people, unique in its study.
        kind: ``data`` packs the text, ``expand`` makes an arm's first weights, and ``state`` the optimizer's state for
            them. ``trunk`` is the training that decayed ends share, and ``end`` the rest of one budget. ``sweep`` is
            the end of a learning rate that is tried, and ``source`` the end of a source.
        key: hash of everything on which the result depends.
        folder: folder of the result.
        needs: names of the jobs that must be done before.
        keys: keys of the training run, without those that are known only when it starts.
        arm, source_seed, seed, budget: identify the run; ``budget`` is the number of steps of an end.
        first, steps: the run trains from after step ``first`` up to ``steps``.
        tokens, flops: cost of this training.
        keeps: keep its last checkpoint, because states are grown from it.
        start: folder of the source's weights from which the arm starts.
        undecided: a placeholder, for counting costs, of a run whose learning rate depends on others; it never runs.
    """

    name: str
    kind: Kind
    key: str
    folder: Path
    needs: tuple[str, ...] = ()
    keys: dict[str, Any] = field(default_factory=dict)
    arm: Arm | None = None
    source_seed: int | None = None
    seed: int = 0
    budget: int | None = None
    first: int = 0
    steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    keeps: bool = False
    start: Path | None = None
    undecided: bool = False

    @property
    def trains(self) -> bool:
        """True for a training run."""
        return self.kind not in ("data", "expand", "state")
