"""Load exports and growths of every family in older versions of transformers, and compare the logits.

``install`` puts an older version into a folder of its own, beside the environment's transformers, whose torch it uses.
``check`` writes the checkpoints with the environment's transformers. It reads them with the older one, and with the
oldest that phigrow supports, in the environment of `oldest.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import oldest

VERSIONS = {
    "4.51.3": ["tokenizers>=0.21,<0.22", "huggingface_hub>=0.30,<1.0"],
}
"""Versions of transformers that must load what phigrow writes, and that are older than phigrow supports itself, with
the packages that each needs in other versions."""
DOWNLOADS = ["requests", "urllib3", "charset-normalizer", "idna", "certifi"]
"""Packages that huggingface_hub imports before its version 1. Its later versions need none of them."""

FOLDER = Path(sys.prefix) / "older-transformers"
TOLERANCE = 2e-5
CONTEXT, LENGTH = 64, 80  # sequences are longer than the context, where dynamic and longrope turn at other frequencies

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT // 4},
    "yarn of the context": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": CONTEXT // 4,
    },
    "longrope": {"rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": CONTEXT // 2},
}  # fmt: skip
THETA = {"phi": 700.0, "gpt_neox": 900.0, "llama": 500.0, "qwen2": 300.0}
SRC = {"kv": 2, "group": 2, "q": 16, "mlp": 40, "layer": 2, "vocab": 300, "hidden": 64}
DST = {**SRC, "kv": 3, "hidden": 96, "mlp": 56, "layer": 3}
TEXT = "def grow(model):\n    return model  # twice\n"


def install() -> None:
    """Install every version, all at once, unless it is there."""
    started = []
    for version, needs in VERSIONS.items():
        target = FOLDER / version
        if not (target / f"transformers-{version}.dist-info").is_dir():
            words = ["--quiet", "--no-deps", "--no-compile", "--disable-pip-version-check", "--target", str(target)]
            command = [sys.executable, "-m", "pip", "install", *words, f"transformers=={version}", *needs, *DOWNLOADS]
            started.append(subprocess.Popen(command))
    codes = [process.wait() for process in started]
    if any(codes):
        raise SystemExit("an older version of transformers could not be installed")
    oldest.install()


def configurations(name: str, scaling: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configurations of a source and of its growth, in the spelling of transformers 5 alone."""
    from phigrow.models.families import all_families

    family, made = all_families()[name], []
    for sizes in (SRC, DST):
        part = 1.0 if name in ("llama", "qwen2") else 0.5
        config = family.config_of({**sizes, "rotary": int(sizes["q"] * part)})
        rope = {"rope_type": "default", **SCALINGS[scaling], "rope_theta": THETA[name]}
        if rope["rope_type"] == "longrope":
            pairs = int(sizes["q"] * part) // 2
            rope |= {
                "short_factor": [1.0 + k / 8 for k in range(pairs)],
                "long_factor": [2.0 + k for k in range(pairs)],
            }
        if part < 1:
            config = {key: value for key, value in config.items() if key not in ("partial_rotary_factor", "rotary_pct")}
            rope["partial_rotary_factor"] = part
        made.append({**config, "max_position_embeddings": CONTEXT, "rope_parameters": rope})
    return made[0], made[1]


