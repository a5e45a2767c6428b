"""Settings of a study: data, sources, a destination, arms, seeds, budgets, and keys of every training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phigrow.growth.growth_spec import GrowthSpec
from phigrow.models.config import Config
from phigrow.study.launch import Layout, layout

SCRATCH, CONTINUED, FLAT = "scratch", "continued", "flat"

Part = tuple[int, int, int]
"""``(first, last, of)``: blocks whose number modulo ``of`` is from ``first`` to ``last - 1``."""


@dataclass(frozen=True)
class Arm:
    """One way to start, from one source at one age.

    Attributes:
        name: in records, tables and folders.
        method: a width method, ``scratch``, ``flat``, or ``continued``: the source itself, trained on without growing.
        growth: options of `phigrow.expand`, such as depth, noise, scale.
        train: keys of the training run that only this arm has.
        learn: arguments of `phigrow.ligo.train.learn_growth`, such as steps; None if its maps are not learned first.
        state: one of `phigrow.growth.moments.STATES`, by which the source's optimizer state is grown; None for a fresh
            optimizer.
        source: name of the source from which it starts, or which teaches it.
        source_steps: training steps of the source; 0 if the source is a checkpoint, or there is none.
        age: tokens that the source has read, divided by the number of its parameters; None if unknown.
        several_ages: the study has this arm at more than one age.
        constant: the source's learning rate has not decayed.
        same_text: the arm reads the blocks that its source read.
        model: configuration of a flat arm.
        budgets: of a flat arm, which may differ from the study's.
        longer: further budgets, trained after everything else.
        method_files: hash of each method file, by the method's name, when the study was read.
    """

    name: str
    method: str
    growth: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    state: str | None = None
    learn: dict[str, Any] | None = None
    source: str = ""
    source_steps: int = 0
    age: float | None = None
    several_ages: bool = False
    constant: bool = False
    same_text: bool = False
    model: Config | None = None
    budgets: tuple[int, ...] = ()
    longer: tuple[int, ...] = ()
    method_files: dict[str, str | None] = field(default_factory=dict)

    @property
    def grows(self) -> bool:
        """True if the arm starts from an expansion of the source."""
        return self.method not in (SCRATCH, CONTINUED, FLAT)

    @property
    def has_source(self) -> bool:
        """True if the arm starts from the source's weights, grown or as they are."""
        return self.method not in (SCRATCH, FLAT)

    @property
    def is_taught(self) -> bool:
        """True if the arm learns from the source's predictions in its first steps."""
        return bool(self.train.get("teacher_steps"))

    @property
    def needs_source(self) -> bool:
        """True if the arm needs the source, for its weights or as its teacher."""
        return self.has_source or self.is_taught

    @property
    def label(self) -> str:
        """The name; with the age of its source, as in ``wr@20``, if the study has several ages."""
        return f"{self.name}@{float(f'{self.age:.2g}'):g}" if self.several_ages and self.age is not None else self.name

    def spec(self, seed: int) -> GrowthSpec:
        """Return the settings of the arm's growth.

        Raises:
            GrowthError: a method file is missing, or has changed since the study was read.
        """
        spec = GrowthSpec.of(self.method, seed=seed, **self.growth)
        return spec.pinned(self.method_files) if self.method_files else spec


@dataclass(frozen=True)
class Source:
    """A small model: an existing checkpoint (``path``), or a model to train first.

    Attributes:
        config: configuration of the model.
        path: folder of the checkpoint; None for a model to train.
        steps: lengths of its training. Arms grow from it at each of these ages, in this order.
        seeds: seeds of its training. Every arm grows from the source of each seed.
        train: keys of its training that differ from those of the arms.
        cost: tokens, flops and seconds of its training, if the checkpoint does not record them.
        name: name among several sources; empty for the only one.
        grown: growth of its first weights from another source, as an arm of which only source, age, method and options
            count. None if it starts from scratch.
    """

    config: Config
    path: Path | None = None
    steps: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0,)
    train: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    name: str = ""
    grown: Arm | None = None


