"""Mixtures of packed folders and of sources inside one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phigrow.corpus import load_blocks, mix_folders, mix_sources, prepare, train_tokenizer
from phigrow.errors import GrowthError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``books`` and ``code`` of one tokenizer (one token a byte), ``long`` of another length, ``other`` of another."""
    root = tmp_path_factory.mktemp("folders")
    train_tokenizer(["text"], 257).save_pretrained(root / "bytes")
    make(root, "books", "abcde", root / "bytes")
    make(root, "code", "vwxyz", root / "bytes", count=30)
    make(root, "long", "vwxyz", root / "bytes", seq_len=16)
    make(root, "other", "vwxyz", None, vocab_size=260)
    make(root / "elsewhere", "code", "klm", root / "bytes")
    make(root, "both", "abcde", root / "bytes", second="vwxyz")
    return root


def make(root: Path, name: str, letters: str, tokenizer: Path | None, count: int = 60, **options: Any) -> None:
    second = options.pop("second", None)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        here = second if second and number % 3 == 0 else letters
        text = "".join(rng.choice(list(here), 40))
        rows.append({"text": text, "source": "second" if here is second else "first"})
    root.mkdir(exist_ok=True)
    path = root / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(path, root / name, tokenizer=tokenizer, heldout=0.2, progress=False, **{"seq_len": 8, **options})


def test_folders_are_one_set_of_named_sources(folders):
    mixed = mix_folders({str(folders / "code"): 1, folders / "books": "3"})
    assert mixed.train.sources == ["books", "code"]
    books, code = load_blocks(folders / "books"), load_blocks(folders / "code")
    assert len(mixed.train) == len(books.train) + len(code.train)
    assert [(s.name, s.weight, len(s.train), len(s.heldout)) for s in mixed.mixture] == [
        ("books", 3.0, len(books.train), len(books.heldout)),
        ("code", 1.0, len(code.train), len(code.heldout)),
    ]
    asked = [len(books.train) + 2, 1, len(books.train) - 1, len(mixed.train) - 1]
    expected = np.concatenate(
        [code.train.batch([2]), books.train.batch([1, len(books.train) - 1]), code.train.batch([len(code.train) - 1])]
    )
    np.testing.assert_array_equal(mixed.train.batch(asked), expected)
    assert mixed.train.source_of(asked).tolist() == [1, 0, 0, 1]
    assert mixed.train.batch([]).shape == (0, 9)
    with pytest.raises(IndexError):
        mixed.train.batch([len(mixed.train)])
    assert mixed.info["train"]["documents"] == sum(b.info["train"]["documents"] for b in (books, code))


def test_a_fingerprint_knows_folders_and_weights(folders):
    def fingerprint(**weights: float) -> str:
        return mix_folders({folders / name: weight for name, weight in weights.items()}).fingerprint

    first = fingerprint(books=0.8, code=0.2)
    assert first == fingerprint(code=2, books=8)  # neither their order nor their sum matters
    assert len({first, fingerprint(books=0.7, code=0.3), fingerprint(books=1), fingerprint(code=1)}) == 4


def test_folders_of_one_name_are_named_by_their_paths(folders):
    mixed = mix_folders({str(folders / "code"): 1, str(folders / "elsewhere" / "code"): 1})
    assert mixed.train.sources == sorted([str(folders / "code"), str(folders / "elsewhere" / "code")])


@pytest.mark.parametrize(
    ("second", "text"),
    [
        (
            "long",
            r"blocks of 8 and of 16 tokens\n  where: .*books and .*long\n(.*\n)*.*prepare both with the same --seq-len",
        ),
        (
            "other",
            r"the folders were packed with two tokenizers, of 257 and \d+ tokens\n  where: .*books and .*other\n"
            r".*\n.*--tokenizer",
        ),
        ("nothing", r"the folder of packed blocks does not exist\n  where: .*nothing"),
    ],
)
def test_folders_that_do_not_agree_are_refused(folders, second, text):
    with pytest.raises(GrowthError, match=text):
        mix_folders({folders / "books": 1, folders / second: 1})


def test_a_folder_stands_once_in_a_mixture(folders, monkeypatch):
    monkeypatch.chdir(folders)
    with pytest.raises(
        GrowthError, match=r"stands twice in the mixture\n  where: books, \./books\n.*name each folder once"
    ):
        mix_folders({"books": 1, "./books": 1})


@pytest.mark.parametrize("weight", [0, -1, "many", None, float("nan"), float("inf"), True])
def test_weights_are_positive_numbers(folders, weight):
    with pytest.raises(
        GrowthError, match=r"the weight is .*\n  where: .*books in the mixture\n(.*\n)*.*positive number"
    ):
        mix_folders({folders / "books": weight})


def test_sources_inside_a_folder_are_mixed_by_name(folders):
    blocks = load_blocks(folders / "both")
    mixed = mix_sources(blocks, {"second": 0.9, "first": 0.1})
    assert [source.name for source in mixed.mixture] == ["first", "second"]
    letters = {name: set(load_tokens(folders, text)) for name, text in (("first", "abcde"), ("second", "vwxyz"))}
    for source in mixed.mixture:
        found = mixed.train.batch(np.asarray(source.train))
        # At most the block at a border between sources holds both.
        pure = [set(block.tolist()) <= letters[source.name] | {0} for block in found]
        assert sum(pure) >= len(pure) - 1
        assert isinstance(source.train, range)  # the blocks of a source lie together: they cost no memory
    assert mixed.fingerprint != blocks.fingerprint
    assert mixed.fingerprint != mix_sources(blocks, {"second": 0.8, "first": 0.2}).fingerprint
    alone = mix_sources(blocks, {"second": 1})
    assert [source.name for source in alone.mixture] == ["second"]
    with pytest.raises(
        GrowthError,
        match=r"no blocks of the source 'third'\n.*both\n(.*\n)*.*choose among its sources: 'first', 'second'",
    ):
        mix_sources(blocks, {"third": 1})
    with pytest.raises(GrowthError, match="the mixture names no source"):
        mix_sources(blocks, {})


def load_tokens(folders: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    return list(AutoTokenizer.from_pretrained(folders / "bytes")(text)["input_ids"])
