"""Find the text files of a path, a folder or a pattern, and leave out those that are no text to train on.

A clone of a data set on the hub also holds its card, its licence and other splits. None of them is training text.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any, NoReturn

from phigrow.checkpoints.hub_names import hub_name
from phigrow.corpus.left_out import DESCRIPTION, LINKED, OTHER_CONFIG, OTHER_KIND, OTHER_SPLIT, LeftOut
from phigrow.errors import GrowthError
from phigrow.files.paths import user_path
from phigrow.files.strict_yaml import parse_yaml

TEXT_SUFFIXES = (".txt", ".md")
JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
PARQUET_SUFFIXES = (".parquet",)
SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, *PARQUET_SUFFIXES)

HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
"""Pattern of repository names on the hub. Anything else is a path, which can be checked without a network."""

TRAIN = "train"
SPLITS = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in the names of files and folders that name a split, as in `datasets`."""

SPLIT_WORDS = {word: split for split, words in SPLITS.items() for word in words}
SHARD = re.compile(r"(?P<split>\w+)-\d{5}-of-\d{5}\b")
"""Name of a shard on the hub."""

SHARD_NUMBER = re.compile(r"-\d{5}-of-\d{5}$")

METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
"""Files that `datasets` writes about a data set."""

ABOUT = re.compile(r"(readme|licen[cs]e|copying|notice|citation|changelog|contributing|security)(?![a-z]).*", re.I)
"""Names of text files about a data set."""

CARD = "README.md"
CARD_KEYS = {"configs", "dataset_info", "task_categories", "size_categories", "language", "license", "pretty_name"}
"""Keys at the top of the card of a data set, one of which tells it from another README.md."""

UNPACKED = {".zst": "unzstd", ".xz": "unxz --keep", ".bz2": "bunzip2 --keep"}
"""Endings of packed files, with the command that unpacks one beside it."""

KINDS = f"give files of these kinds: {', '.join(SUFFIXES)}"


@dataclass(frozen=True)
class LocalFiles:
    """The text files of a reference, sorted, and the files that are left out."""

    files: list[Path]
    left_out: LeftOut = field(default_factory=LeftOut)


def find_files(ref: str | Path, split: str = TRAIN, config: str | None = None) -> LocalFiles | None:
    """Return the files of a reference; None if it can only be a name on the hub.

    A file or a pattern is taken as it is. Of a folder, files about the data set are left out. If the name of any file
    tells the wanted split, files of other splits are left out too.

    Args:
        ref: a file, a folder or a glob pattern.
        split: a split of the data set in a folder.
        config: a configuration that the card of the data set names.

    Raises:
        GrowthError: the reference is spelled like a path, and there is no readable file; or the folder has no such
            split or configuration, has several configurations, or holds a broken link.
    """
    path = user_path(ref)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError as error:  # a folder above it may not be entered, or the name is too long
        _unreadable(str(path), error)
    if is_file:
        if not path.name.endswith(SUFFIXES):
            raise GrowthError(
                f"phigrow cannot read text from {path.name}",
                where=str(path),
                why="its ending is of no known kind",
                fix=_conversion(path) + KINDS,
            )
        return LocalFiles([path])
    if is_folder:
        return _in_folder(path, split, config)
    if ":/" not in str(ref) and any(character in str(ref) for character in "*?["):
        return LocalFiles(with_text(path, _matches(path)))
    if HUB_NAME.fullmatch(hub_name(ref, kind="dataset").repository) and not str(ref).endswith(SUFFIXES):
        return None
    raise GrowthError(
        "the file or folder does not exist", where=str(path.absolute()), fix=f"check the path, and {KINDS}"
    )


def _conversion(path: Path) -> str:
    """Return the command that turns a file of a known other kind into one that is read; empty for other kinds."""
    name, plain = quote(str(path)), path.with_suffix("")
    if path.suffix in UNPACKED:
        return f"unpack it with `{UNPACKED[path.suffix]} {name}`, and give {plain}; or "
    if path.suffix in (".csv", ".tsv"):
        tab = ", sep='\\t'" if path.suffix == ".tsv" else ""
        rows = f"import sys, pandas; pandas.read_csv(sys.argv[1]{tab}).to_parquet(sys.argv[2])"
        table = path.with_suffix(".parquet")
        return f'convert it with `python -c "{rows}" {name} {quote(str(table))}`, and give {table}; or '
    return ""


def _matches(pattern: Path) -> list[Path]:
    """Return what a pattern matches. `glob` skips folders that it may not read, so each is tried."""
    parts = [parent for parent in pattern.parents if glob.has_magic(str(parent))]
    fixed = next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))
    for each in (fixed, *(Path(name) for part in parts for name in glob.glob(str(part), recursive=True))):
        if each.is_dir():
            try:
                os.scandir(each).close()
            except OSError as error:
                _unreadable(str(each), error)
    return [Path(name) for name in glob.glob(str(pattern), recursive=True)]


