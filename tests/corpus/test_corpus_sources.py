"""Documents from files and from the hub, and the errors that say what to do."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from phigrow.corpus import load_documents
from phigrow.errors import GrowthError

Row = dict[str, Any]


@pytest.fixture(autouse=True)
def quiet() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def jsonl(path: Path, rows: list[Row]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def parquet(path: Path, rows: list[Row]) -> Path:
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


def rows(ref: str | Path, cache: Path, **options: Any) -> list[tuple[str | None, str, str]]:
    found = load_documents(ref, cache_dir=cache, **options)
    assert found.column_names == ["text", "source", "title"]
    return [(row["text"], row["source"], row["title"]) for row in found]


def test_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("größer\nas it is\n", encoding="utf-8")
    assert rows(tmp_path / "book.txt", tmp_path / "cache") == [("größer\nas it is\n", "book.txt", "book.txt")]


def test_text_file_splits_at_end_of_text(tmp_path: Path) -> None:
    (tmp_path / "stories.txt").write_text("one<|endoftext|>two<|endoftext|>\n", encoding="utf-8")
    expected = [("one", "stories.txt", "stories.txt#0"), ("two", "stories.txt", "stories.txt#1")]
    assert rows(tmp_path / "stories.txt", tmp_path / "cache") == expected


def test_folder_is_read_recursively_and_in_order(tmp_path: Path) -> None:
    books = tmp_path / "books"
    (books / "maths").mkdir(parents=True)
    (books / ".hidden").mkdir()
    (books / "b.md").write_text("B", encoding="utf-8")
    (books / "a.txt").write_text("A", encoding="utf-8")
    (books / "maths" / "c.txt").write_text("C", encoding="utf-8")
    (books / "latin.txt").write_bytes(b"caf\xe9")
    (books / "picture.png").write_bytes(b"png")
    (books / ".hidden" / "d.txt").write_text("D", encoding="utf-8")
    jsonl(books / "rows.jsonl", [{"text": "J"}])
    found = rows(books, tmp_path / "cache")
    assert found == [
        ("A", "books", "a.txt"),
        ("B", "books", "b.md"),
        (None, "books", "latin.txt"),
        ("C", "maths", "c.txt"),
        ("J", "rows.jsonl", ""),
    ]


def test_glob_takes_what_it_matches(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.md"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert [text for text, _, _ in rows(tmp_path / "*.txt", tmp_path / "cache")] == ["a.txt", "b.txt"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_table_is_a_document_a_row(tmp_path: Path, name: str) -> None:
    table = [{"n": 1, "text": "one"}, {"n": 2, "text": "two"}, {"n": 3, "text": None}]
    path = (parquet if name.endswith("parquet") else jsonl)(tmp_path / name, table)
    expected = [("one", name, ""), ("two", name, ""), (None, name, "")]
    assert rows(path, tmp_path / "cache") == expected


def test_table_keeps_its_sources_and_titles(tmp_path: Path) -> None:
    table = [{"title": "T", "licence": "MIT", "source": "S", "text": "one"}]
    assert rows(parquet(tmp_path / "a.parquet", table), tmp_path / "cache") == [("one", "S", "T")]


def test_text_column_is_chosen(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"body": "one", "text": "other"}])
    assert rows(path, tmp_path / "cache", text_column="body") == [("one", "a.jsonl", "")]


def test_file_name_with_pattern_characters_is_a_file(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "part[1].jsonl", [{"text": "one"}])
    assert rows(path, tmp_path / "cache") == [("one", "part[1].jsonl", "")]


def test_missing_column_is_an_error_that_lists_those_there(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"body": "one", "n": 1}])
    with pytest.raises(GrowthError) as error:
        load_documents(path, cache_dir=tmp_path / "cache")
    assert str(error.value) == (
        f"the data has no column 'text'\n  where: {path}\n  why: the columns are 'body', 'n'\n"
        "  what to do: name the column with the text (--text-column, or text_column of a stream), or leave the file out"
    )


def test_column_of_numbers_is_an_error(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"n": 1}])
    with pytest.raises(
        GrowthError, match=r"column 'n' does not hold text\n  where: .*a\.jsonl, line 1\n  why: it holds 1"
    ):
        load_documents(path, text_column="n", cache_dir=tmp_path / "cache")


def test_broken_json_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(GrowthError, match=r"json file cannot be read\n  where: .*a\.jsonl\n  why: .+"):
        load_documents(tmp_path / "a.jsonl", cache_dir=tmp_path / "cache")


def test_unknown_kinds_and_missing_paths_are_errors(tmp_path: Path) -> None:
    (tmp_path / "book.pdf").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    kinds = r"give files of these kinds: \.txt, \.md, \.jsonl, \.json, \.jsonl\.gz, \.json\.gz, \.parquet"
    with pytest.raises(GrowthError, match=rf"phigrow cannot read text from book\.pdf\n(.*\n)*.*{kinds}"):
        load_documents(tmp_path / "book.pdf")
    with pytest.raises(GrowthError, match=rf"no text files\n(.*\n)*.*{kinds}"):
        load_documents(tmp_path / "empty")
    with pytest.raises(GrowthError, match=r"no text files\n.*\n  why: there is nothing, or hidden files only"):
        load_documents(tmp_path / "empty")
    with pytest.raises(GrowthError, match=r"no text files\n.*\n  why: nothing matches the pattern"):
        load_documents(tmp_path / "*.txt")
    for missing in ("missing.txt", "./missing", "a/b/c", "missing.jsonl"):
        with pytest.raises(
            GrowthError, match=rf"the file or folder does not exist\n(.*\n)*.*check the path, and {kinds}"
        ):
            load_documents(missing)


def test_files_of_other_kinds_have_the_command_that_converts_them(tmp_path: Path) -> None:
    (tmp_path / "a b.csv").write_text('text,n\n"to be, or not",1\nto sleep,2\n')
    (tmp_path / "c.tsv").write_text("text\tn\nto dream\t1\n")
    for name, texts in (("a b.csv", ["to be, or not", "to sleep"]), ("c.tsv", ["to dream"])):
        with pytest.raises(GrowthError, match="phigrow cannot read text from") as caught:
            load_documents(tmp_path / name)
        command = caught.value.fix.split("`")[1]
        subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
        data = load_documents((tmp_path / name).with_suffix(".parquet"), cache_dir=tmp_path / "cache")
        assert data["text"][:] == texts
    (tmp_path / "d.jsonl.zst").write_bytes(b"")
    with pytest.raises(GrowthError, match=r"unpack it with `unzstd .*d.jsonl.zst`, and give .*d.jsonl; or give files"):
        load_documents(tmp_path / "d.jsonl.zst")
    (tmp_path / "e.doc").write_bytes(b"")
    with pytest.raises(GrowthError, match="what to do: give files of these kinds"):
        load_documents(tmp_path / "e.doc")


def test_hub_is_asked_for_names_and_never_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def hub(*names: Any, **options: Any) -> datasets.Dataset:
        asked.append((*names, options))
        return datasets.Dataset.from_dict({"content": ["one"], "id": [1]})

    monkeypatch.setattr(datasets, "load_dataset", hub)
    options = {"text_column": "content", "split": "train[:1%]", "config": "en", "revision": "abc"}
    assert rows("someone/books", tmp_path / "cache", **options) == [("one", "someone/books", "")]
    assert asked == [("someone/books", {"name": "en", "split": "train[:1%]", "revision": "abc", "streaming": False})]
    # What is here wins over a name on the hub.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("local", encoding="utf-8")
    assert rows("books", tmp_path / "cache") == [("local", "books", "a.txt")]
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (ConnectionError("unreachable"), ["the dataset 'a/b'", "HF_HUB_OFFLINE", "give local text"]),
        (datasets.exceptions.DatasetNotFoundError("gone"), ["no dataset 'a/b'", "gone", "check the spelling"]),
        (ValueError("Unknown split"), ["the dataset 'a/b' cannot be loaded", "Unknown split", "--split"]),
        (FileNotFoundError("No (supported) data files found"), ["the dataset 'a/b' cannot be loaded", "data files"]),
        (RuntimeError("scripts are no longer supported"), ["cannot be loaded", "scripts are no longer supported"]),
    ],
)
def test_hub_failures_say_what_to_do(raised: Exception, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def hub(*names: Any, **options: Any) -> Any:
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(GrowthError) as error:
        load_documents("a/b")
    for word in words:
        assert word in str(error.value)
