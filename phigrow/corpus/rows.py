"""Read local files as rows of text, source and title. Every error names the file and the place in it."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn

from phigrow.corpus.left_out import printable
from phigrow.corpus.local_files import PARQUET_SUFFIXES, TEXT_SUFFIXES
from phigrow.errors import GrowthError
from phigrow.files.paths import utf8_path

Row = dict[str, str | None]

SEPARATOR = "<|endoftext|>"
"""Separator of documents inside one text file, as in published corpora."""

MARK = "\ufeff"
"""The byte-order mark, which some editors put before the first character of a file."""

POINTER = b"version https://git-lfs.github.com/spec/"
"""First bytes of a file that Git LFS has not downloaded."""

REPAIR = "repair the file, or leave it out"
LINES = "write it with one object in each line, as with `jq -c '.[]'`, or leave it out"
NAME_COLUMN = "name the column with the text (--text-column, or text_column of a stream), or leave the file out"
LARGEST_WHOLE = 1 << 30
"""Most bytes of a line of JSON, and of a JSON file without one object in each line, which is parsed as a whole."""

COLUMNS_SHOWN = 1000
"""Rows whose columns an error names, and after which a file without the column of the text is refused."""


@contextmanager
def reading(where: str | Path, kind: str, fix: str = REPAIR) -> Iterator[None]:
    """Convert errors of reading a file in the block to a GrowthError that names it; a context.

    Args:
        where: the file, or the name of a data set.
        kind: the noun for messages, such as ``the Parquet file``.
        fix: what to do.

    Raises:
        GrowthError: the block raises any other error of an operating system, a format or a library that reads it.
    """
    import pyarrow as pa

    try:
        yield
    except GrowthError:
        raise
    except (OSError, EOFError, zlib.error, ValueError, RuntimeError, pa.ArrowException) as error:
        cause = error.__cause__ or error
        if isinstance(cause, GrowthError):
            raise cause from error
        raise GrowthError(
            f"{kind} cannot be read", where=str(where), why=str(cause) or type(cause).__name__, fix=fix
        ) from error


def kind_of(file: Path) -> str:
    """Return the kind of a file by its name: ``text``, ``json`` or ``parquet``."""
    if file.name.endswith(TEXT_SUFFIXES):
        return "text"
    return "parquet" if file.name.endswith(PARQUET_SUFFIXES) else "json"


def text_rows(files: Iterable[Path], sources: Iterable[str]) -> Iterator[Row]:
    """Yield a row for each document of the text files; its text is None if the file is not UTF-8."""
    for file, source in zip(files, sources, strict=True):
        with reading(file, "the text file"):
            content = file.read_bytes()
            _refuse_pointer(file, content)
        try:
            decoded = content.decode("utf-8")
        except UnicodeDecodeError:
            decoded = None
        # UTF-16 without a byte-order mark is valid UTF-8: every other character of Latin text is NUL.
        is_text = decoded is not None and decoded.count("\0") <= len(decoded) // 4
        texts: list[str | None] = [*_with_newlines(decoded or "").split(SEPARATOR)] if is_text else [None]
        if len(texts) > 1 and not (texts[-1] or "").strip():
            texts.pop()  # blank text after the last separator is no document
        for number, text in enumerate(texts):
            title = file.name if len(texts) == 1 else f"{file.name}#{number}"
            yield {"text": text, "source": printable(source), "title": printable(title)}


def _with_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def table_rows(files: Iterable[Path], text_column: str) -> Iterator[Row]:
    """Yield a row for each row of JSON and Parquet files. Only text, source and title are read.

    Source and title are None where a file has no such column of strings.
    """
    for file in files:
        kind = kind_of(file)
        with reading(file, f"the {kind} file"):
            rows = _parquet_rows if kind == "parquet" else _json_rows
            yield from rows(file, text_column)


def _json_rows(file: Path, text_column: str) -> Iterator[Row]:
    has_column, columns = False, dict[str, None]()
    number = 0
    for number, (place, row, is_plain) in enumerate(json_objects(file, text_column), 1):
        if number <= COLUMNS_SHOWN:
            columns |= dict.fromkeys(row)
        has_column = has_column or text_column in row
        if number == COLUMNS_SHOWN and not has_column:
            no_column(text_column, str(file), list(columns), f" of the first {COLUMNS_SHOWN:,} rows")
        text = row.get(text_column)
        if text is not None and not isinstance(text, str):
            not_text(text_column, f"{file}, {place}", f"it holds {json.dumps(text)[:60]}")
        yield {
            "text": text if is_plain or _is_unicode(text) else None,
            "source": _string(row.get("source")),
            "title": _string(row.get("title")),
        }
    if number and not has_column:
        no_column(text_column, str(file), list(columns))


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) and _is_unicode(value) else None


def _is_unicode(text: str | None) -> bool:
    """Return False for text with half a character, which JSON can spell with an escape but UTF-8 cannot."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        return False
    return True


