"""Load documents as one `datasets.Dataset` of (text, source, title)."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from phigrow.corpus.embedded import embedded_documents
from phigrow.errors import GrowthError
from phigrow.files.paths import user_path

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

EMBEDDED = "embedded"
TEXT_SUFFIXES = (".txt", ".md")
JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
PARQUET_SUFFIXES = (".parquet",)
SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, *PARQUET_SUFFIXES)

SEPARATOR = "<|endoftext|>"
"""Separator of documents inside one text file, as in published corpora."""

HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
"""Pattern of repository names on the hub. Anything else is a path, which can be checked without a network."""


def load_documents(
    ref: str | Path = EMBEDDED,
    *,
    text_column: str = "text",
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> Dataset:
    """Return the documents of a corpus as a memory-mapped dataset with string columns text, source and title.

    A text file is one document, or several separated by ``<|endoftext|>``. JSON and Parquet files have one document in
    each row. Their columns ``source`` and ``title`` are kept. Without them, the source is the name of the file, of the
    folder (for text files in a folder) or of the hub dataset. The text of a file that is not UTF-8 is null.

    Args:
        ref: ``embedded``; a file, folder (searched recursively) or glob pattern of .txt, .md, .jsonl, .json (each
            also .gz) or .parquet; or the name of a hub dataset. A local path takes precedence over a name on the hub.
        text_column: the column that holds the text, in JSON, Parquet and hub datasets.
        split, config, revision: of a hub dataset.
        cache_dir: folder for the Arrow files of local sources, by default the cache of the datasets library. Hub
            datasets always go to that cache, which keeps the download.

    Raises:
        GrowthError: the text or the column does not exist, the hub cannot be reached, or a file cannot be parsed.

    >>> load_documents("embedded").column_names  # doctest: +SKIP
    ['text', 'source', 'title']
    """
    if str(ref) == EMBEDDED:
        return _from_rows(embedded_rows, {}, cache_dir)
    if (files := local_files(ref)) is not None:
        return _from_files(files, user_path(ref).is_file(), text_column, cache_dir)
    return _from_hub(str(ref), text_column, split, config, revision)


def local_files(ref: str | Path) -> list[Path] | None:
    """Return the files of a reference, sorted; None if it can only be a name on the hub.

    Raises:
        GrowthError: the reference is spelled like a path, and there is no readable file.
    """
    path = user_path(ref)
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise GrowthError(
                f"phigrow cannot read text from {path.name}",
                where=str(path),
                why="its ending is of no known kind",
                fix=_KINDS,
            )
        return [path]
    if path.is_dir():
        entries = [file for file in path.rglob("*") if not _hidden(file.relative_to(path))]
    elif any(character in str(ref) for character in "*?["):
        entries = [Path(name) for name in glob.glob(str(path), recursive=True)]
    elif HUB_NAME.fullmatch(str(ref)) and not str(ref).endswith(SUFFIXES):
        return None
    else:
        raise GrowthError(
            "the file or folder does not exist", where=str(path.absolute()), fix=f"check the path, and {_KINDS}"
        )
    files = sorted(file for file in entries if file.is_file() and file.name.endswith(SUFFIXES))
    if not files:
        raise GrowthError(
            "there are no text files",
            where=str(path.absolute()),
            why=f"all {len(entries)} entries have other endings",
            fix=_KINDS,
        )
    return files


_KINDS = f"give files of these kinds: {', '.join(SUFFIXES)}"


def embedded_rows() -> Iterator[dict[str, str | None]]:
    """Return the documents of the embedded corpus as rows."""
    return map(asdict, embedded_documents())


def text_rows(files: Iterable[Path], sources: Iterable[str]) -> Iterator[dict[str, str | None]]:
    """Yield a row for each document of the text files; its text is None if the file is not UTF-8."""
    for file, source in zip(files, sources, strict=True):
        try:
            texts: list[str | None] = list(file.read_text(encoding="utf-8").split(SEPARATOR))
        except UnicodeDecodeError:
            texts = [None]
        if len(texts) > 1 and not (texts[-1] or "").strip():
            texts.pop()  # blank text after the last separator is no document
        for number, text in enumerate(texts):
            yield {"text": text, "source": source, "title": file.name if len(texts) == 1 else f"{file.name}#{number}"}


def _from_rows(rows: Any, arguments: dict[str, Any], cache_dir: str | Path | None) -> Dataset:
    from datasets import Dataset

    return Dataset.from_generator(rows, _features(), str(cache_dir) if cache_dir else None, gen_kwargs=arguments)


def _from_files(files: list[Path], named: bool, text_column: str, cache_dir: str | Path | None) -> Dataset:
    from datasets import concatenate_datasets

    parts = []
    if texts := [file for file in files if file.name.endswith(TEXT_SUFFIXES)]:
        sources = [file.name if named else file.absolute().parent.name for file in texts]
        parts.append(_from_rows(text_rows, {"files": texts, "sources": sources}, cache_dir))
    tables = [file for file in files if not file.name.endswith(TEXT_SUFFIXES)]
    parts.extend(_from_table(file, text_column, cache_dir) for file in tables)
    return concatenate_datasets(parts)


def _from_table(file: Path, text_column: str, cache_dir: str | Path | None) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    builder = _builder(file)
    escaped = glob.escape(str(file))  # datasets takes the path for a pattern
    try:
        data = load_dataset(builder, data_files=escaped, split="train", cache_dir=str(cache_dir) if cache_dir else None)
    except (DatasetGenerationError, ValueError, OSError) as error:
        why = str(error.__cause__ or error)
        raise GrowthError(
            f"the {builder} file cannot be read", where=str(file), why=why, fix="repair the file, or leave it out"
        ) from error
    return _three_columns(data, str(file), file.name, text_column)


def stream_documents(
    ref: str | Path,
    *,
    text_column: str = "text",
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
) -> IterableDataset:
    """Return the documents of a corpus in order, with the string column ``text``, without a copy on disk.

    Args:
        ref, text_column, split, config, revision: as in `load_documents`. Local files are of one kind.

    Returns:
        A dataset with its position as ``state_dict``.

    Raises:
        GrowthError: as `load_documents`.
    """
    from datasets import IterableDataset, load_dataset

    if str(ref) == EMBEDDED:
        return IterableDataset.from_generator(embedded_rows, features=_features()).select_columns(["text"])
    if (files := local_files(ref)) is None:
        data = _on_hub(str(ref), split, config, revision, streaming=True)
    else:
        kinds = {_builder(file) for file in files}
        if len(kinds) > 1:
            raise GrowthError(
                f"the stream reads files of {len(kinds)} kinds",
                where=str(ref),
                why=f"there are {', '.join(sorted(kinds))} files",
                fix="name one kind (a glob pattern), or give each kind as a source of its own",
            )
        if kinds == {"text"}:
            arguments = {"files": files, "sources": [file.name for file in files]}
            made = IterableDataset.from_generator(text_rows, gen_kwargs=arguments, features=_features())
            return made.select_columns(["text"])
        paths = [glob.escape(str(file)) for file in files]
        data = load_dataset(kinds.pop(), data_files=paths, split="train", streaming=True)
    names = data.column_names or list(next(iter(data.take(1)), {}))
    if text_column not in names:
        _no_column(text_column, str(ref), names)
    if data.features is not None:
        _must_be_text(data.features[text_column], text_column, str(ref))
    data = data.select_columns([text_column])
    return data if text_column == "text" else data.rename_column(text_column, "text")


def _builder(file: Path) -> str:
    """Return the name of the `datasets` builder for a file."""
    if file.name.endswith(TEXT_SUFFIXES):
        return "text"
    return "parquet" if file.name.endswith(PARQUET_SUFFIXES) else "json"


def _from_hub(name: str, text_column: str, split: str, config: str | None, revision: str | None) -> Dataset:
    from datasets import Dataset

    data = _on_hub(name, split, config, revision, streaming=False)
    if not isinstance(data, Dataset):  # a split expression that names several
        raise GrowthError(
            f"{split!r} names several splits of {name!r}",
            where=name,
            why="phigrow holds out documents itself",
            fix="give one split with --split, such as train",
        )
    return _three_columns(data, name, name, text_column)


def _on_hub(name: str, split: str, config: str | None, revision: str | None, *, streaming: bool) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(name, name=config, split=split, revision=revision, streaming=streaming)
    except ConnectionError as error:
        raise GrowthError(
            f"the dataset {name!r} cannot be downloaded",
            where=str(user_path(name).absolute()),
            why=f"no file or folder has this path, and the hub cannot be reached ({error})",
            fix="give local text: a file, folder or glob of .txt, .jsonl or .parquet, or the word embedded",
        ) from error
    except DatasetNotFoundError as error:
        raise GrowthError(
            f"there is no dataset {name!r}",
            where=str(user_path(name).absolute()),
            why=f"no file or folder has this path, and the hub has no such dataset for your account ({error})",
            fix="check the spelling; for a gated dataset log in with `hf auth login`",
        ) from error
    except (ValueError, RuntimeError, OSError) as error:  # an unknown configuration or split; a loading script
        raise GrowthError(
            f"the dataset {name!r} cannot be loaded",
            where=name,
            why=str(error),
            fix="check the dataset's --config and --split",
        ) from error


def _three_columns(data: Dataset, where: str, source: str, text_column: str) -> Dataset:
    """Reduce a table to text, source and title, without rewriting its text."""
    import pyarrow as pa

    names = data.column_names
    if text_column not in names:
        _no_column(text_column, where, names)
    _must_be_text(data.features[text_column], text_column, where)
    strings = [name for name in ("source", "title") if getattr(data.features.get(name), "dtype", None) == "string"]
    table = data.select_columns(list(dict.fromkeys([text_column, *strings])))
    if text_column != "text":
        table = table.rename_column(text_column, "text")
    for name, value in (("source", source), ("title", "")):
        if name not in table.column_names:
            # This column is held in memory (some bytes a document); the text stays memory-mapped.
            table = table.add_column(name, pa.array([value], pa.string()).take(pa.array([0] * len(table), pa.int32())))
    table = table.select_columns(["text", "source", "title"])
    return table if table.features == _features() else table.cast(_features())  # a cast rewrites the text


def _must_be_text(kind: Any, text_column: str, where: str) -> None:
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        raise GrowthError(
            f"the column {text_column!r} does not hold text",
            where=where,
            why=f"its type is {kind}",
            fix="name the column with the text: --text-column, or text_column of a stream",
        )


def _no_column(text_column: str, where: str, names: list[str]) -> NoReturn:
    raise GrowthError(
        f"the data has no column {text_column!r}",
        where=where,
        why=f"the columns are {', '.join(map(repr, names))}",
        fix="name the column with the text: --text-column, or text_column of a stream",
    )


def _features() -> Features:
    from datasets import Features, Value

    return Features({"text": Value("string"), "source": Value("string"), "title": Value("string")})


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
