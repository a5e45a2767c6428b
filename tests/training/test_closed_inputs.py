"""A whole run, started by a user without root's rights, over inputs that another user owns and nobody may write."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import environment, records
from tiny_models import phi_config, phi_model

import phigrow
from phigrow.corpus import prepare

NOBODY = 65534
DROPPED = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all", "--securebits=+noroot"]


def closed(folder: Path) -> dict[Path, tuple[int, int]]:
    """Give a folder away, and let nobody write it; return mode and time of everything in it."""
    for root, _, names in os.walk(folder):
        for path in (Path(root), *(Path(root, name) for name in names)):
            if os.geteuid() == 0:
                os.chown(path, NOBODY, NOBODY)
            path.chmod(0o555 if path.is_dir() else 0o444)
    return {path: (path.stat().st_mode, path.stat().st_mtime_ns) for path in (folder, *folder.rglob("*"))}


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="setpriv drops the rights of root")
def test_a_run_over_closed_inputs_ends_with_an_export_and_changes_nothing(tmp_path, save_model):
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join(f"{number} bottles of beer on the wall. " * 40 for number in range(20)))
    data = tmp_path / "data"
    prepare(text, data, seq_len=32, vocab_size=300, progress=False)
    source = save_model(phi_model(phi_config(vocab=300), torch.float32))
    larger = phi_config(48, 6, vocab=300)
    grown = phigrow.expand(source, larger, tmp_path / "inputs" / "grown", method="lossless")
    data = data.rename(tmp_path / "inputs" / "data")
    before = closed(tmp_path / "inputs")
    prefix = DROPPED if os.geteuid() == 0 else []

    def start(*words: str) -> subprocess.CompletedProcess[str]:
        command = [*prefix, *words]
        return subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)

    assert start("touch", str(data / "new")).returncode != 0  # negative control: these rights are gone
    settings = "--out run --steps 2 --warmup 1 --batch 4 --save-every 1 --export export --dtype fp32 --compile false"
    run = [sys.executable, "-m", "phigrow", "pretrain", "--init", str(grown), "--data", str(data), *settings.split()]
    done = start(*run, "--teacher", str(grown), "--teacher-steps", "1")
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in records(tmp_path / "run", "step")][-1] == 2
    assert os.access(tmp_path / "run" / "export" / "tokenizer.json", os.W_OK)
    assert (tmp_path / "run" / "export" / "tokenizer.json").stat().st_mode & 0o200  # contents are copied, not modes
    assert {path: (path.stat().st_mode, path.stat().st_mtime_ns) for path in before} == before
    for path in sorted(before):
        path.chmod(0o755)  # pytest removes its folders
