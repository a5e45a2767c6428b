"""Choose the ids of the special tokens of a model that is written, in one place.

transformers fills keys that are missing in ``config.json``: a Phi without ``eos_token_id`` ends at token 2, whatever
its tokenizer says. So every id is written, as null where nobody knows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.files.untrusted import MOST_JSON_BYTES, contained, read_json_strict
from phigrow.models.config import Config

BOS, EOS, PAD = "bos_token_id", "eos_token_id", "pad_token_id"
KEYS = (BOS, EOS, PAD)

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class TokenIds:
    """The ids of the special tokens.

    Attributes:
        model: key -> value in ``config.json``, None where there is none.
        generation: key -> value in ``generation_config.json``; a key without a value is missing.
    """

    model: Config
    generation: Config


def choose_token_ids(
    config: Config,
    *,
    vocab: int,
    where: str,
    source: Config | None = None,
    generation: Config | None = None,
    tokenizer: Callable[[str], int | None] = lambda key: None,
    source_place: str = "the source",
) -> TokenIds:
    """Take every id from the configuration if it has one, else from the source, else from the tokenizer.

    The id of padding in ``config.json`` never comes from the tokenizer: transformers would stop training that token's
    embedding. The generation settings keep the source's ids (of which ``eos_token_id`` may be a list), unless the
    configuration asks for another token.

    Args:
        config: of the model that is written.
        vocab: its vocabulary.
        where: its place, for messages.
        source: the source's configuration.
        generation: the source's generation settings.
        tokenizer: key -> id, see `tokenizer_ids`; it is asked only for what is missing.
        source_place: the place of the source with its files, for messages.

    Raises:
        GrowthError: an id is no whole number, or outside the vocabulary. The error names the file that holds it.
    """
    source, generation = source or {}, generation or {}
    model: Config = {}
    generated: Config = {}
    for key in KEYS:
        own = _Id(config.get(key), where)
        inherited = _Id(source.get(key), f"{CONFIG_FILE} of {source_place}")
        former = _Id(generation.get(key), f"{GENERATION_FILE} of {source_place}")
        of_model = _first(own, inherited)
        if of_model.value is None and key != PAD:
            of_model = former if former.value is not None else _Id(tokenizer(key), f"the tokenizer of {source_place}")
        if own.value is None or own.value == inherited.value or own.value in _listed(former.value):
            chosen = _first(former, of_model)
            chosen = chosen if chosen.value is not None else _Id(tokenizer(key), f"the tokenizer of {source_place}")
        else:
            chosen = own
        for each in (of_model, chosen):
            _check(key, each, vocab, where)
        model[key] = of_model.value
        if chosen.value is not None:
            generated[key] = chosen.value
    return TokenIds(model, generated)


@dataclass(frozen=True)
class _Id:
    """An id, a list of ids or None, and the file that holds it."""

    value: Any
    place: str


def tokenizer_ids(folder: Path) -> Callable[[str], int | None]:
    """Return a function from ``bos_token_id``, ``eos_token_id`` or ``pad_token_id`` to the id in a tokenizer's files.

    Files are read when they are needed, and in their order of precedence. The id is None where they do not tell it.

    Args:
        folder: with ``tokenizer_config.json`` and ``tokenizer.json`` or ``vocab.json``; it need not have any of them.

    Raises:
        GrowthError: the function raises it where a file is no JSON object.
    """

    def id_of(key: str) -> int | None:
        name = key.removesuffix("_id")
        settings = _content(folder, "tokenizer_config.json")
        token = _text(settings.get(name)) or _text(_content(folder, "special_tokens_map.json").get(name))
        return None if token is None else _id_of_token(folder, settings, token)

    return id_of


def _id_of_token(folder: Path, settings: Config, token: str) -> int | None:
    decoder = settings.get("added_tokens_decoder")
    for number, entry in (decoder if isinstance(decoder, dict) else {}).items():
        if _text(entry) == token and number.isdecimal():
            return int(number)
    whole = _content(folder, "tokenizer.json")
    added = whole.get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        if _text(entry) == token and type(entry.get("id")) is int:
            return int(entry["id"])
    model = whole.get("model")
    vocabularies = [(model if isinstance(model, dict) else {}).get("vocab")]
    vocabularies += [_content(folder, name) for name in ("added_tokens.json", "vocab.json")]
    for vocabulary in vocabularies:
        if isinstance(vocabulary, dict) and type(vocabulary.get(token)) is int:
            return int(vocabulary[token])
        if isinstance(vocabulary, list):  # of a Unigram model: pairs of token and score
            for number, entry in enumerate(vocabulary):
                if isinstance(entry, list) and entry[:1] == [token]:
                    return number
    return None


def _content(folder: Path, name: str) -> Config:
    """Return the JSON object in a file; empty if there is none, or one that is larger than phigrow reads."""
    path = contained(folder, name)
    if not path.is_file() or path.stat().st_size > MOST_JSON_BYTES:
        return {}
    return read_json_strict(path, "a file of the tokenizer", nan=True)


def _text(token: Any) -> str | None:
    """Return a token as its files spell it: a text, or an object with its ``content``."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def _first(*ids: _Id) -> _Id:
    return next((each for each in ids if each.value is not None), ids[-1])


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check(key: str, given: _Id, vocab: int, configuration: str) -> None:
    """Refuse an id that is outside the vocabulary; ``configuration`` is where another one may be set."""
    for each in _listed(given.value) if key == EOS else [given.value]:
        if each is not None and (type(each) is not int or not 0 <= each < vocab):
            correct = "" if given.place == configuration else f"correct it in {given.place}, or "
            raise GrowthError(
                f"{key} is {each!r}, but the vocabulary has the ids 0 to {vocab - 1}",
                where=given.place,
                fix=f"{correct}set {key} in {configuration} to an id of the vocabulary",
            )
