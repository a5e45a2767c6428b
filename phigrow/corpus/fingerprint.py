"""Fingerprints of text and of packed blocks, by their content; what is large is sampled."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from phigrow.corpus.blocks import Blocks, DataSource
from phigrow.corpus.local_files import TRAIN
from phigrow.corpus.metadata import METADATA_FILE
from phigrow.corpus.sources import EMBEDDED, local_files
from phigrow.corpus.splits import Split
from phigrow.corpus.streaming import StreamBlocks
from phigrow.errors import GrowthError
from phigrow.files.fingerprint import BLOCKS, MISSING, SHOWN, file_fingerprint, json_fingerprint, spans

RUNS, RUN_BYTES = 256, 1 << 16
"""Number of runs of consecutive packed blocks that are read of each split, and the bytes of a run."""

MOST_BLOCKS = 1 << 12
"""Most sampled blocks of a folder of text, over all of its files. Beyond this number of files some are not opened."""


def data_fingerprint(source: DataSource) -> str | None:
    """Return the fingerprint of the text that a run reads.

    Packed blocks are read whole if they have up to 16 MiB a split. Of more, 256 evenly spaced runs of 64 KiB are read.
    The tokenizer counts too. Of a stream every local file is sampled, see `text_fingerprint`. Text on the hub is
    identified by its name and revision, which `DataSource.fingerprint` covers.

    Returns:
        The fingerprint; None if no local file is read.
    """
    if isinstance(source, StreamBlocks):
        texts = {each.name: text_fingerprint(each.ref, each.split, each.config) for each in source.settings.sources}
        return json_fingerprint(texts) if any(texts.values()) else None
    if not isinstance(source, Blocks) or not (source.folder / METADATA_FILE).is_file():
        return None
    tokenizer = source.tokenizer_json()
    return blocks_fingerprint(source.train, source.heldout, source.seq_len, tokenizer[0] if tokenizer else "")


def blocks_fingerprint(train: Split, heldout: Split, seq_len: int, tokenizer: str) -> str:
    """Return the fingerprint of packed blocks, as in `data_fingerprint`.

    Args:
        train, heldout: the splits.
        seq_len: tokens that a block predicts.
        tokenizer: the content of ``tokenizer.json``.
    """
    digest = hashlib.sha256()
    for split in (train, heldout):
        _add_blocks(digest, split, seq_len + 1)
    digest.update(tokenizer.encode())
    return digest.hexdigest()


def check_content(blocks: Blocks) -> None:
    """Refuse packed blocks that have changed since they were packed; folders of earlier releases cannot be checked.

    Raises:
        GrowthError: their fingerprint differs from the one in ``data.json``.
    """
    packed = blocks.info.get("content_fingerprint")
    if packed is None or (now := data_fingerprint(blocks)) in (None, packed):
        return
    raise GrowthError(
        "the packed blocks have changed since they were packed",
        where=str(blocks.folder),
        why=f"the fingerprint of their content is {str(now)[:SHOWN]}, and {METADATA_FILE} has {str(packed)[:SHOWN]}",
        fix="copy the folder again, or pack the text again with 'phigrow data --overwrite'",
    )


def _add_blocks(digest: hashlib._Hash, split: Split, width: int) -> None:
    """Hash the number of blocks of a split, and sampled ones."""
    digest.update(f"{len(split)}\n".encode())
    for first, end in spans(len(split), RUNS, max(1, RUN_BYTES // (4 * width))):
        for start in range(first, end, 4096):
            digest.update(split.batch(np.arange(start, min(end, start + 4096))).astype("<u4").tobytes())


def text_fingerprint(ref: str | Path, split: str = TRAIN, config: str | None = None) -> str | None:
    """Return the fingerprint of the local files of a text: the size of each, and sampled blocks. Names do not count.

    Args:
        ref, split, config: as in `find_files`.

    Returns:
        The fingerprint, `MISSING` if there are no such files, or None for a data set on the hub and for the embedded
        corpus.
    """
    if str(ref) == EMBEDDED:
        return None
    try:
        files = local_files(ref, split, config)
    except GrowthError:
        return MISSING
    if files is None:
        return None
    every = -(-len(files) // MOST_BLOCKS)
    blocks = max(1, min(BLOCKS, MOST_BLOCKS // len(files)))
    sizes = [file.stat().st_size for file in files]
    return json_fingerprint([sizes, [file_fingerprint(file, blocks=blocks) for file in files[::every]]])