def with_text(where: Path, entries: list[Path], left_out: LeftOut | None = None) -> list[Path]:
    """Return the entries with text, sorted."""
    named = [file for file in entries if file.name.endswith(SUFFIXES)]
    if broken := [file for file in named if file.is_symlink() and not file.exists()]:
        raise GrowthError(
            "a file is a broken link",
            where=str(broken[0]),
            why=f"it leads to {os.readlink(broken[0])}, which does not exist",
            fix="get the file that it leads to, or remove the link",
        )
    files = sorted(file for file in named if file.is_file())
    others = [file for file in entries if not file.name.endswith(SUFFIXES) and file.is_file()]
    if left_out is not None:
        left_out.add(OTHER_KIND, *(str(file.relative_to(where)) for file in sorted(others)))
    if not files:
        raise GrowthError(
            "there are no text files",
            where=str(where.absolute()),
            why=_nothing(where, entries),
            fix=_advice(entries),
        )
    return files


def _nothing(where: Path, entries: list[Path]) -> str:
    if entries:
        return f"all {len(entries)} entries have other endings"
    return "nothing matches the pattern" if glob.has_magic(str(where)) else "there is nothing, or hidden files only"


def _advice(entries: list[Path]) -> str:
    if any(file.suffix == ".arrow" for file in entries):
        return "if save_to_disk of datasets wrote the folder, load it with load_from_disk and write it with to_parquet"
    return KINDS


def _in_folder(folder: Path, split: str, config: str | None) -> LocalFiles:
    left_out = LeftOut()
    entries = list(_walk(folder, left_out))
    files = with_text(folder, entries, left_out)
    configs = _configs(folder)
    tables = any(not file.name.endswith(TEXT_SUFFIXES) for file in files if file.name not in METADATA)
    clone = tables or configs is not None or any((folder / name).is_file() for name in METADATA)
    if not re.fullmatch(r"\w+(\.\w+)*", split):
        raise GrowthError(
            f"{split!r} is no split of a local data set",
            where=str(folder),
            why="a part of a split can be taken on the hub only",
            fix="give the name of a split, such as train",
        )

    def keep(condition: Callable[[Path], bool], reason: str) -> list[Path]:
        left_out.add(reason, *(str(file.relative_to(folder)) for file in files if not condition(file)))
        return [file for file in files if condition(file)]

    if clone:
        files = keep(lambda file: not _is_about(file), DESCRIPTION)
        if not files:
            raise GrowthError(
                "there is no text to train on",
                where=str(folder.absolute()),
                why=f"all files are about the data. {left_out}",
                fix=_advice(entries),
            )
    root = folder
    if config is not None or configs:
        chosen = _chosen_config(folder, configs or {}, config)
        mine = {split_name: _matched(folder, chosen, patterns) for split_name, patterns in _data_files(chosen).items()}
        if mine:
            if split not in mine:
                _no_split(folder, split, list(mine))
            every = set().union(*mine.values())
            files = keep(lambda file: file in every, OTHER_CONFIG)
            files = keep(lambda file: file in mine[split], OTHER_SPLIT)
            if not files:
                _no_split(folder, split, [name for name, matched in mine.items() if matched])
            return LocalFiles(files, left_out)
        root = _data_dir(folder, chosen)
        files = keep(lambda file: root in file.parents, OTHER_CONFIG)
        if not files:
            raise GrowthError(
                "the configuration has no text files",
                where=str(folder / CARD),
                why=f"its data_dir is {chosen.get('data_dir')}, and there are none below this folder",
                fix="download the folder, choose another --config, or give the files by a pattern",
            )
    names = {file: _split_of(file.relative_to(root), clone=clone) for file in files}
    if split in names.values():
        files = keep(lambda file: names[file] in (None, split), OTHER_SPLIT)
    elif split in {_kind(name) for name in names.values()}:
        files = keep(lambda file: names[file] is None or _kind(names[file]) == split, OTHER_SPLIT)
    elif split != TRAIN:
        _no_split(folder, split, sorted({name for name in names.values() if name}))
    return LocalFiles(files, left_out)


def _walk(folder: Path, left_out: LeftOut) -> Iterator[Path]:
    """Yield the files of a folder and of the folders in it, without hidden ones."""

    def refuse(error: OSError) -> NoReturn:
        _unreadable(str(error.filename or folder), error)

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        linked = [name for name in folders if Path(root, name).is_symlink()]
        left_out.add(LINKED, *(str(Path(root, name).relative_to(folder)) for name in sorted(linked)))
        yield from (Path(root, name) for name in names if not name.startswith("."))


def _unreadable(where: str, error: OSError) -> NoReturn:
    raise GrowthError(
        "the folder or file cannot be read",
        where=where,
        why=str(error),
        fix="check its permissions, or choose the files to read by a pattern",
    ) from error


def _is_about(file: Path) -> bool:
    return file.name in METADATA or (file.name.endswith(TEXT_SUFFIXES) and bool(ABOUT.fullmatch(file.stem)))


