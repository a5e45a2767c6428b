"""Builds training jobs: the keys, cost and schedule that sources, sweeps and runs share."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from phigrow.models.cost import count_cost
from phigrow.study.job import Job, Kind
from phigrow.study.places import hashed_data
from phigrow.study.settings import Arm, Study
from phigrow.training.configuration import RunConfig
from phigrow.training.declaration import Role


class JobBuilder:
    """Builds the training jobs of a study.

    Attributes:
        study: the study.
        data_key, data_folder: hash and folder of its packed blocks.
        needs_data: the name of the job that packs them, as a tuple; empty if the study names a folder of blocks.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        data = study.data
        self.data_key = hash_of(hashed_data(data, study.former_places))
        self.data_folder = data if isinstance(data, Path) else study.out / f"data-{self.data_key}"
        self.needs_data = () if isinstance(data, Path) else ("data",)
        self._flops: dict[str, float] = {}

    def training(
        self,
        name: str,
        kind: Kind,
        key: str,
        folder: Path,
        needs: tuple[str, ...],
        keys: dict[str, Any],
        *,
        arm: Arm,
        first: int = 0,
        steps: int,
        **which: Any,
    ) -> Job:
        """Return a job that trains ``arm`` from step ``first`` to ``steps``, with its tokens and FLOPs.

        A source is given as an arm that is not one of the study's.
        """
        study = self.study
        tokens = (steps - first) * study.batch_tokens
        if arm.label not in self._flops:
            self._flops[arm.label] = count_cost(study.model_of(arm), study.seq_len).training_flops
        flops = tokens * self._flops[arm.label]
        if arm.is_taught:
            taught = min(steps, arm.train["teacher_steps"]) - min(first, arm.train["teacher_steps"])
            teacher = count_cost(study.source(arm.source).config, study.seq_len)
            flops += taught * study.batch_tokens * teacher.forward_flops
        is_source = arm not in study.arms
        keys = keys | {"data": str(self.data_folder), "out": str(folder)}
        return Job(
            name, kind, key, folder, needs, keys,
            arm=None if is_source else arm, first=first, steps=steps, tokens=tokens, flops=flops, **which,
        )  # fmt: skip

    def branch_step(self, budget: int) -> int:
        """Return the step at which a budget's decay begins."""
        return budget - self.study.decay_steps(budget)

    def schedule(self, steps: int) -> dict[str, Any]:
        """Return the keys of a run that decays at its end."""
        return {"steps": steps, "schedule": "wsd", "decay": self.study.decay_steps(steps)}

    def constant(self, trunk: str, points: list[int]) -> dict[str, Any]:
        """Return the keys of a trunk, trained up to the last of the points at which ends branch off."""
        keys = {"steps": points[-1], "schedule": "wsd", "decay": 0, "save_at": points, "export": None}
        return keys | {"trunk": trunk.replace("/", "-")}

    def branch(self, trunk: str, folder: Path) -> dict[str, Any]:
        """Return the keys of an end that branches off such a trunk."""
        return {"trunk": trunk.replace("/", "-"), "branch_from": str(folder)}


def result_keys(train: dict[str, Any]) -> dict[str, Any]:
    """Return the keys on which the result of a training run depends: those that are set and not operational.

    >>> result_keys({"warmup": 20, "threads": 2, "decay": None})
    {'warmup': 20}
    """
    return {key: value for key, value in train.items() if key not in _operational() and value is not None}


@functools.cache  # called for every job
def _operational() -> frozenset[str]:
    return frozenset(RunConfig.keys_with(Role.OPERATIONAL))


def hash_of(content: Any) -> str:
    """Return a short hash of content that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:10]
