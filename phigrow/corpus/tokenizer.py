"""Load a tokenizer, or train a byte-level BPE on the text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.checkpoints.hub import locate_tokenizer
from phigrow.checkpoints.hub_names import hub_name
from phigrow.checkpoints.tokenizer_folder import (
    check_tokenizer,
    copy_tokenizer,
    name_known_class,
    open_tokenizer,
    surviving,
    vocabulary_files,
)
from phigrow.corpus.local_files import HUB_NAME
from phigrow.errors import GrowthError
from phigrow.files.paths import user_path, utf8_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
"""The end-of-text token, in the spelling of GPT-2 and Phi."""

TOKENIZER_FILE = "tokenizer.json"

SAMPLE = 20_000
"""Number of characters of the text on which a tokenizer is checked."""

SMALLEST = 257
"""The 256 bytes and the end-of-text token."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, eos: str = END_OF_TEXT) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE. It depends only on the texts, and decoding its tokens gives the exact text.

    Args:
        texts: the training text, read once.
        vocab_size: most entries. A small text may have fewer. The end-of-text token has id 0.
        eos: the end-of-text token, which is also the beginning-of-text token, as in Phi.

    Returns:
        A tokenizer that ``AutoTokenizer`` loads from a folder of `save_tokenizer`.

    Raises:
        GrowthError: the vocabulary is too small for the 256 bytes and the end-of-text token.

    >>> tokenizer = train_tokenizer(["to be or not to be"], 260)
    >>> tokenizer.decode(tokenizer.encode("to be"))
    'to be'
    """
    if vocab_size < SMALLEST:
        raise GrowthError(
            f"vocab_size is {vocab_size}",
            why=f"a byte-level tokenizer needs the 256 bytes and {eos}",
            fix=f"choose vocab_size >= {SMALLEST}",
        )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eos],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _fast_tokenizer(tokenizer_object=tokenizer, bos_token=eos, eos_token=eos)


def _fast_tokenizer(**arguments: Any) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    constructor: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast  # transformers does not annotate it
    # Cleaning up spaces would break decode(encode(x)) == x.
    return constructor(clean_up_tokenization_spaces=False, **arguments)


def load_tokenizer(ref: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer that has an end-of-text token, and check it. No code from its repository is run.

    Args:
        ref: a folder, a ``tokenizer.json`` file, or a name on the hub (``phi-2`` means ``microsoft/phi-2``).

    Returns:
        A tokenizer whose ``name_or_path`` is the local folder or file that `save_tokenizer` copies.

    Raises:
        GrowthError: the tokenizer does not exist, cannot be downloaded, has no vocabulary, does not encode its own
            tokens, has no end-of-text token, or has no ``tokenizer.json``.

    >>> load_tokenizer("data/tokenizer").eos_token  # doctest: +SKIP
    '<|endoftext|>'
    """
    path = user_path(ref)
    try:
        exists = path.exists()
    except OSError as error:  # too long a name, or a folder above it that may not be entered
        raise GrowthError("the tokenizer cannot be read", where=str(path), why=str(error), fix=_FIX) from error
    if not exists and (not HUB_NAME.fullmatch(hub_name(ref).repository) or str(ref).endswith(".json")):
        raise GrowthError("the tokenizer does not exist", where=str(path.absolute()), fix=_FIX)
    if path.is_file():
        try:
            with utf8_path(path) as readable:
                tokenizer: PreTrainedTokenizerBase = _fast_tokenizer(tokenizer_file=str(readable))
        except Exception as error:  # the Rust parser raises plain Exception
            raise GrowthError("the file is not a tokenizer", where=str(path), why=str(error), fix=_FIX) from error
        tokenizer.name_or_path = str(path)
        if tokenizer.eos_token is None and END_OF_TEXT in tokenizer.get_vocab():
            tokenizer.eos_token = END_OF_TEXT  # a tokenizer.json does not name this token
        check_tokenizer(tokenizer, str(path))
    else:
        try:
            tokenizer = open_tokenizer(path if path.is_dir() else locate_tokenizer(str(ref)), str(ref))
        except GrowthError as error:
            fix = _FIX if path.is_dir() else f"{error.fix}; or {_FIX}"
            raise GrowthError(error.what, where=error.where, why=error.why, fix=fix) from error
    if tokenizer.eos_token_id is None:
        raise GrowthError(
            "the tokenizer has no end-of-text token",
            where=str(ref),
            why="this token separates documents",
            fix=f"set eos_token in its tokenizer_config.json, or let phigrow train one with {END_OF_TEXT}",
        )
    if not tokenizer.is_fast:
        raise GrowthError(
            "the tokenizer has no tokenizer.json",
            where=str(ref),
            why="phigrow needs a fast tokenizer, which is stored there",
            fix="convert it with transformers' save_pretrained, or choose another tokenizer",
        )
    return tokenizer


