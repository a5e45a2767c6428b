"""The data of a run: folders of blocks, mixtures of them, or a stream; and what records say of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.training.configuration import RunConfig
from phigrow.training.feed import BlockFeed, Feed, LaterFeed, StreamFeed
from phigrow.training.process import World, on_rank_zero


def load_data(config: RunConfig, out: Path, world: World) -> Any:
    """Open the data of a run, on every rank; without ``data`` rank 0 prepares the embedded corpus first.

    Raises:
        GrowthError: folders that cannot be read or do not fit together.
    """
    from phigrow import corpus

    if config.stream is not None:
        opened = corpus.open_stream(corpus.stream_settings(config.stream), config.seq_len)
        return dataclasses.replace(opened, tokenizer_dir=out / "tokenizer")
    if isinstance(config.data, dict):
        return corpus.mix_folders(config.data)
    folder = Path(config.data) if config.data else out.parent / f"data-embedded-{config.seq_len}"
    if config.data is None and not on_rank_zero(world, folder.is_dir):
        if world.first:
            print(f"preparing the embedded corpus in {folder}", flush=True)
        on_rank_zero(world, lambda: bool(corpus.prepare("embedded", folder, seq_len=config.seq_len, progress=False)))
    blocks = corpus.load_blocks(folder)
    return blocks if config.mixture is None else corpus.mix_sources(blocks, config.mixture)


def check_tokenizer(checkpoint: Path, blocks: Any) -> None:
    """Refuse data of another tokenizer than that of a checkpoint's folder, where both have one.

    Raises:
        GrowthError: an id means one thing to the model and another in the data; a tokenizer that cannot be read.
    """
    from phigrow.corpus.tokenizer import same_tokens

    theirs = checkpoint / "tokenizer.json"
    if not theirs.is_file():
        return
    if blocks.train is None:
        own, name = blocks.tokenizer.backend_tokenizer.to_str(), "the stream's tokenizer"
    elif blocks.tokenizer_dir is not None and (path := Path(blocks.tokenizer_dir) / theirs.name).is_file():
        own, name = path.read_text(encoding="utf-8"), str(path)
    else:
        return
    where = f"{name}, and {theirs}"
    if not same_tokens(theirs.read_text(encoding="utf-8"), own, where):
        raise GrowthError(
            "the data was prepared with another tokenizer",
            where=where,
            why="one token id stands for two different tokens",
            fix=f"prepare it with --tokenizer {checkpoint}",
        )


def make_feed(config: RunConfig, blocks: Any, first: int = 0) -> Feed:
    """Return what the steps of a run are read from, which begins at a step ``first`` of the data's order.

    Raises:
        GrowthError: there is nothing to train on.
    """
    if blocks.train is not None and len(blocks.train) == 0:
        raise GrowthError("there are no blocks to train on", where=str(config.data), fix="prepare more text")
    kind = StreamFeed if blocks.train is None else BlockFeed
    feed = kind(blocks, config.seed, config.batch)
    return LaterFeed(feed, first) if first else feed


def keep_tokenizer(blocks: Any) -> None:
    """Save the tokenizer of a stream in the folder of its run, for the export; packed folders have theirs."""
    if blocks.train is None:
        blocks.tokenizer.save_pretrained(blocks.tokenizer_dir)


def data_keys(blocks: Any) -> dict[str, Any]:
    """Return the properties of the data on which the loss curve depends; a resumed run must have the same."""
    curve: dict[str, Any] = {"data_fingerprint": blocks.fingerprint}
    if blocks.mixture:
        curve["mixture"] = {source.name: source.weight for source in blocks.mixture}
    return curve


def data_info(blocks: Any, feed: Feed) -> dict[str, Any]:
    """Return what the ``run`` record says of the data.

    ``packing`` counts train text: ``efficiency`` is the share of its tokens that are in blocks, all of which have a
    loss; ``documents_cut`` the documents that a border between blocks cuts.
    """
    info: dict[str, Any] = {
        "data_fingerprint": blocks.fingerprint,
        "train_blocks": None if blocks.train is None else len(blocks.train),
        "heldout_blocks": len(blocks.heldout),
    }
    train = blocks.info.get("train")
    if train:
        seen, dropped = train["tokens_seen"], train["dropped_tokens"]
        info["packing"] = {
            "efficiency": (seen - dropped) / seen if seen else None,
            "dropped_tokens": dropped,
            "documents": train["documents"],
            "documents_cut": train.get("documents_cut"),
        }
    if blocks.mixture:
        total = sum(source.weight for source in blocks.mixture)
        info["sources"] = {
            source.name: {
                "weight": source.weight / total,
                "tokens": None if blocks.train is None else len(source.train) * blocks.seq_len,
            }
            for source in blocks.mixture
        }
    elif train and len(train.get("sources", {})) > 1:
        info["sources"] = {name: {"tokens": source["tokens"]} for name, source in train["sources"].items()}
    return info


def data_line(config: RunConfig, blocks: Any, feed: Feed) -> str:
    """Return the words with which a run's opening describes its data."""
    many = "a stream of blocks" if blocks.train is None else f"{len(blocks.train):,} blocks"
    text = f"data: {many} of {blocks.seq_len} tokens, {len(blocks.heldout):,} held out"
    if blocks.mixture:
        total = sum(source.weight for source in blocks.mixture)
        epochs = feed.epochs(config.steps) or {}
        parts = [
            f"{s.weight / total:.1%} {s.name}" + (f" ({epochs[s.name]:.2f} epochs)" if s.name in epochs else "")
            for s in blocks.mixture
        ]
        text += f"; mixed: {', '.join(parts)}"
        if empty := [source.name for source in blocks.mixture if not len(source.heldout)]:
            text += f"; nothing held out of {', '.join(empty)}"
    return text