@dataclass(frozen=True)
class Text:
    """Parts of the text: training blocks of sources and of arms, held-out blocks for choosing rates and for figures."""

    source: Part
    arms: Part
    choose: Part
    report: Part


@dataclass(frozen=True)
class Sweep:
    """Learning rates that every arm tries.

    Attributes:
        lr: the grid, rising.
        steps: one length or several. At each but the last, the better half of the rates goes on (successive halving).
        seeds: seeds of the runs.
        widen: largest number of rates that an arm tries beyond the grid, while its best rate is at the edge.
    """

    lr: tuple[float, ...]
    steps: tuple[int, ...]
    seeds: tuple[int, ...]
    widen: int = 0

    @property
    def halves(self) -> bool:
        """True if rates are dropped or added during the sweep, so that later runs depend on results."""
        return len(self.steps) > 1 or self.widen > 0

    def record(self) -> dict[str, Any]:
        """Return the entry for the records of runs whose learning rate the sweep chose."""
        steps = list(self.steps) if self.halves else self.steps[0]
        return {"lr": list(self.lr), "steps": steps, "seeds": list(self.seeds)}


@dataclass(frozen=True)
class Study:
    """A study; `phigrow.study.load_study` reads it from YAML.

    Attributes:
        name: name of its file.
        out: folder of all results.
        data: a folder of packed blocks, or the arguments of `phigrow.corpus.prepare`.
        seq_len: tokens per block.
        sources: the small models; if there are several, each arm names its own.
        dst: configuration of the large model.
        arms: the arms, in the order in which they run.
        baseline: name of the arm whose loss is the target.
        seeds: seeds of data order, new weights and expansions.
        budgets: lengths of decayed runs in steps, in rising order.
        decay: last part of every budget, as a fraction, over which the learning rate falls.
        train: keys of every training run.
        sweep: the learning rates from which each arm chooses; None if ``train`` has the rate.
        text: parts of the text that sources and arms read and are evaluated on; None for all blocks.
        workers: number of runs side by side; None lets the machine decide.
        ranks: DeepSpeed ranks of each run; None lets the machine decide.
        flops_per_second: speed of one run, for estimates of time before the first run.
        refine: train one more end for each arm whose cost was read between two ends.
        former_places: place of an input that was moved -> its former place, see `phigrow.study.places`.
    """

    name: str
    out: Path
    data: Path | dict[str, Any]
    seq_len: int
    sources: tuple[Source, ...]
    dst: Config
    arms: tuple[Arm, ...]
    baseline: str
    seeds: tuple[int, ...]
    budgets: tuple[int, ...]
    decay: float
    train: dict[str, Any]
    sweep: Sweep | None = None
    text: Text | None = None
    workers: int | None = None
    ranks: int | None = None
    flops_per_second: float | None = None
    refine: bool = False
    former_places: dict[str, str] = field(default_factory=dict)

    def source(self, name: str = "") -> Source:
        """Return the source of a name."""
        return next(source for source in self.sources if source.name == name)

    def budgets_of(self, arm: Arm) -> tuple[int, ...]:
        """Return the budgets of an arm, without the longer ones."""
        return arm.budgets or self.budgets

    def model_of(self, arm: Arm | None) -> Config:
        """Return the configuration of the model that an arm trains."""
        if arm is None or arm.method == CONTINUED:
            return self.source(arm.source if arm else self.sources[0].name).config
        return arm.model or self.dst

    @property
    def batch_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return int(self.train["batch"]) * self.seq_len

    def layout(self) -> Layout:
        """Return the number of runs side by side and the ranks of each, on this machine."""
        return layout(int(self.train["batch"]), self.workers, self.ranks)

    def decay_steps(self, steps: int) -> int:
        """Return the steps over which a run of this length decays; at least two, as the first has the full rate."""
        return max(2, round(self.decay * steps))