def _split_of(file: Path, *, clone: bool) -> str | None:
    """Return the split that the name of a file tells, or else that of the nearest folder; None if there is none.

    A shard whose word names no split, such as ``data-00000-of-00001.jsonl``, takes the split of its folder. Without
    one the word counts as a split of the data set's own. In a folder of plain text, ``training`` and ``testing`` do not
    count, and neither do folders: they may be prose.
    """
    shard = SHARD.match(file.name)
    if shard and any(word in SPLIT_WORDS for word in _words(shard["split"])):
        return shard["split"]
    stem = SHARD_NUMBER.sub("", next(file.name.removesuffix(end) for end in SUFFIXES if file.name.endswith(end)))
    if file.name.endswith(TEXT_SUFFIXES):
        prose = () if clone else ("training", "testing")
        split = next((split for part in _ends(stem.split(".")) if (split := _whole(part, prose))), None)
    else:
        split = _first_or_last(stem)
    if clone or not file.name.endswith(TEXT_SUFFIXES):
        split = split or next((split for part in reversed(file.parts[:-1]) if (split := _first_or_last(part))), None)
    return split or (shard["split"] if shard else None)


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[-._ 0-9]+", name.lower()) if word]


def _ends(parts: list[str]) -> list[str]:
    return [*parts[:1], *parts[-1:]]


def _whole(name: str, prose: tuple[str, ...] = ()) -> str | None:
    """Return the split of a name that is one word, apart from digits."""
    words = _words(name)
    return SPLIT_WORDS.get(words[0]) if len(words) == 1 and words[0] not in prose else None


def _first_or_last(name: str) -> str | None:
    """Return the split that the first or last word of a name tells. ``dev`` counts only alone, as in ``dev-01``."""
    words = [word for word in _ends(_words(name)) if word != "dev"]
    return _whole(name) or next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def _kind(split: str | None) -> str | None:
    """Return the split that a name such as ``train_sft`` belongs to; the name itself if there is none."""
    return next((SPLIT_WORDS[word] for word in _words(split or "") if word in SPLIT_WORDS), split)


def _configs(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Return the configurations that the card of a data set names; None if the folder has no card of a data set."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8-sig", errors="replace")
    except OSError:
        return None
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        card = parse_yaml(match[1], CARD) if match else None
    except GrowthError:
        return None
    if not isinstance(card, dict) or not CARD_KEYS & set(card):
        return None
    listed = card.get("configs")
    return {
        str(each.get("config_name", "default")): each
        for each in (listed if isinstance(listed, list) else [])
        if isinstance(each, dict)
    }


def _chosen_config(folder: Path, configs: dict[str, dict[str, Any]], name: str | None) -> dict[str, Any]:
    if name is not None and name not in configs:
        raise GrowthError(
            f"the data set has no configuration {name!r}",
            where=str(folder / CARD),
            why=f"its card names {', '.join(configs)}" if configs else "its card names no configurations",
            fix="choose another --config, or leave it out",
        )
    default = [key for key, each in configs.items() if key == "default" or each.get("default") is True]
    if name is None and not default and len(configs) > 1:
        raise GrowthError(
            f"the data set has {len(configs)} configurations",
            where=str(folder / CARD),
            why=f"its card names {', '.join(configs)}",
            fix="choose one with --config, or give the files by a pattern",
        )
    return configs[name or (default or list(configs))[0]]


def _data_files(config: dict[str, Any]) -> dict[str, list[str]]:
    """Return the patterns of each split of a configuration; empty if it names no files."""
    listed = config.get("data_files")
    if isinstance(listed, str):
        return {TRAIN: [listed]}
    patterns: dict[str, list[str]] = {}
    if isinstance(listed, dict):
        listed = [{"split": split, "path": path} for split, path in listed.items()]
    for each in listed if isinstance(listed, list) else []:
        split, path = (each.get("split", TRAIN), each.get("path")) if isinstance(each, dict) else (TRAIN, each)
        paths = path if isinstance(path, list) else [path]
        patterns.setdefault(str(split), []).extend(str(path) for path in paths if path)
    return patterns


def _data_dir(folder: Path, config: dict[str, Any]) -> Path:
    """Return the folder of a configuration: the one that the card names, or else that of the data set."""
    return Path(os.path.normpath(folder / str(config["data_dir"]))) if config.get("data_dir") else folder


def _matched(folder: Path, config: dict[str, Any], patterns: list[str]) -> set[Path]:
    root = _data_dir(folder, config)
    names = [glob.escape(str(root)) + os.sep + pattern for pattern in patterns]
    return {Path(found) for name in names for found in glob.glob(name, recursive=True)}


def _no_split(folder: Path, split: str, names: list[str]) -> NoReturn:
    raise GrowthError(
        f"the data set has no split {split!r}",
        where=str(folder),
        why=f"its splits are {', '.join(names)}" if names else "the names of its files tell no splits",
        fix="choose another --split, or give the files by a pattern",
    )
