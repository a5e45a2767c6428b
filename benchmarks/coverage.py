"""How often the meter's 95 % intervals hold the true speedup, in simulated experiments whose speedup is known.

`studies` simulates whole studies and reads them as `phigrow report` does: decayed ends at 1, 2, 5, 10 and 20 tokens a
parameter for scratch and for an arm that is 1.0, 1.3 or 2.0 times as fast, from one or two sources, with three or five
seeds. Losses have noise of seeds (shared by both arms), of runs, of single ends and of sources, and are measured on
documents that suit one arm better than the other. Other shapes of the curves, and arms with a head start, are there
too. `curves` simulates studies of one budget, whose costs are read off noisy curves, and the other lines start from
costs with three distributions. Beside phigrow's interval of these stand the plain percentile and BCa bootstraps.

Run: python benchmarks/coverage.py --out benchmarks/results/coverage
Writes OUT.json and OUT.md; about ten minutes on one core.
"""

import argparse
import json
import platform
import warnings
from pathlib import Path

import numpy as np
import scipy
from scipy.stats import bootstrap

from phigrow.measure.cost_of_ends import errors_of_ratio
from phigrow.measure.crossing import Descent
from phigrow.measure.ends import Ends, cross
from phigrow.measure.errors_of_means import interval_of
from phigrow.measure.intervals import speedup_intervals

TRUE = 1.55
SPREAD = 0.10
"""Standard deviation, relative to its mean, of the share of the baseline's cost that the arm needs in a seed."""

HARDNESS = 0.10
"""Of the log of the cost that both arms of a seed share."""

LAWS = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "heavy tails (t, 5 degrees)": lambda rng, shape: rng.standard_t(5, size=shape) / np.sqrt(5 / 3),
    "uniform": lambda rng, shape: rng.uniform(-1, 1, size=shape) * np.sqrt(3),
}
BATCH = 50


def simulated_costs(rng, law, seeds, experiments):
    """Costs of the arm and of the baseline, (experiments, seeds) each."""
    shared = np.exp(HARDNESS * rng.normal(size=(experiments, seeds)))
    return shared * share(rng, law, (experiments, seeds)) / TRUE, shared


def share(rng, law, shape=()):
    """Of mean 1; what would be no cost at all, eight standard deviations below, is cut off."""
    return np.maximum(1 + SPREAD * LAWS[law](rng, shape), 0.2)


def simulated_curves(rng, seeds, experiments, noise=0.003):
    """Costs as the meter reads them off noisy curves: 61 evaluations, a power law in tokens, the arm TRUE as fast."""
    tokens = np.linspace(0, 1, 61)
    arm, base = np.empty((experiments, seeds)), np.empty((experiments, seeds))
    for place in np.ndindex(arm.shape):
        hard, own = np.exp(HARDNESS * rng.normal()), 1 / share(rng, "normal")
        clean = [2.5 + 1.2 * (rate * tokens + 0.02) ** -0.3 for rate in (1 / hard, TRUE * own / hard)]
        theirs, mine = (losses + noise * rng.normal(size=tokens.size) for losses in clean)
        fit = Descent.of(tokens, theirs)
        target = max(theirs[-1], fit.levels[-1])
        arm[place] = Descent.of(tokens, mine).crossing(tokens, target).cost
        base[place] = fit.crossing(tokens, target).cost
    return arm, base


BUDGETS = np.array([1.0, 2.0, 5.0, 10.0, 20.0])
"""Tokens a parameter of the decayed ends."""

SHAPES = {
    "scaling law": lambda tokens: 2.3 + 1.1 * tokens**-0.35,
    "slow start": lambda tokens: 2.3 + 1.1 * tokens**-0.35 + 0.3 * np.exp(-tokens / 0.8),
}
"""Losses of scratch without noise: 2.69 at 20 tokens a parameter, as in tier S of the studies."""

ARMS = {
    "1.0x": (1.0, 0.0),
    "1.3x": (1.3, 0.0),
    "2.0x": (2.0, 0.0),
    "head start of 5 tokens a parameter": (1.0, 5.0),
}
"""Arm -> factor and head start: after t tokens a parameter it has the loss of scratch after factor * t + head start."""

