"""Numbers and results in words: amounts, speedups, savings, a verdict and findings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from phigrow.measure.estimates import (
    ACCOUNTINGS,
    EDGE_MARK,
    INTERVAL,
    SHARED_MARK,
    Accounting,
    Arm,
    BudgetPoint,
    Comparison,
    Estimate,
    FrontierSaving,
    covers_in_words,
    listed,
)
from phigrow.measure.intervals import Interval
from phigrow.records.schema import UNITS, Unit

SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, ""))
COUNTING = "Counting the source's training"
NAMES: dict[Unit, str] = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds"}


def amount(value: float, unit: Unit, like: float | None = None) -> str:
    """A cost with three figures, without the name of its unit; ``like`` sets the scale of counted tokens.

    >>> amount(590_000, "tokens", like=2_460_000), amount(2.5e15, "flops"), amount(812, "seconds")
    ('0.59M', '2.5e15', '812')
    """
    if not math.isfinite(value):
        return "unknown"
    if unit == "tokens":
        size = abs(like or value)
        scale, letter = next((s for s in SCALES if float(f"{size / s[0]:.3g}") >= 1), SCALES[-1])
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
    """A saving in whole percent, with one decimal below 1 % and above 99 %.

    >>> percent(0.35), percent(-0.006), percent(-1e-9)
    ('35 %', '-0.6 %', '0.0 %')
    """
    if math.isnan(saving):
        return "unknown"
    value = 100 * saving
    digits = 1 if 0 < abs(value) < 1 or 99 < value < 100 else 0
    return f"{round(value, digits) + 0.0:.{digits}f} %"  # plus 0.0, because -0.0 would print a sign


def speedup_text(estimate: Estimate) -> str:
    """The speedup with its interval; ``< 0.90x`` if the arm is censored, ``> 2.00x`` if its cost is an upper bound."""
    return _with_interval(times(estimate.speedup), estimate, estimate.speedup_interval, times, "x")


def saving_text(estimate: Estimate) -> str:
    """The saving with its interval; ``< 12 %`` if the arm is censored, ``> 50 %`` if its cost is an upper bound."""
    return _with_interval(percent(estimate.saving), estimate, estimate.saving_interval, percent, " %")


def cost_text(estimate: Estimate) -> str:
    """The cost at the target; ``> 2.46M`` if the arm is censored, ``< 0.3M`` if the cost is an upper bound."""
    if not math.isfinite(estimate.cost):
        return "unknown"
    bound = "> " if estimate.censored else "< " if estimate.upper_bound else ""
    mark = f" {SHARED_MARK}" if estimate.shared_machine else ""
    return bound + amount(estimate.cost, estimate.unit, like=estimate.baseline_cost) + mark


def verdict(comparison: Comparison) -> str:
    """Return the outcome in words: the best arm, its saving in tokens, without and with the source's training.

    >>> verdict(compare(load_runs("runs")))  # doctest: +SKIP
    "wr reached scratch's final loss with 76 % fewer tokens (4.17x speedup)."
    """
    base = comparison.baseline.name
    if not comparison.arms:
        return "There is nothing to compare."
    if met := source_sentences(comparison):
        return " ".join(met)
    best = best_first(comparison)[0]
    sunk, charged = best.estimate("tokens", "sunk"), best.estimate("tokens", "charged")
    if sunk.censored:
        return f"No arm reached {base}'s final loss of {comparison.target():.2f}."
    if sunk.cost == 0:
        start = f"{best.label} had reached {base}'s final loss before its first update."
    else:
        start = f"{best.label} reached {base}'s final loss with {_fewer(sunk)} ({_speedup_in_words(sunk)})."
    start += _unfinished(best)
    if _alike(sunk, charged):
        return start
    if math.isnan(charged.cost):
        return f"{start} The cost of the source's training is unknown."
    return f"{start} {COUNTING}, it needed {_fewer(charged)}."


def source_sentences(comparison: Comparison) -> list[str]:
    """Return sentences about sources that are at or below the target already; empty if none is."""
    target = comparison.target()
    met = [arm for arm in comparison.arms if is_grown(arm) and arm.source_meets(comparison.target(arm))]
    if not met:
        return []
    base = comparison.baseline.name
    losses = sorted({f"{arm.source_loss:.3f}" for arm in met if arm.source_loss is not None})
    whose = "every grown arm" if len(met) == sum(map(is_grown, comparison.arms)) > 1 else listed([a.name for a in met])
    sentences = [
        f"The source of {whose} is already below {base}'s final loss ({' and '.join(losses)} against {target:.3f}).",
        "Speedups at this target therefore say nothing about growth.",
    ]
    continued = [
        arm for arm in comparison.arms if not (is_grown(arm) or is_taught(arm)) and arm.source_loss is not None
    ]
    continued = continued or [arm for arm in comparison.arms if is_continued(arm)]
    if continued:
        best = min(continued, key=lambda arm: arm.final_loss)
        sentences.append(
            f"The arm to beat is {best.label}, the source trained further: it ends at {best.final_loss:.3f}."
        )
        lower = [arm.label for arm in met if arm.final_loss < best.final_loss]
        sentences.append(
            f"Of these arms, {listed(lower)} {'ends' if len(lower) == 1 else 'end'} below it."
            if lower
            else "No grown arm ends below it."
        )
    else:
        sentences.append("The arm to beat is the source trained further, and these folders have no such arm.")
    sentences.append(f"Train {base} to a larger budget at which it ends below the source.")
    return sentences


def frontier_text(saving: FrontierSaving | None) -> str:
    """The saving against the flat frontier, with its interval or its bound."""
    if saving is None or not math.isfinite(saving.saving):
        return "unknown"
    text = percent(saving.saving)
    if saving.bound:
        return f"{'>' if saving.bound == 'at least' else '<'} {text}"
    if saving.interval is None:
        return text
    return f"{text} [{', '.join(percent(end).removesuffix(' %') for end in saving.interval)}]"


def frontier_sentences(comparison: Comparison) -> list[str]:
    """Return sentences on the flat frontier: the savings of the best arm, or the lack of flat models."""
    if not comparison.arms:
        return []
    if not comparison.flat:
        return ["These folders have no flat models of other sizes, so there is no flat frontier to compare with."]
    known = [arm for arm in comparison.arms if arm.frontier and math.isfinite(arm.frontier[1].saving)]
    if not known:
        return []
    best = max(known, key=lambda arm: arm.frontier[1].saving)
    sunk, charged = best.frontier
    if charged.saving <= 0:
        return [
            f"{COUNTING}, no arm saves FLOPs against the best flat model of any size.",
            f"{best.label} comes closest, with a saving of {frontier_text(charged)}, and of {frontier_text(sunk)} "
            "without the source's training.",
        ]
    return [
        f"Against the best flat model of any size, {best.label} saves the most FLOPs: {frontier_text(charged)} with "
        f"the source's training counted, and {frontier_text(sunk)} without.",
    ]


def is_grown(arm: Arm) -> bool:
    """True if the arm was grown from a smaller model."""
    return any(run.meta.get("growth") for run in arm.runs)


def is_taught(arm: Arm) -> bool:
    """True if a teacher's predictions were part of the loss. Such an arm may name a source and start from scratch."""
    return any(run.meta.get("teacher") for run in arm.runs)


