"""The demo: a complete study in one folder and in minutes, on real text and under DeepSpeed.

It pretrains a small Phi on the embedded corpus and expands it by wr, tile and lossless. Then it pretrains each
expansion and a from-scratch arm, with the same data order and schedule, and writes a report. It is a study
(`phigrow.study`) of one seed. A second run continues where the first one stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.files.atomic import atomic_json
from phigrow.files.output import check_file, json_keys
from phigrow.files.paths import user_path
from phigrow.study import Arm, Source, Study, jobs_of, run_study

METHODS = ("wr", "tile", "lossless")
SEQ_LEN = 128
BATCH = 32
VOCAB = 1024

CERTIFICATES = "certificates.json"

STEPS = 140
"""Default steps of the source and of every arm, of `BATCH` x `SEQ_LEN` tokens."""


def phi(hidden: int, heads: int, layers: int) -> dict[str, Any]:
    """Return a tiny Phi with heads of 32 (half of each rotary, as in phi-1.5) and an MLP of 4 * hidden."""
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


SOURCE = phi(hidden=64, heads=2, layers=4)
DESTINATION = phi(hidden=96, heads=3, layers=6)


def demo_study(out: str | Path, *, ranks: int | None = None, steps: int | None = None, seed: int = 0) -> Study:
    """Return the study of the demo: scratch and three growths, with one seed.

    It has four budgets, each with a decayed end: an eighth, a quarter and a half of the steps, and all steps.

    Args:
        out: folder of all results.
        ranks: DeepSpeed ranks of each run; by default chosen for this machine.
        steps: optimizer steps of the source and of every arm; by default `STEPS`.
        seed: of data order and new weights.
    """
    steps = steps or STEPS
    return Study(
        name="demo",
        out=user_path(out),
        # A tenth is held out. The default, a twentieth, would be a handful of Python modules.
        data={
            "ref": "embedded", "seq_len": SEQ_LEN, "vocab_size": VOCAB, "heldout": 0.1, "seed": seed,
            "across_sources": True,
        },
        seq_len=SEQ_LEN,
        sources=(Source(config=SOURCE, steps=(steps,), seeds=(seed,)),),
        dst=DESTINATION,
        arms=tuple(Arm(name, name, source_steps=steps if name in METHODS else 0) for name in ("scratch", *METHODS)),
        baseline="scratch",
        seeds=(seed,),
        budgets=tuple(sorted({max(4, steps // part) for part in (8, 4, 2, 1)})),
        decay=0.2,
        train={
            # fp32, because most laptops have no bf16 instructions and multiply bf16 matrices several times slower.
            "dtype": "fp32", "batch": BATCH, "lr": 4e-3, "warmup": max(1, steps // 15),
            "eval_every": max(1, steps // 20), "eval_blocks": 64, "eval_at": [1, 10, 100],
            "save_every": max(1, steps // 3), "log_every": max(1, steps // 20), "keep": 1, "zero": 1, "export": None,
        },
        ranks=ranks,
    )  # fmt: skip


def run(
    out: str | Path,
    *,
    ranks: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> None:
    """Run the demo in the folder ``out``, or continue it; see `demo_study`.

    Args:
        out: folder of all results.
        ranks: DeepSpeed ranks of each run; by default chosen for this machine.
        steps: optimizer steps of every arm; by default `STEPS`.
        seed: of data order and new weights.
        say: receives the demo's messages, line by line.

    Raises:
        GrowthError: a job failed.
    """
    from rich.console import Console

    from phigrow.measure import compare, load_runs, terminal

    started = time.perf_counter()
    study = demo_study(out, ranks=ranks, steps=steps, seed=seed)
    say(
        f"phigrow demo in {study.out}: a {_size(SOURCE)} Phi, grown to {_size(DESTINATION)} by {', '.join(METHODS)}, "
        "against training from scratch"
    )
    check_file(study.out / CERTIFICATES, _is_certificates, "certificates of a demo", "--out")
    outcome = run_study(study, say=say)
    for error in outcome.failed.values():
        raise error
    if outcome.report is None:
        raise GrowthError(outcome.why_no_report, where=str(study.out), fix="run the same command again: it resumes")
    certify(study, say)
    ends = [job.folder for job in jobs_of(study) if job.kind == "end"]
    Console().print(terminal(compare(load_runs(ends), study.baseline)))
    minutes = (time.perf_counter() - started) / 60
    say(f"\n{minutes:.1f} minutes. Report: {outcome.report / 'report.html'}  Picture: {outcome.report / 'curves.png'}")


def _size(config: dict[str, Any]) -> str:
    from phigrow.models.cost import count_cost

    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    return f"{count_cost(config).parameters / 1e6:.1f}M-parameter ({layers} layers x {hidden})"


def _is_certificates(path: Path) -> bool:
    certificates = json.loads(path.read_text(encoding="utf-8")) if json_keys(path) else {}
    return all(isinstance(each, dict) and "max_abs_dlogit" in each for each in certificates.values())


def certify(study: Study, say: Callable[[str], None]) -> None:
    """Verify each start against its source, once, and print the differences."""
    from phigrow.checkpoints.fingerprint import checkpoint_fingerprint
    from phigrow.expansion.verify import verify

    path = study.out / CERTIFICATES
    certificates = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    jobs = jobs_of(study)
    source = next(job.folder for job in jobs if job.kind == "source") / "export"
    say("\nLogits and loss of each start, compared with the source:")
    for job in jobs:
        if job.kind != "expand":
            continue
        key = f"{job.name}-{job.key}"
        certificate = certificates.get(key)
        contents = [checkpoint_fingerprint(folder) for folder in (source, job.folder)]
        if certificate is None or certificate.get("contents") != contents:
            certificate = certificates[key] = verify(source, job.folder).to_json() | {"contents": contents}
        say(
            f"  {job.name}: largest difference of logits {certificate['max_abs_dlogit']:.2g}, "
            f"loss {certificate['source_loss']:.3f} -> {certificate['destination_loss']:.3f}"
        )
    atomic_json(path, certificates)
