"""Differences between the supported versions of other packages, in one place.

Each function names the lower bound in setup.cfg with which it can be deleted.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock


def reads_rope_parameters() -> bool:
    """Return True if transformers reads ``rope_parameters``; version 4 ignores it without a word.

    Delete it with transformers >= 5.5.
    """
    import transformers

    return int(transformers.__version__.partition(".")[0]) >= 5


def no_init_weights() -> contextlib.AbstractContextManager[Any]:
    """Skip transformers' random initialisation of a new model; a context.

    transformers 4 keeps the switch in another module. Delete it with transformers >= 5.5.
    """
    module: Any
    try:
        from transformers import initialization as module
    except ImportError:
        from transformers import modeling_utils as module
    manager: contextlib.AbstractContextManager[Any] = module.no_init_weights()
    return manager


@contextlib.contextmanager
def mapped_loads() -> Iterator[None]:
    """Let ``torch.load`` map files instead of reading them, also inside of other libraries; a context.

    torch 2.6 has no setting for it, so its function is replaced. Delete that with torch >= 2.7.
    """
    import torch

    try:
        from torch.utils.serialization import config
    except ImportError:
        with mock.patch.object(torch, "load", functools.partial(torch.load, mmap=True)):
            yield
    else:
        with config.patch("load.mmap", True):  # type: ignore[attr-defined]
            yield


def raise_recompile_limits(limit: int, accumulated: int) -> None:
    """Raise the number of shapes for which torch.compile compiles one function, and all of its copies.

    torch 2.6 has other names for both settings. Delete these with torch >= 2.7.
    """
    from torch._dynamo import config as untyped

    dynamo: Any = untyped
    kind = "recompile" if hasattr(dynamo, "recompile_limit") else "cache_size"
    for name, value in ((f"{kind}_limit", limit), (f"accumulated_{kind}_limit", accumulated)):
        setattr(dynamo, name, max(getattr(dynamo, name), value))


def compilable_embedding(model: Any) -> None:
    """Keep the embedding of a model out of the graph of torch.compile, where the graph loses gradients.

    On CPUs torch 2.6 compiles the gradient of an embedding so that repeated tokens overwrite each other. Delete it with
    torch >= 2.7.
    """
    import torch

    if torch.__version__.startswith("2.6."):
        embedding, untyped = model.get_input_embeddings(), torch.compiler
        disable: Any = untyped.disable
        embedding.forward = disable(embedding.forward)
