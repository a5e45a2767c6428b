"""Prepare a folder of packed blocks from text. The folder appears only when it is complete."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.checkpoints.tokenizer_folder import unknown_id
from phigrow.corpus.blocks import BlockArray
from phigrow.corpus.fingerprint import blocks_fingerprint
from phigrow.corpus.left_out import DUPLICATE, EMPTY, UNDECODABLE, LeftOut
from phigrow.corpus.metadata import FORMAT, METADATA_FILE, DataInfo, SplitInfo
from phigrow.corpus.packing import (
    Encoding,
    Indices,
    Selection,
    TokenFile,
    by_source,
    pack,
    select,
    source_names,
    tokenise,
)
from phigrow.corpus.rows import MARK
from phigrow.corpus.sources import EMBEDDED, load_documents
from phigrow.corpus.tokenizer import check_text, load_tokenizer, save_tokenizer, train_tokenizer
from phigrow.errors import GrowthError
from phigrow.files.atomic import atomic_json
from phigrow.files.output import writing
from phigrow.files.paths import user_path, utf8_path
from phigrow.files.staged_folder import staged_folder

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

BATCH_BYTES = 2**27
"""Most bytes of a piece of the packed blocks. Every rank keeps 1.7 KB for each piece that it maps into memory (measured
with 50,000 pieces), so the pieces of `datasets`, 1,000 blocks each, would take 1.2 GB a rank for 1.4T tokens."""
TRAINING_CHARACTERS = 200_000_000
"""Most characters that a tokenizer is trained on. Documents come in random order, so these are a random sample."""


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

    ``out`` then holds ``train/`` and ``heldout/`` (datasets with the columns ``input_ids``, of ``seq_len + 1`` ids, and
    ``source``), ``tokenizer/`` and ``data.json``. It is written under a hidden name and renamed at the end. The blocks
    depend on the text, the tokenizer, ``seq_len``, ``heldout`` and ``seed``. They do not depend on the order of the
    documents or on ``num_proc``.

    Args:
        ref, text_column, split, config, revision: the text, see `load_documents`.
        out: the folder to make.
        seq_len: tokens that a block predicts.
        tokenizer: a folder, file or name, see `load_tokenizer`; None trains one on the train documents.
        vocab_size: of the tokenizer that is trained, at most.
        heldout: the fraction of documents held out, at least one document; 0 holds out none.
        seed: of the split and the order.
        across_sources: pack the documents in one random order, so that a block holds several sources. By default
            documents of one source are packed together, so that sources can be mixed and measured separately.
        num_proc: processes that tokenise and pack.
        overwrite: replace packed blocks that exist in ``out``.
        progress: show the progress bars of `datasets`.

    Raises:
        GrowthError: the text or the tokenizer cannot be loaded, ``out`` exists, or a split has less than one block.

    >>> prepare("embedded", "data", seq_len=256).eos_token_id  # doctest: +SKIP
    0
    """
    _check(seq_len, heldout)
    folder = user_path(out).absolute()
    _check_output(folder, overwrite)
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
    with (
        writing(folder),
        staged_folder(folder) as made,
        utf8_path(made.parent) as work,
        _library_state(progress, num_proc),
    ):
        root, scratch = work / made.name, work / "scratch"
        scratch.mkdir()
        left_out = LeftOut()
        documents = load_documents(
            ref, text_column=text_column, split=split, config=config, revision=revision, cache_dir=scratch / "text",
            left_out=left_out,
        )  # fmt: skip
        info = _write(documents, left_out, given, root, scratch, folder, arguments, num_proc)
    return info


def _encoding(tokenizer: PreTrainedTokenizerBase) -> Encoding:
    import numpy as np
    from tokenizers import Tokenizer

    vocab_size = max(tokenizer.get_vocab().values()) + 1  # more than len() where ids have gaps
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    dtype = "uint16" if vocab_size <= np.iinfo(np.uint16).max + 1 else "uint32"
    eos, unknown = int(tokenizer.eos_token_id), unknown_id(tokenizer)
    return Encoding(copy, vocab_size, eos, None if unknown == eos else unknown, dtype)


def _write(
    documents: Dataset,
    left_out: LeftOut,
    given: PreTrainedTokenizerBase | None,
    root: Path,
    scratch: Path,
    folder: Path,
    arguments: dict[str, Any],
    num_proc: int,
) -> DataInfo:
    """Make the whole folder under ``root``, with temporary files in ``scratch``; ``folder`` is its final name."""
    try:
        chosen = select(documents, arguments["heldout"], arguments["seed"])
    except GrowthError as error:
        raise error.at(arguments["ref"]) from None
    left_out.update(chosen.left_out)
    sample = documents.select(chosen.train)
    tokenizer = train_tokenizer(_sample(sample), arguments["vocab_size"]) if given is None else given
    check_text(tokenizer, _sample(sample), arguments["ref"])
    save_tokenizer(tokenizer, root / "tokenizer")
    encoding = _encoding(tokenizer)
    names, rows = _ordered(documents, chosen, across_sources=arguments["across_sources"])
    files = {
        split: tokenise(documents.select(part), encoding, names, scratch / split, num_proc)
        for split, part in rows.items()
    }
    for split, tokens in files.items():
        _pack(split, tokens, root / split, scratch / split, names, arguments, num_proc)
    info = _describe(root, folder, files, names, left_out, encoding, arguments)
    atomic_json(root / METADATA_FILE, {key: value for key, value in asdict(info).items() if key != "folder"}, indent=2)
    return info


