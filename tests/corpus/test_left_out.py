"""One split of a data set's clone is packed, and one line names the files and documents that were left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from phigrow.corpus import open_stream, prepare, stream_settings, train_tokenizer
from phigrow.corpus.left_out import LeftOut
from phigrow.corpus.local_files import find_files, with_text
from phigrow.corpus.rows import text_rows
from phigrow.corpus.sources import load_documents
from phigrow.errors import GrowthError

CARD = "---\nlicense: mit\n---\n# Books\nA data set of books.\n"


@pytest.fixture(autouse=True)
def quiet() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def put(path: Path, *texts: str | None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": text, "n": number} for number, text in enumerate(texts)]
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def names(folder: Path, **options: Any) -> tuple[list[str], dict[str, list[str]]]:
    """Return the files that are read, and those that are left out by reason."""
    found = find_files(folder, **options)
    assert found is not None
    return [str(file.relative_to(folder)) for file in found.files], {
        reason: each["examples"] for reason, each in found.left_out.as_dict().items()
    }


def test_a_clone_is_its_text_of_one_split(tmp_path):
    clone = tmp_path / "books"
    for split in ("train", "test", "validation"):
        put(clone / "data" / f"{split}-00000-of-00001.parquet", f"text of {split}")
    for name, content in {
        "README.md": CARD, "LICENSE": "MIT", "LICENSE.txt": "MIT", "dataset_infos.json": "{}", ".gitattributes": "*",
        "NOTICE.md": "notice", "cover.png": "png",
    }.items():  # fmt: skip
        (clone / name).write_text(content)
    files, left_out = names(clone)
    assert files == ["data/train-00000-of-00001.parquet"]
    assert left_out == {
        "description": ["LICENSE.txt", "NOTICE.md", "README.md"],
        "other_split": ["data/test-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"],
        "other_kind": ["LICENSE", "cover.png"],
    }
    assert load_documents(clone, cache_dir=tmp_path / "cache")["text"][:] == ["text of train"]
    assert load_documents(clone, cache_dir=tmp_path / "cache", split="test")["text"][:] == ["text of test"]
    with pytest.raises(GrowthError, match=r"no split 'dev'\n.*\n  why: its splits are test, train, validation"):
        find_files(clone, "dev")
    with pytest.raises(GrowthError, match=r"'train\[:1%\]' is no split of a local data set"):
        find_files(clone, "train[:1%]")
    # Negative controls: a pattern takes what it matches, and a file is what it is.
    assert len(find_files(clone / "data" / "*.parquet").files) == 3
    assert find_files(clone / "README.md").files == [clone / "README.md"]


@pytest.mark.parametrize(
    ("files", "kept"),
    [
        (["train.jsonl", "test.jsonl", "dev.jsonl"], ["train.jsonl"]),
        (["train/a.jsonl", "eval/a.jsonl"], ["train/a.jsonl"]),
        (["wiki.train.txt", "wiki.valid.txt", "wiki.test.txt"], ["wiki.train.txt"]),
        (["train_sft-00000-of-00001.jsonl", "test_sft-00000-of-00001.jsonl"], ["train_sft-00000-of-00001.jsonl"]),
        (["training-a.jsonl", "validation.jsonl", "extra.jsonl"], ["extra.jsonl", "training-a.jsonl"]),
        # Nothing names the split of training, so nothing is left out.
        (["test.jsonl", "more.jsonl"], ["more.jsonl", "test.jsonl"]),
        (["contest.jsonl", "trainer.jsonl"], ["contest.jsonl", "trainer.jsonl"]),
        # Prose: a page on training, one on evaluation, and the page that opens the folder.
        (["README.md", "training.md", "evaluation.md"], ["README.md", "evaluation.md", "training.md"]),
        (["test/a.txt", "train/b.txt"], ["test/a.txt", "train/b.txt"]),
        # The word of a shard that names no split: its folder decides, or else the word is a split of its own.
        (
            ["train/data-00000-of-00001.jsonl", "test/data-00000-of-00001.jsonl"],
            ["train/data-00000-of-00001.jsonl"],
        ),
        (["en-train-00000-of-00001.jsonl", "en-test-00000-of-00001.jsonl"], ["en-train-00000-of-00001.jsonl"]),
        (
            ["train-00000-of-00001.jsonl", "unsupervised-00000-of-00001.jsonl"],
            ["train-00000-of-00001.jsonl"],
        ),
        # One word of a title is no split. Negative controls: the same words alone, and at an end of a table's name.
        (["how-to-train-a-dog.txt", "test-driven-development.txt"], None),
        (["how-to-train-a-dog.txt", "train.txt", "test-02.txt"], ["how-to-train-a-dog.txt", "train.txt"]),
        (["train.jsonl", "python-dev.jsonl"], ["python-dev.jsonl", "train.jsonl"]),
        (["train.jsonl", "how-to-test-code.jsonl", "code_test.jsonl.gz"], ["how-to-test-code.jsonl", "train.jsonl"]),
        (["train.jsonl", "dev-01.jsonl", "validation-en.jsonl"], ["train.jsonl"]),
    ],
)
def test_splits_are_told_by_names_as_on_the_hub(tmp_path, files, kept):
    for name in files:
        put(tmp_path / "data" / name, f"text of {name}")
    assert names(tmp_path / "data")[0] == (sorted(files) if kept is None else kept)


def test_the_card_names_files_of_configurations_and_splits(tmp_path):
    clone = tmp_path / "books"
    listed = (
        "configs:\n- config_name: en\n  data_files: [{split: train, path: en/*}, {split: spare, path: spare/*}]\n"
        "- config_name: de\n  data_dir: de\n  data_files: '*.jsonl'\n"
    )
    for name in ("en/a.jsonl", "en/b.jsonl", "spare/a.jsonl", "de/a.jsonl"):
        put(clone / name, name)
    (clone / "README.md").write_text(f"---\n{listed}---\n")
    with pytest.raises(GrowthError, match=r"has 2 configurations\n  where: .*README.md\n  why: .*en, de\n.*--config"):
        names(clone)
    assert names(clone, config="en") == (
        ["en/a.jsonl", "en/b.jsonl"],
        {"description": ["README.md"], "other_split": ["spare/a.jsonl"], "other_config": ["de/a.jsonl"]},
    )
    assert names(clone, config="de")[0] == ["de/a.jsonl"]
    assert names(clone, config="en", split="spare")[0] == ["spare/a.jsonl"]
    with pytest.raises(GrowthError, match=r"no split 'test'\n.*\n  why: its splits are train, spare"):
        names(clone, config="en", split="test")
    with pytest.raises(GrowthError, match=r"no configuration 'fr'\n.*\n  why: its card names en, de"):
        names(clone, config="fr")
    (clone / "README.md").write_text(
        f"---\n{listed.replace('name: de', 'name: de' + chr(10) + '  default: true')}---\n"
    )
    assert names(clone)[0] == ["de/a.jsonl"]
    for broken in ("7", "[]", "[3]", "{}"):  # no names of files: those of the splits decide
        (clone / "README.md").write_text(f"---\nconfigs: [{{config_name: en, data_files: {broken}}}]\n---\n")
        if broken != "[3]":
            assert len(names(clone)[0]) == 4
    (clone / "README.md").write_text("# Books\nNo card of a data set.\n")
    assert len(names(clone)[0]) == 4  # negative control
    with pytest.raises(GrowthError, match="its card names no configurations"):
        names(clone, config="en")


def test_a_configuration_may_name_only_its_folder(tmp_path):
    clone = tmp_path / "books"
    for name in ("en/train.jsonl", "en/test.jsonl", "de/train.jsonl", "test/fr/a.jsonl", "english/train.jsonl"):
        put(clone / name, name)
    listed = "".join(
        f"- config_name: {name}\n  data_dir: {folder}\n"
        for name, folder in {"en": "en", "de": "./de/", "fr": "test/fr", "es": "es"}.items()
    )
    (clone / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    assert names(clone, config="en") == (
        ["en/train.jsonl"],
        {
            "description": ["README.md"],
            "other_split": ["en/test.jsonl"],
            "other_config": ["de/train.jsonl", "english/train.jsonl", "test/fr/a.jsonl"],
        },
    )
    assert names(clone, config="en", split="test")[0] == ["en/test.jsonl"]
    assert names(clone, config="de")[0] == ["de/train.jsonl"]
    assert names(clone, config="fr")[0] == ["test/fr/a.jsonl"]
    with pytest.raises(GrowthError, match="the names of its files tell no splits"):  # folders above it do not count
        names(clone, config="fr", split="test")
    with pytest.raises(GrowthError, match=r"has no text files\n  where: .*README.md\n  why: its data_dir is es,"):
        names(clone, config="es")
    # Negative control: a configuration that names no folder has the files of all.
    (clone / "README.md").write_text("---\nconfigs: [{config_name: en}]\n---\n")
    assert names(clone, config="en")[0] == ["de/train.jsonl", "en/train.jsonl", "english/train.jsonl"]


def test_the_work_for_a_folder_grows_with_its_files(tmp_path, monkeypatch):
    files = [put(tmp_path / f"{number}.jsonl", "text") for number in range(40)]
    hashes: list[int] = []
    former = Path.__hash__
    monkeypatch.setattr(Path, "__hash__", lambda path: hashes.append(1) or former(path))
    assert len(with_text(tmp_path, files)) == 40
    linear = len(hashes)
    assert [file for file in files if file not in set(files)] == []
    assert linear <= 40 < 40 * 40 <= len(hashes)  # negative control: a set for each file


def test_links_and_folders_of_save_to_disk_are_named(tmp_path):
    put(tmp_path / "elsewhere" / "b.jsonl", "b")
    put(tmp_path / "data" / "a.jsonl", "a")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    assert names(tmp_path / "data") == (["a.jsonl"], {"linked_folder": ["more"]})
    (tmp_path / "data" / "c.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(GrowthError, match=r"a file is a broken link\n  where: .*c\.jsonl\n  why: it leads to .*gone"):
        names(tmp_path / "data")
    datasets.Dataset.from_dict({"text": ["one"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(GrowthError, match=r"all files are about the data\.(.*\n)*.*load_from_disk"):
        names(tmp_path / "saved")


def test_one_line_tells_what_was_left_out(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    train_tokenizer(["text"], 257).save_pretrained(tmp_path / "bytes")
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"a text of its own, number {number}", encoding="utf-8")
    (folder / "latin.txt").write_bytes("Käse".encode("latin-1"))
    (folder / "wide.txt").write_bytes("a text".encode("utf-16"))
    (folder / "empty.txt").write_text(" \n")
    (folder / "copy.txt").write_text("a text of its own, number 3")
    (folder / "marked.txt").write_bytes(b"\xef\xbb\xbfwritten by an editor")
    (folder / "same.txt").write_text("written by an editor")  # without a mark
    (folder / "picture.png").write_bytes(b"png")
    info = prepare(folder, tmp_path / "out", seq_len=4, tokenizer=tmp_path / "bytes", progress=False)
    assert str(info).splitlines()[2:] == [
        "Left out: 1 file of an unknown kind (picture.png), 2 documents that are null or not UTF-8 (latin.txt, "
        "wide.txt), 1 empty document (empty.txt), 2 duplicates (copy.txt: 'a text of its own, number 3', same.txt: "
        "'written by an editor'). Removed the byte-order mark of 1 document (marked.txt)."
    ]
    assert info.skipped == {"empty": 1, "undecodable": 2, "duplicate": 2}
    stored = json.loads((tmp_path / "out" / "data.json").read_text())
    assert stored["left_out"] == info.left_out
    assert stored["left_out"]["undecodable"] == {"count": 2, "examples": ["latin.txt", "wide.txt"]}
    text = "".join(f"a text of its own, number {number}" for number in range(12)) + "written by an editor"
    assert info.train.tokens_seen + info.heldout.tokens_seen == len(text) + 13  # the mark would have three tokens
    # Negative control: nothing is left out of clean text.
    for name in ("latin", "wide", "empty", "copy", "marked"):
        (folder / f"{name}.txt").unlink()
    (folder / "picture.png").unlink()
    clean = prepare(folder, tmp_path / "clean", seq_len=4, tokenizer=tmp_path / "bytes", progress=False)
    assert (clean.left_out, len(str(clean).splitlines())) == ({}, 2)
    assert clean.train.tokens_seen + clean.heldout.tokens_seen == info.train.tokens_seen + info.heldout.tokens_seen


def test_tokens_of_unknown_text_are_counted(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(
        models.WordLevel({"<|endoftext|>": 0, "?": 1, "to": 2, "be": 3, "or": 4, "not": 5}, unk_token="?")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    path = put(tmp_path / "a.jsonl", *(f"to be or not to be {number}" for number in range(10)))
    info = prepare(path, tmp_path / "out", seq_len=4, tokenizer=tmp_path / "words.json", progress=False)
    assert info.unknown_tokens == 10
    assert str(info).splitlines()[2] == "10 tokens (12.5%) stand for text that the tokenizer does not know."


def test_streams_count_too(tmp_path):
    train_tokenizer(["text"], 257).save_pretrained(tmp_path / "bytes")
    texts = [f"text number {number}" for number in range(60)]
    put(tmp_path / "a.jsonl", "first", None, *texts, " ", "", "\ufeffmarked", None)
    values = {"ref": str(tmp_path / "a.jsonl"), "tokenizer": str(tmp_path / "bytes"), "heldout": 10}
    blocks = open_stream(stream_settings({**values, "shuffle": 4}), 8)
    feed = blocks.make_feed(0, 4)
    feed.seek(0, None)
    for step in range(80):  # more than two epochs
        feed.read(step, 0, 1)
    expected = (
        "stream a.jsonl: Left out: 2 documents that are null or not UTF-8, 2 empty documents. Removed the byte-order "
        "mark of 1 document."
    )
    tokens = sum(len(text) + 1 for text in [*texts[8:], "marked"])
    again = 80 * 4 * 8 / tokens
    assert feed.notices(80) == [
        f"warning: the stream a.jsonl starts over after {tokens / 8:,.0f} blocks, so this run reads it {again:.1f} "
        "times"
    ]
    assert feed.notices(80) == []  # once
    assert feed.notices(80, ended=True) == [expected]
    feed.close()


def test_lines_of_two_places_are_added():
    one, two = LeftOut(), LeftOut()
    one.add("empty", "a", "b", count=7)
    two.add("empty", "c", "d")
    two.add_marks("e")
    one.update(two)
    assert one.as_dict() == {
        "empty": {"count": 9, "examples": ["a", "b", "c"]},
        "byte_order_mark": {"count": 1, "examples": ["e"]},
    }
    assert str(one) == "Left out: 9 empty documents (a, b, c, ...). Removed the byte-order mark of 1 document (e)."
    assert (str(LeftOut()), bool(LeftOut())) == ("", False)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_left_out(encoding, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_bytes("An ordinary sentence of this text. ".encode(encoding) * 20)
    (folder / "b.txt").write_text("Another sentence, with a \0 inside. " * 20)
    rows = list(text_rows([folder / "a.txt", folder / "b.txt"], ["a", "b"]))
    assert [row["text"] is None for row in rows] == [True, False]
