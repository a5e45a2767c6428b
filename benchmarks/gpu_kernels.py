"""Steps of ``gpu_check.py`` that train nothing: peaks, attention, numbers against the CPU, documents, the loss."""

from __future__ import annotations

import time
from typing import Any

from gpu_place import Place, Result, nominal_peak, relative


def ceilings(place: Place) -> Result:
    """Versions of what is installed, and the fastest copy and matrix product."""
    import torch
    from mfu import installed, matrix_peak, seconds

    device = place.device
    packages = ("phigrow", "torch", "transformers", "deepspeed", "flash_attn", "triton")
    out: Result = {"versions": {name: installed(name) for name in packages}, "device": device.type}
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        out |= {"device": facts.name, "memory_gib": facts.total_memory / 2**30, "cuda": torch.version.cuda}
        out["capability"] = list(torch.cuda.get_device_capability(device))
        out["nominal_tflops"] = (nominal_peak(facts.name) or 0) / 1e12 or None
    size = 2**20 if place.toy else 2**30
    values = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(values)
    out["copy_gb_s"] = 2 * size / seconds(lambda: target.copy_(values), device, 5) / 1e9
    out["batch_copies"] = {kind: batch_copy(place, pinned=kind == "pinned") for kind in ("pageable", "pinned")}
    out["matrix_tflops"], out["matrix_shape"] = matrix_peak(place.model(), 128 if place.toy else 16384, device)
    return out | {"ok": True}


