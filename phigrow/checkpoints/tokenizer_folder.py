"""The one way to open a tokenizer, with a check of what was loaded, and to copy its files.

transformers builds a tokenizer from a folder without any vocabulary: a GPT-2 or Phi configuration alone gives one with
a single token. So nothing else in phigrow calls ``AutoTokenizer``.
"""

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.checkpoints.hub import TOKENIZER_FILES, VOCABULARY_FILES
from phigrow.errors import GrowthError
from phigrow.files.atomic import atomic_json
from phigrow.files.fingerprint import file_fingerprint, json_fingerprint
from phigrow.files.paths import utf8_path
from phigrow.files.untrusted import contained, read_json_strict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
_ALL_BLOCKS = 1 << 20
"""More blocks than a file of a tokenizer has, so that it is read whole: a vocabulary can differ in a few bytes."""

BASE_CLASS = "PreTrainedTokenizerFast"
"""Class of a tokenizer that ``tokenizer.json`` describes completely, in the spelling that transformers 4 and 5 load."""

FEWEST = 2
"""Fewest tokens of a vocabulary besides the special ones."""

PIECES = 32
"""Number of tokens of the vocabulary that make up the sample text."""

_FIX = "give a folder with all files of a tokenizer, a tokenizer.json or a name on the hub"


