"""Streams: exact packing, the same blocks from any saved position, held-out documents that are never trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from phigrow.corpus import open_stream, stream_settings, train_tokenizer
from phigrow.corpus.streaming import ShuffledStream, StreamBlocks
from phigrow.errors import GrowthError

SEQ_LEN, HELDOUT, COUNT = 8, 7, 200


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents as JSON lines in three files, as Parquet, and as text files; one token a byte."""
    root = tmp_path_factory.mktemp("text")
    train_tokenizer(["text"], 257).save_pretrained(root / "bytes")
    rows = [{"body": body, "number": number} for number, body in enumerate(documents())]
    for part in range(3):
        lines = [json.dumps(row) + "\n" for row in rows[part * 67 : (part + 1) * 67]]
        (root / f"part-{part}.jsonl").write_text("".join(lines))
    datasets.Dataset.from_list(rows).to_parquet(str(root / "all.parquet"))
    (root / "all.txt").write_text("<|endoftext|>".join(documents()))
    return root


def documents() -> list[str]:
    rng = np.random.default_rng(0)
    return [f"{number} " + "".join(rng.choice(list("abcdef "), rng.integers(1, 60))) for number in range(COUNT)]


def opened(text: Path, ref: str = "part-*.jsonl", **options: Any) -> StreamBlocks:
    values = {"ref": str(text / ref), "tokenizer": str(text / "bytes"), "text_column": "body", "heldout": HELDOUT}
    return open_stream(stream_settings({**values, "shuffle": 16, **options}), SEQ_LEN)


def ids(text: Path, bodies: list[str]) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(text / "bytes")
    return [token for body in bodies for token in (*tokenizer(body)["input_ids"], 0)]


