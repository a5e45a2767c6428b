"""Read, tokenise and pack text that does not fit on disk. Positions in the text can be saved and restored."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from phigrow.checkpoints.hub import NO_NETWORK
from phigrow.corpus.blocks import describe_heldout
from phigrow.corpus.exchange import TokenExchange
from phigrow.corpus.feed import Feed, Position, StreamFeed
from phigrow.corpus.left_out import EMPTY, UNDECODABLE, LeftOut
from phigrow.corpus.mixture import checked_weights
from phigrow.corpus.order import WHOLE, Part
from phigrow.corpus.rows import MARK
from phigrow.corpus.sources import local_files, stream_documents
from phigrow.corpus.splits import MixedSource, relative_weights
from phigrow.corpus.tokenizer import check_text, load_tokenizer, save_tokenizer
from phigrow.errors import GrowthError, MachineError
from phigrow.files.paths import user_path

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

DOCUMENTS = 64
"""Number of documents that are tokenised at once."""

Tokens = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class StreamSource:
    """One source of a stream: its weight, and its text, as in `load_documents`."""

    name: str
    ref: str
    weight: float = 1.0
    text_column: str = "text"
    split: str = "train"
    config: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class StreamSettings:
    """Settings of a stream.

    Attributes:
        sources, tokenizer: of the text.
        heldout: number of first documents of each source that are held out.
        shuffle: number of blocks that are shuffled together.
    """

    sources: tuple[StreamSource, ...]
    tokenizer: str
    heldout: int = 200
    shuffle: int = 2048


def stream_settings(values: Mapping[str, Any]) -> StreamSettings:
    """Read the ``stream`` key of a recipe: the keys of one source, or ``sources``, which maps names to such keys.

    Raises:
        GrowthError: a key is unknown or missing, or a value is out of range.

    >>> stream_settings({"ref": "books.jsonl", "tokenizer": "phi-1_5"}).sources[0].name
    'books.jsonl'
    """
    given = dict(values)
    shared = {key: given.pop(key) for key in ("tokenizer", "heldout", "shuffle") if key in given}
    if "sources" in given:
        named = given.pop("sources")
        if given or not isinstance(named, dict) or not all(isinstance(each, dict) for each in named.values()):
            raise GrowthError(
                "the sources of the stream cannot be read",
                where="stream.sources",
                why=f"these keys belong inside the sources: {', '.join(given)}"
                if given
                else "they are not of the form {name: {ref: ..., weight: ...}}",
                fix="write {tokenizer: ..., sources: {web: {ref: ..., weight: 0.8}, code: {ref: ..., weight: 0.2}}}",
            )
        parts = {str(name): dict(each) for name, each in named.items()}
    else:
        parts = {user_path(str(given.get("ref", ""))).name: given}
    known = [each.name for each in fields(StreamSource) if each.name != "name"]
    for name, part in parts.items():
        if unknown := [key for key in part if key not in known]:
            fix = f"use one of {', '.join([*known, 'tokenizer', 'heldout', 'shuffle'])}"
            raise GrowthError(f"the stream has no key {unknown[0]!r}", where=f"stream, {name}", fix=fix)
        if not part.get("ref"):
            raise GrowthError(
                "the stream names no text",
                where=f"stream, {name}",
                why="ref is missing or empty",
                fix="set ref to a file, a folder or a dataset",
            )
    if not shared.get("tokenizer"):
        raise GrowthError(
            "the stream names no tokenizer",
            where="stream",
            why="tokenizer is missing or empty",
            fix="set tokenizer to a folder, a file or a name",
        )
    weights = checked_weights({name: part.get("weight", 1.0) for name, part in parts.items()}, "stream")
    for key, least in (("heldout", 0), ("shuffle", 1)):
        if key in shared and (type(shared[key]) is not int or shared[key] < least):
            raise GrowthError(
                f"{key} is {shared[key]!r}", where=f"stream.{key}", fix=f"give a whole number of at least {least}"
            )
    sources = [StreamSource(**{**parts[name], "name": name, "weight": weights[name]}) for name in sorted(parts)]
    return StreamSettings(tuple(sources), **shared)


class TokenStream:
    """The packed blocks of one source, epoch after epoch, from any position.

    Attributes:
        left_out: documents without text that were read since the stream was opened, each once.
        epoch_tokens: number of tokens of an epoch, once the text has started over and it is known.
        exchange: with the other ranks of this host, each of which tokenises a part; None to tokenise everything here.
        number: of this stream, which is another one for each stream of an exchange.
    """

    def __init__(
        self, source: StreamSource, tokenizer: PreTrainedTokenizerBase, fast: Tokenizer, seq_len: int, skip: int
    ) -> None:
        self.source, self.tokenizer, self.seq_len, self.skip = source, tokenizer, seq_len, skip
        self.eos, self._fast, self._checked = int(tokenizer.eos_token_id), fast, False
        self.left_out = LeftOut()
        self.epoch_tokens: int | None = None
        self.exchange: TokenExchange | None = None
        self.number = 0
        self._seeks = 0
        self._documents: Iterator[tuple[Position, Tokens]] | None = None
        self._pieces: list[tuple[Position, Tokens]] = []
        self._offset = 0
        self.seek({"epoch": 0, "dataset": None, "tokens": 0, "offset": 0})

    def seek(self, position: Position) -> None:
        """Go to a position. Text is read at the next `take`."""
        self._stop_reading()
        self._seeks += 1
        self._pieces, self._offset = [], int(position["offset"])
        # Positions saved by earlier versions do not count the tokens before them.
        before = position.get("tokens", 0 if position["dataset"] is None else None)
        self._documents = self._tokenised(position["epoch"], position["dataset"], before)

    def position(self) -> Position:
        """Return the position of the next block. The blocks from there on do not depend on those before it."""
        if not self._pieces:
            self._read()
        return {**self._pieces[0][0], "offset": self._offset}

    def take(self, blocks: int) -> Tokens:
        """Return the next blocks, uint32 ``[blocks, seq_len + 1]``; each shares one token with the next."""
        needed = self._offset + blocks * self.seq_len + 1
        while sum(len(ids) for _, ids in self._pieces) < needed:
            self._read()
        tokens = np.concatenate([ids for _, ids in self._pieces])[self._offset : needed]
        self._offset += blocks * self.seq_len
        while self._offset >= len(self._pieces[0][1]):
            self._offset -= len(self._pieces.pop(0)[1])
        starts = np.arange(blocks)[:, None] * self.seq_len
        packed: Tokens = tokens[starts + np.arange(self.seq_len + 1)]
        return packed

    def close(self) -> None:
        """Close the files, and end the exchange with other ranks."""
        self._stop_reading()
        if self.exchange is not None:
            self.exchange.close()

    def _stop_reading(self) -> None:
        if self._documents is not None:
            self._documents.close()  # type: ignore[attr-defined]
        self._documents = None

    def first(self) -> Tokens:
        """Return the tokens of the held-out documents, which are the first documents of the stream."""
        left_out = LeftOut()
        head = iter(stream_documents(**_load(self.source), left_out=left_out).take(self.skip))
        self.left_out.update(left_out)
        parts = []
        for texts in iter(lambda: self._texts(head), []):
            self._count(texts)
            parts.append(self._encode(texts))
        return np.concatenate([np.empty(0, np.uint32), *parts])

    def _read(self) -> None:
        assert self._documents is not None
        self._pieces.append(next(self._documents))

    def _texts(self, rows: Iterator[dict[str, str | None]], *, begun: bool = False) -> list[str | None]:
        """Return the texts of the next documents; ``begun`` if text before them was trained on."""
        try:
            return [row["text"] for row in itertools.islice(rows, DOCUMENTS)]
        except GrowthError:
            raise
        except Exception as error:  # of a format, the network, or the file system behind a name on the hub
            raise (MachineError if begun else GrowthError)(
                "the stream cannot be read",
                where=self.source.ref,
                why=f"{type(error).__name__}: {error}",
                fix="start the same command again, which resumes from the last checkpoint; if the same error appears, "
                "repair the data",
            ) from error

    def _tokenised(self, epoch: int, state: Any, tokens: int | None) -> Iterator[tuple[Position, Tokens]]:
        """Yield the tokens of `DOCUMENTS` documents at a time, each time with their position.

        Groups of documents are read in rounds of one for each rank that takes part in the exchange. An error of a round
        is raised after its groups.

        Args:
            epoch: of the first document.
            state: of the dataset there; None at its beginning.
            tokens: in the epoch before this document; None if their number is not known.
        """
        first, number = epoch, 0
        while True:
            begun = state is not None or epoch > 0
            with _interruptions_named(begun):
                documents = stream_documents(**_load(self.source))
            documents = documents.skip(self.skip) if self.skip else documents
            if state is not None:
                documents.load_state_dict(state)
            before = state
            rows = iter(documents)
            try:
                ended = False
                while not ended:
                    groups: list[tuple[Any, list[str | None]]] = []
                    failure: GrowthError | None = None
                    while len(groups) < (self.exchange.size if self.exchange else 1) and not ended:
                        try:
                            with _interruptions_named(begun):
                                texts = self._texts(rows, begun=begun)
                        except GrowthError as error:
                            failure, ended = error, True
                            break
                        ended = not texts
                        if texts:
                            begun = True
                            groups.append((before, texts))
                            before = documents.state_dict()
                    encoded = self._encoded([texts for _, texts in groups], number)
                    for (place, texts), ids in zip(groups, encoded, strict=True):
                        if epoch == first:
                            self._count(texts)
                        if len(ids):
                            yield {"epoch": epoch, "dataset": place, "tokens": tokens}, ids
                        tokens = None if tokens is None else tokens + len(ids)
                    number += len(groups)
                    if failure is not None:
                        raise failure
            finally:
                rows.close()
            if tokens == 0:
                raise GrowthError(
                    "the stream has no text to train on",
                    where=self.source.ref,
                    why=f"there is no text after the first {self.skip} documents, which are held out",
                    fix="hold out fewer documents with stream.heldout",
                )
            self.epoch_tokens = tokens or self.epoch_tokens
            epoch, state, tokens = epoch + 1, None, 0

    def _encoded(self, groups: list[list[str | None]], first: int) -> Iterator[Tokens]:
        """Yield the tokens of each group; ``first`` is the number of the first one since the last `seek`."""
        if self.exchange is None:
            yield from map(self._encode, groups)
            return
        own: dict[int, Tokens] = {}
        names = {number: f"{self.number}-{self._seeks}-{number}" for number in range(first, first + len(groups))}
        for number, texts in zip(names, groups, strict=True):
            self._check(_plain(texts))
            if self.exchange.is_mine(number):
                own[number] = self._encode(texts)
                self.exchange.give(names[number], own[number])
        for number, texts in zip(names, groups, strict=True):
            ids = own.pop(number) if number in own else self.exchange.take(names[number])
            yield self._encode(texts) if ids is None else ids

    def _count(self, texts: list[str | None]) -> None:
        """Count the documents without text."""
        self.left_out.add(UNDECODABLE, count=texts.count(None))
        self.left_out.add(EMPTY, count=len(texts) - len(_plain(texts)) - texts.count(None))
        self.left_out.add_marks(count=sum((text or "").startswith(MARK) for text in texts))

    def _check(self, kept: list[str]) -> None:
        """Check the tokenizer on the first text of the stream."""
        if kept and not self._checked:
            check_text(self.tokenizer, kept, self.source.ref)
            self._checked = True

    def _encode(self, texts: list[str | None]) -> Tokens:
        kept = _plain(texts)
        self._check(kept)
        encoded = self._fast.encode_batch_fast(kept, add_special_tokens=False)
        return np.array([token for each in encoded for token in (*each.ids, self.eos)], np.uint32)


def _plain(texts: list[str | None]) -> list[str]:
    """Return the texts that are not empty, without their mark."""
    plain = [None if text is None else text.removeprefix(MARK) for text in texts]
    return [text for text in plain if text and text.strip()]


@contextmanager
def _interruptions_named(begun: bool) -> Iterator[None]:
    """Raise a `MachineError` where the system or the network interrupts a read, if reading has ``begun``; a context.

    Before that, the same errors mostly come from a wrong name, which no later start repairs. Damaged text, such as a
    line that is no JSON, stays bad input.
    """
    try:
        yield
    except MachineError:
        raise
    except GrowthError as error:
        if not begun or not _is_interruption(error):
            raise
        raise MachineError(error.what, where=error.where, why=error.why, fix=error.fix) from error


def _is_interruption(error: BaseException) -> bool:
    """Return True if an error was raised from one of the operating system, with its number, or of the network."""
    each: BaseException | None = error
    while each is not None:
        numbered = isinstance(each, OSError) and each.errno is not None
        if numbered or NO_NETWORK & {kind.__name__ for kind in type(each).__mro__}:
            return True
        each = each.__cause__
    return False


class ShuffledStream:
    """A token stream with blocks that are shuffled in groups. The next group is read while one is in use."""

    def __init__(self, stream: TokenStream, size: int, seed: tuple[int, ...]) -> None:
        self.stream, self.size, self.seed = stream, size, seed
        self._current: Tokens | None = None
        self._next: list[Tokens] = []
        self._group = self._used = 0

    def seek(self, position: Position | None) -> None:
        """Go to a position, or to the beginning. The group at that position is read again."""
        if position is not None:
            self.stream.seek(position["start"])
        self._start = self.stream.position()
        self._group, self._used = (0, 0) if position is None else (position["group"], position["used"])
        self._current = self._shuffled(self.stream.take(self.size))
        self._after = self.stream.position()
        self._next = [self.stream.take(self._used)] if self._used else []

    def position(self) -> Position:
        """Return the position of the next block."""
        return {"group": self._group, "used": self._used, "start": self._start}

    def take(self, blocks: int) -> Tokens:
        """Return the next blocks, uint32 ``[blocks, seq_len + 1]``."""
        if self._current is None:
            self.seek(None)
        assert self._current is not None
        parts = [self._current[:0]]
        while blocks:
            count = min(blocks, self.size - self._used)
            parts.append(self._current[self._used : self._used + count])
            self._next.append(self.stream.take(count))
            self._used += count
            blocks -= count
            if self._used == self.size:
                self._group, self._used = self._group + 1, 0
                self._start, self._after = self._after, self.stream.position()
                self._current, self._next = self._shuffled(np.concatenate(self._next)), []
        return np.concatenate(parts)

    def close(self) -> None:
        """Close the files."""
        self.stream.close()

    @property
    def epoch_blocks(self) -> float | None:
        """Number of blocks of an epoch, once the text has started over and it is known."""
        tokens = self.stream.epoch_tokens
        return None if tokens is None else tokens / self.stream.seq_len

    @property
    def left_out(self) -> str:
        """One line on documents without text that were read; empty if there are none."""
        return str(self.stream.left_out)

    def _shuffled(self, blocks: Tokens) -> Tokens:
        return blocks[np.random.default_rng([*self.seed, self._group]).permutation(len(blocks))]


class HeldBlocks:
    """Held-out blocks in memory, with the source of each."""

    def __init__(self, parts: list[Tokens], names: list[str]) -> None:
        self.sources = names
        self._blocks = np.concatenate(parts)
        self._labels = np.repeat(np.arange(len(parts)), [len(part) for part in parts])

    def __len__(self) -> int:
        return len(self._blocks)

    def batch(self, indices: Any) -> npt.NDArray[np.int64]:
        """Return blocks as int64 ``[len(indices), seq_len + 1]``."""
        return self._blocks[np.asarray(indices, np.int64)].astype(np.int64)

    def source_of(self, indices: Any) -> npt.NDArray[np.int64]:
        """Return, for each block, the index into `sources`."""
        labels: npt.NDArray[np.int64] = self._labels[np.asarray(indices, np.int64)]
        return labels


@dataclass(frozen=True)
class StreamBlocks:
    """An open stream: held-out blocks, properties of the tokenizer, and one token stream for each source.

    ``mixture`` has the sources if there are several.
    """

    settings: StreamSettings
    heldout: HeldBlocks = field(repr=False)
    seq_len: int
    vocab_size: int
    eos_token_id: int
    fingerprint: str
    streams: tuple[TokenStream, ...] = field(repr=False)
    tokenizer: Any = field(repr=False)
    tokenizer_dir: Path | None = None
    mixture: tuple[MixedSource, ...] = ()
    heldout_part: Part = WHOLE

    def make_feed(self, seed: int, batch: int) -> Feed:
        """See `phigrow.corpus.blocks.DataSource`."""
        sources, size = self.settings.sources, self.settings.shuffle
        streams = [ShuffledStream(stream, size, (seed, key)) for key, stream in enumerate(self.streams)]
        return StreamFeed({source.name: source.weight for source in sources}, streams, seed, batch)

    def share_work(self, exchange: TokenExchange) -> None:
        """Let the ranks of this host tokenise for each other. Blocks and positions stay the same."""
        for number, stream in enumerate(self.streams):
            stream.exchange, stream.number = exchange, number

    def describe(self) -> dict[str, Any]:
        """See `phigrow.corpus.blocks.DataSource`."""
        info: dict[str, Any] = {
            "data_fingerprint": self.fingerprint,
            "train_blocks": None,
            **describe_heldout(self),
        }
        if self.mixture:
            weights = relative_weights(self.mixture)
            info["sources"] = {name: {"weight": weight, "tokens": None} for name, weight in weights.items()}
        return info

    def tokenizer_json(self) -> tuple[str, str] | None:
        """See `phigrow.corpus.blocks.DataSource`."""
        return self.tokenizer.backend_tokenizer.to_str(), "the stream's tokenizer"

    def save_tokenizer(self) -> None:
        """See `phigrow.corpus.blocks.DataSource`."""
        assert self.tokenizer_dir is not None, "a stream's tokenizer is saved in the folder of a run"
        save_tokenizer(self.tokenizer, self.tokenizer_dir)


def open_stream(settings: StreamSettings, seq_len: int) -> StreamBlocks:
    """Open a stream and read its held-out documents, the first ones of every source. No epoch trains on them.

    Raises:
        GrowthError: the text, its column or the tokenizer does not exist, or held-out documents do not fill a block.
    """
    from tokenizers import Tokenizer

    tokenizer = load_tokenizer(settings.tokenizer)
    eos = int(tokenizer.eos_token_id)
    rust = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    rust.no_padding()
    rust.no_truncation()
    rust.encode_special_tokens = True  # one that is spelled out in a text is text
    streams = tuple(TokenStream(source, tokenizer, rust, seq_len, settings.heldout) for source in settings.sources)
    parts = []
    for stream in streams:
        tokens = stream.first()
        count = max(0, (len(tokens) - 1) // seq_len)
        if settings.heldout and not count:
            raise GrowthError(
                "the held-out text is too short for one block",
                where=stream.source.ref,
                why=f"the first {settings.heldout} documents have {len(tokens)} tokens; a block takes {seq_len + 1}",
                fix="hold out more documents with stream.heldout, or 0 documents",
            )
        starts = np.arange(count)[:, None] * seq_len
        parts.append(tokens[starts + np.arange(seq_len + 1)] if count else np.empty((0, seq_len + 1), np.uint32))
    borders = np.cumsum([0, *map(len, parts)]).tolist()
    mixture = tuple(
        MixedSource(source.name, source.weight, range(0), range(borders[k], borders[k + 1]))
        for k, source in enumerate(settings.sources)
    )
    digest = hashlib.sha256(json.dumps([_identity(source) for source in settings.sources]).encode())
    digest.update(json.dumps([seq_len, settings.heldout, settings.shuffle, rust.to_str()]).encode())
    for part in parts:
        digest.update(part.tobytes())
    return StreamBlocks(
        settings=settings,
        heldout=HeldBlocks(parts, [source.name for source in settings.sources]),
        seq_len=seq_len,
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        eos_token_id=eos,
        fingerprint=digest.hexdigest(),
        streams=streams,
        tokenizer=tokenizer,
        mixture=mixture if len(mixture) > 1 else (),
    )


def _identity(source: StreamSource) -> dict[str, Any]:
    """Return the input of a fingerprint for a source. Local files enter with name and size, without their folder."""
    identity = asdict(source)
    if (files := local_files(source.ref, source.split, source.config)) is not None:
        identity["ref"] = [[file.name, file.stat().st_size] for file in files]
    return identity


def _load(source: StreamSource) -> dict[str, Any]:
    return {key: value for key, value in asdict(source).items() if key not in ("name", "weight")}
