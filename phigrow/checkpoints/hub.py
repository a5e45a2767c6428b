"""Resolve names to folders: local Hugging Face folders first, then the hub through `huggingface_hub`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from phigrow.checkpoints.hub_cache import incomplete_cache, is_offline
from phigrow.checkpoints.hub_names import HubName, hub_name
from phigrow.checkpoints.pickles import has_pickles
from phigrow.checkpoints.provenance import PROVENANCE_FILE, TRAINING_FILE
from phigrow.checkpoints.stored_model import stored_model_config
from phigrow.errors import GrowthError, MachineError
from phigrow.files.foreign import recognise, recognise_names
from phigrow.files.paths import user_path
from phigrow.files.untrusted import contained
from phigrow.models.config import Config, load_config, shipped_name

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
        name: a folder, ``phi-1``, ``phi-1_5``, ``phi-2`` (of ``microsoft``), or a repository as `hub_name` reads it.
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
    patterns = [*CONFIG_FILES, *TOKENIZER_FILES, *PROVENANCE_FILES, *CARD_FILES, *WEIGHT_FILES]
    asked = hub_name(name, revision)
    return _checkpoint(_download(asked, name, patterns), asked, "*.safetensors")


def locate_tokenizer(name: str) -> Path:
    """Return the local folder of a tokenizer on the hub, which is downloaded or taken from the cache.

    Raises:
        GrowthError: nothing has that name, or the hub cannot be reached.
    """
    try:
        return _download(hub_name(name), name, [*CONFIG_FILES, *TOKENIZER_FILES])
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
        name: a folder, a file, a shipped or aliased name, or a repository as `hub_name` reads it.
        revision: branch, tag or commit on the hub.

    Raises:
        GrowthError: nothing has that name, or the hub cannot be reached.
    """
    path = user_path(name)
    if path.is_dir():
        name = CONFIG_FILES[0]
        if not contained(path, name).exists() and (error := incomplete_cache(path, name)) is not None:
            raise error
        return stored_model_config(path)
    if path.exists():
        return load_config(name)
    if revision is None and "/" not in str(name) and (shipped := shipped_name(name)) is not None:
        return load_config(shipped)
    asked = hub_name(name, revision)
    return load_config(_checkpoint(_download(asked, name, CONFIG_FILES), asked, CONFIG_FILES[0]))


def _checkpoint(folder: Path, asked: HubName, needed: str) -> Path:
    """Return a downloaded folder, unless it lacks a file that a checkpoint needs and its repository shows why.

    Raises:
        GrowthError: the repository holds files of another kind, or only pickled weights; or there is no network, and
            the local cache lacks the file.
    """
    if next(folder.glob(needed), None) is not None:
        return folder
    from huggingface_hub import list_repo_files

    repository, revision = asked.repository, asked.revision
    try:
        names = list_repo_files(repository, revision=revision)
    except Exception:  # a second request may fail in many ways; reading the folder says what is missing
        if not has_pickles(folder) and (error := incomplete_cache(folder, needed)) is not None:
            raise error from None
        return folder
    if any(each.startswith("pytorch_model") and each.endswith(".bin") for each in names):
        at = f" --revision {revision}" if revision else ""
        raise GrowthError(
            "the repository has only pickled weights",
            where=repository,
            why="phigrow downloads safetensors only",
            fix=f"download it, and give the folder: hf download {repository}{at} --local-dir {Path(repository).name}",
        )
    if (foreign := recognise_names(Path(repository), names)) is not None:
        raise foreign.error(f"the repository has no {needed}", repository)
    return folder


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
    return path.resolve().name if path.exists() else hub_name(name).repository


