"""A fuzzer of checkpoints: damage to headers, indexes, configurations and bytes, all decided by (seed, number).

`try_one` damages a sound checkpoint, grows it, and holds the outcome to three rules: nothing but GrowthError escapes,
a refusal leaves nothing behind, and what is grown in spite of the damage is whole and can be read.
"""

import json
import os
import random
import shutil
import struct
from pathlib import Path

from tiny_models import phi_config, phi_model

import phigrow
from phigrow.checkpoints.reader import CheckpointReader
from phigrow.errors import GrowthError
from phigrow.expansion.expand import preview
from phigrow.growth.growth_spec import GrowthSpec
from phigrow.models.config import load_config

SRC, DST = phi_config(16, 2, 12, 2, 4, 11), phi_config(24, 3, 20, 3, 4, 13)
MOST_OUTPUT_BYTES = 4 << 20
"""A damaged size can ask for a large model in good order: it is planned, but not written."""

HEADER, INDEX, CONFIG, DESTINATION = "header", "index", "config", "destination"

Files = dict[str, bytes]

STRANGE = [
    None, True, False, -1, 0, 1, 2, 3, 1.5, -0.0, 1e308, 10**30, 2**31, 2**63, 2**64, 10**400, float("nan"),
    float("inf"), "", "x", "phi", "F32", "BF16", "I64", "../x.safetensors", "/etc/passwd", "model.safetensors", "a\0b",
    "\ud800", "\x1b[2J", "x" * 5000, [], {}, [[]], {"a": {}}, [0, 0], [0, 10**12], [2, 2, 2], ["phi"],
    {"rope_theta": None},
]  # fmt: skip


class Escaped(AssertionError):
    """The input broke a rule of the fuzzer."""


def sound_layouts(folder: Path) -> list[Files]:
    """One checkpoint in one file, and in shards with an index."""
    import torch

    model = phi_model(SRC, torch.float32)
    layouts = []
    for name, size in (("one", "5GB"), ("shards", "4KB")):
        model.save_pretrained(folder / name, max_shard_size=size)
        layouts.append({path.name: path.read_bytes() for path in sorted((folder / name).iterdir())})
    return layouts


