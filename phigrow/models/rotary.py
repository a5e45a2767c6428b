"""Rotary embeddings as transformers computes them: inverse frequencies and attention scaling, in numpy.

The formulas are those of transformers 5's ``modeling_rope_utils``, and a test holds each of them against it. Equal keys
do not make equal embeddings: a missing ``original_max_position_embeddings`` is the context, and ``dynamic`` and
``longrope`` turn a long sequence at other frequencies than a short one. So two configurations are compared by their
frequencies, at every length where these can change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from phigrow.errors import GrowthError
from phigrow.models.config import ORIGINAL, Config, is_number

Frequencies = npt.NDArray[np.floating[Any]]
Float = type[np.float32] | type[np.float64]

EQUAL = 1e-12
"""Largest relative difference of two frequencies in float64 that are one number, computed in two ways."""


class _Setting(NamedTuple):
    """A rotary setting that transformers reads: the values that it can compute with."""

    allowed: Literal["a positive number", "a number", "a list", "anything"]
    needed: bool = False
    null: bool = False


_FACTOR, _OPTIONAL = _Setting("a positive number", needed=True), _Setting("a number", null=True)
_ORIGINAL = {ORIGINAL: _Setting("a positive number")}
SETTINGS: dict[str, dict[str, _Setting]] = {
    "default": {},
    "linear": {"factor": _FACTOR},
    "dynamic": {"factor": _FACTOR},
    "yarn": {
        "factor": _FACTOR._replace(null=True),  # then it is the context over `ORIGINAL`
        "attention_factor": _OPTIONAL,
        "beta_fast": _OPTIONAL,
        "beta_slow": _OPTIONAL,
        "mscale": _OPTIONAL,
        "mscale_all_dim": _OPTIONAL,
        "truncate": _Setting("anything", null=True),
        **_ORIGINAL,
    },
    "longrope": {
        "short_factor": _Setting("a list", needed=True),
        "long_factor": _Setting("a list", needed=True),
        "factor": _Setting("a positive number", null=True),
        "attention_factor": _OPTIONAL,
        **_ORIGINAL,
    },
    "llama3": {"factor": _FACTOR, "low_freq_factor": _FACTOR, "high_freq_factor": _FACTOR, **_ORIGINAL},
    "proportional": {"factor": _Setting("a positive number")},
}
"""Rotary type -> the settings that decide its frequencies, beside the base and the rotary part of a head."""


class Turn(NamedTuple):
    """The rotary embedding of sequences of one length.

    Attributes:
        inverse: [rotary / 2], radians a position by which each pair of coordinates turns.
        scaling: factor of the rotated coordinates of queries and keys.
    """

    inverse: Frequencies
    scaling: float


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding of a model, as its configuration asks for it.

    Attributes:
        kind: the rotary type, one of `SETTINGS`.
        theta: the rotary base.
        size: number of coordinates of a head that turn.
        head: number of all its coordinates.
        context: ``max_position_embeddings``.
        settings: the other settings, such as ``factor``.
        part: rotary fraction of a head, where the configuration gives one.
    """

    kind: str
    theta: float
    size: int
    head: int
    context: int
    settings: Mapping[str, Any]
    part: float | None = None

    def at(self, length: int, dtype: Float = np.float64) -> Turn:
        """Return the frequencies of sequences of ``length`` tokens.

        Args:
            length: tokens.
            dtype: of the arithmetic; transformers' is float32.
        """
        settings = self.settings
        if self.kind == "default":
            return Turn(1 / self._powers(self.theta, dtype), 1.0)
        if self.kind == "linear":
            return Turn(1 / self._powers(self.theta, dtype) / dtype(settings["factor"]), 1.0)
        if self.kind == "proportional":
            return self._proportional(dtype)
        if self.kind == "dynamic":
            factor, longest = settings["factor"], max(length, self.context)
            stretch = factor * longest / self.context - (factor - 1)
            return Turn(1 / self._powers(self.theta * stretch ** (self.size / (self.size - 2)), dtype), 1.0)
        if self.kind == "yarn":
            return self._yarn(dtype)
        if self.kind == "longrope":
            return self._longrope(length, dtype)
        return self._llama3(dtype)

    @property
    def original(self) -> float:
        """The context before scaling: by default ``max_position_embeddings``."""
        return self.settings.get(ORIGINAL, self.context)  # type: ignore[no-any-return]

    def _ratio(self) -> float:
        """The ``factor``, by default the context over the context before scaling."""
        factor: float | None = self.settings.get("factor")
        return self.context / self.original if factor is None else factor

    def last_lengths(self) -> tuple[int, ...]:
        """Return the lengths beyond which the frequencies change."""
        if self.kind == "dynamic":
            return (self.context,)
        return (math.floor(self.original),) if self.kind == "longrope" else ()

    def _powers(self, theta: float, dtype: Float, over: int | None = None) -> Frequencies:
        coordinates: Frequencies = np.arange(0, self.size, 2, dtype=dtype)
        return dtype(theta) ** (coordinates / dtype(over or self.size))

    def _proportional(self, dtype: Float) -> Turn:
        angles = int((1.0 if self.part is None else self.part) * self.head // 2)
        inverse = np.zeros(self.head // 2, dtype=dtype)
        inverse[:angles] = (1 / self._powers(self.theta, dtype, self.head))[:angles]
        return Turn(inverse / dtype(self.settings.get("factor", 1.0)), 1.0)

    def _yarn(self, dtype: Float) -> Turn:
        settings, original, factor = self.settings, self.original, self._ratio()

        def magnitude(scale: float, slope: float = 1) -> float:
            return 1.0 if scale <= 1 else 0.1 * slope * math.log(scale) + 1.0

        scaling, slopes = settings.get("attention_factor"), (settings.get("mscale"), settings.get("mscale_all_dim"))
        if scaling is None and all(slopes):
            scaling = magnitude(factor, settings["mscale"]) / magnitude(factor, settings["mscale_all_dim"])
        elif scaling is None:
            scaling = magnitude(factor)

        def coordinate(rotations: float) -> float:
            turns = math.log(original / (rotations * 2 * math.pi))
            return self.size * turns / (2 * math.log(self.theta))

        low, high = coordinate(settings.get("beta_fast") or 32), coordinate(settings.get("beta_slow") or 1)
        if settings.get("truncate", True):
            low, high = float(math.floor(low)), float(math.ceil(high))
        low, high = max(low, 0), min(high, self.size - 1)
        if low == high:
            high += 0.001  # as transformers
        pairs: Frequencies = np.arange(self.size // 2, dtype=dtype)
        ramp = np.clip((pairs - dtype(low)) / dtype(high - low), 0, 1)
        powers, kept = self._powers(self.theta, dtype), 1 - ramp
        return Turn(1 / (dtype(factor) * powers) * (1 - kept) + 1 / powers * kept, float(scaling))

    def _longrope(self, length: int, dtype: Float) -> Turn:
        settings, original, factor = self.settings, self.original, self._ratio()
        scaling = settings.get("attention_factor")
        if scaling is None:
            scaling = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        stretch: Frequencies = np.array(settings["long_factor" if length > original else "short_factor"], dtype=dtype)
        return Turn(1 / (stretch * self._powers(self.theta, dtype)), float(scaling))

    def _llama3(self, dtype: Float) -> Turn:
        original = self.original
        factor, slow, fast = (self.settings[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
        inverse = 1 / self._powers(self.theta, dtype)
        wavelength = 2 * math.pi / inverse
        outer = np.where(wavelength > original / slow, inverse / factor, inverse)
        with np.errstate(divide="ignore", invalid="ignore"):  # equal factors leave nothing between them
            kept = np.divide(original / wavelength - slow, fast - slow)
            mixed = (1 - kept) * inverse / factor + kept * inverse
        between = (wavelength >= original / fast) & (wavelength <= original / slow)
        return Turn(np.where(between, mixed, outer).astype(dtype), 1.0)

    def check(self, where: str) -> None:
        """Check that transformers can compute the embedding.

        Raises:
            GrowthError: an unknown type, a missing or impossible setting, or a number of frequencies that does not fit
                the heads.
        """
        if not isinstance(self.kind, str) or self.kind not in SETTINGS:
            raise GrowthError(
                f"rope_type is {self.kind!r}, which transformers does not have",
                where=where,
                fix=f"set rope_type to one of {', '.join(SETTINGS)}",
            )
        for key, value in self.settings.items():
            if isinstance(value, dict):
                raise GrowthError(
                    f"the rotary settings hold an object, {key}",
                    where=where,
                    why="only models with several kinds of layers have rotary settings for each kind",
                    fix="move its settings one level up",
                )
        if self.kind == "default":
            return
        for key, setting in SETTINGS[self.kind].items():
            self._check_setting(key, setting, where)
        turning = self.head if self.part is None or self.kind == "proportional" else int(self.head * self.part)
        if turning != self.size:
            raise GrowthError(
                f"rope_type {self.kind} turns {turning} coordinates of a head, but the model turns {self.size}",
                where=where,
                why="transformers cannot run such a model",
                fix="leave partial_rotary_factor out" if self.size == self.head else "choose another rope_type",
            )
        if fault := self._fault():
            raise GrowthError(
                f"the frequencies of rope_type {self.kind} cannot be computed",
                where=where,
                why=fault,
                fix="check the rotary settings and max_position_embeddings",
            )

    def _check_setting(self, key: str, setting: _Setting, where: str) -> None:
        if key not in self.settings:
            if setting.needed:
                raise GrowthError(
                    f"rope_type {self.kind} needs {key}",
                    where=where,
                    why="transformers refuses a configuration without it",
                    fix=f"set {key} in the rotary settings",
                )
            return
        value, allowed = self.settings[key], setting.allowed
        if allowed == "anything" or (value is None and setting.null):
            return
        if allowed == "a list":
            sound = isinstance(value, list) and len(value) == self.size // 2
            sound = sound and all(is_number(each) and each > 0 for each in value)
        else:
            sound = is_number(value) and (value > 0 or allowed == "a number")
        if not sound:
            expected = f"a list of {self.size // 2} positive numbers" if allowed == "a list" else allowed
            raise GrowthError(
                f"{key} is {value!r}, but must be {expected}",
                where=f"the rotary settings of {where}",
                fix=f"correct {key}",
            )

    def _fault(self) -> str | None:
        """Return the reason for which the frequencies are no numbers, or None."""
        try:
            with np.errstate(all="ignore"):
                turns = [self.at(length) for length in lengths_to_compare(self, self, self.context)]
        except (ArithmeticError, ValueError) as error:
            return str(error)
        finite = all(np.isfinite(turn.inverse).all() and math.isfinite(turn.scaling) for turn in turns)
        return None if finite else "they are not finite"


def rotary_of(config: Config, *, size: int, head: int, context: int) -> Rotary:
    """Return the rotary embedding of a configuration in one spelling.

    Args:
        config: see `phigrow.models.config.normalised`.
        size: coordinates of a head that turn.
        head: all its coordinates.
        context: ``max_position_embeddings``, or the family's default.
    """
    return Rotary(
        kind=config["rope_type"],
        theta=config["rope_theta"],
        size=size,
        head=head,
        context=context,
        settings=config["rope_settings"],
        part=config.get("partial_rotary_factor"),
    )


def lengths_to_compare(old: Rotary, new: Rotary, context: int) -> tuple[int, ...]:
    """Return the lengths that decide whether two embeddings agree at every length up to a context.

    Between two of them both are constant, or both follow one formula with two constants (``dynamic``), and two lengths
    tell two such formulas apart.
    """
    edges = {edge for rotary in (old, new) for edge in rotary.last_lengths()}
    around = {length for edge in edges for length in (edge, edge + 1) if 1 <= length <= context}
    return tuple(sorted({1, context} | around))


class RotaryDifference(NamedTuple):
    """The largest difference of two rotary embeddings.

    Attributes:
        length: length of the sequences at which it occurs.
        inverse: largest relative difference of the inverse frequencies.
        scaling: relative difference of the attention scalings.
    """

    length: int
    inverse: float
    scaling: float


def compare(old: Rotary, new: Rotary, context: int) -> RotaryDifference | None:
    """Compare two rotary embeddings by value, at every length up to a context; None if they are equal.

    A rotary part that grows by a whole factor m is compared with every m-th pair of the larger one.

    Raises:
        ValueError: the rotary part grows by another factor, so that no pair of one belongs to a pair of the other.
    """
    if not comparable(old, new):
        raise ValueError(f"{old.size} rotary coordinates are not compared with {new.size}")
    if not old.size:
        return None  # nothing turns that could turn in another way
    step = new.size // old.size
    worst: RotaryDifference | None = None
    for length in lengths_to_compare(old, new, context):
        (one, scale), (two, other) = old.at(length), new.at(length)
        apart = _relative(one, two[::step]), _relative(np.array([scale]), np.array([other]))
        if max(apart) > EQUAL and (worst is None or max(apart) > max(worst.inverse, worst.scaling)):
            worst = RotaryDifference(length, *apart)
    return worst


def comparable(old: Rotary, new: Rotary) -> bool:
    """Return True if the rotary part keeps its size or grows by a whole factor."""
    return old.size == 0 or new.size % old.size == 0


def _relative(one: Frequencies, two: Frequencies) -> float:
    largest = np.maximum(np.abs(one), np.abs(two))
    return float(np.max(np.abs(one - two) / np.where(largest == 0, 1, largest), initial=0.0))