def write(folder: Path) -> None:
    """Write a source, a growth and an export for every family and scaling, and the logits of each."""
    import torch
    import torch.distributed as dist
    from transformers import AutoConfig, AutoModelForCausalLM

    import phigrow
    from phigrow.corpus.tokenizer import save_tokenizer, train_tokenizer
    from phigrow.training import RunConfig
    from phigrow.training.export import export_model
    from phigrow.training.export_files import export_files
    from phigrow.training.model import model_config
    from phigrow.training.process import World

    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
    world = World(0, 1, 0, 1, torch.device("cpu"))
    tokenizer = train_tokenizer([TEXT] * 4, 280)
    save_tokenizer(tokenizer, folder / "tokenizer")
    blocks: Any = SimpleNamespace(tokenizer_dir=folder / "tokenizer", eos_token_id=tokenizer.eos_token_id)
    ids = torch.randint(SRC["vocab"], (2, LENGTH), generator=torch.Generator().manual_seed(0))
    torch.save(ids, folder / "ids.pt")
    (folder / "tokens.json").write_text(json.dumps(tokenizer.encode(TEXT)))
    for name in THETA:
        for scaling in SCALINGS:
            src, dst = configurations(name, scaling)
            model = random_model(AutoModelForCausalLM.from_config(AutoConfig.for_model(**src), dtype=torch.float32))
            at = folder / f"{name}, {scaling}"
            model.save_pretrained(at / "source")
            phigrow.expand(at / "source", dst, at / "growth", method="wr", sync=False)
            grown = AutoModelForCausalLM.from_pretrained(at / "growth")
            dtype = "fp32" if scaling == "default" else "bf16"
            run = RunConfig(init=str(at / "growth"), dtype="fp32", export_dtype=dtype)
            beside = export_files(run, model_config(run, data_vocab=280, seq_len=CONTEXT), blocks)
            engine = SimpleNamespace(module=grown, optimizer=None)
            export_model(engine, at / "export", dtype, world, companions=beside, training={})
            for kind in ("growth", "export"):
                loaded = AutoModelForCausalLM.from_pretrained(at / kind, dtype=torch.float32).eval()
                torch.save(logits(loaded, ids), at / f"{kind}.pt")
    # The control: version 4 reads the first configuration as another function where version 5's keys stand alone.
    at = folder / "phi, default"
    config = json.loads((at / "growth" / "config.json").read_text())
    for key in ("rope_theta", "partial_rotary_factor", "rope_scaling"):
        del config[key]
    (at / "alone").mkdir()
    (at / "alone" / "model.safetensors").symlink_to(at / "growth" / "model.safetensors")
    (at / "alone" / "config.json").write_text(json.dumps(config))
    dist.destroy_process_group()


def random_model(model: Any) -> Any:
    """Give every parameter random values, so that none is 0 or 1 by luck."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.12
            parameter.copy_(values + (1 if parameter.ndim == 1 and name.endswith("weight") else 0))
    return model.eval()


def logits(model: Any, ids: Any) -> Any:
    """Return the logits of a model."""
    import torch

    with torch.no_grad():
        return model(ids, use_cache=False).logits


def read(folder: Path) -> int:
    """Load everything that `write` wrote, with the transformers that is imported, and return the number of failures."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids, failures, largest = torch.load(folder / "ids.pt", weights_only=True), 0, 0.0
    tokens = json.loads((folder / "tokens.json").read_text())
    expected = {"growth": torch.float32, "export": torch.bfloat16}
    for at in sorted(path for path in folder.iterdir() if (path / "growth").is_dir()):
        for kind in ("growth", "export"):
            stored = AutoModelForCausalLM.from_pretrained(at / kind, torch_dtype="auto")
            dtype = torch.float32 if at.name.endswith("default") else expected[kind]
            model = AutoModelForCausalLM.from_pretrained(at / kind, torch_dtype=torch.float32).eval()
            difference = float((logits(model, ids) - torch.load(at / f"{kind}.pt", weights_only=True)).abs().max())
            largest = max(largest, difference)
            if not difference <= TOLERANCE or stored.dtype != dtype:
                failures += 1
                print(f"{at.name}, {kind}: max |dlogit| {difference:.3g}, dtype {stored.dtype}")
        if AutoTokenizer.from_pretrained(at / "export").encode(TEXT) != tokens:
            failures += 1
            print(f"{at.name}: the tokenizer of the export gives other tokens")
    at = folder / "phi, default"
    alone = AutoModelForCausalLM.from_pretrained(at / "alone", torch_dtype=torch.float32).eval()
    control = float((logits(alone, ids) - torch.load(at / "growth.pt", weights_only=True)).abs().max())
    if control <= 1000 * TOLERANCE:
        failures += 1
        print(f"the control differs by {control:.3g} only, so this check sees nothing")
    print(f"transformers {transformers.__version__}: max |dlogit| {largest:.3g}; the control differs by {control:.3g}")
    return failures


def check() -> int:
    """Write with this environment's transformers, and read with every older one."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "write", folder], check=True)
        interpreters = {FOLDER / version: sys.executable for version in VERSIONS} | {Path(): oldest.PYTHON}
        readers = []
        for path, interpreter in interpreters.items():
            environment = {**os.environ, "PYTHONPATH": str(path), "HF_HUB_OFFLINE": "1"}
            readers.append(subprocess.Popen([str(interpreter), __file__, "read", folder], env=environment))
        codes = [reader.wait() for reader in readers]
    return int(any(codes))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["install", "check", "write", "read"])
    parser.add_argument("folder", nargs="?", type=Path)
    words = parser.parse_args()
    if words.action == "install":
        install()
        return 0
    if words.action == "check":
        install()
        return check()
    if words.action == "write":
        write(words.folder)
        return 0
    return int(read(words.folder) > 0)


if __name__ == "__main__":
    sys.exit(main())