NOISE = {"seed": 0.003, "run": 0.003, "end": 0.003, "source": 0.003, "document": 0.02}
"""Standard deviations in nats per token. A seed's is shared by both arms; a document's is between the arms."""

GROUPS, BLOCKS, DOCUMENT = 100, 2000, 30
"""Groups of held-out blocks, blocks, and the mean length of a document in blocks."""


def simulated_study(rng, shape, arm, sources, seeds, noise):
    """Decayed ends of the arm and of scratch, and the true speedup at the last budget."""
    factor, head = ARMS[arm]
    law = SHAPES[shape]
    true = factor * BUDGETS[-1] / (BUDGETS[-1] - head)
    by_seed = noise["seed"] * rng.normal(size=seeds)
    documents = np.cumsum(rng.random(BLOCKS) < 1 / DOCUMENT)
    ends = []
    for clean, count in ((law(factor * BUDGETS + head), sources), (law(BUDGETS), None)):
        keys = tuple((source, seed) for source in (range(count) if count else [None]) for seed in range(seeds))
        by_source = noise["source"] * rng.normal(size=count or 1) * (count is not None)
        losses = clean + noise["end"] * rng.normal(size=(len(keys), len(BUDGETS)))
        losses += noise["run"] * rng.normal(size=(len(keys), 1))
        losses += np.array([by_source[source or 0] + by_seed[seed] for source, seed in keys])[:, None]
        by_document = noise["document"] * rng.normal(size=documents[-1] + 1)
        text = by_document[documents].reshape(GROUPS, -1).mean(1) + 0.005 * rng.normal(size=GROUPS)
        groups = losses.reshape(-1, 1) + text
        places = np.divmod(np.arange(groups.shape[0]), len(BUDGETS))
        blocks = np.full(GROUPS, BLOCKS / GROUPS)
        ends.append(Ends(keys, *places, np.tile(BUDGETS, len(keys)), groups.mean(1), groups, blocks))
    return (*ends, true)


def read_study(arm, base):
    """The speedup in tokens and its interval as the report reads them; None for a bound."""
    budget = float(BUDGETS[-1])
    crossing = cross(arm, base, float(np.log(budget)))
    if crossing.where != "inside":
        return None
    cost = float(np.exp(crossing.log_tokens))
    costs = dict.fromkeys(arm.keys, cost)
    errors = errors_of_ratio(costs, dict.fromkeys((seed for _, seed in arm.keys), budget), costs, crossing.effects, arm)
    return budget / cost, *interval_of(float(np.log(budget / cost)), errors)


def covered_studies(rng, shape, arm, sources, seeds, studies, noise=NOISE):
    """One row of the table of studies."""
    found, held, bounds = [], 0, 0
    for _ in range(studies):
        mine, base, true = simulated_study(rng, shape, arm, sources, seeds, noise)
        read = read_study(mine, base)
        if read is None:
            bounds += 1
            continue
        found.append(read)
        held += read[1] <= true <= read[2]
    speedups, lows, highs = np.array(found).T
    return {
        "shape": shape,
        "arm": arm,
        "sources": sources,
        "seeds": seeds,
        "studies": studies,
        "bounds": bounds,
        "covered": held / len(found),
        "true": true,
        "speedup, median": float(np.median(speedups)),
        "width": float(np.median(np.log(highs / lows))),
    }


