"""Numbers and results in words: amounts with their unit, speedups, savings, one paragraph an arm."""

from __future__ import annotations

import math
from collections.abc import Callable

from phigrow.measure.estimates import ACCOUNTINGS, Accounting, Arm, Comparison, Estimate
from phigrow.measure.intervals import Interval
from phigrow.records.schema import UNITS, Unit

SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, ""))
NAMES: dict[Unit, str] = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds"}


def amount(value: float, unit: Unit, like: float | None = None) -> str:
    """A cost with three figures, without the name of its unit; ``like`` sets the scale of counted tokens.

    >>> amount(590_000, "tokens", like=2_460_000), amount(2.5e15, "flops"), amount(812, "seconds")
    ('0.59M', '2.5e15', '812')
    """
    if not math.isfinite(value):
        return "unknown"
    if unit == "tokens":
        scale, letter = next((s for s in SCALES if abs(like or value) >= s[0]), SCALES[-1])
        return f"{_three(value / scale)}{letter}"
    if unit == "flops":
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}" if value else "0"
    return f"{value:.0f}" if value >= 100 else _three(value)


def times(speedup: float) -> str:
    """A speedup, three figures: ``1.55x``, ``12.3x``; ``inf`` where nothing was spent."""
    if math.isnan(speedup):
        return "unknown"
    return "inf" if math.isinf(speedup) else f"{speedup:.{2 if speedup < 10 else 1 if speedup < 100 else 0}f}x"


def percent(saving: float) -> str:
    """A saving in whole percent, with one decimal where whole ones would read as nothing or as everything."""
    if math.isnan(saving):
        return "unknown"
    value = 100 * saving
    edge = 0 < abs(value) < 1 or 99 < value < 100
    return f"{value:.{1 if edge else 0}f} %"


def speedup_text(estimate: Estimate) -> str:
    """The speedup with its interval, ``< 0.90x`` where it is censored, ``> 2.00x`` where it is an upper bound."""
    return _with_interval(times(estimate.speedup), estimate, estimate.speedup_interval, times, "x")


def saving_text(estimate: Estimate) -> str:
    """The saving with its interval, ``< 12 %`` where it is censored, ``> 50 %`` where it is an upper bound."""
    return _with_interval(percent(estimate.saving), estimate, estimate.saving_interval, percent, " %")


def cost_text(estimate: Estimate) -> str:
    """The cost at the target, ``> 2.46M`` where it is censored, ``< 0.3M`` where it is an upper bound."""
    if not math.isfinite(estimate.cost):
        return "unknown"
    bound = "> " if estimate.censored else "< " if estimate.upper_bound else ""
    return bound + amount(estimate.cost, estimate.unit, like=estimate.baseline_cost)


def findings(comparison: Comparison) -> list[str]:
    """Say in one paragraph an arm what it saved, or that it never got there, always with unit and accounting.

    Where there is no source's training to charge, only the sunk account is said: the charged one is the same.

    >>> print(findings(compare(load_runs("runs")))[0])  # doctest: +SKIP
    wr reached scratch's final held-out loss (3.87) after 0.59M of 2.46M tokens: 4.17x speedup, 76 % saving (tokens,
    sunk); counting the source's training 1.90x speedup, 47 % saving (tokens, charged). ...
    """
    found = (_sentences(comparison, arm) for arm in comparison.arms)
    return [f"{head}: {'. '.join(others)}." for head, *others in found]


def finding_lines(comparison: Comparison) -> list[str]:
    """The findings for a terminal: every unit, and everything else, on an indented line of its own."""
    found = (_sentences(comparison, arm) for arm in comparison.arms)
    return [line for head, *others in found for line in (f"{head}:", *(f"    {each}." for each in others))]


