"""Turn what transformers raises for a model that it cannot build or load into one error that names the place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from phigrow.errors import GrowthError


@contextmanager
def transformers_errors(action: str, where: str) -> Iterator[None]:
    """Raise a `GrowthError` for every exception of transformers inside of this context.

    Args:
        action: what transformers is asked for, such as ``build the model``.
        where: the folder or the configuration.

    Raises:
        GrowthError: transformers cannot do it.
    """
    try:
        yield
    except (GrowthError, MemoryError):
        raise
    except Exception as error:  # transformers and its validators raise every kind of exception
        import transformers

        text = " ".join(str(error).split())
        raise GrowthError(
            f"transformers cannot {action}",
            where=where,
            why=f"{type(error).__name__}: {text}" if text else type(error).__name__,
            fix=f"correct the configuration, or install what is missing; transformers is {transformers.__version__}",
        ) from error
