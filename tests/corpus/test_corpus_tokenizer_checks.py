"""A tokenizer that is empty, or that does not fit the text, is refused before anything is packed with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from phigrow.checkpoints.tokenizer_folder import surviving
from phigrow.corpus import load_blocks, load_tokenizer, open_stream, prepare, stream_settings, train_tokenizer
from phigrow.corpus.tokenizer import check_text, save_tokenizer
from phigrow.errors import GrowthError

TEXTS = [f"To be or not to be, that is question number {n}, and nobody answers it." for n in range(40)]
PHI = {"model_type": "phi", "vocab_size": 51200}


def folder_of(path: Path, **files: Any) -> Path:
    path.mkdir()
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return path


def words_of(path: Path, vocabulary: list[str], **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words; the first is the end of text, the second stands for every unknown word."""
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token=vocabulary[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for key, value in options.items():
        setattr(tokenizer, key, value)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=vocabulary[0], unk_token=vocabulary[1])
    fast.save_pretrained(path)
    return fast


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return tmp_path / "text.jsonl"


EMPTY = {
    "config": {"config": PHI},
    "class": {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer"}},
    "both": {"config": PHI, "tokenizer_config": {"tokenizer_class": "CodeGenTokenizer", "eos_token": "<|endoftext|>"}},
    "special": {"config": PHI, "special_tokens_map": {"eos_token": "</s>", "pad_token": "<pad>"}},
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_tokenizer_of_transformers_is_refused(tmp_path, jsonl, name):
    folder = folder_of(tmp_path / "folder", **EMPTY[name])
    # Negative control: transformers itself builds a tokenizer from this folder.
    assert len(AutoTokenizer.from_pretrained(folder)) < 4
    message = r"no vocabulary of a tokenizer\n  where: .*folder\n  why: there is none of tokenizer\.json, .*vocab\.json"
    with pytest.raises(GrowthError, match=message):
        load_tokenizer(folder)
    with pytest.raises(GrowthError, match=message):
        prepare(jsonl, tmp_path / "out", tokenizer=folder, progress=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(GrowthError, match=message):
        open_stream(stream_settings({"ref": str(jsonl), "tokenizer": str(folder), "heldout": 3}), 8)


def test_files_that_hold_nothing_are_refused(tmp_path):
    folder = folder_of(tmp_path / "gpt2", config=PHI, vocab={"<|endoftext|>": 0})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(GrowthError, match=r"has no vocabulary\n  where: .*gpt2\n  why: it has 1 token, of which 0 are"):
        load_tokenizer(folder)
    Tokenizer(models.BPE()).save(str(tmp_path / "bare.json"))
    with pytest.raises(GrowthError, match=r"has no vocabulary\n  where: .*bare\.json\n  why: it has 0 tokens"):
        load_tokenizer(tmp_path / "bare.json")
    words_of(tmp_path / "one", ["</s>", "<unk>", "the"])
    with pytest.raises(GrowthError, match="why: it has 3 tokens, of which 1 is not special"):
        load_tokenizer(tmp_path / "one")
    words_of(tmp_path / "two", ["</s>", "<unk>", "the", "of"])  # negative control: the smallest that is taken
    assert load_tokenizer(tmp_path / "two").eos_token_id == 0


def test_a_tokenizer_that_loses_its_own_tokens_is_refused(tmp_path):
    lost = normalizers.Replace("the", "")
    words_of(tmp_path / "lost", ["</s>", "<unk>", "the", "then", "they"], normalizer=lost)
    with pytest.raises(GrowthError, match=r"does not encode its own tokens\n  where: .*lost\n.*of 11 characters"):
        load_tokenizer(tmp_path / "lost")


def test_a_tokenizer_without_its_merges_is_refused(tmp_path):
    trained = train_tokenizer(TEXTS, 400)
    assert len(trained) > 300
    for name, merges in (("whole", None), ("cut", "#version: 0.2\n")):
        folder = folder_of(tmp_path / name, config=PHI)
        trained.backend_tokenizer.model.save(str(folder))
        if merges:
            (folder / "merges.txt").write_text(merges)
    assert len(load_tokenizer(tmp_path / "whole")) == len(trained)  # negative control
    message = r"does not join characters to tokens\n  where: .*cut\n  why: its vocabulary has tokens such as '..+'"
    with pytest.raises(GrowthError, match=message):
        load_tokenizer(tmp_path / "cut")


def test_text_that_becomes_unknown_or_nothing_is_refused(tmp_path, jsonl):
    words_of(tmp_path / "chess", ["</s>", "<unk>", *(f"{a}{n}" for a in "abcdefgh" for n in range(1, 9))])
    chess = load_tokenizer(tmp_path / "chess")
    check_text(chess, ["e4 e5 c3 d4 d5 O-O"], "games")
    message = r"the tokenizer cannot represent the text\n  where: .*text\.jsonl, tokenizer .*\n  why: of the first 2,"
    with pytest.raises(GrowthError, match=message):
        prepare(jsonl, tmp_path / "out", tokenizer=tmp_path / "chess", progress=False)
    (stream,) = open_stream(
        stream_settings({"ref": str(jsonl), "tokenizer": str(tmp_path / "chess"), "heldout": 0}), 8
    ).streams
    with pytest.raises(GrowthError, match=message):
        stream.take(1)
    # Letters alone, without an unknown token: everything else becomes nothing.
    Tokenizer(models.BPE({"<|endoftext|>": 0, "q": 1, "z": 2}, [])).save(str(tmp_path / "nothing.json"))
    with pytest.raises(GrowthError, match=message):
        prepare(jsonl, tmp_path / "out", tokenizer=tmp_path / "nothing.json", progress=False)
    assert not (tmp_path / "out").exists()


def test_tokenizers_that_change_text_on_purpose_are_taken(tmp_path):
    lower = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()])
    letters = Tokenizer(models.BPE({c: n for n, c in enumerate(["<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz "])}, []))
    letters.normalizer = lower
    for decoder in (None, decoders.Fuse()):
        if decoder:
            letters.decoder = decoder
        letters.save(str(tmp_path / "letters.json"))
        tokenizer = load_tokenizer(tmp_path / "letters.json")
        assert surviving(tokenizer, ["Café CRÈME"]) == (9, 9)
        assert surviving(tokenizer, ["abc 123"]) == (3, 6)
        check_text(tokenizer, TEXTS, "here")
    plain = train_tokenizer(TEXTS, 300)
    assert surviving(plain, ["größer 中 🙂 \x00"]) == (10, 10)  # ß is two
    plain.backend_tokenizer.decoder = decoders.Fuse()
    assert surviving(plain, ["größer"])[0] < 7  # negative control: a decoder that gives other text


def test_saved_tokenizers_name_a_class_that_transformers_4_knows(tmp_path):
    def kind(folder: Path) -> str:
        return json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]

    trained = train_tokenizer(TEXTS, 300)
    save_tokenizer(trained, tmp_path / "trained")
    assert kind(tmp_path / "trained") == "PreTrainedTokenizerFast"
    trained.save_pretrained(tmp_path / "five")
    assert kind(tmp_path / "five") == "TokenizersBackend"  # negative control: as transformers 5 saves it
    save_tokenizer(load_tokenizer(tmp_path / "five"), tmp_path / "again")
    assert kind(tmp_path / "again") == "PreTrainedTokenizerFast"
    trained.backend_tokenizer.save(str(tmp_path / "bare.json"))
    save_tokenizer(load_tokenizer(tmp_path / "bare.json"), tmp_path / "bare")
    assert kind(tmp_path / "bare") == "PreTrainedTokenizerFast"
    for name in ("trained", "again", "bare"):
        loaded = load_tokenizer(tmp_path / name)
        assert [loaded.encode(text) for text in TEXTS] == [trained.encode(text) for text in TEXTS]
        assert loaded.eos_token == "<|endoftext|>"