@pytest.mark.parametrize("ref", ["part-*.jsonl", "all.parquet", "all.txt"])
def test_a_stream_is_the_documents_packed_epoch_after_epoch(text, ref):
    blocks = opened(text, ref, text_column="text" if ref.endswith("txt") else "body")
    (stream,) = blocks.streams
    epoch = ids(text, documents()[HELDOUT:])
    expected = epoch * 2
    count = len(expected) // SEQ_LEN - 1
    found = stream.take(count)
    stream.close()
    assert found[0].tolist() + found[1:, 1:].reshape(-1).tolist() == expected[: count * SEQ_LEN + 1] or (
        found[:, 1:].reshape(-1).tolist() == expected[1 : count * SEQ_LEN + 1]
    )
    assert len(expected) > 1.9 * len(epoch)
    held = ids(text, documents()[:HELDOUT])
    assert (
        blocks.heldout.batch(range(len(blocks.heldout)))[:, 1:].reshape(-1).tolist()
        == held[1 : 1 + (len(held) - 1) // SEQ_LEN * SEQ_LEN]
    )


def test_any_position_gives_the_same_blocks_again(text):
    (stream,) = opened(text).streams
    shuffled = ShuffledStream(stream, 16, (0, 0))
    parts, positions = [], []
    for count in (5, 11, 16, 40, 3, 1000, 9, 1):
        parts.append(shuffled.take(count))
        positions.append(json.loads(json.dumps(shuffled.position())))  # as a checkpoint holds it
    whole = np.concatenate(parts)
    assert len(whole) > 1.2 * len(ids(text, documents())) / SEQ_LEN  # into the second epoch
    done = 0
    for part, position in zip(parts, positions, strict=True):
        done += len(part)
        (again,) = opened(text).streams
        resumed = ShuffledStream(again, 16, (0, 0))
        resumed.seek(position)
        np.testing.assert_array_equal(resumed.take(20)[: len(whole) - done], whole[done : done + 20])
        assert resumed.take(30).shape == (30, SEQ_LEN + 1)
        again.close()
    stream.close()


def test_blocks_are_shuffled_in_groups_and_none_is_lost(text):
    (stream,), (plain,), (other,) = (opened(text).streams for _ in range(3))
    first = ShuffledStream(stream, 16, (0, 0)).take(64)
    straight = plain.take(64)
    assert not np.array_equal(first, straight)
    for group in range(0, 64, 16):
        assert sorted(map(tuple, first[group : group + 16])) == sorted(map(tuple, straight[group : group + 16]))
    assert not np.array_equal(first, ShuffledStream(other, 16, (1, 0)).take(64))  # another seed
    for each in (stream, plain, other):
        each.close()


def test_held_out_documents_are_never_trained_on(text):
    blocks = opened(text)
    (stream,) = blocks.streams
    tokens = stream.take(len(ids(text, documents())) // SEQ_LEN * 2)[:, 1:].reshape(-1).tolist()
    stream.close()
    trained = "".join(chr(token) if token else "|" for token in tokens)
    for number, body in enumerate(documents()):
        found = "".join(chr(token) if token else "|" for token in ids(text, [body]))
        assert (f"|{found}" in trained) == (number >= HELDOUT), number


def test_a_fingerprint_knows_text_tokenizer_and_settings(text, tmp_path):
    first = opened(text).fingerprint
    assert first == opened(text).fingerprint
    others = {opened(text, **{key: value}).fingerprint for key, value in (("shuffle", 17), ("heldout", 8))}
    others.add(opened(text, "all.parquet").fingerprint)
    assert len({first, *others}) == 4
    for part in range(3):  # moved elsewhere it is the same text
        (tmp_path / f"part-{part}.jsonl").write_bytes((text / f"part-{part}.jsonl").read_bytes())
    assert opened(text, ref=str(tmp_path / "part-*.jsonl")).fingerprint == first


def test_a_repository_of_the_hub_is_streamed_by_configuration_and_split(text, tmp_path, monkeypatch):
    """A repository as the hub has them, but in a folder: `datasets` reads its card, and streams shard after shard."""
    repository = tmp_path / "corpus"
    (repository / "books").mkdir(parents=True)
    (repository / "README.md").write_text(
        "---\nconfigs:\n- config_name: books\n  data_files:\n  - {split: train, path: books/part-*}\n"
        "  - {split: spare, path: books/spare*}\n- config_name: other\n  data_files: other.jsonl\n---\n"
    )
    for part in range(3):
        (repository / "books" / f"part-{part}.jsonl").write_bytes((text / f"part-{part}.jsonl").read_bytes())
    for name in ("books/spare.jsonl", "other.jsonl"):
        (repository / name).write_text('{"body": "elsewhere"}\n' * 9)
    monkeypatch.setattr("phigrow.corpus.sources.find_files", lambda *_: None)  # else the folder's files would win
    monkeypatch.setattr("phigrow.corpus.streaming.local_files", lambda *_: None)

    def blocks(**options: Any) -> StreamBlocks:
        values = {"ref": str(repository), "tokenizer": str(text / "bytes"), "text_column": "body", "config": "books"}
        return open_stream(stream_settings({**values, "heldout": HELDOUT, "shuffle": 16, **options}), SEQ_LEN)

    (stream,) = blocks().streams
    (plain,) = blocks().streams
    expected = ids(text, documents()[HELDOUT:]) * 2
    found = plain.take(len(expected) // SEQ_LEN - 1)
    assert found[:, :-1].reshape(-1).tolist() == expected[: found[:, :-1].size]
    shuffled = ShuffledStream(stream, 16, (0, 0))
    shuffled.take(500)  # into the second shard
    position = json.loads(json.dumps(shuffled.position()))
    (again,) = blocks().streams
    resumed = ShuffledStream(again, 16, (0, 0))
    resumed.seek(position)
    np.testing.assert_array_equal(resumed.take(40), shuffled.take(40))
    assert blocks(split="spare", heldout=1).fingerprint != blocks(heldout=1).fingerprint
    for options, message in (
        ({"config": "verse"}, r"the dataset .* cannot be loaded\n  where: .*\n  why: BuilderConfig 'verse' not found"),
        ({"split": "test"}, r"the dataset .* cannot be loaded\n  where: .*\n  why: Bad split: test"),
    ):
        with pytest.raises(GrowthError, match=message):
            blocks(**options)
    for each in (stream, plain, again):
        each.close()


def test_sources_have_names_and_weights(text):
    parts = {"a": {"ref": str(text / "all.parquet"), "text_column": "body", "weight": 3}}
    parts["b"] = {"ref": str(text / "all.txt")}
    settings = stream_settings({"tokenizer": str(text / "bytes"), "heldout": 9, "sources": parts})
    blocks = open_stream(settings, SEQ_LEN)
    assert [(s.name, s.weight) for s in blocks.mixture] == [("a", 3.0), ("b", 1.0)]
    assert blocks.heldout.sources == ["a", "b"]
    assert blocks.heldout.source_of([0, len(blocks.heldout) - 1]).tolist() == [0, 1]
    assert len(blocks.mixture[0].heldout) + len(blocks.mixture[1].heldout) == len(blocks.heldout)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ref": "x"}, "the stream names no tokenizer"),
        ({"tokenizer": "x"}, "the stream names no text"),
        ({"ref": "x", "tokenizer": "x", "rev": "y"}, r"no key 'rev'\n  where: stream, x\n.*use one of ref, weight"),
        ({"ref": "x", "tokenizer": "x", "weight": 0}, "the weight is 0"),
        ({"ref": "x", "tokenizer": "x", "heldout": -1}, r"heldout is -1\n  where: stream.heldout"),
        ({"ref": "x", "tokenizer": "x", "heldout": True}, "heldout is True"),
        ({"ref": "x", "tokenizer": "x", "shuffle": 0}, "shuffle is 0"),
        ({"tokenizer": "x", "sources": ["x"]}, "the sources of the stream cannot be read"),
        ({"tokenizer": "x", "ref": "x", "sources": {"a": {"ref": "x"}}}, "these keys belong inside the sources: ref"),
    ],
)
def test_bad_settings_are_refused(values, message):
    with pytest.raises(GrowthError, match=message):
        stream_settings(values)


def test_bad_text_is_refused(text):
    with pytest.raises(GrowthError, match=r"no column 'text'\n.*jsonl\n.*'body', 'number'"):
        opened(text, text_column="text")
    with pytest.raises(
        GrowthError, match=r"column 'number' does not hold text\n.*all.parquet\n  why: its type is int64"
    ):
        opened(text, "all.parquet", text_column="number")
    with pytest.raises(GrowthError, match=r"no text files|does not exist"):
        opened(text, "nothing-*.jsonl")
    with pytest.raises(
        GrowthError, match=r"the stream reads files of 3 kinds\n.*\n  why: there are json, parquet, text"
    ):
        opened(text, "*a*")
    with pytest.raises(
        GrowthError,
        match=r"the held-out text is too short for one block\n.*\n  why: the first 1 documents have \d+ tokens",
    ):
        open_stream(
            stream_settings({"ref": str(text / "all.txt"), "tokenizer": str(text / "bytes"), "heldout": 1}), 5000
        )
    (stream,) = opened(text, heldout=COUNT).streams
    with pytest.raises(
        GrowthError, match=r"the stream has no text to train on\n.*\n.*the first 200 documents, which are held out"
    ):
        stream.take(1)
