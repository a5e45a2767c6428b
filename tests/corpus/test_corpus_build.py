"""From text to packed blocks: exact packing, the split, determinism, atomicity."""

from __future__ import annotations

import itertools
import json
import os
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from phigrow.corpus import Blocks, DataInfo, build, load_blocks, prepare, train_tokenizer
from phigrow.errors import GrowthError

EOS = 0
SEQ_LEN = 8


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token a byte, so that the stream can be written down by hand."""
    folder = tmp_path_factory.mktemp("bytes")
    train_tokenizer(["text"], 257).save_pretrained(folder)
    return folder


def words(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choices("abcdefgh ", k=generator.randrange(5, 60))) + f" {n}" for n in range(count)]


def write(path: Path, texts: list[str], sources: list[str] | None = None) -> Path:
    rows = [{"text": text, "source": (sources or ["s"] * len(texts))[n]} for n, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make(folder: Path, texts: list[str], name: str = "out", **options: Any) -> tuple[DataInfo, Blocks]:
    sources = options.pop("sources", None)
    options = {"seq_len": SEQ_LEN, "heldout": 0.2, "progress": False, **options}
    info = prepare(write(folder / f"{name}.jsonl", texts, sources), folder / name, **options)
    return info, load_blocks(folder / name)


def stream_of(blocks: np.ndarray) -> list[int]:
    """Undo the packing: the first block, then of each block all but the token it shares with the one before."""
    for left, right in itertools.pairwise(blocks):
        assert left[-1] == right[0], "consecutive blocks share one token"
    return [*blocks[0].tolist(), *blocks[1:, 1:].reshape(-1).tolist()]


def documents_of(split: Any, tokenizer_dir: Path) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    text = tokenizer.decode(stream_of(split.batch(range(len(split)))))
    return [part for part in text.split("<|endoftext|>") if part]


def all_blocks(data: Blocks) -> tuple[list[list[int]], list[list[int]]]:
    return data.train.batch(range(len(data.train))).tolist(), data.heldout.batch(range(len(data.heldout))).tolist()


def test_a_tokenizer_that_is_not_there_is_told_before_anything_is_read(tmp_path, monkeypatch):
    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("the text is read")

    monkeypatch.setattr(build, "load_documents", read)
    with pytest.raises(GrowthError, match=r"the tokenizer does not exist\n  where: .*nowhere.json"):
        prepare("embedded", tmp_path / "out", tokenizer="nowhere.json")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AssertionError, match="the text is read"):  # negative control: one is to be trained
        prepare("embedded", tmp_path / "out")


def test_packing_by_hand(tmp_path: Path, byte_tokenizer: Path) -> None:
    texts = ["abcdefghij", "klmnopqrstuvw", "xyzabc"]
    info, data = make(tmp_path, texts, tokenizer=byte_tokenizer, heldout=0.0)
    tokenizer = AutoTokenizer.from_pretrained(byte_tokenizer)
    [train, _] = all_blocks(data)
    kept = stream_of(np.array(train))
    orders = [[a, b, c] for a in texts for b in texts for c in texts if len({a, b, c}) == 3]
    streams = [[token for text in order for token in [*tokenizer.encode(text), EOS]] for order in orders]
    # 10 + 13 + 6 bytes and three end-of-text tokens: 3 blocks of 8 and the first token are kept, 7 are dropped.
    assert [stream[:25] for stream in streams].count(kept) == 1
    assert (len(train), {len(block) for block in train}) == (3, {9})
    assert (info.train.tokens_seen, info.train.tokens, info.train.dropped_tokens) == (32, 25, 7)
    # Borders at 8, 16 and 24; documents of 11, 14 and 7 tokens, the last of each the end-of-text token.
    lengths = [len(text) + 1 for text in next(o for o, s in zip(orders, streams, strict=True) if s[:25] == kept)]
    ends = np.cumsum(lengths)
    cut = [
        any(end - length < border < end - 1 for border in (8, 16, 24))
        for length, end in zip(lengths, ends, strict=True)
    ]
    assert info.train.documents_cut == sum(cut) >= 2
    assert (info.train.documents, info.train.blocks, info.heldout.blocks, len(data.heldout)) == (3, 3, 0, 0)
    assert info.packing_efficiency == pytest.approx(25 / 32)


def test_every_token_is_predicted_once(tmp_path: Path, byte_tokenizer: Path) -> None:
    _, data = make(tmp_path, words(40), tokenizer=byte_tokenizer)
    blocks = data.train.batch(range(len(data.train)))
    targets = blocks[:, 1:].reshape(-1).tolist()
    assert targets == stream_of(blocks)[1:]
    assert targets != blocks[:, :-1].reshape(-1).tolist()  # negative control: inputs are not targets


def test_split_is_by_document_and_disjoint(tmp_path: Path, byte_tokenizer: Path) -> None:
    texts = words(100)
    info, data = make(tmp_path, texts, tokenizer=byte_tokenizer)
    train, heldout = (documents_of(split, data.tokenizer_dir) for split in (data.train, data.heldout))
    # The last document of each may be cut by the dropped remainder.
    assert set(train[:-1]) < set(texts)
    assert set(heldout[:-1]) < set(texts)
    assert not set(train) & set(heldout)
    assert info.train.documents + info.heldout.documents == 100
    assert 8 <= info.heldout.documents <= 35
    assert len(train) == info.train.documents
    assert len(heldout) == info.heldout.documents


def test_order_of_the_documents_changes_nothing(tmp_path: Path) -> None:
    texts = words(60)
    sources = [f"s{n % 3}" for n in range(60)]
    mixed = random.Random(1).sample(range(60), 60)
    first, data = make(tmp_path, texts, "a", vocab_size=300, sources=sources)
    again, same = make(tmp_path, [texts[n] for n in mixed], "b", vocab_size=300, sources=[sources[n] for n in mixed])
    assert all_blocks(data) == all_blocks(same)
    assert first.fingerprint == again.fingerprint
    assert first.sources == again.sources
    # A document more leaves the side of all others as it was.
    texts, sources = [*texts, "one document more, quite unlike the rest"], [*sources, "s0"]
    _, more = make(tmp_path, texts, "c", tokenizer=data.tokenizer_dir, sources=sources)
    held = documents_of(data.heldout, data.tokenizer_dir)[:-1]
    assert set(held) <= set(documents_of(more.heldout, data.tokenizer_dir))


def test_seed_changes_split_and_order(tmp_path: Path, byte_tokenizer: Path) -> None:
    texts = words(60)
    first, data = make(tmp_path, texts, "a", tokenizer=byte_tokenizer)
    again, same = make(tmp_path, texts, "b", tokenizer=byte_tokenizer)
    other, different = make(tmp_path, texts, "c", tokenizer=byte_tokenizer, seed=1)
    assert (first.fingerprint, all_blocks(data)) == (again.fingerprint, all_blocks(same))
    assert first.fingerprint != other.fingerprint
    held, held_other = (set(documents_of(d.heldout, d.tokenizer_dir)) for d in (data, different))
    assert held != held_other


# Python 3.12 warns of every fork of a process with threads; the Rust threads are told to stay out of it.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    texts = words(600)
    one, data = make(tmp_path, texts, "one", vocab_size=300, num_proc=1)
    two, same = make(tmp_path, texts, "two", vocab_size=300, num_proc=2)
    assert all_blocks(data) == all_blocks(same)
    assert one.fingerprint == two.fingerprint
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_identical_documents_count_once(tmp_path: Path, byte_tokenizer: Path) -> None:
    texts = words(30)
    once, data = make(tmp_path, texts, "once", tokenizer=byte_tokenizer)
    thrice, same = make(tmp_path, [*texts, *texts, *texts, "", " \n"], "thrice", tokenizer=byte_tokenizer)
    assert all_blocks(data) == all_blocks(same)
    assert once.skipped == {"empty": 0, "undecodable": 0, "duplicate": 0}
    assert thrice.skipped == {"empty": 2, "undecodable": 0, "duplicate": 60}


def test_undecodable_files_are_counted(tmp_path: Path, byte_tokenizer: Path) -> None:
    books = tmp_path / "books"
    books.mkdir()
    for n, text in enumerate(words(12)):
        (books / f"{n}.txt").write_text(text, encoding="utf-8")
    (books / "latin.txt").write_bytes(b"caf\xe9")
    info = prepare(books, tmp_path / "out", seq_len=4, tokenizer=byte_tokenizer, progress=False)
    assert info.skipped == {"empty": 0, "undecodable": 1, "duplicate": 0}
    assert info.sources["books"]["documents"] == 12


def test_at_least_one_document_is_held_out_and_never_all(tmp_path: Path, byte_tokenizer: Path) -> None:
    texts = ["the first text of two", "the second text of two"]
    for n, fraction in enumerate((1e-9, 0.999999)):
        info, _ = make(tmp_path, texts, f"out{n}", tokenizer=byte_tokenizer, heldout=fraction)
        assert (info.train.documents, info.heldout.documents) == (1, 1)


def test_spelled_end_of_text_is_text(tmp_path: Path, byte_tokenizer: Path) -> None:
    texts = ["before <|endoftext|> after", "another document here"]
    info, data = make(tmp_path, texts, tokenizer=byte_tokenizer, heldout=0.0, seq_len=2)
    assert info.train.tokens_seen == len("".join(texts)) + 2
    blocks = data.train.batch(range(len(data.train)))
    assert stream_of(blocks).count(EOS) in (1, 2)  # the last may be dropped
    assert AutoTokenizer.from_pretrained(data.tokenizer_dir).decode(stream_of(blocks)).count("<|endoftext|> after") == 1


def test_tokenizer_is_trained_on_train_documents_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = build.train_tokenizer

    def spy(texts: Any, vocab_size: int) -> Any:
        seen.extend(texts)
        return real(seen, vocab_size)

    monkeypatch.setattr(build, "train_tokenizer", spy)
    texts = words(50)
    info, data = make(tmp_path, texts, vocab_size=300)
    assert len(seen) == info.train.documents
    assert set(seen) < set(texts)
    assert not set(seen) & set(documents_of(data.heldout, data.tokenizer_dir))
    monkeypatch.setattr(build, "TRAINING_CHARACTERS", 1)
    seen.clear()
    make(tmp_path, texts, "capped", vocab_size=300)
    assert len(seen) == 1


def test_sources_are_counted_and_kept_with_the_blocks(tmp_path: Path, byte_tokenizer: Path) -> None:
    texts = ["a" * 20 + str(n) for n in range(10, 20)] + ["b" * 40 + str(n) for n in range(10, 20)]
    sources = ["short"] * 10 + ["long"] * 10
    info, data = make(tmp_path, texts, tokenizer=byte_tokenizer, sources=sources)
    expected = {"long": {"documents": 10, "tokens": 430}, "short": {"documents": 10, "tokens": 230}}
    assert info.sources == expected
    halves = [info.train.sources, info.heldout.sources]
    assert sum(half.get("long", {"tokens": 0})["tokens"] for half in halves) == 430
    assert data.train.sources == ["long", "short"]
    letters = AutoTokenizer.from_pretrained(byte_tokenizer).convert_tokens_to_ids(["b", "a"])
    everything = data.train.batch(range(len(data.train)))
    checked = 0
    for block, source in zip(everything, data.train.source_of(range(len(everything))), strict=True):
        if block[0] in letters:
            assert letters.index(block[0]) == source
            checked += 1
    assert checked > len(everything) / 2


def test_many_sources_become_other(tmp_path: Path, byte_tokenizer: Path) -> None:
    texts = words(400)
    sources = ["big"] * 100 + [f"url{n}" for n in range(300)]
    info, data = make(tmp_path, texts, tokenizer=byte_tokenizer, sources=sources)
    assert len(info.sources) == 256
    assert info.sources["big"]["documents"] == 100
    assert info.sources["other"]["documents"] == 300 - 254
    assert sum(source["documents"] for source in info.sources.values()) == 400
    assert data.train.sources == sorted(info.sources)


def test_facts_on_disk_are_those_returned(tmp_path: Path, byte_tokenizer: Path) -> None:
    info, data = make(tmp_path, words(40), tokenizer=byte_tokenizer)
    facts = json.loads((tmp_path / "out" / "data.json").read_text(encoding="utf-8"))
    assert facts == data.info
    assert "folder" not in facts
    assert (facts["format_version"], facts["seq_len"], facts["vocab_size"], facts["eos_token_id"]) == (1, 8, 257, 0)
    assert facts["dtype"] == "uint16"
    assert facts["train"]["blocks"] == info.train.blocks == len(data.train)
    assert facts["fingerprint"] == data.fingerprint == info.fingerprint
    assert len(info.fingerprint) == 64
    assert facts["versions"]["datasets"] == datasets.__version__
    assert facts["arguments"]["heldout"] == 0.2
    # The arguments repeat the run.
    arguments = facts["arguments"]
    again = prepare(arguments.pop("ref"), tmp_path / "again", progress=False, **arguments)
    assert again.fingerprint == info.fingerprint
    stored = datasets.load_from_disk(str(tmp_path / "out" / "train"))
    assert stored.features["input_ids"] == datasets.List(datasets.Value("uint16"), length=SEQ_LEN + 1)


def test_large_vocabulary_is_stored_in_four_bytes(tmp_path: Path) -> None:
    vocabulary = {"<|endoftext|>": 0, "and": 1, **{f"w{n}": n for n in range(2, 70_000)}}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="and"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|endoftext|>").save_pretrained(tmp_path / "large")
    texts = [f"w69999 and w{n} and w3 and w4 and w5 and w6" for n in range(7, 16)]
    info, data = make(tmp_path, texts, tokenizer=tmp_path / "large")
    assert (info.dtype, info.vocab_size) == ("uint32", 70_000)
    assert data.train.parts[0].dtype == np.uint32
    assert int(data.train.batch(range(len(data.train))).max()) == 69_999


def test_failure_leaves_nothing(tmp_path: Path, byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    path = write(tmp_path / "a.jsonl", words(40))
    options: dict[str, Any] = {"seq_len": 8, "tokenizer": byte_tokenizer, "progress": False}

    def broken(split: Path) -> None:
        assert (split.parent / "train" / "state.json").exists()  # late: the blocks are written
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "BlockArray", broken)
        with pytest.raises(KeyboardInterrupt):
            prepare(path, home / "out", **options)
    assert list(home.iterdir()) == []
    assert not datasets.are_progress_bars_disabled()

    before = prepare(path, home / "out", **options).fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(build, "BlockArray", broken)
        with pytest.raises(KeyboardInterrupt):
            prepare(path, home / "out", **options, seed=1, overwrite=True)
    assert [entry.name for entry in home.iterdir()] == ["out"]
    assert load_blocks(home / "out").fingerprint == before


def test_existing_output_is_replaced_only_when_asked(tmp_path: Path, byte_tokenizer: Path) -> None:
    info, _ = make(tmp_path, words(40), tokenizer=byte_tokenizer)
    with pytest.raises(
        GrowthError, match=r"the output folder holds packed blocks already\n  where: .*out\n(.*\n)*.*--overwrite"
    ):
        make(tmp_path, words(40), tokenizer=byte_tokenizer)
    other, data = make(tmp_path, words(40), tokenizer=byte_tokenizer, seed=1, overwrite=True)
    assert data.fingerprint == other.fingerprint != info.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.jsonl"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(
        GrowthError,
        match=r"the output folder holds other files than packed blocks\n  where: .*mine\n  why: phigrow does not",
    ):
        prepare(tmp_path / "out.jsonl", mine, overwrite=True)
    assert (mine / "thesis.tex").read_text(encoding="utf-8") == "years of work"


def test_too_little_text_is_an_error(tmp_path: Path, byte_tokenizer: Path) -> None:
    with pytest.raises(GrowthError, match=r"the text is a single document\n(.*\n)*.*parts between <\|endoftext\|>"):
        make(tmp_path, ["alone"], tokenizer=byte_tokenizer)
    with pytest.raises(
        GrowthError,
        match=r"the text holds no documents\n  where: .*\n  why: 3 rows were read. Left out: 3 empty documents",
    ):
        make(tmp_path, ["", " ", "\n"], tokenizer=byte_tokenizer)
    short = (
        r"the train text is too short for one block\n  where: .*out\.jsonl\n"
        r"  why: it has 9 tokens in 1 documents, and a block takes 101"
    )
    with pytest.raises(GrowthError, match=short):
        make(tmp_path, ["too short"[:8], "too long"], tokenizer=byte_tokenizer, seq_len=100)
    with pytest.raises(GrowthError, match="the heldout text is too short for one block"):
        make(
            tmp_path,
            ["x", "y" * 200, "z" * 201],
            tokenizer=byte_tokenizer,
            seq_len=100,
            heldout=1e-9,
            seed=_seed_for_x(),
        )
    for options in ({"seq_len": 0}, {"heldout": 1.0}, {"heldout": -0.1}):
        with pytest.raises(GrowthError, match=next(iter(options))):
            make(tmp_path, words(4), tokenizer=byte_tokenizer, **options)


def _seed_for_x() -> int:
    """A seed under which the document ``x`` is the one held out."""
    texts = datasets.Dataset.from_dict({"text": ["x", "y" * 200, "z" * 201]})
    from phigrow.corpus.packing import select

    return next(seed for seed in range(100) if select(texts, 1e-9, seed).heldout.tolist() == [0])


def test_embedded_corpus_from_start_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from phigrow.corpus import sources
    from phigrow.corpus.embedded import Document

    # The scan of the library is tested by itself; it takes seconds.
    chosen = [
        Document(text * 3, "python-library" if n % 2 else "python-reference", str(n))
        for n, text in enumerate(words(40))
    ]
    monkeypatch.setattr(sources, "embedded_documents", lambda: iter(chosen))
    info = prepare("embedded", tmp_path / "out", seq_len=16, vocab_size=300, progress=False)
    assert {name: facts["documents"] for name, facts in info.sources.items()} == {
        "python-library": 20,
        "python-reference": 20,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