def test_files_of_a_given_tokenizer_are_copied_as_they_are(tmp_path):
    given = tmp_path / "given"
    save_tokenizer(train_tokenizer(TEXTS, 300), given)
    config = json.loads((given / "tokenizer_config.json").read_text()) | {"mine": 1, "tokenizer_class": "GPT2Tokenizer"}
    (given / "tokenizer_config.json").write_text(json.dumps(config))
    (given / "chat_template.jinja").write_text("{{ messages }}")
    (given / "thesis.tex").write_text("x")
    for path in given.iterdir():
        path.chmod(0o444)
    save_tokenizer(load_tokenizer(given), tmp_path / "out")
    names = sorted(path.name for path in given.iterdir() if path.name != "thesis.tex")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (given / name).read_bytes()
        assert (tmp_path / "out" / name).stat().st_mode & 0o200


def test_a_tokenizer_of_older_files_gets_a_tokenizer_json(tmp_path):
    given = folder_of(tmp_path / "slow", config=PHI)
    trained = train_tokenizer(TEXTS, 300)
    trained.backend_tokenizer.model.save(str(given))
    assert sorted(path.name for path in given.iterdir()) == ["config.json", "merges.txt", "vocab.json"]
    loaded = load_tokenizer(given)
    save_tokenizer(loaded, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["merges.txt", "tokenizer.json", "vocab.json"]
    again = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert again.encode(TEXTS[0]).ids == loaded.encode(TEXTS[0]) == trained.encode(TEXTS[0])


def test_links_out_of_the_folder_are_refused(tmp_path):
    save_tokenizer(train_tokenizer(TEXTS, 300), tmp_path / "given")
    (tmp_path / "secret").write_text("x")
    (tmp_path / "given" / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(GrowthError, match="a symbolic link leads out of its folder"):
        load_tokenizer(tmp_path / "given")


def test_verify_opens_tokenizers_with_the_same_checks(tmp_path):
    from phigrow.expansion.verify import probe_tokens

    folder = folder_of(tmp_path / "model", config=PHI, vocab={"<|endoftext|>": 0})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(
        GrowthError, match=r"the tokenizer cannot be read\n  where: .*model\n  why: the tokenizer has no"
    ):
        probe_tokens(folder, None, 64, 51200, 0)


def test_only_one_place_opens_tokenizers():
    root = Path(load_tokenizer.__code__.co_filename).parents[1]
    callers = [str(path.relative_to(root)) for path in root.rglob("*.py") if "AutoTokenizer." in path.read_text()]
    assert callers == ["checkpoints/tokenizer_folder.py"]


def test_ids_of_packed_blocks_lie_in_the_vocabulary(tmp_path, jsonl):
    prepare(jsonl, tmp_path / "out", seq_len=8, vocab_size=300, progress=False)
    blocks = load_blocks(tmp_path / "out")
    last = len(blocks.train) - 1
    (path,) = (tmp_path / "out" / "train").glob("*.arrow")
    content = path.read_bytes()
    old = blocks.train.batch([last])[0]
    assert old.max() < blocks.vocab_size
    pattern = old.astype(np.uint16).tobytes()
    assert content.count(pattern) == 1
    del blocks
    path.write_bytes(content.replace(pattern, np.array([*old[:-1], 65535], np.uint16).tobytes()))
    damaged = load_blocks(tmp_path / "out")
    with pytest.raises(GrowthError, match=rf"block {last} holds the token id 65535\n  where: .*train\n.*300 tokens"):
        damaged.train.batch([0, last])
    assert len(damaged.train.batch([0])) == 1  # negative control: other blocks are read


def test_blocks_of_an_empty_tokenizer_are_refused(tmp_path, jsonl):
    prepare(jsonl, tmp_path / "out", seq_len=8, vocab_size=300, progress=False)
    info = json.loads((tmp_path / "out" / "data.json").read_text())
    (tmp_path / "out" / "data.json").write_text(json.dumps(info | {"vocab_size": 1}))
    with pytest.raises(GrowthError, match=r"the packed blocks have a vocabulary of 1\n(.*\n)*.*--overwrite"):
        load_blocks(tmp_path / "out")
