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
from phigrow.files.fingerprint import BLOCKS, MISSING, file_fingerprint, json_fingerprint, spans

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
    digest = hashlib.sha256()
    for split in (source.train, source.heldout):
        _add_blocks(digest, split, source.seq_len + 1)
    if (tokenizer := source.tokenizer_json()) is not None:
        digest.update(tokenizer[0].encode())
    return digest.hexdigest()


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
