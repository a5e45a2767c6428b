"""Compare the outputs of a grown checkpoint and its source on the same tokens; the result is a certificate."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phigrow.checkpoints.hub import locate
from phigrow.checkpoints.provenance import PROVENANCE_FILE
from phigrow.errors import GrowthError
from phigrow.expansion.logits import BACKENDS, Probe, choose_backend, run_probes
from phigrow.files.paths import utf8_path
from phigrow.growth.method import Method
from phigrow.growth.plan import Plan
from phigrow.growth.planner import check_method_of
from phigrow.inspection.plan_file import read_plan_file
from phigrow.models.config import Config, context_of, load_config
from phigrow.models.cost import count_cost
from phigrow.models.families import family_of
from phigrow.models.forward import Ids, Values
from phigrow.models.function import function_of
from phigrow.models.rotary import lengths_to_compare

PROBE_TEXT = """\
A function is a rule that gives every element of one set exactly one element of another. To define one in Python we
write the word def, a name, and the arguments in brackets; the value after return is what a call gives back.

def mean(values):
    # An empty list has no mean, so we say so instead of dividing by zero.
    if not values:
        raise ValueError("mean of no values")
    return sum(values) / len(values)

Exercise: explain why the mean of two equal numbers is that number, and what happens when one of them grows. Light
takes about eight minutes from the sun to the earth. If supply falls while demand stays the same, the price rises.
"""

LAST = 64
"""Positions at the end of a long sequence whose logits are compared; they depend on all positions before them."""

MOST_FLOPS = 1e13
"""Most FLOPs of the grown model on a long sequence, by default: two minutes and a half on one core of 73 GFLOP/s."""

SCORE_FLOPS = 2400
"""Cost of one attention score in numpy, in FLOPs of large matrix products: 33 ns on the same core."""

ARITHMETIC = ("float32", "float64")
"""Dtypes in which both models can be run; the first is the default."""

TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 0.1, "float16": 0.015}
"""Largest |dlogit| of an exact plan, for each dtype in which the grown weights are stored, at logits up to 10; it grows
in proportion beyond. float64 and float32 are rounding of arithmetic; the other two are rounding of the stored weights,
measured over many shapes by tests/growth/test_lossless.py."""


@dataclass(frozen=True)
class Certificate:
    """The measurements of `verify`. Logits are compared over the source's vocabulary, at every probe position.

    Attributes:
        method, plan_hash: of the plan in the destination's ``phigrow.json``; None where there is none.
        claims_exact: the plan claims to preserve the function.
        backend: program that ran the models: ``numpy`` (the forward pass of the family in phigrow) or ``transformers``.
        compute_dtype: of the arithmetic.
        source_dtype, destination_dtype: in which the weights are stored.
        tokens: number of probe positions, long sequences left out.
        probe: kind of the probe, ``text`` or ``random tokens``.
        lengths: lengths of the long sequences, see `long_lengths`.
        not_run: longest length that decides the claim and was too long to run, or None.
        max_abs_dlogit: largest difference of logits, long sequences included.
        mean_abs_dlogit: mean difference of logits.
        max_abs_logit: largest absolute logit of the source.
        kl: mean KL divergence from source to destination, nats per token.
        source_loss, destination_loss: mean cross entropy on the probe's next tokens, nats per token.
        tolerance: allowed ``max_abs_dlogit`` of an exact plan.
        passed: True if the claim holds; None for a plan that claims nothing.
    """

    method: str | None
    plan_hash: str | None
    claims_exact: bool
    backend: str
    compute_dtype: str
    source_dtype: str
    destination_dtype: str
    tokens: int
    probe: str
    lengths: tuple[int, ...]
    not_run: int | None
    max_abs_dlogit: float
    mean_abs_dlogit: float
    max_abs_logit: float
    kl: float
    source_loss: float
    destination_loss: float
    tolerance: float
    passed: bool | None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def verify(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: str = "float32",
    probe: str | None = None,
    tokens: int = 256,
    seed: int = 0,
    revision: str | None = None,
    backend: str = BACKENDS[0],
    longest: int | None = None,
    method: str | Path | Method | None = None,
) -> Certificate:
    """Run source and destination on the same probe tokens, one model at a time, and compare.

    Where the function can change with the length of a sequence, or the destination has more positions than the source,
    both models also run on long sequences, up to the destination's context.

    Args:
        src: the source: a folder or a hub name.
        dst: the grown folder.
        dtype: of the arithmetic, ``float32`` or ``float64``, whatever the stored dtype.
        probe: text to run on; by default a paragraph, if the source has a tokenizer, else random tokens from ``seed``.
        tokens: probe positions, in rows of at most 128.
        revision: hub revision of the source.
        backend: ``numpy`` (fast to start), ``transformers`` (the reference), or ``auto``: numpy where it can run both
            models and neither has more than 100M parameters.
        longest: longest sequence to run; by default, the longest that costs at most `MOST_FLOPS`.
        method: check first that this method made the plan, see `phigrow.growth.planner.check_method_of`. Without it,
            the plan is used as it is, and no code of a method runs.

    Returns:
        The certificate; ``passed`` is False when a plan claims exactness and the logits differ by more than rounding.

    Raises:
        GrowthError: either side cannot be read, they cannot be compared, or ``method`` did not make the plan.
    """
    if dtype not in ARITHMETIC:
        raise GrowthError(
            f"verify cannot compute in {dtype!r}", where="--dtype", fix=f"choose {' or '.join(ARITHMETIC)}"
        )
    if tokens < 2:
        raise GrowthError(f"verify cannot run on {tokens} tokens", where="--tokens", fix="give at least 2")
    source, destination = locate(src, revision), locate(dst)
    plan = read_plan(destination)
    if method is not None:
        if plan is None:
            raise GrowthError(
                "the grown folder has no plan to check the method against",
                where=str(destination),
                why=f"it has no {PROVENANCE_FILE}",
                fix="leave --method out",
            )
        check_method_of(plan, method)
    src_config, dst_config = load_config(source), load_config(destination)
    family = family_of(src_config, str(source))
    other = family_of(dst_config, str(destination))
    if other is not family:
        raise GrowthError(
            f"source and destination are of two families: {family.name} and {other.name}",
            where=f"{source} and {destination}",
            fix="give a checkpoint and the folder that was grown from it",
        )
    src_vocab, dst_vocab = family.sizes_of(src_config)["vocab"], family.sizes_of(dst_config)["vocab"]
    if src_vocab > dst_vocab:
        raise GrowthError(
            f"the destination has fewer tokens: {src_vocab} -> {dst_vocab}",
            where=str(destination),
            fix="give the source first and the grown checkpoint second",
        )
    chosen = choose_backend(backend, source, destination)
    ids, described = probe_tokens(source, probe, tokens, src_vocab, seed)
    lengths, not_run = long_lengths(src_config, dst_config, ids.shape[1], longest)
    rows = (probe_tokens(source, probe, length, src_vocab, seed, length)[0] for length in lengths)
    probes = [Probe(ids, ids.shape[1]), *(Probe(row, min(LAST, row.shape[1])) for row in rows)]
    old, source_dtype = run_probes(source, probes, dtype, chosen)
    new, destination_dtype = run_probes(destination, probes, dtype, chosen)
    differences = _compare(old[0], new[0], ids)
    for before, after in zip(old[1:], new[1:], strict=True):
        differences["max_abs_dlogit"] = _larger(differences["max_abs_dlogit"], _largest_difference(before, after))
        differences["max_abs_logit"] = _larger(differences["max_abs_logit"], float(np.abs(before).max()))
    stored = destination_dtype if dtype == "float64" or destination_dtype != "float64" else dtype
    tolerance = TOLERANCE[stored] * max(1.0, differences["max_abs_logit"] / 10)
    exact = plan is not None and plan.exact
    return Certificate(
        method=plan.method if plan else None,
        plan_hash=plan.hash if plan else None,
        claims_exact=exact,
        backend=chosen,
        compute_dtype=dtype,
        source_dtype=source_dtype,
        destination_dtype=destination_dtype,
        tokens=ids.size,
        probe=described,
        lengths=lengths,
        not_run=not_run,
        tolerance=tolerance,
        # A NaN compares false, so it fails.
        passed=differences["max_abs_dlogit"] <= tolerance if exact else None,
        **differences,
    )


def read_plan(folder: Path) -> Plan | None:
    """Return the plan in a grown folder's ``phigrow.json``, or None where there is no such file.

    Raises:
        GrowthError: the file is damaged, or its hash is not the plan's.
    """
    return read_plan_file(folder).plan if (folder / PROVENANCE_FILE).is_file() else None


def long_lengths(src: Config, dst: Config, length: int, longest: int | None) -> tuple[tuple[int, ...], int | None]:
    """Choose the lengths of the long sequences: those that decide whether two rotary embeddings agree.

    If no rotary embedding changes with the length, the destination's context alone is run, where it is larger.

    Args:
        src, dst: configurations of both models.
        length: length of the ordinary probe; shorter sequences tell nothing more.
        longest: longest sequence to run; None for the longest that costs at most `MOST_FLOPS`.

    Returns:
        The lengths, ascending, and the longest that should have been run but is too long, or None.
    """
    family = family_of(src, "the source")
    old, new = function_of(family, src), function_of(family, dst)
    wanted = set(lengths_to_compare(old.rotary, new.rotary, max(old.context, new.context)))
    if not old.rotary.last_lengths() and not new.rotary.last_lengths() and new.context <= old.context:
        wanted = set()
    wanted = {each for each in wanted if each > length}

    sizes = family.sizes_of(dst)
    scores = sizes["layer"] * math.prod(sizes[axis] for axis in family.heads)

    def fits(each: int) -> bool:
        if longest is not None:
            return each <= longest
        return each * count_cost(dst, each).forward_flops + SCORE_FLOPS * scores * each**2 <= MOST_FLOPS

    if not wanted or fits(max(wanted)):
        return tuple(sorted(wanted)), None
    low, high = length, max(wanted)  # a sequence of `low` fits, one of `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    run = {each for each in wanted if each <= low} | ({low} if low > max(length, old.context) else set())
    return tuple(sorted(run)), max(wanted)


def probe_tokens(
    folder: Path, text: str | None, tokens: int, vocab: int, seed: int, length: int | None = None
) -> tuple[Ids, str]:
    """Return token ids [rows, length], and their kind: a repeated text, or random ones without a tokenizer.

    Args:
        folder: the source.
        text: None for `PROBE_TEXT`.
        tokens: number of ids, rounded down to whole rows.
        vocab: ids are below it.
        seed: of random ids.
        length: of a row; by default at most 128, and no more than the source's context.

    Raises:
        GrowthError: a text without a tokenizer, a tokenizer that cannot be read, or ids outside the vocabulary.
    """
    if length is None:
        length = min(128, tokens, context_of(load_config(folder)))
    rows = max(1, tokens // length)
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model"))
    if text is not None and not has_tokenizer:
        raise GrowthError(
            "verify cannot run on a text, because the source has no tokenizer",
            where=str(folder),
            fix="leave the text out, then verify runs on random tokens",
        )
    if has_tokenizer:
        try:
            ids = encode(folder, text or PROBE_TEXT)
        except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
            raise GrowthError(
                "the tokenizer cannot be read",
                where=str(folder),
                why=str(error),
                fix="download its files again, or remove them to run on random tokens",
            ) from error
        if len(ids) < 2 or max(ids) >= vocab:
            raise GrowthError(
                "the tokens of the probe text cannot be used",
                where=str(folder),
                why=f"there are {len(ids)}, the largest id is {max(ids, default=None)}, the vocabulary has {vocab}",
                fix="give a text of at least two tokens, and check that the tokenizer belongs to this model",
            )
        repeated = (ids * (rows * length // len(ids) + 1))[: rows * length]
        return np.array(repeated, dtype=np.int64).reshape(rows, length), "text"
    # The numbers that torch.randint draws from this seed.
    drawn = np.random.RandomState(seed % (1 << 32)).randint(1 << 32, size=(rows, length), dtype=np.uint32)
    return (drawn % vocab).astype(np.int64), "random tokens"


def encode(folder: Path, text: str) -> list[int]:
    """Return the token ids of a text; transformers is imported only where there is no ``tokenizer.json``."""
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        with utf8_path(folder) as readable:
            tokenizer = Tokenizer.from_file(str(readable / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return list(tokenizer.encode(text).ids)
    from phigrow.checkpoints.tokenizer_folder import open_tokenizer

    return list(open_tokenizer(folder)(text)["input_ids"])


def _compare(old: Values, new: Values, ids: Ids) -> dict[str, float]:
    """Measure the differences of logits [rows, length, vocab]; the new vocabulary may be larger."""
    largest, total, kl, losses = 0.0, 0.0, 0.0, [0.0, 0.0]
    targets = 0
    for before, after, row in zip(old, new, ids, strict=True):
        largest = _larger(largest, _largest_difference(before, after))
        if largest != largest:
            return dict.fromkeys(
                ("max_abs_dlogit", "mean_abs_dlogit", "kl", "source_loss", "destination_loss"), float("nan")
            ) | {"max_abs_logit": float(np.abs(old).max())}
        total += float(np.abs(before - after[:, : before.shape[1]]).mean(dtype=np.float64)) * len(row)
        log_p, log_q = _log_softmax(before), _log_softmax(after)
        kl += float((np.exp(log_p) * (log_p - log_q[:, : log_p.shape[1]])).sum())
        targets += len(row) - 1
        for k, log in enumerate((log_p, log_q)):
            losses[k] -= float(np.take_along_axis(log[:-1], row[1:, None], axis=1).sum())
    return {
        "max_abs_dlogit": largest,
        "mean_abs_dlogit": total / ids.size,
        "max_abs_logit": float(np.abs(old).max()),
        "kl": max(0.0, kl / ids.size),
        "source_loss": losses[0] / targets,
        "destination_loss": losses[1] / targets,
    }


def _largest_difference(before: Values, after: Values) -> float:
    """Return the largest difference of logits [rows, positions, vocab], NaN if one is not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(before - after[..., : before.shape[-1]])
    return float(difference.max()) if np.isfinite(difference).all() else float("nan")


def _larger(one: float, two: float) -> float:
    """Return the larger of two numbers, or NaN if one is NaN."""
    return float(np.maximum(one, two))


def _log_softmax(logits: Values) -> Values:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))  # type: ignore[no-any-return]
