"""Metadata of a folder of packed blocks, ``data.json``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phigrow.corpus.left_out import describe
from phigrow.errors import GrowthError
from phigrow.files.untrusted import read_json_strict

FORMAT = 1
"""Version of the layout of the folder."""

METADATA_FILE = "data.json"


@dataclass(frozen=True)
class SplitInfo:
    """Counts of one split, train or held-out.

    Attributes:
        documents: packed documents.
        blocks: blocks of ``seq_len + 1`` tokens.
        tokens: tokens in the blocks, ``blocks * seq_len + 1``. Every token but the first is predicted once.
        tokens_seen: tokens of all documents, end-of-text tokens included.
        dropped_tokens: tokens at the end that do not fill a block.
        documents_cut: documents that are cut at a border between blocks.
        sources: documents and tokens of each source.
    """

    documents: int
    blocks: int
    tokens: int
    tokens_seen: int
    dropped_tokens: int
    documents_cut: int
    sources: dict[str, dict[str, int]]


@dataclass(frozen=True)
class DataInfo:
    """Metadata of a folder of packed blocks. ``data.json`` has the same fields without ``folder``.

    ``skipped`` counts documents. ``left_out`` has counts and examples of documents and of files, by reason.
    ``unknown_tokens`` counts tokens that stand for text without a token of its own.
    """

    folder: Path
    format_version: int
    seq_len: int
    vocab_size: int
    eos_token_id: int
    dtype: str
    train: SplitInfo
    heldout: SplitInfo
    sources: dict[str, dict[str, int]]
    skipped: dict[str, int]
    left_out: dict[str, Any]
    unknown_tokens: int
    packing_efficiency: float
    dropped_tokens: int
    fingerprint: str
    content_fingerprint: str
    versions: dict[str, str]
    arguments: dict[str, Any]

    def __str__(self) -> str:
        """Summarise the blocks and their folder in two sentences, and what was left out in one line."""
        train, held, sources = self.train, self.heldout, len(self.sources)
        documents, tokens = train.documents + held.documents, train.tokens_seen + held.tokens_seen
        lines = [self._unknown(tokens), describe(self.left_out)]
        return "\n".join([self._packed(documents, sources, tokens), *filter(None, lines)])

    def _unknown(self, tokens: int) -> str:
        return (
            f"{self.unknown_tokens:,} tokens ({self.unknown_tokens / tokens:.1%}) stand for text that the tokenizer "
            "does not know."
            if self.unknown_tokens
            else ""
        )

    def _packed(self, documents: int, sources: int, tokens: int) -> str:
        train, held = self.train, self.heldout
        return (
            f"{documents:,} document{'s' * (documents != 1)} of {sources:,} source{'s' * (sources != 1)}, "
            f"{tokens:,} tokens of a vocabulary of {self.vocab_size:,}, packed into blocks of {self.seq_len:,}: "
            f"{train.blocks:,} to train on and {held.blocks:,} held out.\n"
            f"They are in {self.folder}, with their tokenizer and {METADATA_FILE}, which has every number."
        )


def read_metadata(root: Path) -> dict[str, Any]:
    """Read ``data.json`` of a complete folder of blocks.

    Raises:
        GrowthError: the folder does not exist, is incomplete, or has another format version.
    """
    needed = [root / name for name in (METADATA_FILE, "train/state.json", "heldout/state.json", "tokenizer")]
    missing = [str(path.relative_to(root)) for path in needed if not path.exists()]
    if missing:
        raise GrowthError(
            "the folder holds no packed blocks" if root.is_dir() else "the folder of packed blocks does not exist",
            where=str(root.absolute()),
            why=f"it lacks {', '.join(missing)}" if root.is_dir() else None,
            fix=f"make one with `phigrow data --out {root}`",
        )
    info = read_json_strict(root / METADATA_FILE, "the description of packed blocks")
    if info.get("format_version") != FORMAT:
        raise GrowthError(
            f"the packed blocks have format version {info.get('format_version')!r}",
            where=str(root / METADATA_FILE),
            why=f"this phigrow reads version {FORMAT}",
            fix=f"make them again with `phigrow data --out {root} --overwrite`",
        )
    lacking = [key for key in ("seq_len", "vocab_size", "eos_token_id") if type(info.get(key)) is not int]
    if lacking or not isinstance(info.get("fingerprint"), str):
        raise GrowthError(
            "the description of packed blocks is damaged",
            where=str(root / METADATA_FILE),
            why=f"{', '.join(lacking) or 'fingerprint'} is missing, or of another kind",
            fix=f"copy the folder again, or make it again with `phigrow data --out {root} --overwrite`",
        )
    return info