def try_one(work: Path, layouts: list[Files], seed: int, number: int, grow=phigrow.expand) -> str:
    """Damage, grow, judge.

    Args:
        work: a folder of its own for this fuzzer.
        layouts: of `sound_layouts`.
        seed, number: decide the input, on any machine.
        grow: what is tested; another one is a negative control.

    Returns:
        ``refused``, ``grown``, or ``large`` for what is accepted and not written.

    Raises:
        Escaped: a rule is broken; the message says how to repeat the input.
    """
    rng = random.Random(f"{seed}:{number}")
    files = dict(rng.choice(layouts)) | {"dst.json": json.dumps(DST).encode()}
    done = [damage(rng, files) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    src, out = work / "src", work / "out"
    shutil.rmtree(src, ignore_errors=True)
    src.mkdir()
    for name, data in files.items():
        (work / name if name == "dst.json" else src / name).write_bytes(data)
    before = sorted(os.listdir(work))
    method = rng.choice(["wr", "tile", "lossless"])

    def escaped(what: str) -> Escaped:
        return Escaped(f"{what}\n  after: {'; '.join(done)}; {method}\n  repeat: {variables(seed, number)}")

    try:
        _, size, _ = preview(src, work / "dst.json", GrowthSpec(method=method))
        if size > MOST_OUTPUT_BYTES:
            return "large"
        grow(src, work / "dst.json", out, method=method, sync=False)
    except GrowthError as error:
        if sorted(os.listdir(work)) != before:
            raise escaped(f"a refusal that left {sorted(set(os.listdir(work)) - set(before))} behind") from error
        if not (str(error).replace("\n", "").isprintable() and len(str(error)) < 10_000):
            raise escaped("a message that is no text for a terminal") from error
        return "refused"
    except Exception as error:
        raise escaped(f"{type(error).__name__}: {error}") from error
    try:
        with CheckpointReader(out) as reader:
            config = load_config(out)
            phigrow.plan(config, config, method="wr").table.check_tensors(config, reader.shapes, where="out")
            for tensor in reader.tensors.values():
                tensor.rows(0, tensor.shape[0])
        load_config(out / "generation_config.json")
        json.loads((out / "phigrow.json").read_text())
    except Exception as error:
        raise escaped(f"a grown folder that is not whole: {error}") from error
    shutil.rmtree(out)
    if sorted(os.listdir(work)) != before:
        raise escaped(f"a growth that left {sorted(set(os.listdir(work)) - set(before))} beside its output")
    return "grown"


def variables(seed: int, number: int) -> str:
    return f"PHIGROW_FUZZ_SEED={seed} PHIGROW_FUZZ_INPUT={number} pytest tests/expansion/test_fuzz.py"


def damage(rng: random.Random, files: Files) -> str:
    """Damage one file in place; returns what was done."""
    weights = [name for name in files if name.endswith(".safetensors")]
    texts = [name for name in files if name.endswith(".json")]
    kind = rng.choice(["structure", "structure", "structure", "bytes", "bytes", "length"])
    if kind == "bytes" or not (weights and texts):
        name = rng.choice(list(files))
        files[name], what = damaged_bytes(rng, files[name])
    elif kind == "length":
        name = rng.choice(weights)
        length = rng.choice([0, 1, 7, 2**31, 2**63, 2**64 - 1, rng.randrange(4000)])
        files[name], what = struct.pack("<Q", length) + files[name][8:], f"header length {length}"
    elif rng.random() < 0.4:
        name = rng.choice(weights)
        files[name], what = damaged_header(rng, files[name])
    else:
        name = rng.choice(texts)
        files[name], what = damaged_json(rng, files[name])
    return f"{name}: {what}"


def damaged_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    data = bytearray(data)
    size = len(data)
    at = rng.randrange(min(size, rng.choice([16, 400, 10**9])) or 1)
    how = rng.choice(["flip", "flip", "cut", "insert", "remove", "repeat"])
    if how == "flip":
        for _ in range(rng.choice([1, 1, 4, 32])):
            at = rng.randrange(min(size, rng.choice([16, 400, 10**9])) or 1)
            data[at : at + 1] = bytes([rng.randrange(256)])
    elif how == "cut":
        del data[at:]
    elif how == "insert":
        data[at:at] = rng.randbytes(rng.choice([1, 8, 100]))
    elif how == "remove":
        del data[at : at + rng.choice([1, 8, 100])]
    else:
        data[at:at] = data[at : at + rng.choice([1, 8, 100])]
    return bytes(data), f"{how} at {at}"


def damaged_header(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    (length,) = struct.unpack("<Q", data[:8].ljust(8, b"\0"))
    text, what = damaged_json(rng, data[8 : 8 + length])
    return struct.pack("<Q", len(text)) + text + data[8 + length :], what


def damaged_json(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Change the structure of JSON text; bytes that are none (any more) are damaged as bytes."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):  # earlier damage
        return damaged_bytes(rng, data)
    if not isinstance(content, dict) or not content:
        return damaged_bytes(rng, data)
    holder, key = pick(rng, content)
    how = rng.choice(["strange", "strange", "nudge", "remove", "rename", "swap", "wrap", "twice", "nest"])
    value, what = holder[key], f"{how} {key!r}"
    if how == "strange":
        holder[key] = rng.choice(STRANGE)
        what += f" = {str(holder[key])[:40]}"
    elif how == "nudge":
        is_number = isinstance(value, int | float) and abs(value) < 1e300
        holder[key] = (
            value * rng.choice([2, 3, -1, 0.5, 64]) + rng.choice([-1, 0, 1]) if is_number else str(value) + "x"
        )
        what += f" = {str(holder[key])[:40]}"
    elif how == "remove":
        del holder[key]
    elif how == "rename" and isinstance(holder, dict):
        holder[rng.choice(["x", "", "__metadata__", "weight_map", f"{key}x"])] = holder.pop(key)
    elif how == "swap":
        other, other_key = pick(rng, content)
        holder[key], other[other_key] = json.loads(json.dumps(other[other_key])), json.loads(json.dumps(value))
    elif how == "wrap":
        holder[key] = [value]
    elif how == "twice":
        text = json.dumps(content)
        return f"{{{json.dumps(str(key))}: {json.dumps(value)}, {text[1:]}".encode(), what
    else:
        depth = rng.choice([3, 80, 900, 50_000])
        text = json.dumps(content | {"nested": 0})
        return text.replace('"nested": 0', '"nested": ' + "[" * depth + "]" * depth).encode(), f"nest {depth}"
    return json.dumps(content).encode(), what


def pick(rng: random.Random, content):
    """A random place in a JSON object: (what holds it, its key or position)."""
    holder = content
    while True:
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        if not (isinstance(holder[key], dict | list) and holder[key]) or rng.random() < 0.2:
            return holder, key
        holder = holder[key]
