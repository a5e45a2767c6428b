"""The tokenizer that is trained, and those that are loaded."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoTokenizer

from phigrow.corpus import load_tokenizer, train_tokenizer
from phigrow.corpus.tokenizer import same_tokens, save_tokenizer
from phigrow.errors import GrowthError

TEXTS = ["def add(a, b):\n    return a + b\n", "The sum of two numbers, and the sum of three."] * 20


def test_bytes_come_first_then_merges() -> None:
    tokenizer = train_tokenizer(TEXTS, 280)
    assert len(tokenizer) == 280
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    assert tokenizer.convert_ids_to_tokens([0]) == ["<|endoftext|>"]
    bytes_only = train_tokenizer(TEXTS, 257)
    assert sorted(len(token) for token in bytes_only.get_vocab())[-2:] == [1, 13]
    assert len(tokenizer.encode(TEXTS[1])) < len(bytes_only.encode(TEXTS[1])) == len(TEXTS[1])


def test_tokenizers_are_compared_by_what_their_ids_mean(tmp_path: Path) -> None:
    def same(first: Any, second: Any) -> bool:
        found = {same_tokens(json.dumps(a), json.dumps(b), "here") for a, b in ((first, second), (second, first))}
        assert len(found) == 1  # whichever is first
        return found.pop()

    one = json.loads(train_tokenizer(TEXTS, 280).backend_tokenizer.to_str())
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in one["model"]["merges"]]
    spelled = {**one, "model": one["model"] | {"merges": merges}}  # as older files write them
    longer = {**one, "added_tokens": [*one["added_tokens"], {"id": 280, "content": "<|pad|>"}]}
    for other in (one, one | {"truncation": {"max_length": 9}, "post_processor": None}, spelled, longer):
        assert same(one, other)
    for size, texts in ((270, TEXTS), (280, ["another text " * 20])):
        assert not same(one, json.loads(train_tokenizer(texts, size).backend_tokenizer.to_str()))
    assert not same(longer, {**one, "added_tokens": [{"id": 280, "content": "<|end|>"}]})
    assert not same(one, {**one, "model": one["model"] | {"merges": merges[::-1]}})
    pieces = {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}}
    assert same(pieces, {"model": {"type": "Unigram", "vocab": [["a", -1.5], ["b", -2.0]]}})
    assert not same(pieces, {"model": {"type": "Unigram", "vocab": [["b", -1.0], ["a", -2.0]]}})
    for broken in ("{", "[]", "{}"):
        with pytest.raises(GrowthError, match=r"a tokenizer.json cannot be read\n  where: here"):
            same_tokens(broken, json.dumps(one), "here")


def test_training_is_deterministic() -> None:
    first, second = (train_tokenizer(iter(TEXTS), 320).backend_tokenizer.to_str() for _ in range(2))
    assert first == second
    assert first != train_tokenizer(TEXTS[:1], 320).backend_tokenizer.to_str()


def test_decoding_gives_the_text_back(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.save_pretrained(tmp_path)
    generator = random.Random(0)
    alphabet = "ab \n\t.,'\"\x00äß中🙂 ! ?n't"
    for read in (tokenizer, AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        for _ in range(50):
            text = "".join(generator.choices(alphabet, k=generator.randrange(40)))
            assert read.decode(read.encode(text)) == text
        assert read.encode("The sum") == tokenizer.encode("The sum")
        assert (read.eos_token, read.eos_token_id) == ("<|endoftext|>", 0)


def test_bare_tokenizer_file_is_loaded(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    read = load_tokenizer(tmp_path / "tokenizer.json")
    assert (read.eos_token_id, read.encode("The sum of")) == (0, tokenizer.encode("The sum of"))


def test_other_end_of_text_token() -> None:
    assert train_tokenizer(TEXTS, 300, eos="</s>").eos_token == "</s>"


def test_small_vocabulary_is_an_error() -> None:
    with pytest.raises(GrowthError, match=r"vocab_size is 256\n(.*\n)*.*choose vocab_size >= 257"):
        train_tokenizer(TEXTS, 256)


def test_missing_tokenizers_are_errors(tmp_path: Path) -> None:
    with pytest.raises(
        GrowthError, match=r"the tokenizer does not exist\n  where: .*missing\n  what to do: give a folder"
    ):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(GrowthError, match="the tokenizer does not exist"):
        load_tokenizer("missing.json")
    with pytest.raises(GrowthError, match=r"the tokenizer cannot be read\n  where: x+\n  why: .*File name too long"):
        load_tokenizer("x" * 300)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        GrowthError, match=r"no vocabulary of a tokenizer\n  where: .*empty\n(.*\n)*  what to do: give a folder"
    ):
        load_tokenizer(tmp_path / "empty")
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(GrowthError, match=r"the file is not a tokenizer\n"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_no_network_is_an_error_and_no_code_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def unreachable(name: str, **options: Any) -> None:
        asked.append((name, options["allow_patterns"]))
        raise LocalEntryNotFoundError("We couldn't connect to the hub\nCheck your connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(GrowthError) as error:
        load_tokenizer("phi-2")
    assert "the tokenizer 'phi-2' cannot be loaded" in str(error.value)
    assert "for the model 'microsoft/phi-2': " in str(error.value)
    assert "phigrow trains one on the text" in str(error.value)
    [(name, patterns)] = asked
    assert name == "microsoft/phi-2"
    assert "tokenizer.json" in patterns
    assert not any("safetensors" in pattern or pattern.endswith(".py") for pattern in patterns)


def test_a_tokenizer_of_the_hub_is_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tokenizer(train_tokenizer(TEXTS, 300), tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "snapshot"))
    loaded = load_tokenizer("someone/tokenizer")
    save_tokenizer(loaded, tmp_path / "out")
    for path in (tmp_path / "snapshot").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    (tmp_path / "snapshot" / "tokenizer.json").unlink()  # a repository of a model without tokenizer
    with pytest.raises(GrowthError, match=r"'someone/tokenizer' cannot be loaded|no vocabulary of a tokenizer"):
        load_tokenizer("someone/tokenizer")


def test_tokenizer_without_end_of_text_is_an_error(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, 300, eos="<end>").save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    del facts["eos_token"]
    path.write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(GrowthError, match=r"the tokenizer has no end-of-text token\n(.*\n)*.*set eos_token"):
        load_tokenizer(tmp_path)
