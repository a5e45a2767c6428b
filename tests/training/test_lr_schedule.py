"""Schedules, against their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from phigrow.training import RunConfig
from phigrow.training.schedule import learning_rate_schedule


def rates(**settings) -> list[float]:
    config = RunConfig(lr=0.5, **settings)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
    schedule = learning_rate_schedule(optimizer, config)
    seen = []
    for _ in range(config.steps):
        seen.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return seen


def test_cosine_warms_up_from_0_and_ends_at_min_lr():
    seen = rates(steps=100, warmup=10, min_lr=0.1)
    wanted = [0.5 * (s / 10 if s < 10 else 0.1 + 0.9 * (1 + math.cos(math.pi * (s - 10) / 90)) / 2) for s in range(100)]
    np.testing.assert_allclose(seen, wanted, rtol=1e-12)


def test_wsd_is_flat_until_its_linear_decay():
    seen = rates(steps=100, warmup=10, schedule="wsd", decay=20, min_lr=0.1)
    assert set(seen[10:81]) == {0.5}
    np.testing.assert_allclose(seen[80:], [0.5 * (1 - 0.9 * s / 20) for s in range(20)], rtol=1e-12)
    assert rates(steps=100, warmup=10, schedule="wsd", min_lr=0.1) == seen  # a fifth by default


def test_constant_stays():
    seen = rates(steps=20, warmup=4, schedule="constant")
    np.testing.assert_allclose(seen, [0, 0.125, 0.25, 0.375] + [0.5] * 16)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_no_warmup_starts_at_the_peak(schedule):
    assert rates(steps=10, warmup=0, schedule=schedule)[0] == 0.5


def test_wsd_that_decays_all_the_way_is_linear_warmup_and_linear_decay():
    seen = rates(steps=100, warmup=10, schedule="wsd", decay=90, min_lr=0)
    np.testing.assert_allclose(seen, [0.5 * (s / 10 if s < 10 else (100 - s) / 90) for s in range(100)], atol=1e-12)
