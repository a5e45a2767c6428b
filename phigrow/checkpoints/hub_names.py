"""Read the ways in which users name a repository of the hub: an id, an id with a revision, or an address."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Literal
from urllib.parse import unquote, urlsplit

from phigrow.errors import GrowthError

ALIASES = {"phi-1": "microsoft/phi-1", "phi-1_5": "microsoft/phi-1_5", "phi-2": "microsoft/phi-2"}

Kind = Literal["model", "dataset"]

ID = r"[\w.-]+(?:/[\w.-]+)?"
_WITH_REVISION = re.compile(rf"(?P<id>{ID})@(?P<revision>[\w./-]+)")
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_ADDRESS = re.compile(r"(?i)(?P<scheme>[a-z][a-z0-9+.-]+):/+(?P<rest>[^/].*)")
_BARE = re.compile(rf"(?i)(?:{'|'.join(map(re.escape, _HOSTS))})/.+")
_GIT = re.compile(r"git@(?:hf\.co|huggingface\.co):(?P<rest>.+)")
_OF_OTHERS = {"datasets": "dataset", "spaces": "Space"}


@dataclass(frozen=True)
class HubName:
    """A repository on the hub.

    Attributes:
        repository: its id.
        revision: a branch, tag or commit; None for the newest.
    """

    repository: str
    revision: str | None = None


def hub_name(text: str | Path, revision: str | None = None, kind: Kind = "model") -> HubName:
    """Return the repository that a text names. A text of another form is returned as it is: the hub refuses it.

    Args:
        text: an alias, an id, ``OWNER/NAME@REVISION``, ``hf://OWNER/NAME``, or the address of a repository or of one of
            its revisions. A `Path` has one of the two slashes of an address, which is enough.
        revision: of an option, which must agree with one in the text.
        kind: of the repository that is needed.

    Raises:
        GrowthError: an address of a file, a folder, another kind of repository or another host; or two revisions.

    >>> hub_name("https://huggingface.co/microsoft/phi-1_5/tree/main")
    HubName(repository='microsoft/phi-1_5', revision='main')
    >>> hub_name("phi-2"), hub_name("hf://microsoft/phi-2@abc").revision
    (HubName(repository='microsoft/phi-2', revision=None), 'abc')
    """
    text = str(text)
    if (rest := _rest_of_address(text)) is not None:
        found = _of_address(text, rest, kind)
    elif match := _WITH_REVISION.fullmatch(text):
        found = HubName(match["id"], match["revision"])
    else:
        found = HubName(text)
    if revision is not None and found.revision not in (None, revision):
        raise GrowthError(
            f"two revisions are given: {found.revision} and {revision}",
            where=text,
            why="the name has one of its own, and --revision another",
            fix="give one of them",
        )
    repository = ALIASES.get(found.repository, found.repository) if kind == "model" else found.repository
    return HubName(repository, found.revision if revision is None else revision)


def download_advice(text: str, setting: str) -> str:
    """Return more advice for a setting that needs a folder, if its text names a model on the hub; else an empty text.

    >>> download_advice("a/b@v1", "init")
    '; for a model on the hub, run `hf download a/b --revision v1 --local-dir b`, and set init to b'
    """
    asked = hub_name(text)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", asked.repository):
        return ""
    folder = asked.repository.split("/")[-1]
    words = ["hf", "download", asked.repository, *(["--revision", asked.revision] if asked.revision else [])]
    command = " ".join(map(quote, [*words, "--local-dir", folder]))
    return f"; for a model on the hub, run `{command}`, and set {setting} to {folder}"


def _rest_of_address(text: str) -> str | None:
    """Return what follows the host of an address on the hub; None for a text that is no address.

    Raises:
        GrowthError: an address of another host.
    """
    if match := _GIT.fullmatch(text):
        return match["rest"]
    if _BARE.fullmatch(text):
        return text.partition("/")[2]
    if (match := _ADDRESS.fullmatch(text)) is None:
        return None
    scheme, rest = match["scheme"].lower(), match["rest"]
    if scheme == "hf":
        return rest
    host, _, path = rest.partition("/")
    if scheme in ("http", "https") and host.lower() in _HOSTS:
        return urlsplit(f"//{host}/{path}").path.lstrip("/")
    if scheme == "file":
        raise GrowthError("the path is written as an address", where=text, fix=f"give /{rest.lstrip('/')}")
    raise GrowthError(
        "phigrow reads folders of this machine and repositories of huggingface.co",
        where=text,
        why="this is an address of another place",
        fix="download it, and give the folder",
    )


def _of_address(text: str, rest: str, kind: Kind) -> HubName:
    """Return the repository of an address, from what follows its host."""
    words = [unquote(word) for word in rest.strip("/").split("/")]
    if (owner := words[0]) == "models" and len(words) > 2:
        words, owner = words[1:], words[1]
    needed = "dataset" if kind == "dataset" else "model"
    given = _OF_OTHERS.get(owner, "model")
    if given != "model":
        words = words[1:]
    if given != needed:
        raise GrowthError(
            f"this is the address of a {given}", where=text, why=f"a {needed} is needed here", fix=f"give a {needed}"
        )
    last = min(1, len(words) - 1)  # of an id: older models and data sets have no owner
    words[last], _, revision = words[last].partition("@")
    words[last] = words[last].removesuffix(".git")
    repository, inside = "/".join(words[:2]), words[2:]
    if not re.fullmatch(ID, repository):
        raise GrowthError(
            "the address does not name a repository", where=text, fix=f"give the id of a {needed}, such as OWNER/NAME"
        )
    if revision:
        if inside[:2] == ["pr"] or (revision == "refs" and inside[:1] == ["pr"] and len(inside) == 2):
            revision, inside = "/".join([revision, *inside]), []
    elif inside[:1] in (["tree"], ["commit"]) and len(inside) > 1:
        size = 4 if inside[1:3] == ["refs", "pr"] else 2
        revision, inside = "/".join(inside[1:size]), inside[size:]
    elif inside[:1] in (["blob"], ["resolve"], ["raw"]) and len(inside) > 2:
        raise _inside(text, repository, inside[1], "/".join(inside[2:]), kind, is_file=True)
    elif inside in (["tree"], ["commits"], ["discussions"]):
        inside = []
    if inside:
        raise _inside(text, repository, revision or None, "/".join(inside), kind, is_file=False)
    return HubName(repository, revision or None)


def _inside(text: str, repository: str, revision: str | None, path: str, kind: Kind, *, is_file: bool) -> GrowthError:
    """Return the error for an address of a file or folder in a repository."""
    name = f"{repository}@{revision}" if revision else repository
    folder = repository.split("/")[-1]
    words = [repository, "--include", path if is_file else f"{path}/*", "--local-dir", folder]
    words += ["--repo-type", "dataset"] if kind == "dataset" else []
    words += ["--revision", revision] if revision else []
    download = f"hf download {' '.join(map(quote, words))}"
    whole = f"give {name} for the whole repository"
    if is_file and kind == "model":
        fix = whole
    else:
        fix = f"{whole}; or download this part and give {folder}/{path}: {download}"
    return GrowthError(
        f"the address names a {'file' if is_file else 'folder'} in a repository", where=text,
        why=f"it is {path} of {repository}", fix=fix,
    )  # fmt: skip