def scipy_interval(costs, against, method):
    """The plain bootstrap of the same ratio."""
    found = bootstrap(
        (costs, against), lambda c, b, axis=-1: c.mean(axis) / b.mean(axis), paired=True, vectorized=True, axis=-1,
        n_resamples=1999, method=method, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return 1 / found.high, 1 / found.low


def covered(costs, against, method):
    """The share of experiments whose interval holds TRUE, and the median width of log(speedup)."""
    lows, highs = [], []
    for at in range(0, len(costs), BATCH):
        rows = slice(at, at + BATCH)
        if method == "phigrow":
            low, high = np.array(speedup_intervals(costs[rows], against[rows], resamples=1999)).T
        else:
            low, high = scipy_interval(costs[rows], against[rows], method)
        lows.append(low)
        highs.append(high)
    low, high = np.concatenate(lows), np.concatenate(highs)
    return float(np.mean((low <= TRUE) & (high >= TRUE))), float(np.median(np.log(high / low)))


STUDIES = [
    *((shape, arm, sources, seeds, {}) for sources, seeds in ((2, 3), (1, 3), (1, 5))
      for shape, arm in [*(("scaling law", arm) for arm in ARMS), ("slow start", "1.3x")]),
    ("scaling law", "1.3x", 2, 3, {"source": 0.0}),
    ("scaling law", "1.3x", 2, 3, {"source": 0.006}),
    ("scaling law", "1.3x", 2, 3, {"document": 0.0}),
    ("scaling law", "1.3x", 2, 3, {"seed": 0.0, "run": 0.0, "end": 0.006}),
    ("scaling law", "1.3x", 1, 3, {"document": 0.0}),
]  # fmt: skip
"""Shape, arm, sources, seeds and noise that differs from ``NOISE``. With one source there is no noise of sources."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file name without ending")
    parser.add_argument("--experiments", type=int, default=5_000, help="0: only the studies")
    parser.add_argument("--curve-experiments", type=int, default=2_000)
    parser.add_argument("--studies", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="The BCa confidence interval cannot be calculated")
    studies = []
    for number, (shape, arm, sources, seeds, other) in enumerate(STUDIES):
        noise = NOISE | ({"source": 0.0} if sources == 1 else {}) | other
        rng = np.random.default_rng([options.seed, number])
        row: dict = covered_studies(rng, shape, arm, sources, seeds, options.studies, noise) | {"noise": other}
        studies.append(row)
        print(row, flush=True)
    rows = []
    for seeds in (3, 5, 10) if options.experiments else ():
        for law in (*LAWS, "curves"):
            rng = np.random.default_rng([options.seed, seeds, len(law)])
            if law == "curves":
                costs, against = simulated_curves(rng, seeds, options.curve_experiments)
            else:
                costs, against = simulated_costs(rng, law, seeds, options.experiments)
            row = {"seeds": seeds, "law": law, "experiments": len(costs)}
            for method in ("phigrow", "percentile", "BCa"):
                row[method], row[f"{method} width"] = covered(costs, against, method)
            row["speedup, median"] = float(np.median(against.mean(1) / costs.mean(1)))
            rows.append(row)
            print(row, flush=True)
    versions = {"numpy": np.__version__, "scipy": scipy.__version__, "python": platform.python_version()}
    settings = {"true speedup": TRUE, "spread": SPREAD, "hardness": HARDNESS, "noise": NOISE, "seed": options.seed}
    content = {"settings": settings, "versions": versions, "studies": studies, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(as_markdown(studies, rows))


def as_markdown(studies, rows) -> str:
    lines = [
        "Share of simulated studies whose 95 % interval holds the true speedup in tokens, read off decayed ends. The",
        "noise of losses, in nats per token, is " + ", ".join(f"{key} {value:g}" for key, value in NOISE.items()) + ".",
        "In brackets the median width of the interval in log(speedup).",
        "",
        "| sources | seeds | curve of scratch | arm | other noise | studies | true speedup | median | covered |",
        "| --: | --: | :-- | :-- | :-- | --: | --: | --: | --: |",
    ]
    for row in studies:
        noise = ", ".join(f"{key} {value:g}" for key, value in row["noise"].items()) or "none"
        lines.append(
            f"| {row['sources']} | {row['seeds']} | {row['shape']} | {row['arm']} | {noise} | {row['studies']:,} | "
            f"{row['true']:.3f} | {row['speedup, median']:.3f} | {100 * row['covered']:.1f} % ({row['width']:.2f}) |"
        )
    if not rows:
        return "\n".join(lines) + "\n"
    lines += [
        "",
        f"Share of simulated experiments whose 95 % interval holds the true speedup ({TRUE}x). `curves` reads studies",
        "of one budget off noisy curves, the others start from costs.",
        "",
        "| seeds | law of a seed's speedup | experiments | phigrow | percentile bootstrap | BCa bootstrap |",
        "| --: | :-- | --: | --: | --: | --: |",
    ]
    for row in rows:
        cells = [f"{100 * row[m]:.1f} % ({row[f'{m} width']:.2f})" for m in ("phigrow", "percentile", "BCa")]
        lines.append(f"| {row['seeds']} | {row['law']} | {row['experiments']:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
