"""The data of a run: folders of blocks, mixtures of them, or a stream; and its description for records."""

from __future__ import annotations

import dataclasses
import secrets
from pathlib import Path
from typing import Any

from phigrow.corpus.blocks import DataSource
from phigrow.corpus.exchange import TokenExchange, exchange_folder
from phigrow.corpus.feed import Feed, LaterFeed
from phigrow.corpus.order import Part
from phigrow.corpus.splits import relative_weights
from phigrow.errors import GrowthError
from phigrow.training.configuration import RunConfig
from phigrow.training.process import World, gather_objects, on_rank_zero

EMBEDDED = "embedded"
"""Value of ``data`` for the embedded corpus. A folder of this name takes precedence."""


def check_data(config: RunConfig) -> None:
    """Refuse a run that names no text. Only the demonstration trains on the embedded corpus unasked.

    Raises:
        GrowthError: neither ``data`` nor ``stream`` is set, and the model is not the demo's.
    """
    if config.data is None and config.stream is None and not config.is_demo:
        raise GrowthError(
            "the run has no text to train on",
            where="data",
            why="neither data nor stream is set",
            fix="give data: <folder written by 'phigrow data'>, or data: embedded for the documentation of Python",
        )


def load_data(config: RunConfig, out: Path, world: World) -> DataSource:
    """Open the data of a run on every rank; rank 0 prepares the embedded corpus first, where the run reads it.

    Raises:
        GrowthError: folders cannot be read or do not fit together.
    """
    from phigrow import corpus

    if config.stream is not None:
        opened = corpus.open_stream(corpus.stream_settings(config.stream), config.seq_len)
        if (exchange := token_exchange(world)) is not None:
            opened.share_work(exchange)
        return dataclasses.replace(opened, tokenizer_dir=out / "tokenizer")
    if isinstance(config.data, dict):
        for mixed in config.data:
            _check(mixed, world)
        return corpus.mix_folders(config.data)
    embedded = config.data is None or (config.data == EMBEDDED and not Path(EMBEDDED).is_dir())
    folder = out.parent / f"data-embedded-{config.seq_len}" if embedded else Path(str(config.data))
    if embedded and not on_rank_zero(world, folder.is_dir):
        if world.first:
            print(f"preparing the embedded corpus in {folder}", flush=True)
        on_rank_zero(world, lambda: bool(corpus.prepare("embedded", folder, seq_len=config.seq_len, progress=False)))
    _check(folder, world)
    blocks = corpus.load_blocks(folder)
    return blocks if config.mixture is None else corpus.mix_sources(blocks, config.mixture)


def token_exchange(world: World) -> TokenExchange | None:
    """Return the exchange of tokens among the ranks of this host; None if it has one rank, or they share no folder.

    Every rank must call it. Hosts may have unequal numbers of ranks, so a rank that is alone joins the collectives too.
    """
    if all(size == 1 for size in gather_objects(world, world.local_size)):
        return None
    token = on_rank_zero(world, lambda: secrets.token_hex(8))
    exchange = None
    if world.local_size > 1:
        exchange = TokenExchange(exchange_folder(token), world.local_rank, world.local_size)
    gather_objects(world, None)  # all have made their folders
    if all(gather_objects(world, exchange is None or exchange.is_complete())):
        return exchange
    if exchange is not None:
        exchange.close()
    return None


def _check(folder: str | Path, world: World) -> None:
    """Refuse packed blocks that have changed since they were packed. Rank 0 reads them."""
    from phigrow.corpus.blocks import load_blocks
    from phigrow.corpus.fingerprint import check_content

    on_rank_zero(world, lambda: check_content(load_blocks(folder)))


def restricted(config: RunConfig, blocks: DataSource) -> DataSource:
    """Return the data of a run with its ``data_part`` and ``eval_part``.

    Raises:
        GrowthError: the part of the held-out blocks is empty.
    """
    parts = {}
    if config.data_part is not None:
        parts["train_part"] = Part(*config.data_part)
    if config.eval_part is not None:
        parts["heldout_part"] = Part(*config.eval_part)
    out = dataclasses.replace(blocks, **parts)  # type: ignore[type-var]
    if config.eval_part is not None and not out.describe()["heldout_blocks"]:
        raise GrowthError(
            f"The part {out.heldout_part} of the {len(out.heldout):,} held-out blocks is empty.",
            where=f"eval_part, {config.stream or config.data or 'the embedded corpus'}",
            fix="Choose a larger part, or hold out more text.",
        )
    return out


def check_tokenizer(checkpoint: Path, blocks: DataSource) -> None:
    """Refuse data whose tokenizer differs from the checkpoint's, if both have one.

    Raises:
        GrowthError: an id stands for different tokens in the model and in the data, or a tokenizer cannot be read.
    """
    from phigrow.corpus.tokenizer import same_tokens

    path = checkpoint / "tokenizer.json"
    if not path.is_file() or (of_data := blocks.tokenizer_json()) is None:
        return
    content, name = of_data
    where = f"{name}, and {path}"
    if not same_tokens(path.read_text(encoding="utf-8"), content, where):
        raise GrowthError(
            "the data was prepared with another tokenizer",
            where=where,
            why="one token id stands for two different tokens",
            fix=f"prepare the data with 'phigrow data --tokenizer {checkpoint}'",
        )


def make_feed(config: RunConfig, blocks: DataSource, first: int = 0) -> Feed:
    """Return the feed of a run, whose first batch is the one of step ``first`` in the order of the data.

    Raises:
        GrowthError: the data has no training blocks.
    """
    feed = blocks.make_feed(config.seed, config.batch)
    return LaterFeed(feed, first) if first else feed


def data_keys(blocks: DataSource) -> dict[str, Any]:
    """Return the properties of the data on which the loss curve depends; a resumed run must have the same."""
    curve: dict[str, Any] = {"data_fingerprint": blocks.fingerprint}
    if blocks.mixture:
        curve["mixture"] = {source.name: source.weight for source in blocks.mixture}
    return curve


def data_line(config: RunConfig, blocks: DataSource, feed: Feed) -> str:
    """Return the line about the data that a run prints when it starts."""
    described = blocks.describe()
    count = described["train_blocks"]
    many = "a stream of blocks" if count is None else f"{count:,} blocks"
    text = f"data: {many} of {blocks.seq_len} tokens, {described['heldout_blocks']:,} held out"
    for name, setting in (("data_part", config.data_part), ("eval_part", config.eval_part)):
        text += f", {name} {','.join(map(str, setting))}" if setting else ""
    if blocks.mixture:
        epochs = feed.epochs(config.steps) or {}
        parts = [
            f"{weight:.1%} {name}" + (f" ({epochs[name]:.2f} epochs)" if name in epochs else "")
            for name, weight in relative_weights(blocks.mixture).items()
        ]
        text += f"; mixed: {', '.join(parts)}"
        if empty := [source.name for source in blocks.mixture if not len(source.heldout)]:
            text += f"; nothing held out of {', '.join(empty)}"
    return text
