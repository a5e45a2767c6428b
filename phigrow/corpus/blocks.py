"""Read packed blocks for training: memory-mapped, in random batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from phigrow.corpus.metadata import read_metadata

Rows = range | npt.NDArray[np.int64]
"""Numbers of blocks."""


class BlockArray:
    """The blocks of one split on disk; nothing is read before it is asked for.

    ``sources`` are the names that `source_of` indexes.
    """

    def __init__(self, folder: str | Path) -> None:
        from datasets import ClassLabel, load_from_disk

        self.folder = Path(folder)
        data = load_from_disk(str(folder), keep_in_memory=False)
        table = data.data.table
        self.parts = [
            # Sliced arrays share one buffer: flatten, unlike values, honours the slice.
            chunk.flatten().to_numpy(zero_copy_only=True).reshape(len(chunk), -1)
            for chunk in table.column("input_ids").chunks
            if len(chunk)
        ]
        self._starts = np.cumsum([0, *map(len, self.parts)])
        self._source = table.column("source")
        label = data.features["source"]
        self.sources: list[str] = list(label.names) if isinstance(label, ClassLabel) else []

    def __len__(self) -> int:
        return int(self._starts[-1])

    def batch(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """Return blocks as int64 ``[len(indices), seq_len + 1]``: input is ``[:, :-1]``, target ``[:, 1:]``.

        Raises:
            IndexError: an index below 0 or past the end.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"block {wanted.min()}..{wanted.max()} of {len(self)}")
        if not len(wanted):
            return np.empty((0, self.parts[0].shape[1] if self.parts else 0), np.int64)
        part = np.searchsorted(self._starts, wanted, side="right") - 1
        row = wanted - self._starts[part]
        return np.stack([self.parts[p][r] for p, r in zip(part.tolist(), row.tolist(), strict=True)]).astype(np.int64)

    def source_of(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """Return, for each block, the index into `sources` of the document its first token belongs to."""
        return np.asarray(self._source.take(np.asarray(indices, dtype=np.int64)).to_numpy(), dtype=np.int64)

    def labels(self) -> npt.NDArray[np.int64]:
        """Return `source_of` of every block; memory-mapped where the split is one piece."""
        return np.asarray(self._source.combine_chunks().to_numpy(), dtype=np.int64)

    def __reduce__(self) -> tuple[type[BlockArray], tuple[Path]]:
        return BlockArray, (self.folder,)  # to another process goes the path, not the data


class Split(Protocol):
    """A split as training reads it: blocks by their number, and the source of each."""

    sources: list[str]

    def __len__(self) -> int: ...

    def batch(self, indices: Any) -> npt.NDArray[np.int64]: ...

    def source_of(self, indices: Any) -> npt.NDArray[np.int64]: ...


@dataclass(frozen=True)
class MixedSource:
    """One source of a mixture: its weight, and its blocks among the train and the held-out ones."""

    name: str
    weight: float
    train: Rows = field(repr=False)
    heldout: Rows = field(repr=False)


@dataclass(frozen=True)
class Blocks:
    """A folder made by `phigrow.corpus.prepare`: both splits, and the content of ``data.json`` in ``info``.

    ``mixture`` has the sources where they are read by weight, see `phigrow.corpus.mix_folders`.
    """

    folder: Path
    train: Split = field(repr=False)
    heldout: Split = field(repr=False)
    seq_len: int
    vocab_size: int
    eos_token_id: int
    fingerprint: str
    tokenizer_dir: Path
    info: dict[str, Any] = field(repr=False)
    mixture: tuple[MixedSource, ...] = field(default=(), repr=False)


def load_blocks(folder: str | Path) -> Blocks:
    """Open the packed blocks of a folder for training, memory-mapped.

    Raises:
        GrowthError: there is no such folder, ``phigrow data`` did not make it, or its format has another version.

    >>> blocks = load_blocks("data")  # doctest: +SKIP
    >>> blocks.train.batch([0, 5]).shape  # doctest: +SKIP
    (2, 257)
    """
    root = Path(folder).expanduser()
    info = read_metadata(root)
    return Blocks(
        folder=root,
        train=BlockArray(root / "train"),
        heldout=BlockArray(root / "heldout"),
        seq_len=info["seq_len"],
        vocab_size=info["vocab_size"],
        eos_token_id=info["eos_token_id"],
        fingerprint=info["fingerprint"],
        tokenizer_dir=root / "tokenizer",
        info=info,
    )