def is_continued(arm: Arm) -> bool:
    """True if the arm was not grown but started from a trained model."""
    config = arm.runs[0].meta.get("config")
    init = config.get("init", "scratch") if isinstance(config, dict) else "scratch"
    return not is_grown(arm) and init != "scratch"


def mark_sentences(comparison: Comparison) -> list[str]:
    """Return sentences that explain the marks of arms and of seconds; empty where there are none."""
    sentences = []
    for edge, word in (("high", "largest"), ("low", "smallest")):
        if names := [arm.name for arm in (comparison.baseline, *comparison.arms) if arm.lr_edge == edge]:
            sentences.append(
                f"{EDGE_MARK} {listed(names)}: the best learning rate is the {word} tried, so a better one may exist."
            )
    if any(estimate.shared_machine for arm in comparison.arms for estimate in arm.estimates):
        sentences.append(f"{SHARED_MARK} Other runs shared the machine, so these seconds have no interval.")
    return sentences


def interval_sentence(comparison: Comparison, *, at_budgets: bool = False) -> str:
    """Return a sentence with the sources of error that the intervals cover, or with the reason why there are none.

    Args:
        comparison: from ``compare``.
        at_budgets: describe the intervals at all budgets, not only those at the compared budget.
    """
    names: dict[str, dict[str, None]] = {}
    for arm in comparison.arms:
        compared: Sequence[Arm | BudgetPoint] = arm.budgets if at_budgets else (arm,)
        for results in compared:
            if any(estimate.speedup_interval is not None for estimate in results.estimates):
                names.setdefault(covers_in_words(results.covered), {})[arm.name] = None
    if not names:
        notes = dict.fromkeys(arm.interval_note for arm in comparison.arms)
        reasons = [note.removesuffix(": no interval") for note in notes if note.endswith(": no interval")]
        why = f" ({'; '.join(reasons)})" if reasons else ""
        return f"There are no intervals{why}. An interval needs three seeds that reach the target."
    if len(names) == 1:
        return f"{INTERVAL}s over {next(iter(names))}."
    return f"{INTERVAL}s. " + " ".join(f"{', '.join(arms)}: over {covers}." for covers, arms in names.items())


