"""Properties of settings and of data order, over random values."""

from __future__ import annotations

import dataclasses
import tempfile
import typing
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from phigrow.corpus.order import apportion, mixed_rows, rank_rows, shares, step_rows
from phigrow.training import RunConfig, load_run_config

FIELDS = {field.name: field for field in dataclasses.fields(RunConfig)}
TYPES = typing.get_type_hints(RunConfig)
CROSS_CHECKED = {
    "init", "init_optimizer", "model", "data", "mixture", "stream", "steps", "warmup", "decay", "schedule",
    "schedule_start", "schedule_steps", "rewarm", "branch_from", "source_tokens", "source_flops", "source_seconds",
    "data_part", "eval_part", "optimizer", "grad_clip", "lr_base_width", "teacher", "teacher_steps", "teacher_weight",
}  # fmt: skip
"""Settings whose values must fit one another."""

DECAY_RATES = ("beta1", "beta2", "momentum")
"""Settings that must be below their upper bound."""


def values_of(name: str) -> st.SearchStrategy[Any]:
    """Values that a setting may have by its declaration."""
    meta, hint = FIELDS[name].metadata, TYPES[name]
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)]
    kind = typing.get_origin(kinds[0]) or kinds[0]
    low, high = meta["ge"], meta["le"]
    if meta["choices"]:
        found: st.SearchStrategy[Any] = st.sampled_from(meta["choices"])
    elif kind is bool:
        found = st.booleans()
    elif kind is int:
        found = st.integers(low, 10**6 if high is None else high)
    elif kind is float:
        found = st.floats(low, 1e6 if high is None else high, allow_nan=False, exclude_max=name in DECAY_RATES)
    elif kind is list:
        found = st.lists(st.integers(low, 10**6), min_size=1, max_size=5)
    elif kind is dict:
        found = st.dictionaries(st.text("abc", min_size=1), st.integers(0, 9), min_size=1, max_size=3)
    else:
        found = st.text("abcdefghij/-_.", min_size=1, max_size=20).filter(lambda text: not text.startswith("-"))
    return found | st.none() if type(None) in typing.get_args(hint) else found


FREE = [name for name in FIELDS if name not in CROSS_CHECKED]
SETTINGS = st.fixed_dictionaries({}, optional={name: values_of(name) for name in FREE})


def word(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, dict):
        return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
    if isinstance(value, list):
        return ",".join(map(str, value))
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)


@settings(max_examples=60, deadline=None)
@given(SETTINGS)
def test_settings_survive_words_and_yaml(chosen):
    config = RunConfig(**chosen)
    words = [text for name, value in chosen.items() for text in (f"--{name.replace('_', '-')}", word(value))]
    assert load_run_config(options=words) == config
    assert load_run_config(options=[f"{a}={b}" for a, b in zip(words[::2], words[1::2], strict=True)]) == config
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(config.as_dict()), encoding="utf-8")
        assert load_run_config(recipe) == config


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 90), st.integers(1, 4))
def test_every_epoch_reads_every_block_once(seed, batch, blocks, epochs):
    steps = -(-epochs * blocks // batch)
    rows = np.concatenate([step_rows(seed, step, batch, blocks) for step in range(steps)])[: epochs * blocks]
    assert all(sorted(epoch) == list(range(blocks)) for epoch in rows.reshape(epochs, blocks).tolist())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 6), st.integers(1, 90), st.integers(0, 50))
def test_a_run_that_resumes_reads_on_where_it_stood_on_any_number_of_ranks(seed, share, world, blocks, step):
    batch = share * world
    uninterrupted = [step_rows(seed, number, batch, blocks) for number in range(step + 2)]
    resumed = step_rows(seed, step, batch, blocks)
    np.testing.assert_array_equal(resumed, uninterrupted[step])
    parts = [part for rank in range(world) for part in rank_rows(resumed, rank, world, 1)]
    np.testing.assert_array_equal(np.concatenate(parts), resumed)
    # The same blocks in batches of another size: the position counts blocks, not steps.
    whole = np.concatenate(uninterrupted)
    one_by_one = [step_rows(seed, number, 1, blocks)[0] for number in range(len(whole))]
    np.testing.assert_array_equal(one_by_one, whole)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 30), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.data())
def test_a_mixture_reads_every_block_of_a_source_once_an_epoch(seed, batch, weights, data):
    sizes = [data.draw(st.integers(1, 20)) for _ in weights]
    ends = np.cumsum(sizes).tolist()
    sources = [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    exact, steps = shares([float(weight) for weight in weights]), 12
    rows = np.concatenate([mixed_rows(seed, step, batch, exact, sources) for step in range(steps)])
    read = [int(np.isin(rows, source).sum()) for source in sources]
    assert read == apportion(exact, steps * batch)
    for source, total in zip(sources, read, strict=True):
        counts = np.bincount(rows[np.isin(rows, source)] - source.start, minlength=len(source))
        assert counts.max() - counts.min() <= 1
        assert counts.sum() == total
