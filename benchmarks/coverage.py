"""How often the meter's 95 % intervals hold the true speedup, in simulated experiments whose speedup is known.

Two simulations for 3, 5 and 10 paired seeds. Costs are drawn for every seed: one that a pair shares (seeds
differ in how hard they are), times the share of it that the arm needs, whose mean is 1 / speedup, from three laws.
`curves` draws whole loss curves with noise in every evaluation and runs them through the crossing as `phigrow report`
does. Beside
phigrow's interval stand the plain percentile and BCa bootstraps of the same data, which is why neither is used.

Run: python benchmarks/coverage.py --out benchmarks/results/coverage
Writes OUT.json and OUT.md; about a minute on one core.
"""

import argparse
import json
import platform
import warnings
from pathlib import Path

import numpy as np
import scipy
from scipy.stats import bootstrap

from phigrow.measure.crossing import Descent
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file name without ending")
    parser.add_argument("--experiments", type=int, default=10_000)
    parser.add_argument("--curve-experiments", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="The BCa confidence interval cannot be calculated")
    rows = []
    for seeds in (3, 5, 10):
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
    settings = {"true speedup": TRUE, "spread": SPREAD, "hardness": HARDNESS, "seed": options.seed}
    content = {"settings": settings, "versions": versions, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(as_markdown(rows))


def as_markdown(rows) -> str:
    lines = [
        f"Share of simulated experiments whose 95 % interval holds the true speedup ({TRUE}x); in brackets the median",
        "width of the interval in log(speedup). `curves` goes through the whole meter, the others start from costs.",
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
