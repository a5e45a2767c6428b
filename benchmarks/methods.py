"""What every method costs at the start: how far the grown model's logits and its held-out loss are from the source's.

A small model of each family is trained for a few minutes on the source code of the standard library, byte by byte, and
grown by every method it takes: to twice the width, to uneven sizes, and in depth. Arithmetic is float64. Losses are
nats a byte on files that training did not see. Methods are found by name. LiGO is measured before and after its maps
were learned, by `phigrow.learn_growth` as it is by default: 100 steps, of 2,048 bytes of the same text.

    .venv/bin/python benchmarks/methods.py --out benchmarks/results/DATE-methods-MACHINE
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

import phigrow
from phigrow.corpus import prepare
from phigrow.errors import GrowthError
from phigrow.expansion.logits import widen_norms
from phigrow.growth.methods.depth import DEPTHS
from phigrow.growth.registry import all_methods
from phigrow.ligo.train import learn_growth
from phigrow.models.families import all_families
from phigrow.models.family import Family

SOURCE = {"vocab": 256, "hidden": 64, "kv": 4, "group": 1, "q": 16, "rotary": 16, "mlp": 192, "layer": 3}
SIZES = {
    "2x width": {"hidden": 128, "kv": 8, "mlp": 384},
    "uneven": {"hidden": 96, "kv": 6, "mlp": 250},
    "depth": {"layer": 5},
}
LENGTH, ROWS = 128, 16
EXACT = 1e-10
LEARNED = "ligo, learned"


def library() -> tuple[list[Path], list[Path]]:
    """Files of the standard library, to train on and held out: every tenth."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return [f for k, f in enumerate(files) if k % 10], files[::10]


def stdlib() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of these files."""
    texts = [b"".join(file.read_bytes() for file in files) for files in library()]
    train, held_out = (torch.frombuffer(bytearray(text), dtype=torch.uint8).long() for text in texts)
    return train, held_out[: 64 * LENGTH].view(64, LENGTH)


def trained(family: Family, text: torch.Tensor, steps: int, seed: int) -> Any:
    """A source, after AdamW with a linear decay."""
    torch.manual_seed(seed)
    config = {**family.config_of(SOURCE), "max_position_embeddings": LENGTH, "bos_token_id": None, "eos_token_id": None}
    settings = {key: value for key, value in config.items() if key != "architectures"}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**settings), attn_implementation="sdpa"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH, (ROWS, 1))
        ids = text[starts + torch.arange(LENGTH)]
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.double().eval()


@torch.no_grad()
def measure(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Logits and loss, in float64 throughout."""
    widen_norms(model)
    out = model(input_ids=ids, labels=ids, use_cache=False)
    return out.logits, float(out.loss)


def packed(folder: Path) -> str:
    """What sources are trained on, as blocks of bytes for a learning run; byte 0 ends a file."""
    (folder / "text").mkdir()
    for file in library()[0]:
        (folder / "text" / file.with_suffix(".txt").name).write_bytes(file.read_bytes())
    # ByteLevel shows bytes as characters: those that are printable as themselves, the others from 256 on, in order.
    shown = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (ord(c) > 255, ord(c)))
    plain = [ord(c) for c in shown if ord(c) < 256]
    byte_of = dict(zip(shown, plain + [byte for byte in range(256) if byte not in plain], strict=True))
    tokenizer = Tokenizer(models.WordLevel(byte_of, unk_token=None))
    one = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(False, use_regex=False), one])
    end = next(character for character, byte in byte_of.items() if byte == 0)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end).save_pretrained(folder / "bytes")
    prepare(folder / "text", folder / "data", seq_len=LENGTH, tokenizer=folder / "bytes", progress=False)
    return str(folder / "data")


