"""Read packed blocks for training: memory-mapped, in random batches."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from phigrow.checkpoints.tokenizer_folder import FEWEST
from phigrow.corpus.feed import BlockFeed, Feed
from phigrow.corpus.metadata import read_metadata
from phigrow.corpus.order import WHOLE, Part
from phigrow.corpus.rows import reading
from phigrow.corpus.splits import MixedSource, Split, relative_weights
from phigrow.errors import GrowthError
from phigrow.files.paths import user_path, utf8_path


class BlockArray:
    """The blocks of one split on disk, memory-mapped.

    `source_of` returns indices into ``sources``, the names of the sources. Ids that are read are checked against
    ``vocab_size``, if it is given.
    """

    def __init__(self, folder: str | Path, vocab_size: int | None = None) -> None:
        from datasets import ClassLabel, load_from_disk

        self.folder, self.vocab_size = user_path(folder), vocab_size
        fix = "copy the folder again, or make it again with `phigrow data`"
        with reading(self.folder, "the packed blocks", fix), utf8_path(self.folder) as readable:
            data = load_from_disk(str(readable), keep_in_memory=False)
            table = data.data.table
            self.parts = [
                # Sliced arrays share one buffer: flatten, unlike values, honours the slice.
                chunk.flatten().to_numpy(zero_copy_only=True).reshape(len(chunk), -1)
                for chunk in table.column("input_ids").chunks
                if len(chunk)
            ]
            self._starts = np.cumsum([0, *map(len, self.parts)])
            # Arrow's own `take` would join all pieces in memory, at every call.
            column = table.column("source").chunks
            self._labels = [chunk.to_numpy(zero_copy_only=True) for chunk in column if len(chunk)]
            self._label_starts = np.cumsum([0, *map(len, self._labels)])
        label = data.features["source"]
        self.sources: list[str] = list(label.names) if isinstance(label, ClassLabel) else []

    def __len__(self) -> int:
        return int(self._starts[-1])

    def batch(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """Return blocks as int64 ``[len(indices), seq_len + 1]``: input is ``[:, :-1]``, target ``[:, 1:]``.

        Raises:
            IndexError: an index below 0 or past the end.
            GrowthError: a block holds an id outside the vocabulary.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"block {wanted.min()}..{wanted.max()} of {len(self)}")
        if not len(wanted):
            return np.empty((0, self.parts[0].shape[1] if self.parts else 0), np.int64)
        part = np.searchsorted(self._starts, wanted, side="right") - 1
        row = wanted - self._starts[part]
        blocks = np.stack([self.parts[p][r] for p, r in zip(part.tolist(), row.tolist(), strict=True)])
        if self.vocab_size is not None and blocks.max() >= self.vocab_size:
            number, place = np.argwhere(blocks >= self.vocab_size)[0]
            raise GrowthError(
                f"block {wanted[number]} holds the token id {blocks[number, place]}",
                where=str(self.folder),
                why=f"the vocabulary has {self.vocab_size} tokens, so the file is damaged",
                fix="make the blocks again with `phigrow data --overwrite`, or copy them again",
            )
        return blocks.astype(np.int64)

    def source_of(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """Return, for each block, the index into `sources` of the document of its first token."""
        wanted = np.asarray(indices, dtype=np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"block {wanted.min()}..{wanted.max()} of {len(self)}")
        part = np.searchsorted(self._label_starts, wanted, side="right") - 1
        order = np.argsort(part, kind="stable")
        out = np.empty(len(wanted), np.int64)
        borders = np.flatnonzero(np.diff(part[order], prepend=-1, append=-1))
        for first, last in itertools.pairwise(borders.tolist()):
            here = order[first:last]
            number = part[here[0]]
            out[here] = self._labels[number][wanted[here] - self._label_starts[number]]
        return out

    def labels(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return `source_of` of the blocks from ``start`` to ``stop - 1``."""
        first, last = np.searchsorted(self._label_starts, (start, stop - 1), side="right") - 1
        begins = self._label_starts[first]
        joined = np.concatenate(self._labels[first : last + 1]) if last > first else self._labels[first]
        return np.asarray(joined[start - begins : stop - begins], dtype=np.int64)

    def __reduce__(self) -> tuple[type[BlockArray], tuple[Path, int | None]]:
        return BlockArray, (self.folder, self.vocab_size)  # another process gets the path, not the data


class DataSource(Protocol):
    """The data of a run: packed blocks on disk, or a stream."""

    @property
    def heldout(self) -> Split:
        """The held-out blocks."""

    @property
    def mixture(self) -> tuple[MixedSource, ...]:
        """The sources, if they are read by weight."""

    @property
    def heldout_part(self) -> Part:
        """The held-out blocks that evaluations may read."""

    @property
    def seq_len(self) -> int:
        """Tokens that a block predicts."""

    @property
    def vocab_size(self) -> int:
        """Size of the tokenizer's vocabulary."""

    @property
    def eos_token_id(self) -> int:
        """The end-of-text token."""

    @property
    def fingerprint(self) -> str:
        """Hash of all inputs of the blocks."""

    @property
    def tokenizer_dir(self) -> Path | None:
        """Folder of the tokenizer, which an export copies."""

    def make_feed(self, seed: int, batch: int) -> Feed:
        """Return the feed of a run with this seed and global batch size.

        Raises:
            GrowthError: there are no blocks to train on.
        """

    def describe(self) -> dict[str, Any]:
        """Return the fields of the ``run`` record that describe the data.

        ``train_blocks`` is None if the number of blocks is unknown. ``packing`` describes the train text. Its
        ``efficiency`` is the share of tokens that are in blocks. ``documents_cut`` is the number of documents that are
        cut at a border between blocks.
        """

    def tokenizer_json(self) -> tuple[str, str] | None:
        """Return the content of ``tokenizer.json`` and its name for messages; None if there is no tokenizer."""

    def save_tokenizer(self) -> None:
        """Save the tokenizer in `tokenizer_dir`, unless it is there already."""


@dataclass(frozen=True)
class Blocks:
    """A folder made by `phigrow.corpus.prepare`: both splits, and the content of ``data.json`` in ``info``.

    ``mixture`` has the sources if they are read by weight, see `phigrow.corpus.mix_folders`. ``train_part`` and
    ``heldout_part`` restrict the blocks of each source that training and evaluations read.
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
    train_part: Part = WHOLE
    heldout_part: Part = WHOLE

    def make_feed(self, seed: int, batch: int) -> Feed:
        """See `DataSource`."""
        if not len(self.train):
            raise GrowthError(
                "the data has no blocks to train on", where=str(self.folder),
                why="its train text is shorter than one block", fix="prepare more text with `phigrow data`",
            )  # fmt: skip
        if empty := [name for name, size in self._train_sizes().items() if size == 0]:
            raise GrowthError(
                f"the part {self.train_part} of the train blocks is empty for {', '.join(empty)}",
                where=f"data_part, {self.folder}", why="there are too few blocks for this part",
                fix="choose a larger part, or prepare more text with `phigrow data`",
            )  # fmt: skip
        return BlockFeed(self.train, self.mixture, seed, batch, self.train_part)

    def _train_sizes(self) -> dict[str, int]:
        """Return the number of train blocks of the part: of each source of a mixture, else of the data as a whole."""
        if self.mixture:
            return {source.name: self.train_part.size(len(source.train)) for source in self.mixture}
        return {"the data": self.train_part.size(len(self.train))}

    def describe(self) -> dict[str, Any]:
        """See `DataSource`."""
        info: dict[str, Any] = {
            "data_fingerprint": self.fingerprint,
            "train_blocks": len(self.train) if self.train_part == WHOLE else sum(self._train_sizes().values()),
            **describe_heldout(self),
        }
        train = self.info.get("train")
        if train:
            seen, dropped = train["tokens_seen"], train["dropped_tokens"]
            info["packing"] = {
                "efficiency": (seen - dropped) / seen if seen else None,
                "dropped_tokens": dropped,
                "documents": train["documents"],
                "documents_cut": train.get("documents_cut"),
            }
        if self.mixture:
            weights = relative_weights(self.mixture)
            info["sources"] = {
                source.name: {"weight": weights[source.name], "tokens": self._train_sizes()[source.name] * self.seq_len}
                for source in self.mixture
            }
        elif train and len(train.get("sources", {})) > 1:
            info["sources"] = {name: {"tokens": counts["tokens"]} for name, counts in train["sources"].items()}
        return info

    def tokenizer_json(self) -> tuple[str, str] | None:
        """See `DataSource`."""
        path = self.tokenizer_dir / "tokenizer.json"
        return (path.read_text(encoding="utf-8"), str(path)) if path.is_file() else None

    def save_tokenizer(self) -> None:
        """See `DataSource`. `phigrow.corpus.prepare` has saved it."""


def describe_heldout(source: DataSource) -> dict[str, Any]:
    """Return the fields of the ``run`` record on the held-out blocks, with a fingerprint if only a part is read."""
    part = source.heldout_part
    if part == WHOLE:
        return {"heldout_blocks": len(source.heldout)}
    rows = [mixed.heldout for mixed in source.mixture] or [range(len(source.heldout))]
    text = f"{source.fingerprint} {part}"
    return {
        "heldout_blocks": sum(part.size(len(blocks)) for blocks in rows),
        "eval_fingerprint": hashlib.sha256(text.encode()).hexdigest(),
    }


def load_blocks(folder: str | Path) -> Blocks:
    """Open the packed blocks of a folder for training, memory-mapped.

    Raises:
        GrowthError: the folder does not exist, is not from ``phigrow data``, has another format version, or was packed
            with an empty tokenizer.

    >>> blocks = load_blocks("data")  # doctest: +SKIP
    >>> blocks.train.batch([0, 5]).shape  # doctest: +SKIP
    (2, 257)
    """
    root = user_path(folder)
    info = read_metadata(root)
    if info["vocab_size"] < FEWEST + 1:  # packed before tokenizers were checked
        raise GrowthError(
            f"the packed blocks have a vocabulary of {info['vocab_size']}",
            where=str(root),
            why="their tokenizer was empty, so they hold nothing but the end of each text",
            fix=f"make them again with `phigrow data --out {root} --overwrite`",
        )
    return Blocks(
        folder=root,
        train=BlockArray(root / "train", info["vocab_size"]),
        heldout=BlockArray(root / "heldout", info["vocab_size"]),
        seq_len=info["seq_len"],
        vocab_size=info["vocab_size"],
        eos_token_id=info["eos_token_id"],
        fingerprint=info["fingerprint"],
        tokenizer_dir=root / "tokenizer",
        info=info,
    )
