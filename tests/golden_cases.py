"""The fixed set of growths whose results are frozen in ``tests/golden``: configurations, weights and methods.

Values come from numpy's PCG64, whose output numpy promises to keep, so they are the same on every machine and version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from phigrow.models.families import all_families

FOLDER = Path(__file__).parent / "golden"
FAMILIES = sorted(all_families())
DTYPES = ("float32", "bfloat16")

SRC = {"kv": 2, "group": 1, "q": 8, "rotary": 4, "hidden": 16, "mlp": 20, "layer": 3, "vocab": 37}
UNEVEN = {"kv": 3, "group": 1, "q": 8, "rotary": 4, "hidden": 24, "mlp": 31, "layer": 4, "vocab": 37}
WHOLE = {"kv": 4, "group": 1, "q": 8, "rotary": 4, "hidden": 32, "mlp": 40, "layer": 4, "vocab": 37}
EVERYTHING = {"kv": 3, "group": 2, "q": 10, "rotary": 4, "hidden": 60, "mlp": 31, "layer": 5, "vocab": 41}

# (name, destination sizes, arguments of phigrow.plan): every method, every depth method, options and mixtures.
CASES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "wr": (UNEVEN, {"method": "wr"}),
    "wr-center": (EVERYTHING, {"method": "wr", "anchor": "center", "seed": 3}),
    "tile": (UNEVEN, {"method": "tile"}),
    "tile-center-rms": (EVERYTHING, {"method": "tile", "anchor": "center", "scale": "rms"}),
    "tile-preserve-noise": (WHOLE, {"method": "tile", "scale": "preserve", "noise": 0.1, "seed": 1}),
    "lossless": (UNEVEN, {"method": "lossless"}),
    "lossless-everything": (EVERYTHING, {"method": "lossless", "seed": 2}),
    "isometric": (UNEVEN, {"method": "isometric"}),
    "hypercloning": (WHOLE, {"method": "hypercloning"}),
    "hypercloning-quiet": (WHOLE, {"method": "hypercloning", "snr": "none"}),
    "lemon": (UNEVEN, {"method": "lemon"}),
    "gesmundo": (UNEVEN, {"method": "gesmundo"}),
    "fpi": (UNEVEN, {"method": "fpi"}),
    "aki": (UNEVEN, {"method": "aki"}),
    "ligo": (UNEVEN, {"method": "ligo"}),
    "ligo-tile": (UNEVEN, {"method": "ligo:start=tile"}),
    "staged": (WHOLE, {"method": "staged"}),
    "net2net": (UNEVEN, {"method": "net2net"}),
    "sparkling": (UNEVEN, {"method": "sparkling"}),
    "shrink_perturb": (UNEVEN, {"method": "shrink_perturb"}),
    "stack": (UNEVEN, {"method": "wr", "depth": "stack"}),
    "interpose-floor": (UNEVEN, {"method": "wr", "depth": "interpose", "rounding": "floor"}),
    "interpose-half-up": (UNEVEN, {"method": "wr", "depth": "interpose", "rounding": "half-up"}),
    "identity": (UNEVEN, {"method": "wr", "depth": "identity"}),
    "solar": (UNEVEN, {"method": "wr", "depth": "solar"}),
    "llama-pro": (UNEVEN, {"method": "wr", "depth": "llama-pro"}),
    "midas": (UNEVEN, {"method": "wr", "depth": "midas"}),
    "random": (UNEVEN, {"method": "wr", "depth": "random"}),
    "random-lossless": (EVERYTHING, {"method": "lossless", "depth": "random", "seed": 4}),
    "mixture": (UNEVEN, {"method": "lossless,mlp=tile:scale=preserve"}),
    "mixture-aki": (UNEVEN, {"method": "lemon,mlp=aki"}),
    "mixture-isometric": (UNEVEN, {"method": "isometric,mlp=tile:scale=preserve"}),
}
MULTIPLIED = {"isometric", "mixture-isometric"}
"""Cases with matrix products or decompositions, whose last bits depend on the processor: frozen to a tolerance."""


def configurations(family: str, dst: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Source and destination configuration of a family; sizes that its architecture fixes follow the others."""
    table = all_families()[family]
    settings = {"initializer_range": 0.02, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None}
    return tuple({**table.config_of(dict(sizes)), **settings} for sizes in (SRC, dst))  # type: ignore[return-value]


def source_values(family: str, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """float32 values of every tensor of a source, none of them 0 or 1 by chance."""
    shapes = all_families()[family].state_shapes(config)
    return {name: _drawn(f"{family}:{name}", shape) for name, shape in shapes.items()}


def moment_values(family: str, config: dict[str, Any], moment: str) -> dict[str, np.ndarray]:
    """float32 values of Adam's moments; second moments are positive."""
    shapes = all_families()[family].state_shapes(config)
    drawn = {name: _drawn(f"{family}:{moment}:{name}", shape) for name, shape in shapes.items()}
    return {name: np.square(values) for name, values in drawn.items()} if moment == "exp_avg_sq" else drawn


def _drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    # Whole numbers, because numpy promises to keep those of a bit generator but not its normal values.
    whole = np.random.PCG64(seed).random_raw(int(np.prod(shape))) >> np.uint64(48)
    return ((whole.astype(np.float64) - 2**15) / 2**17 + 0.0003).astype(np.float32).reshape(shape)


def write_source(folder: Path, family: str, config: dict[str, Any], dtype: str) -> Path:
    """A Hugging Face folder with these weights."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    values = source_values(family, config)
    tensors = {name: torch.from_numpy(value).to(getattr(torch, dtype)) for name, value in values.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}), encoding="utf-8")
    return folder


def growths() -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """(family, case, source configuration, destination configuration, arguments of a plan) of every frozen growth."""
    for family in FAMILIES:
        for case, (sizes, arguments) in CASES.items():
            yield family, case, *configurations(family, sizes), arguments


def digest(data: Any) -> str:
    """sha256 of data as canonical JSON, or of bytes."""
    if not isinstance(data, bytes):
        data = json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(data).hexdigest()
