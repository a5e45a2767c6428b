"""Ways to start a model, each in a few words, for readers of a report."""

from __future__ import annotations

from phigrow.measure.estimates import Arm

STARTS = {
    "aki": "copies of neurons; new ones come from the next layer (bert2BERT's AKI)",
    "fpi": "random copies of neurons, each read with a share of the weight (bert2BERT's FPI)",
    "gesmundo": "the source, plus new units whose outputs have zero weight",
    "hypercloning": "whole repeats of the source side by side (HyperCloning)",
    "isometric": "the source's function, with its residual stream mapped by a random isometry",
    "lemon": "the source's function, with copies read in uneven shares (LEMON)",
    "ligo": "linear maps of the source's weights, learned before growing (LiGO)",
    "lossless": "the source's function at any size, plus new units whose outputs have zero weight at first",
    "net2net": "random copies of units, their weights shared among the copies (Net2Net)",
    "shrink_perturb": "the source's weights scaled down, plus new random weights",
    "sparkling": "copies of the source that keep the size of activations (SPARKLING)",
    "staged": "two copies of the source side by side (Staged Training)",
    "tile": "the source's weights repeated until every matrix is full (tiling)",
    "wr": "the source's weights in one block, new random weights around it (weight reuse)",
}
"""Method -> its start."""


def start_in_words(arm: Arm) -> str:
    """Describe how the runs of an arm began, from their records."""
    run = arm.runs[0]
    growth = run.meta.get("growth")
    if isinstance(growth, dict) and growth.get("method"):
        method = str(growth["method"])
        if growth.get("stages"):
            return f"trained in stages, grown by {method.replace('+', ', ')}"
        return STARTS.get(method, f"grown by {method}")
    config = run.meta.get("config")
    init = config.get("init", "scratch") if isinstance(config, dict) else "scratch"
    return "random weights" if init == "scratch" else "the weights of a trained model"
