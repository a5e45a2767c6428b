"""Text to a folder of packed blocks, complete or not there."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.corpus.blocks import BlockArray
from phigrow.corpus.metadata import FACTS, FORMAT, DataInfo, SplitInfo
from phigrow.corpus.packing import Stream, by_source, pack, select, source_names, tokenise
from phigrow.corpus.sources import EMBEDDED, load_documents
from phigrow.corpus.tokenizer import load_tokenizer, train_tokenizer
from phigrow.errors import GrowthError
from phigrow.files.output import writing

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TRAINING_CHARACTERS = 200_000_000
"""Text a tokenizer is trained on at most. The documents come in random order: it is a fair sample of them."""


def prepare(
    ref: str | Path = EMBEDDED,
    out: str | Path = "data",
    *,
    seq_len: int = 256,
    tokenizer: str | Path | None = None,
    vocab_size: int = 4096,
    heldout: float = 0.05,
    seed: int = 0,
    across_sources: bool = False,
    text_column: str = "text",
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    num_proc: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> DataInfo:
    """Turn text into packed token blocks: deduplicate, split by document, shuffle, tokenise, pack by source, save.

    ``out`` then holds ``train/`` and ``heldout/`` (datasets of input_ids, ``seq_len + 1`` ids, and source),
    ``tokenizer/`` and ``data.json``. It is written beside its place and renamed at the end: complete or not there.
    The blocks depend on the text, the tokenizer, ``seq_len``, ``heldout`` and ``seed``; neither on the order of the
    documents nor on ``num_proc``.

    Args:
        ref, text_column, split, config, revision: what to read, see `load_documents`.
        out: the folder to make.
        seq_len: tokens a block predicts.
        tokenizer: a folder, file or name, see `load_tokenizer`; None trains one on the train documents.
        vocab_size: of the tokenizer that is trained, at most.
        heldout: the fraction of documents held out, at least one document; 0 holds out none.
        seed: of the split and the order.
        across_sources: pack the documents in one random order, so that a block holds several sources. By default those
            of a source come together: its blocks are its own, but for the one at each border, and can be mixed and
            measured apart.
        num_proc: processes that tokenise and pack.
        overwrite: replace the packed blocks that are there.
        progress: show the progress bars of `datasets`.

    Raises:
        GrowthError: the text or the tokenizer cannot be had, ``out`` is taken, or there is less than one block.

    >>> prepare("embedded", "data", seq_len=256).eos_token_id  # doctest: +SKIP
    0
    """
    _check(seq_len, heldout)
    place = Path(out).expanduser().absolute()
    _check_place(place, overwrite)
    arguments = {
        "ref": str(ref),
        "seq_len": seq_len,
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "vocab_size": vocab_size,
        "heldout": heldout,
        "seed": seed,
        "across_sources": across_sources,
        "text_column": text_column,
        "split": split,
        "config": config,
        "revision": revision,
    }
    given = None if tokenizer is None else load_tokenizer(tokenizer)  # before minutes of reading
    with writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".partial", dir=place.parent))
    try:
        with _library_state(progress, num_proc):
            documents = load_documents(
                ref, text_column=text_column, split=split, config=config, revision=revision, cache_dir=staging / "text"
            )
            info = _write(documents, given, staging, place, arguments, num_proc)
        _move(staging, place)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return info


def _write(
    documents: Dataset,
    given: PreTrainedTokenizerBase | None,
    staging: Path,
    place: Path,
    arguments: dict[str, Any],
    num_proc: int,
) -> DataInfo:
    """Make everything under ``staging/data``; the rest of ``staging`` is scratch."""
    import numpy as np
    from tokenizers import Tokenizer

    root = staging / "data"
    root.mkdir()
    seq_len, heldout = arguments["seq_len"], arguments["heldout"]
    chosen = select(documents, heldout, arguments["seed"])
    tokenizer: Any = given
    if tokenizer is None:
        tokenizer = train_tokenizer(_sample(documents.select(chosen.train)), arguments["vocab_size"])
    tokenizer.save_pretrained(root / "tokenizer")
    vocab_size = max(tokenizer.get_vocab().values()) + 1  # more than len() where ids have gaps
    eos = int(tokenizer.eos_token_id)
    dtype = "uint16" if vocab_size <= np.iinfo(np.uint16).max + 1 else "uint32"
    rust = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy: its settings are changed
    rust.no_padding()
    rust.no_truncation()

    names = source_names(documents, np.concatenate([chosen.train, chosen.heldout]))
    rows = {"train": chosen.train, "heldout": chosen.heldout}
    if not arguments["across_sources"] and len(names) > 1:
        rows = {name: by_source(documents, part, names) for name, part in rows.items()}
    parts = {name: documents.select(part) for name, part in rows.items()}
    streams = {name: tokenise(part, rust, eos, names, staging / name, dtype, num_proc) for name, part in parts.items()}
    for name, stream in streams.items():
        if not stream.blocks(seq_len) and (name == "train" or heldout):
            raise GrowthError(
                f"too little {name} text for one block",
                where=arguments["ref"],
                why=f"{stream.tokens} tokens in {len(stream.ends)} documents; a block takes {seq_len + 1}",
                fix="choose a smaller seq_len, give more text, or change the held-out fraction (0 holds out none)",
            )
        blocks = pack(stream, seq_len, names, staging / name, num_proc)
        # Few large files: every file is one memory map in training. No blocks need one too, or they cannot be loaded.
        shards = {"max_shard_size": "2GB"} if len(blocks) else {"num_shards": 1}
        blocks.save_to_disk(root / name, **shards)

    splits = {name: _split_info(stream, seq_len, names) for name, stream in streams.items()}
    seen = sum(part.tokens_seen for part in splits.values())
    dropped = sum(part.dropped_tokens for part in splits.values())
    info = DataInfo(
        folder=place,
        format_version=FORMAT,
        seq_len=seq_len,
        vocab_size=vocab_size,
        eos_token_id=eos,
        dtype=dtype,
        train=splits["train"],
        heldout=splits["heldout"],
        sources=_add(splits["train"].sources, splits["heldout"].sources),
        skipped=chosen.skipped,
        packing_efficiency=(seen - dropped) / seen,
        dropped_tokens=dropped,
        fingerprint=_fingerprint(root),
        versions=_versions(),
        arguments=arguments,
    )
    facts = {key: value for key, value in asdict(info).items() if key != "folder"}
    (root / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return info


def _sample(documents: Dataset) -> Iterator[str]:
    left = TRAINING_CHARACTERS
    for batch in documents.select_columns(["text"]).with_format("arrow").iter(1000):
        for text in batch["text"].to_pylist():
            if left <= 0:
                return
            left -= len(text)
            yield text


def _split_info(stream: Stream, seq_len: int, names: list[str]) -> SplitInfo:
    blocks = stream.blocks(seq_len)
    kept = blocks * seq_len + 1 if blocks else 0
    return SplitInfo(
        documents=len(stream.ends),
        blocks=blocks,
        tokens=kept,
        tokens_seen=stream.tokens,
        dropped_tokens=stream.tokens - kept,
        documents_cut=stream.cut(seq_len),
        sources=stream.count(names),
    )


def _add(left: dict[str, dict[str, int]], right: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    none = {"documents": 0, "tokens": 0}
    names = sorted({*left, *right})
    return {name: {key: left.get(name, none)[key] + right.get(name, none)[key] for key in none} for name in names}


def _fingerprint(root: Path) -> str:
    digest = hashlib.sha256()
    for name in ("train", "heldout"):
        blocks = BlockArray(root / name)
        digest.update(f"{name} {len(blocks)}\n".encode())
        for part in blocks.parts:
            digest.update(f"{part.dtype}\n".encode() if part is blocks.parts[0] else b"")
            digest.update(part.data)
    digest.update((root / "tokenizer" / "tokenizer.json").read_bytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    libraries = ("datasets", "tokenizers", "transformers", "pyarrow", "numpy")
    # Python too: the embedded corpus is that of its version.
    return {"python": platform.python_version(), **{name: version(name) for name in libraries}}


def _check(seq_len: int, heldout: float) -> None:
    if seq_len < 1:
        raise GrowthError(f"seq_len {seq_len}", fix="a block predicts at least one token")
    if not 0 <= heldout < 1:
        raise GrowthError(f"heldout {heldout}", fix="choose a fraction of the documents, 0 <= heldout < 1")


def _check_place(place: Path, overwrite: bool) -> None:
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    if not (place / FACTS).is_file():
        # Never replaced, even with overwrite: it is something else of the user's.
        raise GrowthError("the output is taken", where=str(place), why="it is not packed blocks", fix="another --out")
    if not overwrite:
        raise GrowthError(
            "packed blocks are there already", where=str(place), fix="choose another --out, or replace it: --overwrite"
        )


def _move(staging: Path, place: Path) -> None:
    old = staging / "old"
    if place.exists():
        place.rename(old)
    try:
        (staging / "data").rename(place)
    except OSError:
        if old.exists():
            old.rename(place)
        raise


@contextmanager
def _library_state(progress: bool, num_proc: int) -> Iterator[None]:
    """Bars as wanted, and no threads of the tokenizer in forked processes; then everything as it was."""
    import datasets

    silenced = not progress and not datasets.are_progress_bars_disabled()
    threads = os.environ.get("TOKENIZERS_PARALLELISM")
    try:
        if silenced:
            datasets.disable_progress_bars()
        if num_proc > 1:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        yield
    finally:
        if silenced:
            datasets.enable_progress_bars()
        if num_proc > 1:
            if threads is None:
                del os.environ["TOKENIZERS_PARALLELISM"]
            else:
                os.environ["TOKENIZERS_PARALLELISM"] = threads