def best_first(comparison: Comparison) -> list[Arm]:
    """Return the arms by falling speedup in tokens, sunk; those that did not reach the target come last."""

    def rank(arm: Arm) -> tuple[bool, float, float]:
        speedup = arm.estimate("tokens", "sunk").speedup
        return bool(arm.censored_seeds), -speedup if math.isfinite(speedup) or speedup > 0 else 0.0, arm.final_loss

    return sorted(comparison.arms, key=rank)


def _fewer(estimate: Estimate) -> str:
    """The saving in words. If the cost is an upper bound, the saving is a lower bound."""
    size = percent(abs(estimate.saving))
    if size in ("0 %", "0.0 %"):
        return f"{'at most ' if estimate.upper_bound else ''}an equal number of tokens"
    if estimate.saving < 0:
        return f"{'at most ' if estimate.upper_bound else ''}{size} more tokens"
    return f"{'at least ' if estimate.upper_bound else ''}{size} fewer tokens"


def _speedup_in_words(estimate: Estimate) -> str:
    bound = "over " if estimate.upper_bound else ""
    text = f"{bound}{times(estimate.speedup)} speedup"
    if estimate.speedup_interval is None:
        return text
    low, high = estimate.speedup_interval
    return f"{text}, interval {times(low)} to {times(high)}"


def findings(comparison: Comparison) -> list[str]:
    """Return one paragraph for each arm, best first, with the unit and the accounting of every number.

    An arm without a source has the same numbers in both accountings. Only sunk is then given.

    >>> print(findings(compare(load_runs("runs")))[0])  # doctest: +SKIP
    wr reached scratch's final held-out loss (3.87) after 0.59M of 2.46M tokens. Tokens: 4.17x speedup, 76 % saving.
    Counting the source's training: 1.90x speedup, 47 % saving. ...
    """
    return [" ".join(lines) for lines in grouped_findings(comparison)]


def finding_lines(comparison: Comparison) -> list[str]:
    """Return the whole text of a comparison for a terminal: verdict, findings and notes, as in ``report.md``.

    Every unit of a finding is on an indented line of its own. Every note begins with ``note: ``.
    """
    lines = [verdict(comparison)]
    for outcome, *others in grouped_findings(comparison):
        lines += [outcome, *(f"    {each}" for each in others)]
    return [*lines, *(f"note: {note}" for note in all_notes(comparison))]


def all_notes(comparison: Comparison) -> list[str]:
    """Return the notes on the comparison and on every arm, then the explanations of bounds, curves and signs.

    The terminal, ``report.md`` and the page print this list, so that none of them has less than another.
    """
    notes = [*comparison.notes, *(note for arm in (comparison.baseline, *comparison.arms) for note in arm.notes)]
    return list(dict.fromkeys([*notes, *remarks(comparison)]))


def remarks(comparison: Comparison) -> list[str]:
    """Return sentences on the curves from which costs were read, and on the signs of the costs."""
    sentences = []
    on_curves = [arm for arm in comparison.arms if arm.basis == "curve"]
    if middle := [arm.name for arm in on_curves if not any(run.has_unknown_schedule for run in arm.runs)]:
        sentences.append(f"{names_of(middle, comparison)}: costs are read before the learning rate has decayed.")
    if between := [arm.name for arm in comparison.arms if arm.basis == "ends"]:
        sentences.append(f"{names_of(between, comparison)}: costs are read off a curve fitted through decayed ends.")
    if any(arm.censored_seeds for arm in comparison.arms):
        sentences.append("< and > mark bounds, because the arm did not reach the target.")
    if any(estimate.upper_bound for arm in comparison.arms for estimate in arm.estimates):
        sentences.append("An arm that was already below the target at its smallest budget has bounds too.")
    return sentences + mark_sentences(comparison)


