"""YAML by the rules of version 1.2: words that older readers turn into other values, and keys that stand twice."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from phigrow.errors import GrowthError
from phigrow.files.strict_yaml import dump_yaml, parse_yaml, read_yaml

CASES = {
    "no": "no",
    "yes": "yes",
    "on": "on",
    "0100": 100,
    "0o100": 64,
    "0x1F": 31,
    "1e-05": 1e-5,
    "1e3": 1000.0,
    "1_000": "1_000",
    "1:30": "1:30",
    "2026-11-27": "2026-11-27",
    "true": True,
    "False": False,
    "null": None,
    "~": None,
    "": None,
    "-7": -7,
    "+.5": 0.5,
    "8.": 8.0,
    ".inf": math.inf,
    "-.inf": -math.inf,
    "1.2.3": "1.2.3",
    "e3": "e3",
    "'0100'": "0100",
}


@pytest.mark.parametrize(("word", "value"), CASES.items())
def test_a_word_is_what_yaml_1_2_says(word, value):
    content = parse_yaml(f"key: {word}", "here")["key"]
    assert (content, type(content)) == (value, type(value))


@pytest.mark.parametrize("word", ["no", "0100", "1e-05", "1:30", "2026-11-27"])
def test_the_older_reader_differs(word):
    """A negative control: PyYAML's own loader turns these words into other values."""
    assert yaml.safe_load(f"key: {word}")["key"] != parse_yaml(f"key: {word}", "here")["key"]


def test_keys_are_texts_as_they_are_written():
    assert parse_yaml("{1.0: a, 1.00: b, no: c, 0100: d, null: e}", "here") == {
        "1.0": "a", "1.00": "b", "no": "c", "0100": "d", "null": "e",
    }  # fmt: skip


def test_merged_mappings_may_be_overruled():
    text = "base: &base {lr: 1, batch: 2}\narm: {<<: *base, lr: 3}\nother: {<<: [*base, {lr: 4, warmup: 5}]}\n"
    content = parse_yaml(text, "here")
    assert content["arm"] == {"lr": 3, "batch": 2}
    assert content["other"] == {"lr": 1, "batch": 2, "warmup": 5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "(?s)not valid YAML.*here, line 3.*the key 'a' stands twice, in line 1 too"),
        ("arms:\n  tile: {}\n  tile: {}\n", "(?s)here, line 3.*the key 'tile' stands twice, in line 2 too"),
        ("? [1, 2]\n: 3\n", "(?s)here, line 1.*a key is no text"),
        ("a: [1, 2\n", "(?s)not valid YAML.*here, line 2"),
        ("a: !!python/object:os.system x\n", "(?s)not valid YAML.*could not determine a constructor"),
    ],
)
def test_a_mistake_is_named_with_its_line(text, message):
    with pytest.raises(GrowthError, match=message):
        parse_yaml(text, "here")


def test_a_mapping_may_be_merged_before_its_own_place_is_read():
    """PyYAML flattens merged mappings on the way, so keys must be compared before it does."""
    text = "base: &b {x: 1}\nouter:\n  a: &a\n    <<: *b\n    x: 2\nc:\n  <<: *a\n  y: 3\n"
    expected = {"base": {"x": 1}, "outer": {"a": {"x": 2}}, "c": {"x": 2, "y": 3}}
    assert parse_yaml(text, "here") == expected
    assert parse_yaml("a: {<<: {1: 2}}", "here") == {"a": {"1": 2}}
    with pytest.raises(GrowthError, match="the key 'x' stands twice, in line 5 too"):
        parse_yaml(text.replace("    x: 2\n", "    x: 2\n    x: 3\n"), "here")


@pytest.mark.parametrize("text", ["a: !!int abc", "a: !!map [1]", "a: !!timestamp x", "[" * 5000, "a: " + "9" * 5000])
def test_hostile_text_is_one_error(text):
    with pytest.raises(GrowthError, match="not valid YAML"):
        parse_yaml(text, "here")


def test_files(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbflr: 1e-3\n")  # a byte-order mark
    assert read_yaml(path, "recipe", "") == {"lr": 1e-3}
    path.write_bytes(b"lr: \xff\n")
    with pytest.raises(GrowthError, match=r"(?s)the recipe cannot be read.*recipe\.yaml.*give a readable file"):
        read_yaml(path, "recipe", "")
    with pytest.raises(GrowthError, match=r"(?s)there is no such study.*give another"):
        read_yaml(tmp_path / "none.yaml", "study", "give another")


WORDS_OR_TEXTS = st.sampled_from([*CASES, "1e5", "y", "NO", "0o7", "=", "<<", "! tag"]) | st.text(
    st.characters(exclude_categories=["Cs", "Cc"]), max_size=20
)
CONTENT = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS_OR_TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS_OR_TEXTS, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(CONTENT)
def test_what_is_written_is_read_back(content):
    assert parse_yaml(dump_yaml({"content": content}), "here") == {"content": content}


def test_pyyamls_own_writer_would_not_do():
    """A negative control: without quotes, the name of an arm comes back as a number."""
    written = yaml.safe_dump({"arm": "1e5"})
    assert parse_yaml(written, "here") == {"arm": 1e5}
    assert parse_yaml(dump_yaml({"arm": "1e5"}), "here") == {"arm": "1e5"}
