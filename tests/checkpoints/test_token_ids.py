"""Ids of special tokens: from the configuration, the source and the tokenizer, in this order."""

import json
from pathlib import Path

import pytest

from phigrow.checkpoints.token_ids import choose_token_ids, tokenizer_ids
from phigrow.errors import GrowthError

TOKENIZER = {"bos_token_id": 5, "eos_token_id": 6, "pad_token_id": 8}.get


def chosen(config, source=None, generation=None, tokenizer=TOKENIZER):
    ids = choose_token_ids(
        config,
        vocab=10,
        where="the destination configuration",
        source=source,
        generation=generation,
        tokenizer=tokenizer,
    )
    return ids.model, ids.generation


@pytest.mark.parametrize(
    ("config", "source", "generation", "expected", "generated"),
    [
        (None, None, None, 6, 6),
        (None, 3, None, 3, 3),
        (None, 3, [3, 4], 3, [3, 4]),
        (None, None, [7, 9], [7, 9], [7, 9]),
        (None, [7, 9], None, [7, 9], [7, 9]),
        (7, 7, [7, 9], 7, [7, 9]),
        (7, None, [7, 9], 7, [7, 9]),
        (1, 1, [7, 9], 1, [7, 9]),  # the source generates with tokens that its configuration does not name
        (1, 7, [7, 9], 1, 1),
        (1, None, None, 1, 1),
        (0, 7, 7, 0, 0),
        ([1, 2], 7, [7, 9], [1, 2], [1, 2]),
    ],
)
def test_the_end_of_a_text(config, source, generation, expected, generated):
    key = "eos_token_id"
    model, settings = chosen({key: config}, {key: source}, {key: generation})
    assert (model[key], settings[key]) == (expected, generated)
    assert chosen({} if config is None else {key: config}, {key: source}, {key: generation}) == (model, settings)


def test_padding_never_comes_from_the_tokenizer_into_the_model():
    model, settings = chosen({})
    assert (model["bos_token_id"], model["pad_token_id"], settings["pad_token_id"]) == (5, None, 8)
    assert chosen({}, {"pad_token_id": 2})[0]["pad_token_id"] == 2


def test_ids_that_nobody_knows_are_null():
    model, settings = chosen({}, tokenizer=lambda key: None)
    assert model == {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    assert settings == {}


@pytest.mark.parametrize("value", [10, -1, True, 1.0, "2", [3, 10], [[3]]])
def test_an_id_outside_the_vocabulary_is_refused(value):
    assert chosen({"eos_token_id": 9})[0]["eos_token_id"] == 9
    for place in range(3):
        with pytest.raises(GrowthError, match=r"eos_token_id is .*, but the vocabulary has the ids 0 to 9") as caught:
            chosen(*({"eos_token_id": value} if place == each else {} for each in range(3)))
        assert "set eos_token_id in the destination configuration" in str(caught.value)
        file = ("the destination configuration", "config.json of the source", "generation_config.json of the source")[
            place
        ]
        assert caught.value.where == file
        assert ("correct it in" in caught.value.fix) == (place > 0)
    with pytest.raises(GrowthError, match=r"(?s)eos_token_id is .*where: generation_config.json of the source"):
        chosen({"eos_token_id": 9}, {"eos_token_id": 9}, {"eos_token_id": value})  # the others are sound
    with pytest.raises(GrowthError, match=r"(?s)pad_token_id is 10.*where: the tokenizer of the source"):
        chosen({}, tokenizer={"pad_token_id": 10}.get)
    with pytest.raises(GrowthError, match="pad_token_id is"):
        chosen({"pad_token_id": value})


def write(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"eos_token": "<e>", "added_tokens_decoder": {"3": {"content": "<e>"}}}},
        {
            "tokenizer_config": {"eos_token": {"content": "<e>"}},
            "tokenizer": {"added_tokens": [{"id": 3, "content": "<e>"}]},
        },
        {"special_tokens_map": {"eos_token": "<e>"}, "tokenizer": {"model": {"vocab": {"a": 0, "<e>": 3}}}},
        {
            "tokenizer_config": {"eos_token": "<e>"},
            "tokenizer": {"model": {"vocab": [["a", 0.0], ["b", 0], ["c", 0], ["<e>", 0]]}},
        },
        {"special_tokens_map": {"eos_token": {"content": "<e>"}}, "vocab": {"<e>": 3}},
        {"tokenizer_config": {"eos_token": "<e>"}, "added_tokens": {"<e>": 3}, "vocab": {"<e>": 4}},
    ],
)
def test_ids_are_read_from_the_files_of_a_tokenizer(files, tmp_path):
    ids = tokenizer_ids(write(tmp_path, **files))
    assert (ids("eos_token_id"), ids("bos_token_id")) == (3, None)


def test_a_tokenizer_without_ids_has_none_and_a_damaged_one_is_named(tmp_path):
    assert tokenizer_ids(tmp_path / "nowhere")("eos_token_id") is None
    write(tmp_path, tokenizer_config={"eos_token": "<e>"}, tokenizer={"added_tokens": 5, "model": [1]})
    assert tokenizer_ids(tmp_path)("eos_token_id") is None
    (tmp_path / "tokenizer.json").write_text("?")
    with pytest.raises(GrowthError, match="a file of the tokenizer cannot be read") as caught:
        tokenizer_ids(tmp_path)("eos_token_id")
    assert "tokenizer.json" in str(caught.value)
    assert tokenizer_ids(tmp_path)("bos_token_id") is None  # which needs no vocabulary