def learned(source: Any, target: dict[str, Any]) -> Any:
    """A source grown by LiGO, its maps learned."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy.deepcopy(source).float().save_pretrained(folder / "source")
        learn_growth(folder / "source", target, folder / "maps", data=packed(folder), batch=ROWS, threads=1)
        return phigrow.expand_model(source, target, method="ligo", maps=folder / "maps")


def growths(methods: list[str] | None = None) -> Iterator[tuple[str, str, str]]:
    """(method, depth, sizes); depth methods are measured with lossless, which then changes nothing."""
    if methods:
        yield from ((method, "", sizes) for sizes in ("2x width", "uneven") for method in methods)
        return
    for sizes in ("2x width", "uneven"):
        yield from ((method, "", sizes) for method in (*all_methods(), LEARNED))
        yield "tile:scale=preserve", "", sizes
    yield from (("lossless", depth, "depth") for depth in DEPTHS)


def rows(family: Family, steps: int, seed: int, methods: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """One row a growth."""
    text, held_out = stdlib()
    source = trained(family, text, steps, seed)
    old, loss = measure(source, held_out)
    for method, depth, sizes in growths(methods):
        row = {"family": family.name, "method": method, "depth": depth, "sizes": sizes, "source_loss": loss}
        target = {**source.config.to_dict(), **family.config_of({**SOURCE, **SIZES[sizes]})}
        # What follows from the number of layers is left to transformers.
        target = {key: value for key, value in target.items() if key != "layer_types"}
        how = {"depth": depth} if depth else {}
        operator = "ligo" if method == LEARNED else method
        try:
            plan = phigrow.plan(source.config.to_dict(), target, operator, **how)
        except GrowthError as refused:
            yield {**row, "refused": refused.what}
            continue
        if method == LEARNED:
            grown = learned(source, target)
        else:
            grown = phigrow.expand_model(source, target, method=method, **how)
        new, grown_loss = measure(grown, held_out)
        apart = float((old - new).abs().max())
        if (apart <= EXACT) != (plan.exact and method != LEARNED):
            raise SystemExit(f"{method} in {family.name}, {sizes}: claims {plan.exact}, differs by {apart}")
        yield {**row, "exact": apart <= EXACT, "max_abs_dlogit": apart, "loss_above_source": grown_loss - loss}


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a line a method and sizes, a column a family."""
    families = list(dict.fromkeys(row["family"] for row in found))
    losses = {row["family"]: row["source_loss"] for row in found}
    lines = ["| method | growth | " + " | ".join(f"{name} ({losses[name]:.2f})" for name in families) + " |"]
    lines.append("|---|---|" + "--:|" * len(families))
    cells = {(row["depth"] or row["method"], row["sizes"], row["family"]): _cell(row) for row in found}
    for name, sizes in dict.fromkeys((name, sizes) for name, sizes, _ in cells):
        lines.append(f"| `{name}` | {sizes} | " + " | ".join(cells[name, sizes, f] for f in families) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    if "refused" in row:
        return "refused"
    return f"exact, {row['max_abs_dlogit']:.0e}" if row["exact"] else f"{row['loss_above_source']:+.3f}"


def _page(found: list[dict[str, Any]], steps: int) -> str:
    sizes = "; ".join(
        f"{name}: {', '.join(f'{a} {SOURCE[a]} -> {b}' for a, b in to.items())}" for name, to in SIZES.items()
    )
    return f"""# What every method costs at the start

`benchmarks/methods.py`, {steps} training steps of {ROWS * LENGTH:,} bytes. In brackets the source's held-out loss, nats
a byte. `exact` is followed by the largest difference of any logit in float64; elsewhere stands the grown model's
held-out loss above its source's, before any training. {sizes}.

{table(found)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="training steps of the source, of 2,048 bytes each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", action="append", choices=all_families(), help="default: every one")
    parser.add_argument("--method", action="append", help="default: every one, and every depth method")
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [all_families()[name] for name in given.family or all_families()]
    found = [row for family in chosen for row in rows(family, given.steps, given.seed, given.method)]
    print(table(found))
    if given.out:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        content = {
            "steps": given.steps,
            "seed": given.seed,
            "python": platform.python_version(),
            **versions,
            "rows": found,
        }
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        given.out.with_suffix(".md").write_text(_page(found, given.steps) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