def _sentences(comparison: Comparison, arm: Arm) -> list[str]:
    """What an arm did, then the sentences that say how well, without their full stops."""
    base, target = comparison.baseline.name, comparison.target(arm)
    sunk, charged = arm.estimate("tokens", "sunk"), arm.estimate("tokens", "charged")
    goal = f"{base}'s final held-out loss ({target:.2f})"
    budget = amount(sunk.baseline_cost, "tokens")
    if arm.censored_seeds:
        many, missed = len(arm.seeds), len(arm.censored_seeds)
        seeds = "" if many == 1 else f" in any of {many} seeds" if missed == many else f" in {missed} of {many} seeds"
        spent = amount(max(float(run.evals["tokens"][-1]) for run in arm.runs), "tokens")
        head = f"{arm.name} did not reach {goal}{seeds} within {spent} tokens (censored)"
    elif sunk.upper_bound:
        spent = amount(sunk.cost, "tokens", like=sunk.baseline_cost)
        head = f"{arm.name} was below {goal} at its smallest budget, {spent} of {budget} tokens"
    elif sunk.cost == 0:
        head = f"{arm.name} was at {goal} before its first update"
    else:
        head = f"{arm.name} reached {goal} after {cost_text(sunk)} of {budget} tokens"
    parts: list[str] = []
    for unit in UNITS:
        first, second = arm.estimate(unit, "sunk"), arm.estimate(unit, "charged")
        said = f"{_result(first)} ({NAMES[unit]}, sunk)"
        if not _alike(first, second):
            source = "counting the source's training " if unit == "tokens" else ""
            said += f"; {source}{_result(second)} ({NAMES[unit]}, charged)"
        parts.append(said[0].upper() + said[1:] if parts else said)
    accountings = ACCOUNTINGS[:1] if _alike(sunk, charged) else ACCOUNTINGS
    parts += [text for accounting in accountings if (text := vanishing_text(arm, accounting))]
    parts.append(f"It ended at {arm.final_loss:.2f} ({base}: {target:.2f})")
    if arm.settings:
        parts.append(f"It was trained with other settings: {', '.join(arm.settings)}")
    return [head, *parts, arm.interval_note[0].upper() + arm.interval_note[1:]]


def _alike(sunk: Estimate, charged: Estimate) -> bool:
    """Whether there was no source to charge, so that both accounts are one."""
    return (sunk.cost, sunk.baseline_cost) == (charged.cost, charged.baseline_cost)


def vanishing_text(arm: Arm, accounting: Accounting, unit: Unit = "tokens") -> str:
    """Where the interval of the saving meets zero, in words; empty where there are no intervals."""
    found = arm.vanishing(unit, accounting)
    what = f"The interval of the saving ({NAMES[unit]}, {accounting})"
    if found.state == "met" and found.budget is not None:
        return f"{what} meets zero at a budget of {amount(found.budget, 'tokens')} tokens"
    first, last = (amount(arm.budgets[place].budget, "tokens") for place in (0, -1)) if arm.budgets else ("", "")
    if found.state == "never":
        return f"{what} stays above zero up to the largest budget, {last} tokens"
    if found.state == "always":
        return f"{what} is above zero at no budget from {first} to {last} tokens"
    return ""


def _result(estimate: Estimate) -> str:
    if math.isnan(estimate.cost):
        return "unknown, since the source's cost was not recorded,"
    if estimate.cost == 0:
        return f"met before training, {percent(estimate.saving)} saving"
    # A censored arm's speedup is a bound; whether it is slower than the baseline is then already said.
    slower = ", slower" if estimate.speedup < 1 and not (estimate.censored or estimate.upper_bound) else ""
    return f"{speedup_text(estimate)} speedup, {saving_text(estimate)} saving{slower}"


def _three(value: float) -> str:
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _with_interval(
    text: str, estimate: Estimate, interval: Interval | None, form: Callable[[float], str], suffix: str
) -> str:
    if text == "unknown":
        return text
    if estimate.censored or estimate.upper_bound:
        return f"{'<' if estimate.censored else '>'} {text}"
    if interval is None:
        return text
    return f"{text} [{', '.join(form(end).removesuffix(suffix) for end in interval)}]"
