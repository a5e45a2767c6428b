"""Model FLOP/s of pretraining on one GPU, beside the matrix peak measured in the same run, and where the rest goes.

    python benchmarks/mfu.py --model phi-1_5 --compile layers --micro-batch 4 8 16 --out DATE-DEVICE-mfu-phi-1_5
    python benchmarks/mfu.py --model phi2 --compile layers --micro-batch 2 4 8 --out DATE-DEVICE-mfu-phi2

The model, attention, activation and loss are the recipe's own; around them is a plain loop, so that this needs neither
DeepSpeed nor a second GPU: bf16 weights and gradients, fp32 masters, fused AdamW, clipping, random tokens. FLOPs are
`phigrow.models.cost.count_cost`'s, 3 times forward whatever is recomputed, attention not halved for causality (PaLM,
appendix B; as llm-foundry counts). The peak is the fastest bf16 product among large squares and the model's own shapes,
measured before and after the training; the share of it is thus of what this GPU does in this state, not of a data
sheet.

`--model tiny` runs anywhere, in seconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

KINDS = {
    "loss": ("log_softmax", "logsoftmax", "nll_loss", "cross_entropy"),
    "attention": ("flash", "fmha", "attention", "sdpa", "softmax"),
    "matrices": ("gemm", "cutlass", "cublas", "nvjet", "xmma", "aten::mm", "aten::addmm", "aten::bmm", "mkldnn"),
    "optimizer": ("adam", "multi_tensor", "foreach"),
    "normalisation": ("layer_norm", "layernorm"),
    "copies": ("memcpy", "memset", "copy", "fill", "zero_"),
}
"""A part of its name -> what a kernel does; the first that fits. Compiled kernels are 'elementwise and fused'."""


def shape(name: str) -> dict[str, Any]:
    """The configuration of a shipped model, without dropout, or a tiny one."""
    from phigrow.models.config import load_config

    config = load_config("phi-1_5" if name == "tiny" else name)
    if name == "tiny":
        sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512}
        config |= sizes | {"num_attention_heads": 2, "num_key_value_heads": 2}
    return config | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], device: torch.device, times: int) -> float:
    """Mean seconds of ``work``, after two runs that are not counted."""
    for _ in range(2):
        work()
    synchronise(device)
    began = time.perf_counter()
    for _ in range(times):
        work()
    synchronise(device)
    return (time.perf_counter() - began) / times


def matrix_peak(config: dict[str, Any], tokens: int, device: torch.device) -> tuple[float, str]:
    """The fastest bf16 product, in TFLOP/s, and its shape."""
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    squares = [(8192, 8192, 8192), (16384, 8192, 8192)] if device.type == "cuda" else [(128, 128, 128)]
    best = (0.0, "")
    for m, k, n in [*squares, (tokens, hidden, mlp), (tokens, mlp, hidden)]:
        a = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        b = torch.randn(k, n, device=device, dtype=torch.bfloat16)
        out = torch.empty(m, n, device=device, dtype=torch.bfloat16)
        took = seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, 30 if device.type == "cuda" else 3)
        best = max(best, (2 * m * k * n / took / 1e12, f"{m} x {k} x {n}"))
    return best


class Training:
    """One model with its optimizer; calling it takes a step."""

    def __init__(self, config: dict[str, Any], words: argparse.Namespace, micro: int, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        from phigrow.training.activation import fuse_gelu
        from phigrow.training.attention import registered_name
        from phigrow.training.compilation import compile_layers
        from phigrow.training.loss import attach_loss
        from phigrow.training.recompute import recompute_layers

        torch.manual_seed(0)
        hf_config = CONFIG_MAPPING["phi"].from_dict(config)
        with device:
            model = AutoModelForCausalLM.from_config(
                hf_config, attn_implementation=registered_name(words.attention, within=False), dtype=torch.bfloat16
            )
        fuse_gelu(model)
        recompute_layers(model, words.checkpointing, partitioned=False)
        attach_loss(model, words.loss)
        model.train()
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p.detach().float().requires_grad_() for p in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4, weight_decay=0.1, fused=True)
        if words.compile == "layers":
            compile_layers(model, backend=words.backend)
        self.forward: Callable[[torch.Tensor], torch.Tensor] = (
            torch.compile(model) if words.compile == "model" else model
        )
        shape = (micro, words.seq_len + 1)
        self.blocks = torch.randint(0, config["vocab_size"], shape, device=device)
        self.passes = words.accumulation
        self.loss = torch.zeros((), device=device)

    def __call__(self) -> None:
        for _ in range(self.passes):
            self.loss = self.forward(self.blocks)
            (self.loss / self.passes).backward()
        for weight, master in zip(self.weights, self.masters, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)


def profile(work: Callable[[], Any], device: torch.device) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Where the time of a step goes: shares by kind, and the ten longest kernels."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profiler(activities=[ProfilerActivity.CPU, *activities] if on_gpu else activities) as found:
        work()
        synchronise(device)
    kernels: dict[str, float] = {}
    for event in found.key_averages():
        took = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if took > 0 and (not on_gpu or str(event.device_type).endswith("CUDA")):
            kernels[event.key] = kernels.get(event.key, 0.0) + took
    total = sum(kernels.values())
    shares: dict[str, float] = {}
    for name, took in kernels.items():
        kind = next((k for k, parts in KINDS.items() if any(p in name.lower() for p in parts)), "elementwise and fused")
        shares[kind] = shares.get(kind, 0.0) + took / total
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:10]
    rows = [{"kernel": name[:100], "ms": took / 1e3, "share": took / total} for name, took in longest]
    return dict(sorted(shares.items(), key=lambda item: -item[1])), rows


def measure(config: dict[str, Any], words: argparse.Namespace, micro: int, device: torch.device) -> dict[str, Any]:
    """The record of one micro-batch size; of a size that does not fit, only that."""
    from phigrow.models.cost import count_cost

    record: dict[str, Any] = {"micro_batch": micro}
    tokens = micro * words.seq_len
    try:
        peak, peak_shape = matrix_peak(config, tokens, device)
        training = Training(config, words, micro, device)
        took = seconds(training, device, words.steps)
        shares, kernels = profile(training, device)
        after, _ = matrix_peak(config, tokens, device)
    except torch.OutOfMemoryError:
        return record | {"out_of_memory": True}
    per_step = tokens * words.accumulation
    flops = count_cost(config, words.seq_len).training_flops * per_step / took / 1e12
    peak = max(peak, after)
    record |= {"seconds": took, "tokens_per_second": per_step / took, "model_tflops": flops}
    record |= {"peak_tflops": peak, "peak_shape": peak_shape, "share_of_peak": flops / peak}
    record["loss"] = float(training.loss.detach())
    if device.type == "cuda":
        record["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
    return record | {"where": shares, "kernels": kernels}


def table(records: list[dict[str, Any]]) -> str:
    lines = [
        "| micro-batch | tokens/s | model TFLOP/s | matrix peak | share | memory GB |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for r in records:
        if r.get("out_of_memory"):
            lines.append(f"| {r['micro_batch']} | out of memory | | | | |")
            continue
        memory = f"{r['memory_gb']:.1f}" if "memory_gb" in r else ""
        rates = f"{r['tokens_per_second']:,.0f} | {r['model_tflops']:.4g} | {r['peak_tflops']:.4g}"
        lines.append(f"| {r['micro_batch']} | {rates} | {100 * r['share_of_peak']:.1f} % | {memory} |")
    done = [r for r in records if "where" in r]
    if done:
        best = max(done, key=lambda r: r["model_tflops"])
        lines += ["", f"Where a step goes at micro-batch {best['micro_batch']}:", "", "| | share |", "|---|--:|"]
        lines += [f"| {kind} | {100 * share:.1f} % |" for kind, share in best["where"].items()]
        lines += ["", "| longest kernels | ms | share |", "|---|--:|--:|"]
        lines += [f"| `{k['kernel']}` | {k['ms']:.2f} | {100 * k['share']:.1f} % |" for k in best["kernels"]]
    return "\n".join(lines) + "\n"


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="phi-1_5", help="phi-1_5, phi2, another shipped configuration, or tiny")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[8])
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches an optimizer step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile", default="none", choices=("none", "layers", "model"))
    parser.add_argument("--backend", default="inductor", help="of torch.compile, for layers")
    recompute = {"nargs": "?", "const": True, "default": False, "choices": (True, "selective")}
    parser.add_argument(
        "--checkpointing", **recompute, help="recompute layers in the backward pass; selective: cheap operations only"
    )
    parser.add_argument("--attention", default="sdpa", choices=("sdpa", "flash_attention_2"))
    parser.add_argument("--loss", default="auto", choices=("auto", "full", "chunked"))
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    words = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = shape(words.model)
    records = []
    for micro in words.micro_batch:
        records.append(measure(config, words, micro, device))
        print({key: value for key, value in records[-1].items() if key not in ("where", "kernels")}, flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    settings = {key: value for key, value in vars(words).items() if key != "out"}
    text = f"{words.model}, context {words.seq_len}, {name}\n\n{table(records)}"
    print(text)
    if words.out:
        versions = {package: installed(package) for package in ("torch", "transformers", "flash_attn")}
        content = {"device": name, "versions": versions, "settings": settings, "records": records}
        words.out.with_suffix(".json").write_text(json.dumps(content, indent=1))
        words.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
