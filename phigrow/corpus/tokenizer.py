"""Load a tokenizer, or train a byte-level BPE on the text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.checkpoints.hub import ALIASES
from phigrow.corpus.sources import HUB_NAME
from phigrow.errors import GrowthError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
"""The end-of-text token, in the spelling of GPT-2 and Phi."""

SMALLEST = 257
"""The 256 bytes and the end-of-text token."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, eos: str = END_OF_TEXT) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE. It depends only on the texts, and decoding its tokens gives the exact text.

    Args:
        texts: the training text, read once.
        vocab_size: most entries. A small text may have fewer. The end-of-text token has id 0.
        eos: the end-of-text token, which is also the beginning-of-text token, as in Phi.

    Returns:
        A tokenizer that ``AutoTokenizer`` loads from its ``save_pretrained`` folder.

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
    """Load a tokenizer that has an end-of-text token. No code from its repository is run.

    Args:
        ref: a folder, a ``tokenizer.json`` file, or a name on the hub (``phi-2`` means ``microsoft/phi-2``).

    Raises:
        GrowthError: the tokenizer does not exist, cannot be downloaded, has no end-of-text token, or has no
            ``tokenizer.json``.

    >>> load_tokenizer("data/tokenizer").eos_token  # doctest: +SKIP
    '<|endoftext|>'
    """
    from transformers import AutoTokenizer

    path = Path(ref).expanduser()
    if not path.exists() and (str(ref).endswith(".json") or not HUB_NAME.fullmatch(str(ref))):
        raise GrowthError("the tokenizer does not exist", where=str(path.absolute()), fix=_FIX)
    if path.is_file():
        try:
            tokenizer: PreTrainedTokenizerBase = _fast_tokenizer(tokenizer_file=str(path))
        except Exception as error:  # the Rust parser raises plain Exception
            raise GrowthError("the file is not a tokenizer", where=str(path), why=str(error), fix=_FIX) from error
        if tokenizer.eos_token is None and END_OF_TEXT in tokenizer.get_vocab():
            tokenizer.eos_token = END_OF_TEXT  # a tokenizer.json does not name this token
    else:
        source = str(path) if path.is_dir() else ALIASES.get(str(ref), str(ref))
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError) as error:  # not in the folder or on the hub, or no network
            reason = str(error).strip().splitlines()[0]
            raise GrowthError(
                f"the tokenizer {str(ref)!r} cannot be loaded", where=str(path.absolute()), why=reason, fix=_FIX
            ) from error
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
