"""Fingerprints by content, of files, checkpoints, text and packed blocks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from phigrow.checkpoints.fingerprint import checkpoint_fingerprint, state_fingerprint
from phigrow.checkpoints.integrity import digests, write_marker
from phigrow.corpus import load_blocks, mix_folders, open_stream, prepare, stream_settings
from phigrow.corpus.fingerprint import check_content, data_fingerprint, text_fingerprint
from phigrow.errors import GrowthError
from phigrow.files.fingerprint import BLOCK, BLOCKS, MISSING, file_fingerprint, spans


def test_a_large_file_is_sampled_at_both_ends_and_between():
    size = BLOCKS * BLOCK + 1
    parts = spans(size)
    assert (len(parts), parts[0], parts[-1]) == (BLOCKS, (0, BLOCK), (size - BLOCK, size))
    assert {stop - begin for begin, stop in parts} == {BLOCK}
    assert spans(size - 1) == [(0, size - 1)]
    assert spans(10 * size, blocks=1) == [(0, BLOCK)]


@pytest.mark.parametrize("size", [0, 1, 100_000, 3 << 20])
def test_a_file_is_its_bytes(tmp_path, size):
    content = bytearray(np.random.default_rng(size).bytes(size))
    one, two = tmp_path / "one", tmp_path / "another name"
    one.write_bytes(content)
    two.write_bytes(content)
    assert file_fingerprint(one) == file_fingerprint(two)
    for change in {0, size // 2 if size <= BLOCKS * BLOCK else size - 1, size - 1} if size else set():
        changed = bytearray(content)
        changed[change] ^= 1
        two.write_bytes(changed)
        assert file_fingerprint(one) != file_fingerprint(two)
    two.write_bytes(content + b"\0")
    assert file_fingerprint(one) != file_fingerprint(two)


def checkpoint(folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "phi", **config}))
    rng = np.random.default_rng(0)
    save_file({f"layer.{k}": rng.normal(size=(300, 200)) for k in range(12)}, folder / "model.safetensors")
    return folder


def test_a_checkpoint_is_its_configuration_and_its_weights(tmp_path):
    first = checkpoint_fingerprint(checkpoint(tmp_path / "one"))
    same = checkpoint(tmp_path / "two", transformers_version="4.0", _name_or_path="two")
    (same / "phigrow.json").write_text("{}")
    (same / "README.md").write_text("a card")
    assert checkpoint_fingerprint(same) == first
    assert checkpoint_fingerprint(checkpoint(tmp_path / "three", rope_theta=5.0)) != first
    assert checkpoint_fingerprint(tmp_path / "none") == MISSING
    # Every tensor is read, though the file of 5.8 MB is sampled.
    weights = (same / "model.safetensors").read_bytes()
    for number in range(12):
        changed = bytearray(weights)
        changed[len(weights) - (number + 1) * 300 * 200 * 8] ^= 1
        (same / "model.safetensors").write_bytes(changed)
        assert checkpoint_fingerprint(same) != first
    (same / "model.safetensors").write_bytes(weights)
    assert checkpoint_fingerprint(same) == first
    # A damaged header is content too, and no error.
    (same / "model.safetensors").write_bytes(b"\xff" * 100)
    assert checkpoint_fingerprint(same) not in (first, MISSING)


def test_a_grown_state_is_its_files_and_not_the_time_it_took(tmp_path):
    def state(name: str, moments: bytes, **content: object) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "moments.pt").write_bytes(moments)
        (folder / "state.json").write_text(json.dumps(content))
        write_marker(folder, {"universal": True}, digests(folder))
        return state_fingerprint(folder)

    first = state("one", b"moments", step=3, seconds=1.0)
    assert state("two", b"moments", step=3, seconds=2.0) == first
    assert len({first, state("three", b"changed", step=3), state("four", b"moments", step=4)}) == 3
    assert state_fingerprint(tmp_path / "none") == MISSING


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    for name in ("books", "code"):
        (folder / f"{name}.txt").write_text(f"of {name} there is no end " * 200)
    prepare(folder / "books.txt", folder / "data", seq_len=16, vocab_size=270, heldout=0, progress=False)
    return folder


def test_packed_blocks_are_their_tokens(packed, tmp_path):
    first = data_fingerprint(load_blocks(packed / "data"))
    copy = shutil.copytree(packed / "data", tmp_path / "copy")
    assert data_fingerprint(load_blocks(copy)) == first
    (file,) = (copy / "train").glob("*.arrow")
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    file.write_bytes(content)
    damaged = load_blocks(copy)
    assert damaged.fingerprint == load_blocks(packed / "data").fingerprint  # what data.json says
    assert data_fingerprint(damaged) != first
    with pytest.raises(
        GrowthError, match=r"have changed since they were packed\n  where: .*copy\n  why: .*data.json has"
    ):
        check_content(damaged)
    check_content(load_blocks(packed / "data"))
    # Folders of earlier releases do not have the fingerprint.
    check_content(replace(damaged, info={k: v for k, v in damaged.info.items() if k != "content_fingerprint"}))
    assert data_fingerprint(mix_folders({str(copy): 1.0})) == data_fingerprint(damaged)


def test_a_text_is_its_files(packed, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(f"text of {name}")
    first = text_fingerprint(folder)
    moved = folder.rename(tmp_path / "moved")
    assert (text_fingerprint(moved), text_fingerprint(folder)) == (first, MISSING)
    (moved / "b.txt").write_text("text of c.txt")  # of the same size
    assert text_fingerprint(moved) != first
    assert text_fingerprint("embedded") is None
    assert text_fingerprint("some/dataset") is None


def test_a_stream_is_its_text(packed, tmp_path):
    text = tmp_path / "books.txt"
    text.write_text("of books there is no end " * 200)
    values = {"ref": str(text), "tokenizer": str(packed / "data" / "tokenizer"), "heldout": 0}
    first = open_stream(stream_settings(values), 16)
    content = data_fingerprint(first)
    assert content is not None
    text.write_text("of books there is an end " * 200)
    second = open_stream(stream_settings(values), 16)
    assert second.fingerprint == first.fingerprint  # names and sizes
    assert data_fingerprint(second) != content
    elsewhere = {"ref": str(shutil.copy(packed / "books.txt", tmp_path / "other.txt"))}
    assert data_fingerprint(open_stream(stream_settings(values | elsewhere), 16)) is not None