def json_objects(file: Path, text_column: str) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Yield the place and content of each object of a JSON file, and whether it has no escape of a character.

    A file has an object in each line, or it is an array of objects or of texts, or objects that span lines.
    """
    with _opened(file) as stream:
        decoder, is_first = json.JSONDecoder(), True
        for number, data in enumerate(iter(partial(stream.readline, LARGEST_WHOLE + 1), b""), 1):
            if len(data) > LARGEST_WHOLE:
                _broken(file, f"line {number} is longer than {LARGEST_WHOLE:,} bytes", LINES)
            line = _decoded(data, file, number)
            if number == 1:
                line = line.removeprefix(MARK)
            place, is_plain, end, line = f"line {number}", b"\\u" not in data, 0, line.strip()
            if is_first and line.startswith("["):
                break
            try:
                while end < len(line):  # mostly one object
                    content, end = decoder.raw_decode(line, end)
                    end += len(line) - end - len(line[end:].lstrip())
                    yield place, _object(content, file, place), is_plain
            except json.JSONDecodeError as error:
                if is_first and not end:
                    break
                _broken(file, f"line {number}, column {error.colno}: {error.msg}")
            is_first = is_first and not line
        else:
            return
    yield from _whole(file, text_column)


def _whole(file: Path, text_column: str) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Yield the objects of a JSON file that is not lines of JSON."""
    with _opened(file) as stream:
        data = stream.read(LARGEST_WHOLE + 1)
    if len(data) > LARGEST_WHOLE:
        _broken(file, f"it does not hold one object in each line, and it is longer than {LARGEST_WHOLE:,} bytes", LINES)
    text, number = _decoded(data, file).removeprefix(MARK).rstrip(), 0
    end = len(text) - len(text.lstrip())
    decoder = json.JSONDecoder()
    while end < len(text):
        try:
            content, end = decoder.raw_decode(text, end)
        except json.JSONDecodeError as error:
            _broken(file, f"line {error.lineno}, column {error.colno}: {error.msg}")
        while end < len(text) and text[end].isspace():
            end += 1
        for each in content if isinstance(content, list) else [content]:
            number += 1
            place = f"item {number}"
            yield place, {text_column: each} if isinstance(each, str) else _object(each, file, place), False


def _object(content: Any, file: Path, place: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        _broken(file, f"{place} holds {json.dumps(content)[:60]}, which is no object")
    return content


def _decoded(data: bytes, file: Path, line: int | None = None) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1 if line is None else line
        why = f"line {number} is not UTF-8: {error.reason} ({data[error.start : error.end].hex(' ')})"
        _broken(file, why, f"convert it to UTF-8, as with `iconv -f ENCODING -t UTF-8`, {REPAIR}")


def _broken(file: Path, why: str, fix: str = REPAIR) -> NoReturn:
    raise GrowthError("the json file cannot be read", where=str(file), why=why, fix=fix)


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        _refuse_pointer(file, stream.peek(len(POINTER)))
        yield stream  # type: ignore[misc]


def _refuse_pointer(file: Path, content: bytes) -> None:
    if content.startswith(POINTER):
        raise GrowthError(
            "the file was not downloaded",
            where=str(file),
            why="it is a pointer of Git LFS, which stands for the file",
            fix="run `git lfs pull` in the repository, or download the data set with `hf download`",
        )


def _parquet_rows(file: Path, text_column: str) -> Iterator[Row]:
    import pyarrow.parquet as pq

    with file.open("rb") as start:
        _refuse_pointer(file, start.read(len(POINTER)))
    with utf8_path(file) as readable, pq.ParquetFile(readable) as table:
        schema = table.schema_arrow
        if text_column not in schema.names:
            no_column(text_column, str(file), schema.names)
        if not _holds_strings(schema.field(text_column).type):
            not_text(text_column, str(file), f"its type is {schema.field(text_column).type}")
        others = [name for name in ("source", "title") if name in schema.names]
        others = [name for name in others if name != text_column and _holds_strings(schema.field(name).type)]
        first = 0
        for batch in table.iter_batches(256, columns=[text_column, *others]):
            columns = {name: _strings(batch.column(name), file, first) for name in batch.schema.names}
            nothing = [None] * len(batch)
            for text, source, title in zip(
                columns[text_column], columns.get("source", nothing), columns.get("title", nothing), strict=True
            ):
                yield {"text": text, "source": source, "title": title}
            first += len(batch)


def _strings(values: Any, file: Path, first: int) -> list[str | None]:
    try:
        strings: list[str | None] = values.to_pylist()
        return strings
    except UnicodeDecodeError:
        for number, value in enumerate(values):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise GrowthError(
                    "the parquet file cannot be read",
                    where=str(file),
                    why=f"row {first + number + 1} is not UTF-8: {error.reason}",
                    fix=REPAIR,
                ) from error
        raise


def _holds_strings(kind: Any) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def not_text(text_column: str, where: str, why: str) -> NoReturn:
    """Refuse a column that does not hold text."""
    raise GrowthError(f"the column {text_column!r} does not hold text", where=where, why=why, fix=NAME_COLUMN)


def no_column(text_column: str, where: str, names: list[str], rows: str = "") -> NoReturn:
    """Refuse data without the column that shall hold the text; ``rows`` names the rows that were read."""
    raise GrowthError(
        f"the data has no column {text_column!r}",
        where=where,
        why=f"the columns{rows} are {', '.join(map(repr, names))}",
        fix=NAME_COLUMN,
    )
