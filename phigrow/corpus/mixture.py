"""Mix several folders of packed blocks, or several sources of one folder, by weights."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from phigrow.corpus.blocks import BlockArray, Blocks, load_blocks
from phigrow.corpus.source_rows import ScatteredRows, rows_by_source
from phigrow.corpus.splits import MixedSource
from phigrow.corpus.tokenizer import same_tokens
from phigrow.errors import GrowthError
from phigrow.files.paths import user_path


class ConcatenatedBlocks:
    """The blocks of several arrays, one array after the other. Each array is one source."""

    def __init__(self, arrays: Sequence[BlockArray], names: Sequence[str]) -> None:
        self.arrays, self.sources = list(arrays), list(names)
        self._starts = np.cumsum([0, *map(len, self.arrays)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, source: int) -> range:
        """Return the rows of one source."""
        return range(int(self._starts[source]), int(self._starts[source + 1]))

    def source_of(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """Return, for each block, the index into `sources` of its array."""
        return np.searchsorted(self._starts, np.asarray(indices, np.int64), side="right") - 1

    def batch(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """Return blocks as int64 ``[len(indices), seq_len + 1]``, as `BlockArray.batch` does.

        Raises:
            IndexError: an index below 0 or past the end.
        """
        wanted = np.asarray(indices, np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"block {wanted.min()}..{wanted.max()} of {len(self)}")
        source = self.source_of(wanted)
        width = next((a.parts[0].shape[1] for a in self.arrays if a.parts), 0)
        out = np.empty((len(wanted), width), np.int64)
        for index in np.unique(source).tolist():
            here = source == index
            out[here] = self.arrays[index].batch(wanted[here] - self._starts[index])
        return out


def mix_folders(folders: Mapping[str, float]) -> Blocks:
    """Join folders of packed blocks into one set. Each step reads the folders in proportion to their weights.

    Args:
        folders: folder -> weight. Weights need not add up to 1.

    Returns:
        Blocks with ``mixture``. A source has the name of its folder, or the whole path if two names are equal.

    Raises:
        GrowthError: a folder cannot be read, or differs from the first in the length of its blocks or in its tokenizer;
            a weight is not a positive number.

    >>> mix_folders({"textbooks": 0.8, "code": 0.2}).train.sources  # doctest: +SKIP
    ['code', 'textbooks']
    """
    weights = checked_weights(folders)
    again = [
        folder for folder, times in Counter(user_path(folder).resolve() for folder in weights).items() if times > 1
    ]
    if again:
        raise GrowthError(
            f"the folder {again[0]} stands twice in the mixture",
            where=", ".join(folder for folder in weights if user_path(folder).resolve() == again[0]),
            fix="name each folder once, and add its weights",
        )
    short = Counter(user_path(folder).resolve().name for folder in weights)
    named = {(user_path(f).resolve().name if short[user_path(f).resolve().name] == 1 else f): f for f in weights}
    names = sorted(named)
    parts = [load_blocks(named[name]) for name in names]
    first = parts[0]
    for part in parts[1:]:
        _check_agreement(first, part)
    for part in parts:
        if not len(part.train):
            raise GrowthError(
                "the folder has no blocks to train on",
                where=str(part.folder),
                why="its train text is shorter than one block",
                fix="prepare more text with `phigrow data`",
            )
    train, heldout = (
        ConcatenatedBlocks([getattr(part, side) for part in parts], names) for side in ("train", "heldout")
    )
    sources = tuple(
        MixedSource(name, weights[named[name]], train.rows(index), heldout.rows(index))
        for index, name in enumerate(names)
    )
    seen = sum(part.info["train"]["tokens_seen"] for part in parts)
    dropped = sum(part.info["train"]["dropped_tokens"] for part in parts)
    info = {
        "train": {
            "tokens_seen": seen,
            "dropped_tokens": dropped,
            "documents": sum(part.info["train"]["documents"] for part in parts),
            "documents_cut": _sum(part.info["train"].get("documents_cut") for part in parts),
        },
        "folders": {name: part.info for name, part in zip(names, parts, strict=True)},
    }
    fingerprint = _fingerprint([(s.weight, p.fingerprint) for s, p in zip(sources, parts, strict=True)])
    return replace(first, train=train, heldout=heldout, fingerprint=fingerprint, info=info, mixture=sources)


def mix_sources(blocks: Blocks, mixture: Mapping[str, float]) -> Blocks:
    """Give weights to the sources in one folder. Sources without a weight are not read.

    Raises:
        GrowthError: the folder has no blocks of a source, or a weight is not a positive number.
    """
    weights = checked_weights(mixture)
    assert isinstance(blocks.train, BlockArray)
    assert isinstance(blocks.heldout, BlockArray)
    known = blocks.train.sources
    train = rows_by_source(blocks.train)
    heldout = rows_by_source(blocks.heldout)
    for name in weights:
        if name not in known or not len(train[known.index(name)]):
            there = [source for source, rows in zip(known, train, strict=True) if len(rows)]
            raise GrowthError(
                f"the folder has no blocks of the source {name!r}",
                where=f"mixture, {blocks.folder}",
                why="a weight was given for this source",
                fix=f"choose among its sources: {', '.join(map(repr, there))}",
            )
    sources = tuple(
        MixedSource(name, weights[name], train[known.index(name)], heldout[known.index(name)])
        for name in sorted(weights)
    )
    labels = hashlib.sha256()
    for rows in (*train, *heldout):
        if isinstance(rows, ScatteredRows):
            for numbers in rows.pieces():
                labels.update(numbers.tobytes())
        else:
            assert isinstance(rows, range)
            labels.update(f"{rows.start} {rows.stop}\n".encode())
    key = [*((source.weight, source.name) for source in sources), (0.0, labels.hexdigest()), (0.0, blocks.fingerprint)]
    return replace(blocks, fingerprint=_fingerprint(key), mixture=sources)


def checked_weights(weights: Mapping[str, Any], where: str = "the mixture") -> dict[str, float]:
    """Return the weights as numbers.

    Raises:
        GrowthError: there are no weights, or one is not a positive, finite number.
    """
    out = {}
    for name, value in weights.items():
        try:
            out[str(name)] = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            out[str(name)] = math.nan
        if not (math.isfinite(out[str(name)]) and out[str(name)] > 0):
            raise GrowthError(
                f"the weight is {value!r}",
                where=f"{name} in {where}",
                why="sources are read in proportion to their weights",
                fix="give a positive number",
            )
    if not out:
        raise GrowthError(
            "the mixture names no source", where=where, fix="write 'folder: weight' or 'source: weight' for each"
        )
    return out


def _check_agreement(first: Blocks, other: Blocks) -> None:
    where = f"{first.folder} and {other.folder}"
    if first.seq_len != other.seq_len:
        raise GrowthError(
            f"the folders hold blocks of {first.seq_len} and of {other.seq_len} tokens",
            where=where,
            why="all blocks of a batch have the same length",
            fix="prepare both with the same --seq-len",
        )
    one, two = ((part.tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8") for part in (first, other))
    if not same_tokens(one, two, where) or first.eos_token_id != other.eos_token_id:
        raise GrowthError(
            f"the folders were packed with two tokenizers, of {first.vocab_size} and {other.vocab_size} tokens",
            where=where,
            why="the same id stands for different text in each",
            fix=f"prepare the second with --tokenizer {first.tokenizer_dir}",
        )


def _fingerprint(parts: list[tuple[float, str]]) -> str:
    total = sum(weight for weight, _ in parts)
    text = json.dumps([[repr(weight / total) if weight else "", key] for weight, key in parts])
    return hashlib.sha256(text.encode()).hexdigest()


def _sum(values: Any) -> int | None:
    values = list(values)
    return None if None in values else sum(values)