def _ordered(documents: Dataset, chosen: Selection, *, across_sources: bool) -> tuple[list[str], dict[str, Indices]]:
    """Return the names of all sources, and the rows of both splits in the order in which they are packed."""
    import numpy as np

    names = source_names(documents, np.concatenate([chosen.train, chosen.heldout]))
    rows = {"train": chosen.train, "heldout": chosen.heldout}
    if not across_sources and len(names) > 1:
        rows = {split: by_source(documents, part, names) for split, part in rows.items()}
    return names, rows


def _pack(
    split: str,
    tokens: TokenFile,
    folder: Path,
    scratch: Path,
    names: list[str],
    arguments: dict[str, Any],
    num_proc: int,
) -> None:
    """Pack one split into a folder.

    Raises:
        GrowthError: the split has less than one block of text, but should have some.
    """
    seq_len = arguments["seq_len"]
    if not tokens.blocks(seq_len) and (split == "train" or arguments["heldout"]):
        raise GrowthError(
            f"the {split} text is too short for one block",
            where=arguments["ref"],
            why=f"it has {tokens.tokens} tokens in {len(tokens.ends)} documents, and a block takes {seq_len + 1}",
            fix="choose a smaller seq_len, give more text, or change the held-out fraction (0 holds out none)",
        )
    blocks = pack(tokens, seq_len, names, scratch, num_proc)
    # Few large files, because training maps each into memory. An empty split needs one file too.
    shards = {"max_shard_size": "2GB"} if len(blocks) else {"num_shards": 1}
    with _record_batches(max(1000, BATCH_BYTES // (4 * (seq_len + 1)))):
        blocks.save_to_disk(folder, **shards)


def _describe(
    root: Path,
    folder: Path,
    files: dict[str, TokenFile],
    names: list[str],
    left_out: LeftOut,
    encoding: Encoding,
    arguments: dict[str, Any],
) -> DataInfo:
    """Return the metadata of the packed blocks in ``root``."""
    seq_len = arguments["seq_len"]
    splits = {split: _split_info(tokens, seq_len, names) for split, tokens in files.items()}
    seen = sum(part.tokens_seen for part in splits.values())
    dropped = sum(part.dropped_tokens for part in splits.values())
    return DataInfo(
        folder=folder,
        format_version=FORMAT,
        seq_len=seq_len,
        vocab_size=encoding.vocab_size,
        eos_token_id=encoding.eos,
        dtype=encoding.dtype,
        train=splits["train"],
        heldout=splits["heldout"],
        sources=_add(splits["train"].sources, splits["heldout"].sources),
        skipped={reason: left_out.counts.get(reason, 0) for reason in (EMPTY, UNDECODABLE, DUPLICATE)},
        left_out=left_out.as_dict(),
        unknown_tokens=sum(tokens.unknown for tokens in files.values()),
        packing_efficiency=(seen - dropped) / seen,
        dropped_tokens=dropped,
        fingerprint=_fingerprint(root),
        content_fingerprint=blocks_fingerprint(
            BlockArray(root / "train"),
            BlockArray(root / "heldout"),
            seq_len,
            (root / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"),
        ),
        versions=_versions(),
        arguments=arguments,
    )


def _sample(documents: Dataset) -> Iterator[str]:
    left = TRAINING_CHARACTERS
    for batch in documents.select_columns(["text"]).with_format("arrow").iter(1000):
        for marked in batch["text"].to_pylist():
            text = marked.removeprefix(MARK)
            if left <= 0:
                return
            left -= len(text)
            yield text


def _split_info(file: TokenFile, seq_len: int, names: list[str]) -> SplitInfo:
    blocks = file.blocks(seq_len)
    kept = blocks * seq_len + 1 if blocks else 0
    return SplitInfo(
        documents=len(file.ends),
        blocks=blocks,
        tokens=kept,
        tokens_seen=file.tokens,
        dropped_tokens=file.tokens - kept,
        documents_cut=file.cut(seq_len),
        sources=file.count(names),
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
        raise GrowthError(f"seq_len is {seq_len}", why="a block predicts at least one token", fix="choose seq_len >= 1")
    if not 0 <= heldout < 1:
        raise GrowthError(
            f"heldout is {heldout}",
            why="it is the fraction of documents that are held out",
            fix="choose 0 <= heldout < 1",
        )


def _check_output(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / METADATA_FILE).is_file():
        # Never replaced, even with overwrite: the files are the user's.
        raise GrowthError(
            "the output folder holds other files than packed blocks",
            where=str(out),
            why="phigrow does not replace them",
            fix="choose another --out",
        )
    if not overwrite:
        raise GrowthError(
            "the output folder holds packed blocks already",
            where=str(out),
            why="phigrow replaces them only if you ask for it",
            fix="choose another --out, or add --overwrite",
        )


@contextmanager
def _record_batches(rows: int) -> Iterator[None]:
    """Let `datasets` write so many rows at a time within a context; `save_to_disk` has no argument for it."""
    from datasets import config

    former = config.DEFAULT_MAX_BATCH_SIZE
    config.DEFAULT_MAX_BATCH_SIZE = rows
    try:
        yield
    finally:
        config.DEFAULT_MAX_BATCH_SIZE = former


@contextmanager
def _library_state(progress: bool, num_proc: int) -> Iterator[None]:
    """Within a context, set the progress bars of `datasets` and turn off tokenizer threads in forked processes."""
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