def check_text(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], where: str) -> None:
    """Check on the first texts that a tokenizer can represent them.

    Args:
        tokenizer: see `load_tokenizer`.
        texts: read until they have `SAMPLE` characters.
        where: the place of the texts, for errors.

    Raises:
        GrowthError: more than half of the characters are lost: they have no token, or only the unknown token.
    """
    sample, left = [], SAMPLE
    for text in texts:
        sample.append(text[:left])
        left -= len(sample[-1])
        if left <= 0:
            break
    kept, total = surviving(tokenizer, sample)
    if 2 * kept < total:
        raise GrowthError(
            "the tokenizer cannot represent the text",
            where=f"{where}, tokenizer {tokenizer.name_or_path or 'in memory'}",
            why=f"of the first {total:,} characters, {total - kept:,} are lost in its tokens",
            fix="choose a tokenizer that was made for such text, or let phigrow train one on it",
        )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer so that transformers 4 and 5 load it.

    Args:
        tokenizer: of `train_tokenizer` or `load_tokenizer`. The files of a loaded one are copied as they are.
        folder: made if it does not exist.
    """
    given = Path(tokenizer.name_or_path) if tokenizer.name_or_path else None
    folder.mkdir(exist_ok=True)
    if given is not None and given.is_dir():
        copied = copy_tokenizer(given, folder, vocabulary_files(tokenizer))
        if TOKENIZER_FILE not in copied:
            tokenizer.backend_tokenizer.save(str(folder / TOKENIZER_FILE))
        return
    tokenizer.save_pretrained(folder)
    if given is not None:
        shutil.copyfile(given, folder / TOKENIZER_FILE)
    name_known_class(folder)


def same_tokens(one: str, two: str, where: str) -> bool:
    """Return True if two tokenizers have the same token for every id that both have, and the same merges.

    Everything else may differ, such as padding, post-processing and tokens that one of them adds at the end.

    Args:
        one, two: contents of ``tokenizer.json``.
        where: place of both, for errors.

    Raises:
        GrowthError: one of the contents cannot be read.
    """
    if one == two:
        return True
    try:
        (first, merges), (second, other_merges) = _tokens_and_merges(one), _tokens_and_merges(two)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise GrowthError(
            "a tokenizer.json cannot be read", where=where, why=str(error), fix="prepare the tokenizer's folder again"
        ) from error
    return merges == other_merges and all(second.get(number, token) == token for number, token in first.items())


def _tokens_and_merges(text: str) -> tuple[dict[int, str], list[str]]:
    content = json.loads(text)
    model = content["model"]
    vocab = model.get("vocab") or {}
    # The vocabulary of a unigram model is a list of pieces with their scores.
    named = vocab if isinstance(vocab, dict) else {piece[0]: number for number, piece in enumerate(vocab)}
    tokens = {number: token for token, number in named.items()}
    tokens |= {added["id"]: added["content"] for added in content.get("added_tokens") or []}
    # Older files write a merge as one string, newer ones as a pair.
    return tokens, [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]


_FIX = "give a folder, a tokenizer.json or a name on the hub; or give none, and phigrow trains one on the text"