def batch_copy(place: Place, *, pinned: bool) -> Result:
    """Copy 64 MiB of token ids to the device: the rate, and how long the host waits for it."""
    import torch
    from mfu import synchronise

    size = 2**16 if place.toy else 2**26
    batch = torch.zeros(size // 8, dtype=torch.int64)
    batch = batch.pin_memory() if pinned and place.device.type == "cuda" else batch
    waits, takes = [], []
    for _ in range(3):
        synchronise(place.device)
        began = time.perf_counter()
        batch.to(place.device, non_blocking=pinned, copy=True)
        waits.append(time.perf_counter() - began)
        synchronise(place.device)
        takes.append(time.perf_counter() - began)
    return {"gb_s": size / min(takes) / 1e9, "host_waits_seconds": min(waits)}


def attention(place: Place) -> Result:
    """Every attention forward and backward at head sizes 64 and 80 against fp64, its kernel and its time."""
    import torch

    from phigrow.training import attention_choice as choice

    tokens = 64 if place.toy else 2048
    rows, ok = [], True
    for head_dim in (64, 80):
        for within in (False, True):
            shape = choice.Shape(2, 4 if place.toy else 32, 4 if place.toy else 32, tokens, head_dim, within)
            wide = [x.requires_grad_() for x in choice.random_inputs(shape, torch.float64, place.device)]
            expected = choice.attend("sdpa", wide, shape)
            expected_gradients = torch.autograd.grad(expected.square().sum(), wide)
            for name in ("sdpa", "flash_attention_2", *(["varlen"] if within else [])):
                row: Result = {"attention": name, "head_dim": head_dim, "within": within}
                if (problem := choice.problem_of(name, place.dtype, place.device, shape)) is not None:
                    rows.append(row | {"problem": problem})
                    continue
                narrow = [x.detach().to(place.dtype).requires_grad_() for x in wide]
                found = choice.attend(name, narrow, shape)
                gradients = torch.autograd.grad(found.float().square().sum(), narrow)
                row["forward"] = relative(found, expected)
                row["backward"] = max(relative(a, b) for a, b in zip(gradients, expected_gradients, strict=True))
                row["seconds"] = choice.timed(name, place.dtype, place.device, shape)
                row["kernel"] = choice.kernel(name, place.dtype, place.device, shape)
                rows.append(row)
                ok &= row["forward"] < 0.02 and row["backward"] < 0.05
    chosen = choice.choose_attention("auto", place.dtype_name, place.device, choice.Shape(4, 32, 32, tokens, 64))
    return {"ok": ok, "rows": rows, "auto": chosen.record()}


def numbers(place: Place) -> Result:
    """The logits, the loss and all gradients of a model in fp32 on this device against the CPU in fp64."""
    import torch

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    found = _pass(place, place.device, torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = before
    expected = _pass(place, torch.device("cpu"), torch.float64)
    loss, logits = abs(found[0] - expected[0]), relative(found[2], expected[2])
    worst = max((relative(a, expected[1][name]), name) for name, a in found[1].items())
    ok = loss < 1e-4 and logits < 1e-3 and worst[0] < 1e-3
    return {"ok": ok, "loss": loss, "logits": logits, "gradient": worst[0], "of": worst[1]}


def _pass(place: Place, device: Any, dtype: Any) -> tuple[float, dict[str, Any], Any]:
    """Return the loss, the gradients and the logits of two blocks."""
    import torch

    from phigrow.training import RunConfig
    from phigrow.training.loss import hidden_states
    from phigrow.training.model import build_model
    from phigrow.training.process import World

    config = RunConfig(model=place.model(), zero=0, dtype="fp32")
    model = build_model(config, place.model(), World(0, 1, 0, 1, torch.device("cpu")), "sdpa", {})
    model = model.to(device, dtype)
    rows = torch.randint(512, (2, 33 if place.toy else 257), generator=torch.Generator().manual_seed(0))
    loss = model(rows.to(device))
    loss.backward()
    head = model.get_output_embeddings()
    with torch.no_grad():
        hidden = hidden_states(model, rows[:, :-1].to(device))
        logits = torch.nn.functional.linear(hidden, head.weight, head.bias)
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters()}, logits


def documents(place: Place) -> Result:
    """Attention inside documents by a mask, by lengths and alone; no gradient may cross a border."""
    import torch

    from phigrow.training import RunConfig, attention_choice
    from phigrow.training.loss import hidden_states
    from phigrow.training.model import build_model
    from phigrow.training.process import World

    length = place.seq_len // 2
    draw = torch.Generator().manual_seed(0)
    first = torch.randint(1, 200, (1, length - 1), generator=draw)
    second = torch.randint(200, 512, (1, length), generator=draw)
    ids = torch.cat([first, torch.zeros(1, 1, dtype=torch.int64), second], dim=1).to(place.device)  # 0 ends a text
    config = RunConfig(model=place.model(), zero=0, dtype=place.dtype_name, documents="within")
    alone = World(0, 1, 0, 1, place.device)
    shape = attention_choice.shape_of(place.model(), rows=1, tokens=place.seq_len, within=True)
    out: Result = {"ok": True}
    reference: Any = None
    for name in ("sdpa", "flash_attention_2", "varlen"):
        if (problem := attention_choice.problem_of(name, place.dtype, place.device, shape)) is not None:
            out[name] = {"problem": problem}
            continue
        model = build_model(config, place.model(), alone, name, {}, 0).to(place.device, place.dtype)
        hidden = hidden_states(model, ids, 0)
        alone_hidden = hidden_states(model, ids[:, length - 1 :], 0)
        reference = hidden if reference is None else reference
        hidden[:, length:].float().sum().backward()
        embedding = model.get_input_embeddings().weight.grad
        crossing = float(embedding[1:200].abs().max())
        row = {
            "against_mask": relative(hidden, reference),
            "against_alone": relative(hidden[:, length - 1 :], alone_hidden),
            "crossing_gradient": crossing,
            "own_gradient": float(embedding[200:].abs().max()),
        }
        out[name] = row
        out["ok"] &= crossing == 0 < row["own_gradient"] and row["against_alone"] < 0.05 > row["against_mask"]
    return out


def loss(place: Place) -> Result:
    """The chunked loss against the one with all logits: value, gradient, time and memory."""
    import torch
    from mfu import seconds

    from phigrow.training.loss import token_loss

    tokens, hidden, vocab = (256, 64, 512) if place.toy else (8192, 2048, 51200)
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, hidden, generator=draw).to(place.device, place.dtype)
    weight = (torch.randn(vocab, hidden, generator=draw) / hidden**0.5).to(place.device, place.dtype).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=draw).to(place.device)
    out: Result = {}
    kept: dict[str, tuple[float, Any]] = {}
    for mode in ("full", "chunked"):

        def work(mode: str = mode) -> Any:
            value = token_loss(states, weight, None, targets, mode)
            return value, torch.autograd.grad(value, weight)[0]

        if place.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        value, gradient = work()
        kept[mode] = (float(value), gradient)
        out[mode] = {"seconds": seconds(work, place.device, 3)}
        if place.device.type == "cuda":
            out[mode]["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    out["loss"] = abs(kept["full"][0] - kept["chunked"][0])
    out["gradient"] = relative(kept["chunked"][1], kept["full"][1])
    return out | {"ok": out["loss"] < 1e-2 and out["gradient"] < 0.05}