def _download(asked: HubName, name: str | Path, patterns: list[str]) -> Path:
    """Download files of a repository, or take them from the cache; ``name`` is what the user gave, for messages."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    repository, revision = asked.repository, asked.revision
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise GrowthError(
            f"there is no checkpoint {str(name)!r}",
            where=str(user_path(name).absolute()),
            why="no folder has this path, and it is not a valid hub id",
            fix="give a folder with config.json and safetensors files, phi-1, phi-1_5, phi-2, or a hub id",
        ) from error
    except Exception as error:
        local = "download the repository on another machine and give its folder"
        if (described := hub_error(error, repository, "model", local, revision=revision)) is None:
            raise
        raise described from error


def hub_error(
    error: BaseException, repository: str, kind: str, instead: str, *, revision: str | None = None
) -> GrowthError | None:
    """Describe why the hub did not give a repository, from the HTTP status and the causes of an exception.

    Args:
        error: an exception of `huggingface_hub`, `datasets` or the HTTP library.
        repository: its id.
        kind: ``model`` or ``dataset``.
        instead: what the user can do without the hub.
        revision: the branch, tag or commit that was asked for.

    Returns:
        The error for the user; None if the exception has nothing to do with the hub.
    """
    # A file that a repository does not have is no error of the library, which then looks for another one.
    chain = [each for each in _causes(error) if type(each).__name__ != "RemoteEntryNotFoundError"]
    names = {parent.__name__ for each in chain for parent in type(each).__mro__}
    reply = next((each for each in chain if getattr(each, "response", None) is not None), None)
    status = getattr(getattr(reply, "response", None), "status_code", None)
    gated = "GatedRepoError" in names or "gated dataset" in str(error)
    why = (str(reply or error).strip() or type(error).__name__).splitlines()[0]
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repository}"
    login = "log in with `hf auth login`, or set HF_TOKEN to a token that may read it"

    def described(what: str, fix: str, why: str = why, error_type: type[GrowthError] = GrowthError) -> GrowthError:
        return error_type(what, where=repository, why=why, fix=fix)

    if "RevisionNotFoundError" in names:
        return described(f"the {kind} {repository!r} has no revision {revision!r}", f"choose one of those on {page}")
    if "DisabledRepoError" in names:
        return described(f"the hub has disabled the {kind} {repository!r}", instead)
    if gated or status == 403:
        return described(
            f"the hub denies access to the {kind} {repository!r}",
            f"accept its terms on {page} with your account, then {login}",
        )
    if status == 401 or status == 404 or names & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return described(
            f"the hub has no {kind} {repository!r} for your account",
            f"check the spelling; if it is private or gated, accept its terms on {page}, and {login}",
            why=f"no file or folder has this path either ({why})",
        )
    if status == 429:
        return described(
            "the hub refuses more requests for now (429)",
            f"wait some minutes and run the same command again; accounts have a higher limit: {login}",
            error_type=MachineError,
        )
    if isinstance(status, int) and status >= 500:
        return described(
            f"the hub has an error of its own ({status})",
            f"run the same command again in some minutes (https://status.huggingface.co), or {instead}",
            error_type=MachineError,
        )
    if isinstance(status, int):
        return described(f"the hub refuses the {kind} {repository!r} ({status})", instead)
    if "OfflineModeIsEnabled" in names or (is_offline() and names & {"LocalEntryNotFoundError", "ConnectionError"}):
        return described(
            f"the {kind} {repository!r} is not in the local cache",
            f"unset HF_HUB_OFFLINE to download it, or {instead}",
            why="no file or folder has this path, and HF_HUB_OFFLINE is set, so nothing is downloaded",
        )
    if any("CERTIFICATE" in str(each).upper() for each in chain):
        return described(
            f"the hub cannot be reached for the {kind} {repository!r}",
            f"set SSL_CERT_FILE to the certificates of your network's proxy, or {instead}",
            why=next(str(each) for each in chain if "CERTIFICATE" in str(each).upper()),
        )
    if names & NO_NETWORK:
        return described(
            f"the hub cannot be reached for the {kind} {repository!r}",
            f"check the network and the proxy, or {instead}",
            why=f"it is neither on this machine nor in the local cache, and there is no connection ({why})",
        )
    return None


NO_NETWORK = frozenset({"LocalEntryNotFoundError", "ConnectionError", "ConnectError", "TimeoutException", "Timeout"})
"""Names of exceptions of the hub's and of HTTP libraries without an answer from the hub."""


def _causes(error: BaseException) -> Iterator[BaseException]:
    each: BaseException | None = error
    seen: set[int] = set()
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or each.__context__
