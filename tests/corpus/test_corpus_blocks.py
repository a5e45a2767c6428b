"""Reading packed blocks: values, bounds, memory maps, speed, errors; and an import that costs nothing."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import phigrow.corpus
from phigrow.corpus import Blocks, load_blocks, prepare
from phigrow.errors import GrowthError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("blocks")
    texts = [f"document {n} counts " + " ".join(str(n * k) for k in range(400)) for n in range(300)]
    (root / "a.txt").write_text("<|endoftext|>".join(texts), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phigrow.corpus.build.BATCH_BYTES", 1)  # pieces of 1,000 blocks, the fewest
        prepare(root / "a.txt", root / "data", seq_len=64, vocab_size=300, progress=False)
    return root / "data"


@pytest.fixture(scope="module")
def blocks(folder: Path) -> Blocks:
    return load_blocks(folder)


def test_batches_are_the_blocks_on_disk(blocks: Blocks, folder: Path) -> None:
    from datasets import load_from_disk

    stored = load_from_disk(str(folder / "train")).with_format("numpy")
    assert len(blocks.train) == len(stored) > 2000
    assert len(blocks.train.parts) > 1  # more than one chunk, so that their borders are met
    indices = np.random.default_rng(0).integers(0, len(stored), 64)
    batch = blocks.train.batch(indices)
    assert (batch.dtype, batch.shape) == (np.int64, (64, 65))
    np.testing.assert_array_equal(batch, stored[indices.tolist()]["input_ids"])
    ends = [0, 999, 1000, 1001, len(stored) - 1]
    np.testing.assert_array_equal(blocks.train.batch(ends), stored[ends]["input_ids"])
    everything = blocks.train.batch(range(len(stored)))
    assert (everything[:-1, -1] == everything[1:, 0]).all()
    assert blocks.train.batch([]).shape == (0, 65)


def test_indices_outside_are_an_error(blocks: Blocks) -> None:
    for index in (-1, len(blocks.train)):
        with pytest.raises(IndexError, match=f"block {index}"):
            blocks.train.batch([index])


def test_facts_are_attributes(blocks: Blocks, folder: Path) -> None:
    facts = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    assert blocks.info == facts
    assert (blocks.seq_len, blocks.vocab_size, blocks.eos_token_id) == (64, 300, 0)
    assert (blocks.fingerprint, blocks.tokenizer_dir) == (facts["fingerprint"], folder / "tokenizer")
    assert blocks.train.sources == ["a.txt"]
    assert blocks.train.source_of([0, 5, 1]).tolist() == [0, 0, 0]


def test_blocks_stay_on_disk(blocks: Blocks) -> None:
    assert not any(part.flags.owndata or part.flags.writeable for part in blocks.train.parts)
    sent = pickle.dumps(blocks.train)
    assert len(sent) < 500  # the path, not the data
    np.testing.assert_array_equal(pickle.loads(sent).batch([3]), blocks.train.batch([3]))  # noqa: S301


def test_a_thousand_batches_take_less_than_a_second(blocks: Blocks) -> None:
    indices = np.random.default_rng(0).integers(0, len(blocks.train), (1000, 16))
    start = time.perf_counter()
    for row in indices:
        blocks.train.batch(row)
    assert time.perf_counter() - start < 1.0  # measured 0.03


def test_missing_or_incomplete_folders_say_how_to_make_one(folder: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(GrowthError) as error:
        load_blocks(missing)
    assert str(error.value) == (
        f"the folder of packed blocks does not exist\n  where: {missing}\n"
        f"  what to do: make one with `phigrow data --out {missing}`"
    )
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    shutil.rmtree(half / "heldout")
    with pytest.raises(
        GrowthError, match=r"no packed blocks\n.*\n  why: it lacks heldout/state\.json\n.*phigrow data --out"
    ):
        load_blocks(half)


def test_other_format_is_an_error(folder: Path, tmp_path: Path) -> None:
    later = tmp_path / "later"
    shutil.copytree(folder, later)
    facts = json.loads((later / "data.json").read_text(encoding="utf-8"))
    (later / "data.json").write_text(json.dumps({**facts, "format_version": 2}), encoding="utf-8")
    with pytest.raises(
        GrowthError, match=r"the packed blocks have format version 2\n.*\n.*reads version 1\n.*--overwrite"
    ):
        load_blocks(later)


def test_import_loads_nothing_heavy() -> None:
    code = (
        "import sys, phigrow.corpus\n"
        "heavy = {'torch', 'transformers', 'datasets', 'tokenizers', 'pyarrow'}\n"
        "print(sorted(heavy & sys.modules.keys()))\n"
        "phigrow.corpus.Document, phigrow.corpus.embedded_documents\n"
        "print(sorted(heavy & sys.modules.keys()))\n"
        "phigrow.corpus.prepare, phigrow.corpus.load_blocks, phigrow.corpus.load_documents\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & sys.modules.keys()))\n"
        "import pyarrow\n"  # negative control
        "print(sorted(heavy & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]", "[]", "['pyarrow']"]


def test_public_names_are_there() -> None:
    for name in phigrow.corpus.__all__:
        assert getattr(phigrow.corpus, name).__name__ == name
    assert set(phigrow.corpus.__all__) <= set(dir(phigrow.corpus))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        phigrow.corpus.nothing  # noqa: B018
