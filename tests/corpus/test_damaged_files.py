"""A file that cannot be read is named, in packing and in streams alike, and columns that nobody reads do no harm."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phigrow.corpus import load_blocks, load_documents, open_stream, prepare, rows, stream_settings, train_tokenizer
from phigrow.corpus.left_out import LeftOut
from phigrow.corpus.rows import table_rows
from phigrow.corpus.sources import stream_documents
from phigrow.errors import GrowthError, MachineError

Reader = Callable[[Path], list[Any]]


@pytest.fixture(autouse=True)
def quiet() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(params=["packed", "streamed"])
def read(request: pytest.FixtureRequest) -> Reader:
    """Read all texts of a reference, from packing's dataset or from a stream."""

    def packed(ref: Path) -> list[Any]:
        folder = ref if ref.is_dir() else ref.parent
        return list(load_documents(ref, cache_dir=folder / ".cache")["text"])

    def streamed(ref: Path) -> list[Any]:
        return [row["text"] for row in stream_documents(ref)]

    return packed if request.param == "packed" else streamed


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet(path: Path, texts: list[bytes]) -> Path:
    """Write texts without a check of their bytes."""
    offsets, data = [0], b""
    for text in texts:
        data += text
        offsets.append(len(data))
    buffers = [None, pa.py_buffer(pa.array(offsets, pa.int32()).buffers()[1]), pa.py_buffer(data)]
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), len(texts), buffers)})
    pq.write_table(table, path)
    return path


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
DAMAGED: dict[str, tuple[str, bytes, str]] = {
    "text in Latin-1": ("a.jsonl", b'{"text": "one"}\n{"text": "K\xe4se"}\n', r"line 2 is not UTF-8: .*\(e4\)"),
    "cut off": ("a.jsonl", b'{"text": "one"}\n{"text": "tw', "line 2, column 10: Unterminated string"),
    "a number": ("a.jsonl", b'{"text": "one"}\n7\n', "line 2 holds 7, which is no object"),
    "an array": ("a.json", b'[{"text": "one"},\n {"text": ]\n', "line 2, column 11: Expecting value"),
    "no gzip": ("a.jsonl.gz", b'{"text": "one"}\n', "Not a gzipped file"),
    "half a gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "one"}\n' * 9)[:-9], "Compressed file ended|EOF"),
    "no Parquet": ("a.parquet", b'{"text": "one"}\n', "Parquet"),
    "no bytes": ("a.parquet", b"", "Parquet file size is 0 bytes"),
    "a pointer": ("a.jsonl", LFS.encode(), "it is a pointer of Git LFS"),
    "a pointer for a table": ("a.parquet", LFS.encode(), "it is a pointer of Git LFS"),
    "a pointer for a text": ("a.txt", LFS.encode(), "it is a pointer of Git LFS"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named(tmp_path, read, name):
    file, content, why = DAMAGED[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(GrowthError, match=rf"(cannot be read|not downloaded)\n  where: .*{file}\n  why: .*({why})"):
        read(tmp_path / file)


def test_bad_bytes_in_parquet_are_named_by_row(tmp_path, read):
    path = parquet(tmp_path / "a.parquet", [*[b"one"] * 300, b"K\xe4se", b"two"])
    with pytest.raises(GrowthError, match=r"cannot be read\n  where: .*a\.parquet\n  why: row 301 is not UTF-8"):
        read(path)
    assert read(parquet(tmp_path / "b.parquet", [b"one", "Käse".encode()])) == ["one", "Käse"]  # negative control


def test_empty_shards_are_left_out_and_named(tmp_path, read):
    folder = tmp_path / "shards"
    folder.mkdir()
    lines(folder / "a.jsonl", {"text": "one"}, {"text": "two"})
    lines(folder / "b.jsonl")
    (folder / "c.jsonl").write_text("\n\n")
    assert read(folder) == ["one", "two"]
    tables = tmp_path / "tables"
    tables.mkdir()
    parquet(tables / "a.parquet", [])
    parquet(tables / "b.parquet", [b"three"])
    assert read(tables) == ["three"]
    train_tokenizer(["text"], 257).save_pretrained(tmp_path / "bytes")
    info = prepare(folder, tmp_path / "out", seq_len=2, heldout=0.0, tokenizer=tmp_path / "bytes", progress=False)
    assert info.left_out == {"no_documents": {"count": 2, "examples": ["b.jsonl", "c.jsonl"]}}


def test_text_without_any_document_is_named(tmp_path):
    train_tokenizer(["text"], 257).save_pretrained(tmp_path / "bytes")
    lines(tmp_path / "a.jsonl")
    parquet(tmp_path / "a.parquet", [])
    for name in ("a.jsonl", "a.parquet"):
        with pytest.raises(GrowthError, match=rf"no documents\n  where: .*{name}\n  why: the file has no rows"):
            prepare(tmp_path / name, tmp_path / "out", tokenizer=tmp_path / "bytes", progress=False)
        settings = {"ref": str(tmp_path / name), "tokenizer": str(tmp_path / "bytes"), "heldout": 0}
        (stream,) = open_stream(stream_settings(settings), 8).streams
        with pytest.raises(GrowthError, match=rf"the stream has no text to train on\n  where: .*{name}"):
            stream.take(1)
    assert not (tmp_path / "out").exists()


def test_other_columns_may_change_their_type(tmp_path, read):
    many = [{"text": f"{number} " + "x" * 2000, "score": 1, "meta": {"a": 1}} for number in range(5500)]  # 11 MB
    late = [{"text": "late", "score": "high", "meta": [1, "two"], "more": None}]
    texts = read(lines(tmp_path / "a.jsonl", *many, *late))
    assert texts == [row["text"] for row in [*many, *late]]
    with pytest.raises(datasets.exceptions.DatasetGenerationError):  # negative control: the library itself
        datasets.load_dataset("json", data_files=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"))
    path = lines(tmp_path / "b.jsonl", {"text": "one"}, {"text": 2})
    with pytest.raises(GrowthError, match=r"'text' does not hold text\n  where: .*b\.jsonl, line 2\n  why: it holds 2"):
        read(path)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('{"text": "one"}\n\n{"text": "two"}', ["one", "two"]),
        ('\ufeff{"text": "one"}\r\n{"text": "two"}\r\n', ["one", "two"]),
        ('[{"text": "one"}, {"text": "two", "n": 1}]', ["one", "two"]),
        ('[\n  "one",\n  "two"\n]\n', ["one", "two"]),
        ('\n \r\n["one", "two"]', ["one", "two"]),
        ('\ufeff\n{\n  "text": "one"\n}\n', ["one"]),
        ('{"text": "one"}{"text": "two"} {"n": 1}', ["one", "two", None]),
        ('{\n  "text": "one"\n}\n{\n  "text": "two"\n}\n', ["one", "two"]),
        ('{"text": "a time", "when": "2020-01-01 00:00:00"}\n{"text": "2020-01-01"}', ["a time", "2020-01-01"]),
        ('{"text": "half \\ud800"}\n{"text": "whole \\ud83d\\ude42"}', [None, "whole 🙂"]),
        ('{"text": "NaN is no number", "n": NaN}', ["NaN is no number"]),
    ],
)
def test_json_comes_in_many_shapes(tmp_path, read, content, texts):
    (tmp_path / "a.json").write_bytes(content.encode())
    assert read(tmp_path / "a.json") == texts


def test_a_wrong_column_is_named_after_the_first_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("phigrow.corpus.rows.COLUMNS_SHOWN", 4)
    rows: list[dict[str, Any]] = [{"body": "a"}, {"body": "b", "n": 1}, {"body": "c"}, {"body": "d"}]
    path = lines(tmp_path / "a.jsonl", *rows, {"body": "e", "more": 2}, {"text": "late"})
    read: list[Any] = []
    message = (
        r"no column 'text'\n  where: .*a\.jsonl\n  why: the columns of the first 4 rows are 'body', 'n'\n.*text-column"
    )
    with pytest.raises(GrowthError, match=message):
        read.extend(table_rows([path], "text"))
    for row in table_rows([path], "body"):
        read.append(row["text"])
    assert read[-6:] == ["a", "b", "c", "d", "e", None]
    # Negative controls: the fourth row has the column; and a shorter file is read to its end.
    lines(path, *rows[:3], {"text": "in time"})
    assert [row["text"] for row in table_rows([path], "text")] == [None, None, None, "in time"]
    with pytest.raises(GrowthError, match="why: the columns are 'body', 'n'"):
        list(table_rows([lines(path, *rows[:3])], "text"))


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_no_more_of_json_is_read_than_fits(tmp_path, monkeypatch, name):
    monkeypatch.setattr("phigrow.corpus.rows.LARGEST_WHOLE", 64)

    def read(content: str) -> list[Any]:
        data = content.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        return [row["text"] for row in table_rows([tmp_path / name], "text")]

    largest = json.dumps(["x" * 60])
    assert (len(largest), read(largest)) == (64, ["x" * 60])  # negative control
    for content, why in (
        (largest + " ", "line 1 is longer than 64 bytes"),
        ("\n\n" + json.dumps([*"abcdefghijklmn"]), "line 3 is longer than 64 bytes"),
        ("[\n" + json.dumps(["x" * 60]) + "]", "does not hold one object in each line, and it is longer than 64 bytes"),
    ):
        with pytest.raises(GrowthError, match=rf"cannot be read\n  where: .*{name}\n  why: .*{why}\n.*one object in"):
            read(content)
    assert read('{"text": "one"}\n' * 9) == ["one"] * 9  # lines may be more in sum
    with pytest.raises(GrowthError, match="line 4, column 3: Expecting value"):  # blank lines count
        read("\n\n[\n ]]")


def test_sources_and_titles_are_kept_where_they_are_strings(tmp_path):
    lines(tmp_path / "a.jsonl", {"text": "one", "source": "web", "title": 7}, {"text": "two", "source": None})
    lines(tmp_path / "b.jsonl", {"text": "three", "source": 5})
    data = load_documents(tmp_path / "*.jsonl", cache_dir=tmp_path / "cache")
    assert data["source"][:] == ["web", None, "b.jsonl"]
    assert data["title"][:] == ["", "", ""]
    table = pa.table({"text": ["x"], "source": pa.array(["s"]).dictionary_encode(), "title": [1]})
    pq.write_table(table, tmp_path / "c.parquet")
    (row,) = load_documents(tmp_path / "c.parquet", cache_dir=tmp_path / "cache")
    assert row == {"text": "x", "source": "s", "title": ""}


def test_names_that_are_not_utf8_are_escaped(tmp_path, read):
    for name, content in (("caf\udce9.jsonl", '{"text": "one"}'), ("caf\udce9\x1b[1m.txt", "two")):
        (tmp_path / name).write_text(content)
        assert read(tmp_path / name) == [content.split('"')[-2] if "{" in content else content]
    data = load_documents(tmp_path / "*.*", cache_dir=tmp_path / "cache")
    assert data["source"][:] == [tmp_path.name, "caf\\udce9.jsonl"]
    assert data["title"][:] == ["caf\\udce9\\x1b[1m.txt", ""]


def test_each_file_is_read_once_and_one_without_rows_is_empty(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    reads = []
    read_bytes, open_file = Path.read_bytes, Path.open
    monkeypatch.setattr(Path, "read_bytes", lambda file: reads.append(file.name) or read_bytes(file))
    for name in ("a.txt", "b.txt", "c.jsonl", "d.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    (tmp_path / "d.jsonl").write_text("")

    def counted(file, *words, **settings):
        if file.suffix == ".jsonl":
            reads.append(file.name)
        return open_file(file, *words, **settings)

    monkeypatch.setattr(Path, "open", counted)
    left_out = LeftOut()
    data = load_documents(tmp_path, cache_dir=tmp_path / "cache", left_out=left_out)
    assert (len(data), left_out.counts) == (3, {"no_documents": 1})
    assert [reads.count(name) for name in ("a.txt", "b.txt", "c.jsonl")] == [1, 1, 1]


def test_a_changed_file_is_read_again(tmp_path):
    for content in ("one", "two"):
        path = lines(tmp_path / "a.jsonl", {"text": content})
        (tmp_path / "a.txt").write_text(content)
        os.utime(path, ns=(1, hash(content) % 10**9))
        os.utime(tmp_path / "a.txt", ns=(1, hash(content) % 10**9))
        for name in ("a.jsonl", "a.txt"):
            assert load_documents(tmp_path / name, cache_dir=tmp_path / "cache")["text"][:] == [content]


def test_files_and_folders_that_may_not_be_read_are_named(unprivileged, read, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", unprivileged / "closed" / "cache")
    (unprivileged / "closed").mkdir(0o500)
    if read.__name__ == "streamed":
        lines(unprivileged / "a.jsonl", {"text": "one"})
        with pytest.raises(
            GrowthError, match=r"the cache of datasets cannot be written\n  where: .*closed(.*\n)*.*HF_HOME"
        ):
            read(unprivileged / "a.jsonl")
    (unprivileged / "closed").chmod(0o700)
    lines(unprivileged / "a.jsonl", {"text": "one"})
    (unprivileged / "b.txt").write_text("two")
    parquet(unprivileged / "c.parquet", [b"three"])
    for name, kind in (("a.jsonl", "json"), ("b.txt", "text"), ("c.parquet", "parquet")):
        (unprivileged / name).chmod(0o000)
        message = rf"the {kind} file cannot be read\n  where: .*{name}\n  why: .*Permission denied"
        with pytest.raises(GrowthError, match=message):
            read(unprivileged / name)
        (unprivileged / name).chmod(0o444)
        assert len(read(unprivileged / name)) == 1  # negative control
    inner = unprivileged / "texts" / "inner"
    inner.mkdir(parents=True)
    lines(unprivileged / "texts" / "a.jsonl", {"text": "one"})
    lines(inner / "b.jsonl", {"text": "two"})
    for ref in (unprivileged / "texts", unprivileged / "texts" / "*" / "*.jsonl", unprivileged / "texts" / "**" / "*l"):
        assert "two" in read(ref)
        inner.chmod(0o000)
        with pytest.raises(GrowthError, match=r"cannot be read\n  where: .*inner\n  why: .*Permission denied"):
            read(ref)
        inner.chmod(0o700)


def test_errors_in_the_middle_of_a_stream_are_named(tmp_path):
    train_tokenizer(["text"], 257).save_pretrained(tmp_path / "bytes")
    lines(tmp_path / "part-0.jsonl", *({"text": f"text {number}"} for number in range(200)))
    (tmp_path / "part-1.jsonl").write_bytes(b'{"text": "K\xe4se"}\n')
    settings = {"ref": str(tmp_path / "part-*.jsonl"), "tokenizer": str(tmp_path / "bytes"), "heldout": 5}
    (stream,) = open_stream(stream_settings(settings), 8).streams
    stream.take(100)
    with pytest.raises(
        GrowthError, match=r"cannot be read\n  where: .*part-1\.jsonl\n  why: line 1 is not UTF-8"
    ) as bad:
        stream.take(200)
    assert not isinstance(bad.value, MachineError)  # a later start would meet the same line


@pytest.mark.parametrize(
    ("error", "temporary"),
    [
        (OSError(116, "Stale file handle"), True),
        (OSError(5, "Input/output error"), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (ValueError("no JSON"), False),
        (gzip.BadGzipFile("CRC check failed"), False),
    ],
)
def test_an_interrupted_read_in_the_middle_of_a_stream_is_no_bad_input(tmp_path, monkeypatch, error, temporary):
    train_tokenizer(["text"], 257).save_pretrained(tmp_path / "bytes")
    lines(tmp_path / "a.jsonl", *({"text": f"text {number}"} for number in range(300)))
    settings = {"ref": str(tmp_path / "a.jsonl"), "tokenizer": str(tmp_path / "bytes"), "heldout": 5}
    (stream,) = open_stream(stream_settings(settings), 8).streams
    objects = rows.json_objects
    last = [150]  # rows before the error

    def interrupted(*words: Any) -> Any:
        for number, row in enumerate(objects(*words)):
            if number == last[0]:
                raise error
            yield row

    monkeypatch.setattr(rows, "json_objects", interrupted)
    with pytest.raises(GrowthError, match="the json file cannot be read") as raised:
        stream.take(250)
    assert isinstance(raised.value, MachineError) == temporary
    last[0] = 10  # before anything was read
    stream.seek({"epoch": 0, "dataset": None, "tokens": 0, "offset": 0})
    with pytest.raises(GrowthError) as raised:
        stream.take(1)
    assert not isinstance(raised.value, MachineError)


def test_errors_of_a_stream_from_the_hub_name_the_data_set(tmp_path, monkeypatch):
    few = 1

    def texts() -> Any:
        yield from [{"text": "one"}] * few
        raise RuntimeError("Server disconnected without sending a response.")

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(texts, features=None)
    )
    train_tokenizer(["text"], 257).save_pretrained(tmp_path / "bytes")
    settings = {"ref": "someone/books", "tokenizer": str(tmp_path / "bytes"), "heldout": 0}
    (stream,) = open_stream(stream_settings(settings), 2).streams
    message = r"the stream cannot be read\n  where: someone/books\n  why: RuntimeError: Server disconnected"
    with pytest.raises(GrowthError, match=message) as at_first:
        stream.take(9)
    assert not isinstance(at_first.value, MachineError)
    few = 100  # more than are tokenised at once, so that the error comes later
    (stream,) = open_stream(stream_settings(settings), 2).streams
    with pytest.raises(MachineError, match=message):
        stream.take(500)


def test_damaged_blocks_are_named(tmp_path):
    train_tokenizer(["text"], 257).save_pretrained(tmp_path / "bytes")
    path = lines(tmp_path / "a.jsonl", *({"text": f"text number {number}"} for number in range(60)))
    prepare(path, tmp_path / "out", seq_len=8, tokenizer=tmp_path / "bytes", progress=False)
    assert len(load_blocks(tmp_path / "out").train)  # negative control
    (arrow,) = (tmp_path / "out" / "train").glob("*.arrow")
    content = arrow.read_bytes()
    for damaged in (content[: len(content) // 2], b"", LFS.encode()):
        arrow.write_bytes(damaged)
        with pytest.raises(GrowthError, match=r"the packed blocks cannot be read\n  where: .*out/train\n  why: .+"):
            load_blocks(tmp_path / "out")
    arrow.unlink()
    with pytest.raises(GrowthError, match=r"the packed blocks cannot be read\n  where: .*out/train\n  why: .*arrow"):
        load_blocks(tmp_path / "out")
    arrow.write_bytes(content)
    info = json.loads((tmp_path / "out" / "data.json").read_text())
    (tmp_path / "out" / "data.json").write_text(json.dumps(info | {"seq_len": "8"}))
    with pytest.raises(GrowthError, match=r"damaged\n  where: .*data\.json\n  why: seq_len is missing, or of another"):
        load_blocks(tmp_path / "out")


def test_bad_bytes_in_a_table_of_the_hub_are_left_out(tmp_path, monkeypatch):
    train_tokenizer(["text"], 257).save_pretrained(tmp_path / "bytes")
    texts = [*(f"text number {number}".encode() for number in range(40)), b"K\xe4se"]
    table = pq.read_table(parquet(tmp_path / "a.parquet", texts))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset(table))
    info = prepare("someone/books", tmp_path / "out", seq_len=8, tokenizer=tmp_path / "bytes", progress=False)
    assert info.left_out == {"undecodable": {"count": 1, "examples": ["someone/books"]}}
    assert info.train.documents + info.heldout.documents == 40


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    from datasets.arrow_writer import ArrowWriter

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ArrowWriter, "write", full)
    path = lines(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    with pytest.raises(GrowthError, match=r"cannot be written to the cache(.*\n)*  why: .*No space left on device"):
        prepare(path, tmp_path / "out", progress=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl"]