def open_tokenizer(folder: Path, name: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, and check it. No code from the folder is run, and nothing is downloaded.

    Args:
        folder: an existing folder.
        name: of the tokenizer, for errors, by default the folder.

    Raises:
        GrowthError: the tokenizer cannot be loaded, its folder has no vocabulary or a link that leads out of it, or
            `check_tokenizer` refuses it.
    """
    for file in TOKENIZER_FILES:
        contained(folder, file)
    from transformers import AutoTokenizer

    try:
        with utf8_path(folder) as readable:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(readable), local_files_only=True, trust_remote_code=False
            )
        tokenizer.name_or_path = str(folder)
    except Exception as error:  # the Rust parser raises plain Exception, transformers a dozen kinds
        if not any((folder / file).is_file() for file in VOCABULARY_FILES):
            raise _no_vocabulary(folder) from error
        raise GrowthError(
            f"the tokenizer {name or str(folder)!r} cannot be loaded",
            where=str(folder.absolute()),
            why=(str(error).strip() or repr(error)).splitlines()[0],
            fix=_FIX,
        ) from error
    if not any((folder / file).is_file() for file in vocabulary_files(tokenizer)):
        raise _no_vocabulary(folder)
    check_tokenizer(tokenizer, str(folder))
    return tokenizer


def _no_vocabulary(folder: Path) -> GrowthError:
    return GrowthError(
        "the folder has no vocabulary of a tokenizer",
        where=str(folder.absolute()),
        why=f"there is none of {', '.join(VOCABULARY_FILES)}; from the rest transformers may build an empty tokenizer",
        fix=_FIX,
    )


def vocabulary_files(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the names of files that may hold the vocabulary of a tokenizer of this class."""
    return list(dict.fromkeys([*VOCABULARY_FILES, *type(tokenizer).vocab_files_names.values()]))


def tokenizer_fingerprint(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the fingerprint of the files of a tokenizer. They are read whole; a chat template does not count.

    Args:
        folder: of the tokenizer.
        tokenizer: opened from it.

    Raises:
        GrowthError: a file cannot be read.
    """
    names = sorted({*TOKENIZER_FILES, *vocabulary_files(tokenizer)} - {TEMPLATE_FILE})
    paths = [folder / name for name in names if (folder / name).is_file()]
    return json_fingerprint({path.name: file_fingerprint(path, blocks=_ALL_BLOCKS) for path in paths})


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Check that a tokenizer has a vocabulary, and that text made of its own tokens survives a round trip.

    Args:
        tokenizer: of transformers.
        where: its place, for errors.

    Raises:
        GrowthError: there are fewer than `FEWEST` tokens besides the special ones, the round trip loses more than half
            of the text, its tokens are single characters although the vocabulary has longer ones, or an id lies outside
            the vocabulary.
    """
    vocabulary = tokenizer.get_vocab()
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    ordinary = sorted(number for number in vocabulary.values() if number not in special)
    if len(ordinary) < FEWEST:
        raise GrowthError(
            "the tokenizer has no vocabulary",
            where=where,
            why=f"it has {len(vocabulary)} token{'s' * (len(vocabulary) != 1)}, of which {len(ordinary)} "
            f"{'is' if len(ordinary) == 1 else 'are'} not special",
            fix=_FIX,
        )
    sample = ordinary[:: max(1, len(ordinary) // PIECES)]
    text = str(tokenizer.decode(sample))
    kept, total = surviving(tokenizer, [text])
    if 2 * kept < total:
        raise GrowthError(
            "the tokenizer does not encode its own tokens",
            where=where,
            why=f"of {total} characters of a text made of them, {total - kept} are lost",
            fix=_FIX,
        )
    size = max(vocabulary.values()) + 1
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    long = sorted(number for token, number in vocabulary.items() if number not in special and _is_long(token))
    long = long[:: max(1, len(long) // PIECES)]
    again = tokenizer.encode(str(tokenizer.decode(long)), add_special_tokens=False, verbose=False)
    if len(long) >= FEWEST and not any(map(_is_long, tokenizer.convert_ids_to_tokens(again))):
        raise GrowthError(
            "the tokenizer does not join characters to tokens",
            where=where,
            why=f"its vocabulary has tokens such as {tokenizer.convert_ids_to_tokens(long[0])!r}, but a text of such "
            "tokens becomes single characters, so its merges are missing",
            fix=_FIX,
        )
    ids += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if outside := [number for number in ids if not 0 <= number < size]:
        raise GrowthError(
            f"the tokenizer gives the id {outside[0]}", where=where, why=f"its vocabulary has {size} tokens", fix=_FIX
        )


def _is_long(token: str) -> bool:
    """Return True for a token of several characters, which are not the code of a byte."""
    return len(token) > 1 and not re.fullmatch(r"<0x[0-9A-F]{2}>", token)


def surviving(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> tuple[int, int]:
    """Return the number of characters that survive encoding and decoding, and the number of all.

    White space, case and accents do not count, because tokenizers may change them on purpose. A character that becomes
    the unknown token is lost.
    """
    kept = total = 0
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    unknown = unknown_id(tokenizer)
    for text in texts:
        there = _characters(text)
        ids = [
            number for number in tokenizer.encode(text, add_special_tokens=False, verbose=False) if number != unknown
        ]
        if backend is not None and backend.decoder is None:  # its tokens are not text, so their places are counted
            encoding = backend.encode(text, add_special_tokens=False)
            spans = [span for number, span in zip(encoding.ids, encoding.offsets, strict=True) if number != unknown]
            places = {place for first, last in spans for place in range(first, last)}
            survived = _characters("".join(text[place] for place in sorted(places)))
        else:
            survived = _characters(str(tokenizer.decode(ids)))
        kept += (there & survived).total()
        total += there.total()
    return kept, total


def unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id that text without a token gets; None if there is none."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None if tokenizer.unk_token_id is None else int(tokenizer.unk_token_id)
    if type(backend.model).__name__ == "Unigram":  # which does not tell its unknown token in Python
        number: int | None = json.loads(backend.to_str())["model"].get("unk_id")
        return number
    token = getattr(backend.model, "unk_token", None)
    return backend.token_to_id(token) if token else None


def _characters(text: str) -> Counter[str]:
    plain = unicodedata.normalize("NFKD", text.casefold())
    return Counter(each for each in plain if not each.isspace() and not unicodedata.combining(each))


def copy_tokenizer(source: Path, folder: Path, others: Iterable[str] = ()) -> list[str]:
    """Copy the files of a tokenizer, contents without modes, so that transformers 4 and 5 load the copy.

    transformers 5 saves a tokenizer without a class of its own as ``TokenizersBackend``, which transformers 4 does not
    know. The copy names the class that both know.

    Args:
        source: a folder.
        folder: an existing folder.
        others: names of more files to copy.

    Returns:
        The names of the files that were there.
    """
    copied = []
    for name in dict.fromkeys([*TOKENIZER_FILES, *others]):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
            copied.append(name)
    name_known_class(folder)
    return copied


def name_known_class(folder: Path) -> None:
    """Name the class of a saved tokenizer so that transformers 4 and 5 load it; a file without need is not touched."""
    path = folder / CONFIG_FILE
    if not path.is_file() or b'"TokenizersBackend"' not in path.read_bytes():
        return
    config = read_json_strict(path, "the configuration of a tokenizer", nan=True)
    if config.get("tokenizer_class") == "TokenizersBackend":
        atomic_json(path, config | {"tokenizer_class": BASE_CLASS}, indent=2)
