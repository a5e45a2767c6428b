"""Measure what a rank holds while a model is built, filled and exported: a script for DeepSpeed's launcher.

Words: source folder, output folder, ZeRO stage, how the export is written (``streamed``, ``whole`` for the control, or
``none``), and the data type. Every rank writes ``rank-K.json``: rises of its peak resident memory, in bytes.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil


class Peak:
    """The highest resident memory of this process within a block, over what it was at the start."""

    def __enter__(self) -> Peak:
        self._process, self._over = psutil.Process(), threading.Event()
        self.start = self.highest = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.is_set():
            self.highest = max(self.highest, self._process.memory_info().rss)
            time.sleep(0.001)

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def rise(self) -> int:
        return self.highest - self.start


def export_whole(engine: Any, folder: Path) -> None:
    """The plain way, as transformers and DeepSpeed's examples do it: all tensors on rank 0, then one save."""
    import torch.distributed as dist
    from huggingface_hub import save_torch_state_dict

    from phigrow.training.zero import full_value

    tensors = {name: full_value(p, engine.optimizer, master=False) for name, p in engine.module.named_parameters()}
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
        save_torch_state_dict(tensors, folder, max_shard_size="5GB", metadata={"format": "pt"})


def main() -> int:
    from scenarios import FakeBlocks

    from phigrow.training import RunConfig
    from phigrow.training.engine import engine_config
    from phigrow.training.export import export_model
    from phigrow.training.export_files import export_files
    from phigrow.training.model import build_model, model_config
    from phigrow.training.process import start

    source, out, stage, how, dtype = [word for word in sys.argv[1:] if not word.startswith("--")]
    world = start(1)
    config = RunConfig(init=source, zero=int(stage), dtype=dtype, batch=world.size)
    model_dict = model_config(config, data_vocab=1, seq_len=16)
    engine_dict = engine_config(config, world.size, 1)
    # transformers, DeepSpeed and the allocator load and warm up on a model that weighs nothing.
    small = model_dict | {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}
    build_model(RunConfig(zero=int(stage), dtype=dtype, batch=world.size), small, world, "sdpa", engine_dict)
    with Peak() as building:
        model = build_model(config, model_dict, world, "sdpa", engine_dict)
    engine = type("Engine", (), {"module": model, "optimizer": None})()
    folder = Path(out) / f"export-{how}"
    beside = export_files(config, model_dict, FakeBlocks())
    with Peak() as exporting:
        if how == "whole":
            export_whole(engine, folder)
        elif how == "streamed":
            export_model(engine, folder, "fp32", world, companions=beside, training={}, shard_bytes=5 * 10**7)
    found = {"built": building.rise, "exported": exporting.rise}
    (Path(out) / f"rank-{world.rank}.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