def mid_schedule_sentences(comparison: Comparison) -> list[str]:
    """Return sentences on the speedups that were read before a learning rate had decayed; empty if none was."""
    base = comparison.baseline.name
    middle = [arm.name for arm in comparison.arms if any(point.basis == "curve" for point in arm.budgets[:-1])]
    if not middle:
        return []
    if base in comparison.ends:  # the baseline has several budgets, so its learning rate has decayed at each
        return [
            f"Runs of {listed(middle)} have one budget, so their learning rate had not decayed where they reached the "
            f"decayed ends of {base}.",
            "Their speedups are too low.",
        ]
    return [
        "Speedups at every budget but the last were measured before the learning rate had decayed.",
        "This flatters the arm that starts faster.",
        "Only runs that decayed at several budgets show how a speedup changes with the budget.",
    ]


def names_of(names: list[str], comparison: Comparison) -> str:
    """Return names of arms in words: ``All arms`` if there are no others."""
    return "All arms" if len(names) == len(comparison.arms) > 1 else ", ".join(names)


def recorded_units(comparison: Comparison) -> list[Unit]:
    """Return the units that every compared run recorded."""
    runs = [run for arm in (comparison.baseline, *comparison.arms) for run in arm.runs]
    return [unit for unit in UNITS if all(run.has_unit(unit) for run in runs)]


def grouped_findings(comparison: Comparison) -> list[list[str]]:
    """Return the findings of every arm as lines, best first: the outcome, a line for each unit, and remarks."""
    return [_lines(comparison, arm) for arm in best_first(comparison)]


def _lines(comparison: Comparison, arm: Arm) -> list[str]:
    base = comparison.baseline.name
    lines = [f"{_outcome(comparison, arm)}{_unfinished(arm)}"]
    for unit in recorded_units(comparison):
        sunk, charged = arm.estimate(unit, "sunk"), arm.estimate(unit, "charged")
        line = f"{NAMES[unit][0].upper()}{NAMES[unit][1:]}: {_result(sunk)}."
        if not _alike(sunk, charged):
            line += f" {COUNTING}: {_result(charged)}."
        lines.append(line)
    sunk, charged = arm.estimate("tokens", "sunk"), arm.estimate("tokens", "charged")
    accountings = ACCOUNTINGS[:1] if _alike(sunk, charged) else ACCOUNTINGS
    lines += [text for accounting in accountings if (text := vanishing_text(arm, accounting))]
    word, theirs = ("last recorded", "final loss is") if arm.unfinished else ("final", "is")
    lines.append(f"Its {word} loss is {arm.final_loss:.2f}; {base}'s {theirs} {comparison.target(arm):.2f}.")
    if arm.settings:
        lines.append(f"Its {_difference(comparison, arm)}")
    if arm.surroundings:
        lines.append(f"Its {_surroundings(comparison, arm)}")
    if arm.frontier:
        sunk_frontier, charged_frontier = arm.frontier
        line = f"Saving against the flat frontier, in FLOPs: {frontier_text(sunk_frontier)}."
        if charged_frontier.cost != sunk_frontier.cost:
            line += f" {COUNTING}: {frontier_text(charged_frontier)}."
        lines.append(line)
    if arm.lr_edge:
        word = "largest" if arm.lr_edge == "high" else "smallest"
        lines.append(f"{EDGE_MARK} Its best learning rate is the {word} tried, so a better one may exist.")
    unread = [point for point in arm.budgets if arm.source_meets(point.target)]
    if unread and is_grown(arm):
        lines.append(
            f"Its source ({arm.source_loss:.3f}) is below {base}'s loss at {len(unread)} of {len(arm.budgets)} "
            "budgets. Speedups at those budgets say nothing about growth."
        )
    return [*lines, f"{arm.interval_note[0].upper()}{arm.interval_note[1:]}."]


def settings_sentences(comparison: Comparison) -> list[str]:
    """Return sentences for every arm whose settings or surroundings differ from the baseline's, best arm first."""
    sentences = []
    for arm in best_first(comparison):
        for differs, words in ((arm.settings, _difference), (arm.surroundings, _surroundings)):
            if differs:
                sentences.append(f"{arm.name}: {words(comparison, arm)}")
    return sentences


def _surroundings(comparison: Comparison, arm: Arm) -> str:
    return f"runs were made otherwise than {comparison.baseline.name}'s: {', '.join(arm.surroundings)}."


