"""Files that people reported to other tools. Each case once gave a wrong result, a traceback or a refusal here."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import phi_config, phi_model

import phigrow
from phigrow.checkpoints.companions import generation_settings
from phigrow.checkpoints.pickles import open_checkpoint
from phigrow.errors import GrowthError

SMALL, LARGE = phi_config(32, 4, 48, 2, 4), phi_config(64, 4, 60, 3, 4)


@pytest.fixture
def source(save_model) -> Path:
    return save_model(phi_model(SMALL, torch.float32))


def change_config(folder: Path, **keys: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def test_generation_settings_of_config_json_are_kept(source, tmp_path):
    (source / "generation_config.json").unlink(missing_ok=True)
    assert generation_settings(source) == {}
    change_config(source, repetition_penalty=1.7, no_repeat_ngram_size=2, temperature=1.0, top_k=50, max_length=20)
    grown = phigrow.expand(source, LARGE, tmp_path / "grown", method="tile")
    found = json.loads((grown / "generation_config.json").read_text())
    assert (found["repetition_penalty"], found["no_repeat_ngram_size"]) == (1.7, 2)
    assert not {"temperature", "top_k", "max_length"} & set(found)  # defaults of older versions
    (source / "generation_config.json").write_text('{"repetition_penalty": 1.2}')
    assert generation_settings(source) == {"repetition_penalty": 1.2}  # the file alone counts where there is one


def test_a_source_is_not_replaced_by_its_growth(source, tmp_path):
    grown = phigrow.expand(source, LARGE, tmp_path / "grown", method="tile")
    before = (grown / "model.safetensors").read_bytes()
    larger = phi_config(96, 4, 72, 4, 4)
    with pytest.raises(GrowthError, match="the output is the source itself"):
        phigrow.expand(grown, larger, tmp_path / "x" / ".." / "grown", method="tile", overwrite=True)
    assert (grown / "model.safetensors").read_bytes() == before
    phigrow.expand(source, larger, grown, method="tile", overwrite=True)  # another output is replaced


def test_metadata_that_is_null_is_no_damage(source):
    file = source / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])

    def store(metadata: object) -> None:
        text = json.dumps(header | {"__metadata__": metadata}).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    store(None)
    with open_checkpoint(source) as reader:
        assert "lm_head.weight" in reader.tensors
    for wrong in ([], "", {"a": 1}):
        store(wrong)
        with pytest.raises(GrowthError, match="is not an object of strings"):
            open_checkpoint(source)


def test_a_destination_that_names_an_attention_kernel_is_taken(source, tmp_path):
    kernel = {"_attn_implementation": "flash_attention_2", "attn_implementation": "flash_attention_2"}
    grown = phigrow.expand(source, LARGE | kernel, tmp_path / "grown", method="tile")
    assert not any("attn_implementation" in key for key in json.loads((grown / "config.json").read_text()))


def test_a_terminal_in_ascii_gets_a_table_without_its_lines(tmp_path):
    for name, config in (("src", SMALL), ("dst", LARGE)):
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "phigrow", "plan", "--src", "src.json", "--dst-config", "dst.json"]
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment, timeout=120)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
    assert b"?" in done.stdout
