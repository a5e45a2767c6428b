"""Settings of a study: data, a source, a destination, arms, seeds, budgets, and keys of every training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phigrow.growth.growth_spec import GrowthSpec
from phigrow.models.config import Config
from phigrow.study.launch import Layout, layout

SCRATCH, CONTINUED = "scratch", "continued"


@dataclass(frozen=True)
class Arm:
    """One way to start.

    Attributes:
        name: in records, tables and folders.
        method: a width method, ``scratch``, or ``continued``: the source itself, trained on without growing.
        growth: options of `phigrow.expand`, such as depth, noise, scale.
        train: keys of the training run that this arm has for itself.
        learn: keys of `phigrow.ligo.train.learn_growth`, such as steps, where the maps of its method are learned first.
        state: how the source's optimizer state is grown, of `phigrow.growth.moments.STATES`; None: AdamW starts afresh.
    """

    name: str
    method: str
    growth: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    state: str | None = None
    learn: dict[str, Any] | None = None

    @property
    def grows(self) -> bool:
        """True if the arm starts from an expansion of the source."""
        return self.method not in (SCRATCH, CONTINUED)

    def spec(self, seed: int) -> GrowthSpec:
        """Everything that the arm chooses about its growth."""
        return GrowthSpec.of(self.method, seed=seed, **self.growth)


@dataclass(frozen=True)
class Source:
    """The small model: a checkpoint that there is (``path``), or a model to train for ``steps`` first.

    ``cost`` has tokens, flops and seconds of its training where the checkpoint does not say them itself; ``train`` the
    keys in which its training differs from that of the arms.
    """

    config: Config
    path: Path | None = None
    steps: int = 0
    seed: int = 0
    train: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """Learning rates that every arm tries, for how many steps, with which seeds."""

    lr: tuple[float, ...]
    steps: int
    seeds: tuple[int, ...]

    def record(self) -> dict[str, Any]:
        """Return the entry for the records of runs whose learning rate the sweep chose."""
        return {"lr": list(self.lr), "steps": self.steps, "seeds": list(self.seeds)}


@dataclass(frozen=True)
class Study:
    """A study; `phigrow.study.load_study` reads it from YAML.

    Attributes:
        name: of the file.
        out: folder of everything.
        data: a folder of packed blocks, or the arguments of `phigrow.corpus.prepare`.
        seq_len: tokens a block.
        vocab_size: of the data, where it is known before it is made.
        source: the small model.
        dst: configuration of the large one.
        arms: in the order in which they run.
        baseline: the arm that sets the target.
        seeds: of data order, new weights and expansions.
        budgets: steps at whose end a run has decayed, rising.
        decay: the last part of every budget, as a fraction, over which the learning rate falls.
        train: keys of every training run.
        sweep: how each arm's learning rate is chosen; None: ``train`` has it.
        workers: runs trained side by side; None: chosen for the machine.
        ranks: DeepSpeed ranks of each; None: chosen for the machine.
        flops_per_second: of one run on the machine that it was written for, for estimates of time before any run.
    """

    name: str
    out: Path
    data: Path | dict[str, Any]
    seq_len: int
    source: Source
    dst: Config
    arms: tuple[Arm, ...]
    baseline: str
    seeds: tuple[int, ...]
    budgets: tuple[int, ...]
    decay: float
    train: dict[str, Any]
    sweep: Sweep | None = None
    workers: int | None = None
    ranks: int | None = None
    flops_per_second: float | None = None

    @property
    def batch_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return int(self.train["batch"]) * self.seq_len

    def layout(self) -> Layout:
        """Runs side by side, and the ranks of each, on this machine."""
        return layout(int(self.train["batch"]), self.workers, self.ranks)

    def decay_steps(self, steps: int) -> int:
        """Steps over which a run of this length decays: at least two, as the first is still at the full rate."""
        return max(2, round(self.decay * steps))
