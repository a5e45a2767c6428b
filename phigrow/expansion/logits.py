"""Compute the logits of a checkpoint, with the family's forward pass in numpy or with transformers' model."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from phigrow.checkpoints.bits import widen
from phigrow.checkpoints.configuration import stored_hf_config
from phigrow.checkpoints.stored_model import QUANTIZATION, StoredModel
from phigrow.errors import GrowthError
from phigrow.files.paths import utf8_path
from phigrow.models.config import Config, is_number, normalised
from phigrow.models.families import family_of
from phigrow.models.forward import ACTIVATIONS, Ids, Values
from phigrow.models.function import function_of
from phigrow.models.transformers_errors import transformers_errors

if TYPE_CHECKING:
    import torch

BACKENDS = ("auto", "numpy", "transformers")
"""Ways to compute logits; the first is the default."""

LARGEST_IN_NUMPY = 100_000_000
"""Most parameters of a model that ``auto`` runs in numpy. Beyond, the imports of torch and transformers are a small
part of the time, and transformers' own model is the stronger evidence."""


def choose_backend(backend: str, *folders: Path) -> str:
    """Return ``numpy`` or ``transformers``, one for all checkpoints, so that they are compared in the same arithmetic.

    Raises:
        GrowthError: the backend is unknown, a checkpoint cannot be read, or ``numpy`` was chosen and cannot run one.
    """
    if backend not in BACKENDS:
        raise GrowthError(
            f"verify has no backend {backend!r}", where="--backend", fix=f"choose one of {', '.join(BACKENDS)}"
        )
    if backend == "transformers":
        return backend
    for folder in folders:
        with StoredModel(folder) as reader:
            obstacle = _obstacle(reader)
            large = sum(math.prod(shape) for shape in reader.shapes.values()) > LARGEST_IN_NUMPY
        if obstacle is not None and backend == "numpy":
            raise GrowthError(
                "the numpy backend cannot run this checkpoint",
                where=str(folder),
                why=obstacle,
                fix="choose the backend transformers",
            )
        if obstacle is not None or (large and backend == "auto"):
            return "transformers"
    return "numpy"


def _obstacle(reader: StoredModel) -> str | None:
    """Return the reason for which a checkpoint needs transformers, or None."""
    family, config = reader.family, reader.config
    settings = _settings(config)
    if family.forward is None:
        return f"the family {family.name} has no forward pass in numpy"
    if reader.pickled:
        return "its weights are pickled, and torch reads pickles"
    if settings["hidden_act"] not in ACTIVATIONS:
        return f"numpy has no activation {settings['hidden_act']!r}"
    if family.sizes_of(config)["rotary"] % 2:
        return "the rotary part of its heads has an odd number of coordinates"
    if not all(is_number(settings[key]) for key in family.function_keys if key.endswith("_eps")):
        return "the epsilon of its normalisations is not a number"
    return None


def _settings(config: Config) -> Config:
    """Return a configuration in one spelling, with a value for every key that changes the function."""
    return {**normalised(config), **function_of(family_of(config, "a configuration"), config).settings}


class Probe(NamedTuple):
    """Token ids on which models run.

    Attributes:
        ids: [rows, length].
        last: number of last positions whose logits are compared.
    """

    ids: Ids
    last: int


def compute_logits(folder: Path, ids: Ids, dtype: str, backend: str) -> tuple[Values, str]:
    """Run a checkpoint on token ids, as `run_probes` does; return logits [rows, length, vocab] and the stored dtype."""
    (logits,), stored = run_probes(folder, [Probe(ids, ids.shape[1])], dtype, backend)
    return logits, stored


def run_probes(folder: Path, probes: Sequence[Probe], dtype: str, backend: str) -> tuple[list[Values], str]:
    """Run a checkpoint on several probes.

    Args:
        folder: the checkpoint.
        probes: in ascending order of length: a model with dynamic frequencies keeps those of its longest sequence.
        dtype: of the arithmetic, ``float32`` or ``float64``.
        backend: ``numpy`` or ``transformers``.

    Returns:
        Logits [rows, last, vocab] of each probe, and the dtype in which the weights are stored.

    Raises:
        GrowthError: the checkpoint cannot be read, or its tensors are not those of its configuration.
    """
    with StoredModel(folder) as reader:
        reader.check()
        family, config, stored = reader.family, reader.config, reader.dtype_name
        if backend == "numpy" and family.forward is not None:
            weights, settings, sizes = _Weights(reader, dtype), _settings(config), family.sizes_of(config)
            rotary = function_of(family, config).rotary
            with np.errstate(all="ignore"):  # NaN and infinities show in the comparison
                return [
                    family.forward(settings, sizes, rotary.at(ids.shape[1], np.float32), weights, ids, last)
                    for ids, last in probes
                ], stored
        pickled = reader.pickled
    return _logits_of_transformers(folder, config, probes, dtype, pickled), stored


class _Weights(Mapping[str, Values]):
    """The tensors of a checkpoint by name, each read when it is used."""

    def __init__(self, reader: StoredModel, dtype: str) -> None:
        self._tensors = reader.tensors
        self._compute: type[np.floating[Any]] = np.float64 if dtype == "float64" else np.float32

    def __getitem__(self, name: str) -> Values:
        tensor = self._tensors[name]
        return widen(tensor.bits(0, tensor.shape[0]), tensor.dtype_name, self._compute)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _logits_of_transformers(
    folder: Path, stored: Config, probes: Sequence[Probe], dtype: str, pickled: bool
) -> list[Values]:
    with utf8_path(folder) as readable:
        model = transformers_model(readable, stored, str(folder), dtype, pickled)
    import torch

    with torch.inference_mode():
        logits = [
            np.concatenate(
                [model(torch.from_numpy(row)[None], use_cache=False, logits_to_keep=last).logits.numpy() for row in ids]
            )
            for ids, last in probes
        ]
    del model
    gc.collect()
    return logits


def transformers_model(folder: Path, stored: Config, where: str, dtype: str, pickled: bool) -> Any:
    """Load a checkpoint as transformers' model in evaluation mode. No code from the folder is run.

    Args:
        folder: the checkpoint, see `phigrow.files.paths.utf8_path`.
        stored: the configuration of its weights.
        where: its place for messages.
        dtype: of the weights in memory.
        pickled: its weights are pickles.

    Raises:
        GrowthError: transformers cannot load it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config: Any = stored_hf_config(folder, stored, where)
    if hasattr(config, QUANTIZATION):
        delattr(config, QUANTIZATION)  # the weights are stored as floating point numbers, as phigrow has checked
    with transformers_errors("load the checkpoint", where), _no_loading_bar():
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=not pickled,  # transformers, too, reads pickles with weights_only=True
        )
    model.eval()
    if dtype == "float64":
        widen_norms(model)
    return model


@contextmanager
def _no_loading_bar() -> Iterator[None]:
    """Hide transformers' bar "Loading weights", which would stand between two tables."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def widen_norms(model: torch.nn.Module) -> None:
    """Let every RMSNorm compute in its weights' dtype; transformers' compute in float32, whatever the model's."""
    import torch

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm") and isinstance(child.weight, torch.nn.Parameter):
                eps: Any = child.variance_epsilon
                wide = torch.nn.RMSNorm(child.weight.shape, eps=eps)
                wide.weight = child.weight
                setattr(module, name, wide)
