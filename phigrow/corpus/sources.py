"""Load documents as one `datasets.Dataset` of (text, source, title)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.checkpoints.hub import hub_error
from phigrow.checkpoints.hub_names import hub_name
from phigrow.corpus.embedded import embedded_documents
from phigrow.corpus.left_out import NO_ROWS, LeftOut, printable
from phigrow.corpus.local_files import TRAIN, find_files
from phigrow.corpus.rows import Row, kind_of, no_column, not_text, reading, table_rows, text_rows
from phigrow.errors import GrowthError
from phigrow.files.machine_errors import machine_error
from phigrow.files.paths import user_path

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

EMBEDDED = "embedded"

PEEKED = 100
"""Rows that are read when a stream is opened, to see that there is text."""


def load_documents(
    ref: str | Path = EMBEDDED,
    *,
    text_column: str = "text",
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    left_out: LeftOut | None = None,
) -> Dataset:
    """Return the documents of a corpus as a memory-mapped dataset with string columns text, source and title.

    A text file is one document, or several separated by ``<|endoftext|>``. JSON and Parquet files have one document in
    each row. Their columns ``source`` and ``title`` are kept. Without them, the source is the name of the file, of the
    folder (for text files in a folder) or of the hub dataset. The text of a file that is not UTF-8 is null.

    Of a folder, files about the data set (README, LICENSE) and files of other splits are left out, see `find_files`.

    Args:
        ref: ``embedded``; a file, folder (searched recursively) or glob pattern of .txt, .md, .jsonl, .json (each
            also .gz) or .parquet; or the name of a hub dataset. A local path takes precedence over a name on the hub.
        text_column: the column that holds the text, in JSON, Parquet and hub datasets.
        split, config: of a hub dataset, or of a folder with one.
        revision: of a hub dataset.
        cache_dir: folder for the Arrow files of local sources, by default the cache of the datasets library. Hub
            datasets always go to that cache, which keeps the download.
        left_out: receives the files that are not read.

    Raises:
        GrowthError: the text or the column does not exist, the hub cannot be reached, or a file cannot be parsed.

    >>> load_documents("embedded").column_names  # doctest: +SKIP
    ['text', 'source', 'title']
    """
    if str(ref) == EMBEDDED:
        return _from_rows(embedded_rows, {}, cache_dir)
    if (found := find_files(ref, split, config)) is not None:
        left_out = LeftOut() if left_out is None else left_out
        left_out.update(found.left_out)
        return _from_files(found.files, user_path(ref).is_file(), text_column, cache_dir, left_out)
    return _from_hub(str(ref), text_column, split, config, revision)


def local_files(ref: str | Path, split: str = TRAIN, config: str | None = None) -> list[Path] | None:
    """Return the files of a reference, sorted; None if it can only be a name on the hub.

    Raises:
        GrowthError: as `find_files`.
    """
    found = find_files(ref, split, config)
    return None if found is None else found.files


def embedded_rows() -> Iterator[Row]:
    """Return the documents of the embedded corpus as rows."""
    return map(asdict, embedded_documents())


def _from_rows(rows: Callable[..., Iterator[Row]], arguments: dict[str, Any], cache_dir: str | Path | None) -> Dataset:
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    cache = str(cache_dir) if cache_dir else None
    try:
        with _cache():
            return Dataset.from_generator(rows, _features(), cache, gen_kwargs=arguments)
    except ValueError:
        if next(rows(**arguments), None) is not None:
            raise
        return Dataset.from_dict({"text": [], "source": [], "title": []}, features=_features())  # which it refuses
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, GrowthError):
            raise error.__cause__ from None
        raise GrowthError(
            "the text cannot be written to the cache of datasets",
            where=cache or "HF_HOME",
            why=str(error.__cause__ or error),
            fix="choose a place where you may write and that has enough space",
        ) from error


@contextmanager
def _cache() -> Iterator[None]:
    """Name the cache of `datasets` where it cannot be written; a context."""
    try:
        yield
    except OSError as error:
        raise GrowthError(
            "the cache of datasets cannot be written",
            where=str(error.filename or "HF_HOME"),
            why=str(error),
            fix="set HF_HOME to a folder where you may write and that has enough space",
        ) from error


def _from_files(
    files: list[Path], named: bool, text_column: str, cache_dir: str | Path | None, left_out: LeftOut
) -> Dataset:
    from datasets import concatenate_datasets

    parts = []
    if texts := [file for file in files if kind_of(file) == "text"]:
        sources = [file.name if named else file.absolute().parent.name for file in texts]
        parts.append(
            _from_rows(_stamped_texts, {"files": texts, "sources": sources, "stamps": _stamps(texts)}, cache_dir)
        )
    for file in files:
        if kind_of(file) != "text":
            arguments = {"file": file, "text_column": text_column, "stamps": _stamps([file])}
            part = _from_rows(_stamped_table, arguments, cache_dir)
            if len(part):
                parts.append(_named(part, printable(file.name)))
            else:
                left_out.add(NO_ROWS, file.name)
    if not parts:
        raise GrowthError(
            "the text holds no documents",
            where=", ".join(map(str, files[:3])) + (", ..." if len(files) > 3 else ""),
            why=f"{'the file has' if len(files) == 1 else f'all {len(files)} files have'} no rows",
            fix="download or write the files again: an empty file often comes from a download that failed",
        )
    return concatenate_datasets(parts)


def _stamps(files: list[Path]) -> list[tuple[int, int]]:
    """Return size and time of files: `datasets` keeps rows in its cache by the arguments of their generator."""
    stamps = []
    for file in files:
        with reading(file, "the file"):
            status = file.stat()
        stamps.append((status.st_size, status.st_mtime_ns))
    return stamps


def _stamped_texts(files: list[Path], sources: list[str], stamps: Any) -> Iterator[Row]:
    return text_rows(files, sources)


def _stamped_table(file: Path, text_column: str, stamps: Any) -> Iterator[Row]:
    return table_rows([file], text_column)


def _named(data: Dataset, source: str) -> Dataset:
    """Give the rows of a file without a column of sources or titles the name of the file and an empty title."""
    for name, value in (("source", source), ("title", "")):
        if data.data.column(name).null_count == len(data):
            data = _with_constant(data.remove_columns(name), name, value)
    return data.select_columns(["text", "source", "title"])


def _with_constant(data: Dataset, name: str, value: str) -> Dataset:
    import pyarrow as pa

    # This column is held in memory (some bytes a document); the text stays memory-mapped.
    return data.add_column(name, pa.array([value], pa.string()).take(pa.array([0] * len(data), pa.int32())))


def stream_documents(
    ref: str | Path,
    *,
    text_column: str = "text",
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    left_out: LeftOut | None = None,
) -> IterableDataset:
    """Return the documents of a corpus in order, with the string column ``text``, without a copy on disk.

    Args:
        ref, text_column, split, config, revision, left_out: as in `load_documents`. Local files are of one kind.

    Returns:
        A dataset with its position as ``state_dict``.

    Raises:
        GrowthError: as `load_documents`.
    """
    from datasets import IterableDataset

    def rows(generator: Callable[..., Iterator[Row]], arguments: dict[str, Any] | None = None) -> IterableDataset:
        with _cache():
            made = IterableDataset.from_generator(generator, gen_kwargs=arguments, features=_features())
        return made.select_columns(["text"])

    if str(ref) == EMBEDDED:
        return rows(embedded_rows)
    if (found := find_files(ref, split, config)) is None:
        return _hub_stream(str(ref), text_column, split, config, revision)
    if left_out is not None:
        left_out.update(found.left_out)
    files = found.files
    kinds = {kind_of(file) for file in files}
    if len(kinds) > 1:
        raise GrowthError(
            f"the stream reads files of {len(kinds)} kinds",
            where=str(ref),
            why=f"there are {', '.join(sorted(kinds))} files",
            fix="name one kind (a glob pattern), or give each kind as a source of its own",
        )
    if kinds == {"text"}:
        return rows(text_rows, {"files": files, "sources": [file.name for file in files]})
    for _ in zip(range(PEEKED), table_rows(files, text_column), strict=False):
        pass  # an error is better raised here than in the middle of a run
    return rows(table_rows, {"files": files, "text_column": text_column})


def _hub_stream(ref: str, text_column: str, split: str, config: str | None, revision: str | None) -> IterableDataset:
    data = _on_hub(ref, split, config, revision, streaming=True)
    with reading(ref, "the dataset"):
        names = data.column_names or list(next(iter(data.take(1)), {}))
    if text_column not in names:
        no_column(text_column, ref, names)
    if data.features is not None:
        _must_be_text(data.features[text_column], text_column, ref)
    data = data.select_columns([text_column])
    return data if text_column == "text" else data.rename_column(text_column, "text")


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
    from datasets.exceptions import DatasetGenerationError

    asked = hub_name(name, revision, kind="dataset")
    name, revision = asked.repository, asked.revision
    try:
        return load_dataset(name, name=config, split=split, revision=revision, streaming=streaming)
    except Exception as error:
        local = "give local text: a file, folder or glob of .txt, .jsonl or .parquet, or the word embedded"
        described = hub_error(error, name, "dataset", local, revision=revision) or machine_error(error)
        if described is not None:
            raise described from error
        if isinstance(error, DatasetGenerationError):  # a damaged file
            raise GrowthError(
                f"the dataset {name!r} cannot be read",
                where=name,
                why=str(error.__cause__ or error),
                fix="report it to the authors of the dataset, or download it and leave the damaged file out",
            ) from error
        if not isinstance(error, ValueError | RuntimeError | FileNotFoundError):
            raise
        # An unknown configuration or split, a loading script, or no data files.
        raise GrowthError(
            f"the dataset {name!r} cannot be loaded",
            where=name,
            why=str(error),
            fix="check the dataset's --config and --split",
        ) from error


def _three_columns(data: Dataset, where: str, source: str, text_column: str) -> Dataset:
    """Reduce a table to text, source and title, without rewriting its text."""
    names = data.column_names
    if text_column not in names:
        no_column(text_column, where, names)
    _must_be_text(data.features[text_column], text_column, where)
    strings = [name for name in ("source", "title") if getattr(data.features.get(name), "dtype", None) == "string"]
    table = data.select_columns(list(dict.fromkeys([text_column, *strings])))
    if text_column != "text":
        table = table.rename_column(text_column, "text")
    for name, value in (("source", source), ("title", "")):
        if name not in table.column_names:
            table = _with_constant(table, name, value)
    table = table.select_columns(["text", "source", "title"])
    return table if table.features == _features() else table.cast(_features())  # a cast rewrites the text


def _must_be_text(kind: Any, text_column: str, where: str) -> None:
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        not_text(text_column, where, f"its type is {kind}")


def _features() -> Features:
    from datasets import Features, Value

    return Features({"text": Value("string"), "source": Value("string"), "title": Value("string")})
