"""The demo: everything that phigrow does, in one folder and in minutes, on real text and under DeepSpeed.

Embedded corpus -> small Phi pretrained -> expanded by wr, tile and lossless -> each, and a from-scratch arm, pretrained
with the same data order and schedule -> report. Every stage leaves a folder that a second run finds finished.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.study.launch import default_ranks, environment

METHODS = ("wr", "tile", "lossless")
SEQ_LEN = 128
BATCH = 32
VOCAB = 2048


@dataclass(frozen=True)
class Settings:
    """What a demo folder was made with; a second run must agree.

    Attributes:
        steps: optimizer steps of every arm, source included, of `BATCH` x `SEQ_LEN` tokens.
        seed: of data order and new weights.
        ranks: DeepSpeed ranks.
    """

    steps: int
    seed: int
    ranks: int


STEPS = 220
"""Default steps: on two CPU cores the whole demo then stays under twelve minutes."""


def phi(hidden: int, heads: int, layers: int) -> dict[str, Any]:
    """A small Phi in the proportions of phi-1.5: heads of 64, half of them rotary, mlp four times as wide as hidden."""
    return {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "max_position_embeddings": SEQ_LEN,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }


SOURCE = phi(hidden=128, heads=2, layers=4)
DESTINATION = phi(hidden=192, heads=3, layers=6)


def run(
    out: str | Path,
    *,
    ranks: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> None:
    """Run the demo in the folder ``out``, or what is left of it.

    Args:
        out: folder of all results.
        ranks: DeepSpeed ranks; by default chosen for this machine.
        steps: optimizer steps of every arm; by default `STEPS`.
        seed: of data order and new weights.
        say: receives what the demo says, line by line.

    Raises:
        GrowthError: the folder holds a demo of other settings, or a stage failed.
    """
    started = time.perf_counter()
    out = Path(out)
    settings = _settle(out, Settings(steps or STEPS, seed, ranks or default_ranks(BATCH)))
    say(f"phigrow demo in {out}: {len(METHODS)} growth methods against training from scratch")
    data = out / "data"
    stages: list[tuple[str, Path, Callable[[], None]]] = [
        ("text: the Python installation's documentation, as packed tokens", data, lambda: _prepare(data, settings)),
        (
            f"source: a {_size(SOURCE)} Phi, {settings.steps} steps",
            out / "runs" / "source" / "export",
            lambda: _train(out, "source", settings, model=SOURCE),
        ),
        *(
            (f"expand by {method} to {_size(DESTINATION)}", out / "init" / method, _expander(out, method, settings))
            for method in METHODS
        ),
        (
            f"train from scratch, {settings.steps} steps",
            out / "runs" / "scratch" / "export",
            lambda: _train(out, "scratch", settings, model=DESTINATION),
        ),
        *(
            (
                f"train from {method}, the same {settings.steps} steps",
                out / "runs" / method / "export",
                _trainer(out, method, settings),
            )
            for method in METHODS
        ),
    ]
    for number, (what, result, work) in enumerate(stages, 1):
        done = result.exists()
        say(f"\n[{number}/{len(stages)}] {what}{' (done before)' if done else ''}")
        if not done:
            work()
    _report(out, say)
    minutes = (time.perf_counter() - started) / 60
    say(f"\n{minutes:.1f} minutes. Report: {out / 'report' / 'report.html'}  Picture: {out / 'report' / 'curves.png'}")


def _settle(out: Path, settings: Settings) -> Settings:
    path = out / "demo.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != asdict(settings):
            raise GrowthError(
                "the folder holds a demo of other settings",
                where=str(path),
                why=f"it was made with {found}, now asked for {asdict(settings)}",
                fix="give the same settings, or another --out",
            )
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(settings)) + "\n", encoding="utf-8")
    return settings


def _size(config: dict[str, Any]) -> str:
    from phigrow.flops import count

    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    return f"{count(config).parameters / 1e6:.1f}M-parameter ({layers} layers x {hidden})"


def _prepare(data: Path, settings: Settings) -> None:
    from phigrow.corpus import prepare

    # A tenth held out: with the default twentieth the held-out part is a handful of modules.
    prepare(
        "embedded", out=data, seq_len=SEQ_LEN, vocab_size=VOCAB, heldout=0.1, seed=settings.seed, across_sources=True
    )


def _expander(out: Path, method: str, settings: Settings) -> Callable[[], None]:
    def work() -> None:
        from phigrow.expand import expand

        source = out / "runs" / "source" / "export"
        expand(source, DESTINATION, out / "init" / method, method=method, seed=settings.seed, dtype="float32")

    return work


def _trainer(out: Path, method: str, settings: Settings) -> Callable[[], None]:
    return lambda: _train(out, method, settings, init=out / "init" / method)


def _train(
    out: Path, arm: str, settings: Settings, *, model: dict[str, Any] | None = None, init: Path | None = None
) -> None:
    """Launch DeepSpeed on the training module, one process a rank."""
    steps = settings.steps
    options: dict[str, Any] = {
        "arm": arm,
        "out": out / "runs" / arm,
        "data": out / "data",
        "seed": settings.seed,
        "steps": steps,
        "batch": BATCH,
        "lr": 2e-3,
        "warmup": max(1, steps // 15),
        "eval-every": max(1, steps // 25),
        "eval-blocks": 64,
        "save-every": max(1, steps // 3),
        "log-every": max(1, steps // 20),
        "keep": 1,
        "zero": 1,
        "export-dtype": "fp32",  # growth starts from the masters: nothing is rounded on the way
    }
    if init is not None:
        options["init"] = init
    else:
        path = out / f"{arm}-config.json"
        path.write_text(json.dumps(model, indent=2) + "\n", encoding="utf-8")
        options["model"] = path
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(settings.ranks)]
    launcher += ["--log_level", "error", "--module", "phigrow.training"]
    done = subprocess.run([*launcher, *words], env=environment(), check=False)
    if done.returncode != 0:
        raise GrowthError(
            f"training {arm} ended with code {done.returncode}",
            where=str(out / "runs" / arm),
            fix="read the lines above, then run the same command again: it resumes",
        )


def _report(out: Path, say: Callable[[str], None]) -> None:
    from rich.console import Console

    from phigrow.measure import findings, report, terminal
    from phigrow.verify import verify

    certificates = {}
    say("\nWhat each start computes, against the source:")
    for method in METHODS:
        certificate = verify(out / "runs" / "source" / "export", out / "init" / method)
        certificates[method] = certificate.to_json()
        say(
            f"  {method:9} max |dlogit| {certificate.max_abs_dlogit:.2g}, loss {certificate.source_loss:.3f} -> "
            f"{certificate.destination_loss:.3f}"
        )
    (out / "certificates.json").write_text(json.dumps(certificates, indent=1) + "\n", encoding="utf-8")
    comparison = report([out / "runs" / arm for arm in ("scratch", *METHODS)], out / "report")
    Console().print(terminal(comparison))
    for line in findings(comparison):
        say(line)
