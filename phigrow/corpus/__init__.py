"""Pack text into token blocks for memory-mapped training: the embedded corpus, local files or a hub dataset.

>>> from phigrow.corpus import load_blocks, prepare
>>> info = prepare("embedded", "data", seq_len=256)  # doctest: +SKIP
>>> load_blocks("data").train.batch([0, 1]).shape  # doctest: +SKIP
(2, 257)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phigrow.corpus.blocks import BlockArray, Blocks, load_blocks
    from phigrow.corpus.build import prepare
    from phigrow.corpus.embedded import Document, embedded_documents
    from phigrow.corpus.metadata import DataInfo, SplitInfo
    from phigrow.corpus.mixture import mix_folders, mix_sources
    from phigrow.corpus.sources import load_documents
    from phigrow.corpus.streaming import open_stream, stream_settings
    from phigrow.corpus.tokenizer import load_tokenizer, train_tokenizer

__all__ = [
    "BlockArray",
    "Blocks",
    "DataInfo",
    "Document",
    "SplitInfo",
    "embedded_documents",
    "load_blocks",
    "load_documents",
    "load_tokenizer",
    "mix_folders",
    "mix_sources",
    "open_stream",
    "prepare",
    "stream_settings",
    "train_tokenizer",
]

# Imported on first use, so that `import phigrow.corpus` costs nothing (datasets and transformers take seconds).
_HOME = {
    "BlockArray": "blocks",
    "Blocks": "blocks",
    "DataInfo": "metadata",
    "Document": "embedded",
    "SplitInfo": "metadata",
    "embedded_documents": "embedded",
    "load_blocks": "blocks",
    "load_documents": "sources",
    "load_tokenizer": "tokenizer",
    "mix_folders": "mixture",
    "mix_sources": "mixture",
    "open_stream": "streaming",
    "prepare": "build",
    "stream_settings": "streaming",
    "train_tokenizer": "tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
