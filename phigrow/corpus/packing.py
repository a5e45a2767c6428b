"""Select, order, tokenise and pack documents, each step in bounded memory."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from phigrow.corpus.left_out import DUPLICATE, EMPTY, EXAMPLES, UNDECODABLE, LeftOut
from phigrow.corpus.rows import MARK
from phigrow.errors import GrowthError

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from tokenizers import Tokenizer

Indices = npt.NDArray[np.int64]

MAX_SOURCES = 256
"""Most sources with a name of their own. If a column has more, such as a URL for each document, the rarer ones become
``other``."""

OTHER = "other"


@dataclass(frozen=True)
class Selection:
    """Rows of a dataset in the order of packing, and the rows that were left out."""

    train: Indices
    heldout: Indices
    left_out: LeftOut


def select(documents: Dataset, heldout: float, seed: int) -> Selection:
    """Choose, split and shuffle the documents by a hash of (seed, text), so that the result does not depend on order.

    Args:
        documents: with a string column ``text``. Null stands for text that cannot be decoded.
        heldout: the fraction of documents held out: at least one document, never all; 0 holds out none.
        seed: of the split and the order.

    Raises:
        GrowthError: there are no documents, or only one with ``heldout`` above 0.
    """
    rows: list[Indices] = []
    hashes: list[npt.NDArray[np.uint64]] = []
    first: dict[str, list[int]] = {UNDECODABLE: [], EMPTY: [], MARK: []}
    counts: Counter[str] = Counter()

    def count(reason: str, row: int) -> None:
        counts[reason] += 1
        if counts[reason] <= EXAMPLES:
            first[reason].append(row)

    key = str(seed).encode()
    start = 0
    for texts in _texts(documents):
        keep = []
        digests = []
        for row, text in enumerate(texts, start):
            if text is None:
                count(UNDECODABLE, row)
            elif not (plain := text.removeprefix(MARK)).strip():
                count(EMPTY, row)
            else:
                keep.append(row)
                digests.append(hashlib.blake2b(plain.encode(), digest_size=16, key=key).digest())
                if len(plain) < len(text):
                    count(MARK, row)
        start += len(texts)
        rows.append(np.array(keep, np.int64))
        hashes.append(np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2))  # 16 bytes for each document
    index, hash_ = (
        np.concatenate([np.empty(0, np.int64), *rows]),
        np.concatenate([np.empty((0, 2), np.uint64), *hashes]),
    )
    # The first half of the hash orders, the second splits. The sort is stable, so the first of identical rows is kept.
    order = np.lexsort((hash_[:, 1], hash_[:, 0]))
    index, hash_ = index[order], hash_[order]
    repeated = np.zeros(len(index), bool)
    repeated[1:] = (hash_[1:] == hash_[:-1]).all(axis=1)
    left_out = LeftOut()
    for reason in (UNDECODABLE, EMPTY):
        left_out.add(reason, *_names(documents, first[reason]), count=counts[reason])
    copies = np.sort(index[repeated])
    left_out.add(DUPLICATE, *_names(documents, copies[:EXAMPLES].tolist(), quote=True), count=len(copies))
    left_out.add_marks(*_names(documents, first[MARK]), count=counts[MARK])
    index, position = index[~repeated], hash_[~repeated, 1]
    if not len(index):
        raise GrowthError(
            "the text holds no documents",
            why=f"{start} row{'s were' if start != 1 else ' was'} read. {left_out}".strip(),
            fix="give text files that are not empty, in UTF-8",
        )
    is_heldout = position < np.uint64(min(int(heldout * 2**64), 2**64 - 1))
    if heldout:
        if len(index) == 1:
            raise GrowthError(
                "the text is a single document",
                why="held-out text consists of whole documents, so one document is not enough for both splits. "
                f"{left_out}".strip(),
                fix="give at least two documents (files, rows, or parts between <|endoftext|>), or hold out 0",
            )
        is_heldout[position.argmin()] = True
        is_heldout[position.argmax()] = False
    return Selection(index[~is_heldout], index[is_heldout], left_out)


def _names(documents: Dataset, rows: list[int], *, quote: bool = False) -> list[str]:
    """Return the names of the first rows for messages: title or source, and the beginning of the text if asked."""
    columns = [*(["text"] if quote else []), *({"title", "source"} & set(documents.column_names))]
    names = []
    for row in rows[:EXAMPLES]:
        document = documents.select_columns(columns)[row] if columns else {}
        name = document.get("title") or document.get("source") or f"row {row + 1}"
        start = " ".join(document["text"][:200].split())[:30] if quote else ""
        names.append(f"{name}: {start!r}" if quote else name)
    return list(dict.fromkeys(names))


def source_names(documents: Dataset, rows: Indices) -> list[str]:
    """Return the sources of these rows, sorted. Beyond `MAX_SOURCES`, the rarer ones become ``other``."""
    counts: Counter[str] = Counter()
    chosen = documents.select_columns(["source"]).select(rows).with_format("arrow")
    for batch in chosen.iter(10_000):
        for pair in batch["source"].combine_chunks().value_counts().to_pylist():
            counts[pair["values"] or OTHER] += pair["counts"]
    if len(counts) <= MAX_SOURCES:
        return sorted(counts)
    common = sorted(counts, key=lambda name: (-counts[name], name))[: MAX_SOURCES - 1]
    return sorted({*common, OTHER})


def by_source(documents: Dataset, rows: Indices, names: list[str]) -> Indices:
    """Return the rows sorted by source in the order of ``names``. Rows of one source keep their order."""
    known = _known(names)
    labels: list[Indices] = [np.empty(0, np.int64)]
    for batch in documents.select_columns(["source"]).select(rows).with_format("arrow").iter(10_000):
        labels.append(np.array([known(name) for name in batch["source"].to_pylist()], np.int64))
    return rows[np.argsort(np.concatenate(labels), kind="stable")]


def _known(names: list[str]) -> Callable[[str | None], int]:
    """Return a function from source to index; a source without a name, or a rare one, has the index of ``other``."""
    index = {name: number for number, name in enumerate(names)}
    return lambda name: index.get(name or OTHER, index.get(OTHER, 0))


@dataclass(frozen=True)
class Encoding:
    """A copy of a tokenizer for packing, with its end-of-text id, the id of unknown text and the dtype of its ids."""

    tokenizer: Tokenizer
    vocab_size: int
    eos: int
    unknown: int | None
    dtype: str


@dataclass(frozen=True)
class TokenFile:
    """The tokens of one split: a flat file, the position at which each document ends, and the source of each.

    ``unknown`` is the number of tokens that stand for text without a token of its own.
    """

    path: Path
    ends: Indices
    sources: Indices
    dtype: str
    unknown: int = 0

    @property
    def tokens(self) -> int:
        """Tokens in the file, end-of-text tokens included."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def blocks(self, seq_len: int) -> int:
        """Return the number of blocks of ``seq_len + 1`` tokens, each of which shares one token with the next."""
        return max(0, (self.tokens - 1) // seq_len)

    def cut(self, seq_len: int) -> int:
        """Return the number of documents that are cut at a border between blocks."""
        starts = np.concatenate([[0], self.ends[:-1]])
        last = np.minimum((self.ends - 2) // seq_len, self.blocks(seq_len)) * seq_len
        return int((last > starts).sum()) if len(self.ends) else 0

    def count(self, names: list[str]) -> dict[str, dict[str, int]]:
        """Return documents and tokens of each source that has any."""
        lengths = np.diff(self.ends, prepend=0)
        present = {name: self.sources == index for index, name in enumerate(names)}
        return {
            name: {"documents": int(mask.sum()), "tokens": int(lengths[mask].sum())}
            for name, mask in present.items()
            if mask.any()
        }


def tokenise(documents: Dataset, encoding: Encoding, names: list[str], folder: Path, num_proc: int) -> TokenFile:
    """Write the token ids of all documents, an end-of-text id after each, into one flat file in ``folder``.

    Raises:
        GrowthError: an id lies outside the vocabulary.
    """
    from datasets import Features, List, Value

    folder.mkdir()
    path, dtype, unknown = folder / "tokens.bin", encoding.dtype, 0
    ends: list[Indices] = []
    sources: list[Indices] = []
    total = 0
    with path.open("wb") as file:
        if len(documents):
            ids = documents.map(
                _encode,
                batched=True,
                batch_size=256,
                num_proc=_workers(num_proc, len(documents)),
                fn_kwargs={"tokenizer": encoding.tokenizer, "eos": encoding.eos, "names": names, "dtype": dtype},
                remove_columns=documents.column_names,
                features=Features({"ids": List(Value(dtype)), "source": Value("int64")}),
                cache_file_name=str(folder / "ids.arrow"),
                new_fingerprint="ids",  # saves hashing the tokenizer; the cache is not used again
                desc="tokenise",
            )
            for batch in ids.with_format("arrow").iter(1000):
                for chunk in batch["ids"].chunks:
                    tokens = chunk.flatten().to_numpy()
                    if tokens.max() >= encoding.vocab_size:
                        raise GrowthError(
                            f"the tokenizer gives the id {tokens.max()}",
                            why=f"its vocabulary has {encoding.vocab_size} tokens",
                            fix="choose another tokenizer",
                        )
                    if encoding.unknown is not None:
                        unknown += int((tokens == encoding.unknown).sum())
                    tokens.tofile(file)
                lengths = batch["ids"].combine_chunks().value_lengths().to_numpy()
                ends.append(total + np.cumsum(lengths, dtype=np.int64))
                sources.append(batch["source"].to_numpy())
                total = int(ends[-1][-1])
    nothing = np.empty(0, np.int64)
    return TokenFile(path, np.concatenate([nothing, *ends]), np.concatenate([nothing, *sources]), dtype, unknown)


def pack(file: TokenFile, seq_len: int, names: list[str], folder: Path, num_proc: int) -> Dataset:
    """Cut tokens into overlapping blocks: block i is tokens ``[i * seq_len, (i + 1) * seq_len]``, both included.

    Returns:
        A dataset with the columns ``input_ids`` (fixed length ``seq_len + 1``) and ``source`` (of the first token).
    """
    from datasets import ClassLabel, Dataset, Features, List, Value

    count = file.blocks(seq_len)
    features = Features({"input_ids": List(Value(file.dtype), length=seq_len + 1), "source": ClassLabel(names=names)})
    if not count:
        return Dataset.from_dict({"input_ids": [], "source": []}, features=features)
    starts = np.arange(count, dtype=np.int64) * seq_len
    first = file.sources[np.searchsorted(file.ends, starts, side="right")]
    table = Dataset.from_dict({"start": starts, "source": first}).with_format("numpy")
    blocks = table.map(
        _cut,
        batched=True,
        batch_size=4096,
        writer_batch_size=4096,
        num_proc=_workers(num_proc, count),
        fn_kwargs={"path": file.path, "dtype": file.dtype, "seq_len": seq_len, "features": features},
        remove_columns=["start"],
        features=features,
        cache_file_name=str(folder / "blocks.arrow"),
        new_fingerprint="blocks",
        desc="pack",
    )
    return blocks.with_format(None)


def _encode(batch: dict[str, list[Any]], tokenizer: Tokenizer, eos: int, names: list[str], dtype: str) -> Any:
    # An end-of-text token that is spelled out in a text is text, not the end of a document. Set here because the
    # setting is lost when the tokenizer is sent to another process.
    tokenizer.encode_special_tokens = True
    encoded = tokenizer.encode_batch_fast([text.removeprefix(MARK) for text in batch["text"]], add_special_tokens=False)
    ids = [np.array([*encoding.ids, eos], dtype=dtype) for encoding in encoded]
    return {"ids": ids, "source": list(map(_known(names), batch["source"]))}


def _cut(batch: dict[str, Any], path: Path, dtype: str, seq_len: int, features: Features) -> Any:
    import pyarrow as pa

    tokens = np.memmap(path, dtype, "r")
    window = batch["start"][:, None] + np.arange(seq_len + 1)
    flat = pa.array(tokens[window].reshape(-1))
    columns = [pa.FixedSizeListArray.from_arrays(flat, seq_len + 1), pa.array(batch["source"], pa.int64())]
    return pa.table(columns, schema=features.arrow_schema)


def _texts(documents: Dataset) -> Iterator[list[str | None]]:
    for batch in documents.select_columns(["text"]).with_format("arrow").iter(1000):
        try:
            yield batch["text"].to_pylist()
        except UnicodeDecodeError:  # in a file of the hub; local files are checked as they are read
            yield [_text(value) for value in batch["text"]]


def _text(value: Any) -> str | None:
    try:
        text: str | None = value.as_py()
    except UnicodeDecodeError:
        return None
    return text


def _workers(num_proc: int, rows: int) -> int | None:
    """Return the number of processes; None for this process alone, in which the tokenizer has its own threads."""
    wanted = min(num_proc, rows)
    return wanted if wanted > 1 else None
