"""Resolve names to folders: local Hugging Face folders first, then the hub through `huggingface_hub`."""

from __future__ import annotations

from pathlib import Path

from phigrow.checkpoints.provenance import PROVENANCE_FILE, TRAINING_FILE
from phigrow.checkpoints.stored_model import stored_model_config
from phigrow.errors import GrowthError
from phigrow.files.foreign import recognise
from phigrow.files.paths import user_path
from phigrow.files.untrusted import contained
from phigrow.models.config import Config, load_config, shipped_name

ALIASES = {"phi-1": "microsoft/phi-1", "phi-1_5": "microsoft/phi-1_5", "phi-2": "microsoft/phi-2"}
_SHIPPED = {"phi-1": "phi-1.json", "phi-1_5": "phi-1_5.json", "phi-2": "phi2.json"}

CONFIG_FILES = ["config.json", "generation_config.json"]
VOCABULARY_FILES = [
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
]
TOKENIZER_FILES = [
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
]
PROVENANCE_FILES = [PROVENANCE_FILE, TRAINING_FILE]
CARD_FILES = ["README.md"]
WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]


def locate(name: str | Path, revision: str | None = None) -> Path:
    """Return the local folder of a checkpoint. A hub name is downloaded, or taken from the cache.

    Args:
        name: a folder, ``phi-1``, ``phi-1_5``, ``phi-2`` (of ``microsoft``), or any hub id.
        revision: branch, tag or commit on the hub.

    Raises:
        GrowthError: nothing has that name, the folder has links that lead out of it, or the hub cannot be reached.
    """
    path = user_path(name)
    if path.is_dir():
        if revision is not None:
            raise GrowthError(
                f"--revision {revision} was given with a local folder",
                where=str(path),
                why="only repositories on the hub have revisions",
                fix="leave --revision out",
            )
        for file in (*CONFIG_FILES, *TOKENIZER_FILES, *PROVENANCE_FILES):
            contained(path, file)
        return path
    _refuse_file(path)
    return _download(name, revision, [*CONFIG_FILES, *TOKENIZER_FILES, *PROVENANCE_FILES, *CARD_FILES, *WEIGHT_FILES])


def locate_tokenizer(name: str) -> Path:
    """Return the local folder of a tokenizer on the hub, which is downloaded or taken from the cache.

    Raises:
        GrowthError: nothing has that name, or the hub cannot be reached.
    """
    try:
        return _download(name, None, [*CONFIG_FILES, *TOKENIZER_FILES])
    except GrowthError as error:
        raise GrowthError(
            f"the tokenizer {name!r} cannot be loaded",
            where=error.where,
            why=f"{error.what}: {error.why}",
            fix=error.fix,
        ) from error


def source_config(name: str | Path, revision: str | None = None) -> Config:
    """Return the configuration of a source, without its weights where they are on the hub.

    Args:
        name: a folder, a file, a shipped or aliased name, or a hub id.
        revision: branch, tag or commit on the hub.

    Raises:
        GrowthError: nothing has that name, or the hub cannot be reached.
    """
    path = user_path(name)
    if path.is_dir():
        return stored_model_config(path)
    if path.exists():
        return load_config(name)
    if revision is None and (shipped := _SHIPPED.get(str(name)) or shipped_name(name)):
        return load_config(shipped)
    return load_config(_download(name, revision, CONFIG_FILES))


def _refuse_file(path: Path) -> None:
    """Refuse a file where a folder is needed; it would be taken for the name of a repository."""
    if not path.is_file():
        return
    if (foreign := recognise(path)) is not None:
        raise foreign.error("a checkpoint is a folder, not a file", str(path))
    raise GrowthError("a checkpoint is a folder, not a file", where=str(path), fix="give the folder of a checkpoint")


def display_name(name: str | Path) -> str:
    """Return the name of a source: the hub id of an alias or hub name, or the name of a local folder."""
    path = user_path(name)
    return path.resolve().name if path.exists() else ALIASES.get(str(name), str(name))


def _download(name: str | Path, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository = ALIASES.get(str(name), str(name))
    local = "download the repository on another machine and give its folder"
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise GrowthError(
            f"there is no checkpoint {str(name)!r}",
            where=str(user_path(name).absolute()),
            why="no folder has this path, and it is not a valid hub id",
            fix="give a folder with config.json and safetensors files, phi-1, phi-1_5, phi-2, or a hub id",
        ) from error
    except LocalEntryNotFoundError as error:
        raise GrowthError(
            f"the hub cannot be reached for {repository!r}",
            where=str(name),
            why="it is neither a folder nor in the local cache, and there is no network (or HF_HUB_OFFLINE is set)",
            fix=local,
        ) from error
    except HfHubHTTPError as error:
        raise GrowthError(
            f"the hub refuses {repository!r}", where=str(name), why=str(error).splitlines()[0], fix=local
        ) from error