def _difference(comparison: Comparison, arm: Arm) -> str:
    return f"settings differ from {comparison.baseline.name}'s: {', '.join(arm.settings)}."


def _outcome(comparison: Comparison, arm: Arm) -> str:
    """Return a sentence with the cost at which an arm met the target."""
    base, target = comparison.baseline.name, comparison.target(arm)
    sunk = arm.estimate("tokens", "sunk")
    goal = f"{base}'s final held-out loss ({target:.2f})"
    budget = amount(sunk.baseline_cost, "tokens")
    if arm.censored_seeds:
        many, missed = len(arm.seeds), len(arm.censored_seeds)
        seeds = "" if many == 1 else f" in any of {many} seeds" if missed == many else f" in {missed} of {many} seeds"
        spent = amount(max(float(run.evals["tokens"][-1]) for run in arm.runs), "tokens")
        return f"{arm.label} did not reach {goal}{seeds} within {spent} tokens (censored)."
    if sunk.upper_bound:
        spent = amount(sunk.cost, "tokens", like=sunk.baseline_cost)
        return f"{arm.label} was already below {goal} at its smallest budget, {spent} of {budget} tokens."
    if sunk.cost == 0:
        return f"{arm.label} had reached {goal} before its first update."
    return f"{arm.label} reached {goal} after {cost_text(sunk)} of {budget} tokens."


def _unfinished(arm: Arm) -> str:
    """Return a sentence on the runs of an arm that have not ended, with a space before it; empty if there are none."""
    runs = arm.unfinished
    if not runs:
        return ""
    reached = listed([f"step {int(run.evals['step'][-1])} of {run.budget}" for run in runs])
    if len(arm.runs) == 1:
        return f" Its run is unfinished, last evaluated at {reached}."
    verb = "is" if len(runs) == 1 else "are"
    return f" {len(runs)} of its {len(arm.runs)} runs {verb} unfinished, last evaluated at {reached}."


def _alike(sunk: Estimate, charged: Estimate) -> bool:
    """True if there is no source to charge, so that both accountings are the same."""
    return (sunk.cost, sunk.baseline_cost) == (charged.cost, charged.baseline_cost)


def vanishing_text(arm: Arm, accounting: Accounting, unit: Unit = "tokens") -> str:
    """Return a sentence about the budgets at which the interval of the saving lies above zero; empty without intervals.

    >>> vanishing_text(arm, "charged")  # doctest: +SKIP
    "Counting the source's training, growth saved no tokens at any budget."
    """
    vanishing = arm.vanishing(unit, accounting)
    prefix = f"{COUNTING}, the" if accounting == "charged" else "The"
    saving = f"{prefix} interval of the saving in {NAMES[unit]}"
    if vanishing.state == "met" and vanishing.budget is not None:
        return f"{saving} is no longer above zero from a budget of {amount(vanishing.budget, 'tokens')} tokens on."
    if vanishing.state == "never":
        largest = amount(arm.budgets[-1].budget, "tokens")
        if vanishing.above_from is None:
            return f"{saving} is above zero up to the largest budget, {largest} tokens."
        return f"{saving} is above zero only from a budget of {amount(vanishing.above_from, 'tokens')} tokens on."
    if vanishing.state == "always":
        if all(point.estimate(unit, accounting).saving <= 0 for point in arm.budgets):
            who = "growth" if is_grown(arm) else "this arm"
            start = f"{COUNTING}, {who}" if accounting == "charged" else who.capitalize()
            return f"{start} saved no {NAMES[unit]} at any budget."
        return f"{saving} is not above zero at any budget."
    return ""


def _result(estimate: Estimate) -> str:
    if estimate.unknown:
        return f"not compared, because {estimate.unknown}"
    if math.isnan(estimate.cost):
        return "unknown, because the cost was not recorded"
    if estimate.cost == 0:
        return f"target reached before training, {percent(estimate.saving)} saving"
    # The speedup of a censored arm is a bound; the first sentence about the arm makes clear that it is slower.
    slower = " (slower)" if estimate.speedup < 1 and not (estimate.censored or estimate.upper_bound) else ""
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
    if estimate.shared_machine:
        text = f"{text} {SHARED_MARK}"
    if estimate.censored or estimate.upper_bound:
        return f"{'<' if estimate.censored else '>'} {text}"
    if interval is None:
        return text
    return f"{text} [{', '.join(form(end).removesuffix(suffix) for end in interval)}]"
