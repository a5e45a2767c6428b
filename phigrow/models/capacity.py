"""Estimate from a configuration alone the ZeRO stage that fits, and the time and price of a run.

Model states follow Rajbhandari et al., "ZeRO" (1910.02054), as DeepSpeed 0.19 lays them out for the runs of
`phigrow.training` (bf16 or fp32 weights, fp32 gradients and masters, AdamW, gradients summed over ranks in fp32), and
agree with DeepSpeed's ``estimate_zero2_model_states_mem_needs`` and ``estimate_zero3_model_states_mem_needs``.
Activations are counted as in Korthikanti et al., "Reducing Activation Recomputation" (2205.05198), for transformers'
Phi block as phigrow trains it: one LayerNorm feeds attention and mlp, attention keeps no scores, the fused GELU keeps
its input and its output.
docs/capacity.md holds all of it against measured memory.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from phigrow.errors import GrowthError, nearest_multiples
from phigrow.models.config import Config, context_of, load_config
from phigrow.models.cost import count_cost
from phigrow.models.families import family_of

GIB = 2**30
SELECTIVE = "selective"
"""Value of ``checkpointing`` that recomputes only cheap operations."""
RESERVED = 0.10
"""Assumed share of a GPU's memory that the CUDA context, the communication library and fragmentation take."""

PEAK_FLOPS = {"a100": 312e12, "h100": 989.4e12, "h200": 989.4e12}
"""Dense bf16 FLOP/s of a GPU (SXM), from NVIDIA's data sheets of A100, H100 and H200 (half of the sparse figure)."""

REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000
"""Defaults of DeepSpeed's ``reduce_bucket_size`` and ``stage3_max_live_parameters``, in values. Stage 0, and stage 1 in
bf16, have no setting for their buckets, which are as large."""

WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a value."""

FULL_LOGITS = 2**26
"""Most logits that the loss holds at once when its mode is ``auto``: 256 MiB in fp32. For fewer, computing the loss in
chunks is slower and saves nothing."""


@dataclass(frozen=True)
class ZeroLayout:
    """A ZeRO stage, with optional offload of optimizer and parameters to the memory of the host."""

    stage: int
    offload_optimizer: bool = False
    offload_param: bool = False

    @property
    def name(self) -> str:
        """Name for tables."""
        return (
            f"ZeRO {self.stage}"
            + (" + offload" if self.offload_optimizer else "")
            + (" all" if self.offload_param else "")
        )

    @property
    def keys(self) -> dict[str, Any]:
        """Keys of a training recipe that choose this layout."""
        offload = {"offload_optimizer": self.offload_optimizer, "offload_param": self.offload_param}
        return {"zero": self.stage} | {key: "cpu" for key, wanted in offload.items() if wanted}


LAYOUTS = (
    ZeroLayout(0),
    ZeroLayout(1),
    ZeroLayout(2),
    ZeroLayout(3),
    ZeroLayout(2, offload_optimizer=True),
    ZeroLayout(3, offload_optimizer=True),
    ZeroLayout(3, offload_optimizer=True, offload_param=True),
)
"""Layouts in order of preference. Stage 0 is never chosen, because it sums bf16 gradients in bf16."""

OPTIMIZERS = {"adamw": LAYOUTS, "muon": (ZeroLayout(1), ZeroLayout(3))}
"""Optimizers, and the layouts in which each trains bf16 weights."""


@dataclass(frozen=True)
class States:
    """Bytes of one rank, and of the host for that rank.

    ``buffers`` are held during the backward pass, and ``reduction`` is added while gradients are summed in it. ``step``
    is the most that is added after it, for a moment.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    reduction: float
    step: float
    host: float

    @property
    def held(self) -> float:
        """Bytes held between backward pass and step, without buffers."""
        return self.weights + self.gradients + self.optimizer

    def peak(self, activations: float = 0.0) -> float:
        """Return the most bytes at any moment of a step whose forward and backward pass take so many at their peak."""
        return self.held + self.buffers + max(activations + self.reduction, self.step)


@dataclass(frozen=True)
class Activations:
    """Bytes of one rank: those kept from forward to backward pass, and the peak between the two."""

    kept: float
    peak: float


@dataclass(frozen=True)
class Fit:
    """Memory of one layout on the given GPUs, with ``micro_batch`` sequences at once.

    ``largest`` is the largest micro-batch that fits, 0 if none does.
    """

    layout: ZeroLayout
    states: States
    activations: Activations
    micro_batch: int
    largest: int
    total: float
    fits: bool


@dataclass(frozen=True)
class Capacity:
    """The result of `capacity`: bytes, seconds, FLOPs of the whole run, and FLOP/s of one GPU."""

    parameters: int
    gpus: int
    gpu_bytes: float
    usable_bytes: float
    seq_len: int
    batch: int
    checkpointing: bool | str
    loss: str
    fits: tuple[Fit, ...]
    chosen: ZeroLayout | None
    tokens: float | None
    flops: float | None
    peak_flops: float
    mfu: float
    seconds: float | None
    gpu_hours: float | None
    cost: float | None
    optimizer: str = "adamw"

    @property
    def recipe(self) -> dict[str, Any]:
        """Keys of a training recipe that run the chosen layout; empty if nothing fits."""
        rows = next((fit.micro_batch for fit in self.fits if fit.layout == self.chosen), None)
        if self.chosen is None or rows is None:
            return {}
        keys = self.chosen.keys | {"batch": self.batch, "micro_batch": rows}
        keys |= {"optimizer": self.optimizer} if self.optimizer != "adamw" else {}
        return keys | ({"activation_checkpointing": self.checkpointing} if self.checkpointing else {})

    def to_json(self) -> dict[str, Any]:
        """Return all values as plain JSON data."""
        import dataclasses

        return dataclasses.asdict(self) | {"recipe": self.recipe}


def model_states(
    parameters: int,
    ranks: int,
    layout: ZeroLayout,
    *,
    dtype: str = "bf16",
    reduce_dtype: str = "fp32",
    bucket: int = REDUCE_BUCKET,
    live: int = LIVE_PARAMETERS,
    overlap: bool = True,
    muon: int = 0,
) -> States:
    """Return the bytes of weights, gradients, AdamW's state and DeepSpeed's buffers on one of ``ranks`` ranks.

    With P parameters, N ranks and weights of w bytes (2 or 4):

    - weights ``w P``, at stage 3 ``w P / N`` and the parameters that are gathered at the same time;
    - gradients ``w P`` at stage 0; at stage 1 a whole ``4 P`` in fp32 beside bf16's own ``2 P`` (in fp32 runs
      ``4 P / N``); at stages 2 and 3 ``4 P / N``;
    - masters ``4 P / N`` (none in an fp32 run at stage 0) and moments ``8 P / N``, whole at stage 0; the ``muon``
      parameters that Muon trains have one moment, ``4 / N`` bytes each;
    - a bucket of B gradients in their own type at stages 1 (fp32 runs) and 2, two with ``overlap``; at stage 3 one in
      ``reduce_dtype``, of s bytes a value. DeepSpeed allocates it whole, however small the model;
    - while a bucket is summed over ranks, its gradients in a row, and a copy in ``reduce_dtype`` if that is another
      type: ``w B`` and ``s B`` at stages 1 (fp32 runs) and 2; at stage 3 ``s B``, and ``4 B / N`` if the sums are not
      fp32. Stage 0 copies like stage 2, after the backward pass, and so does stage 1 in bf16: it sums its fp32
      gradients in place if they are more than a bucket, else in a copy of ``4 P``. A ``reduce_dtype`` that is not fp32
      copies all of them, ``s P``;
    - for a moment in the optimizer's step, as measured: ``4 P``, nothing, ``P`` and ``4 P / N`` at stages 0 to 3
      (in fp32 runs ``4 P``).

    >>> round(model_states(2_779_683_840, 8, ZeroLayout(2)).held / GIB, 1)
    10.4
    """
    width, summed, stage = WIDTH[dtype], WIDTH[reduce_dtype], layout.stage
    share = parameters / ranks
    weights = width * (parameters if stage < 3 else share)
    masters = 0.0 if stage == 0 and dtype == "fp32" else 4.0
    optimizer = (masters + 8) * (parameters if stage == 0 else share) - 4 * muon / (1 if stage == 0 else ranks)
    gradients = {
        0: width * parameters,
        1: 6 * parameters if dtype == "bf16" else 4 * share,
        2: 4 * share,
        3: 4 * share,
    }[stage]
    passing = {0: 4 * parameters, 1: 0, 2: parameters, 3: 4 * share}
    step = float(passing[stage] if dtype == "bf16" else 4 * parameters)
    buffers = reduction = 0.0
    copied = width + (summed if reduce_dtype != dtype else 0)
    if stage == 0:
        step = max(step, copied * min(REDUCE_BUCKET, parameters))
    elif stage == 1 and dtype == "bf16":
        fits_a_bucket = parameters <= REDUCE_BUCKET
        step = max(step, (4 * fits_a_bucket + (summed if reduce_dtype != "fp32" else 0)) * parameters)
    elif stage < 3:
        buffers, reduction = float(width * bucket * (2 if overlap else 1)), float(copied * min(bucket, parameters))
    else:
        rounded = 4 / ranks if reduce_dtype != "fp32" else 0  # back to fp32, this rank's part
        buffers, reduction = float(summed * bucket), float((summed + rounded) * min(bucket, parameters))
        buffers += width * min(parameters, live) if ranks > 1 or layout.offload_param else 0
    host = 0.0
    if layout.offload_optimizer:
        host, optimizer, gradients, step = optimizer + gradients, 0.0, 0.0, 0.0
    if layout.offload_param:
        host, weights = host + weights, 0.0
    return States(weights, gradients, optimizer, buffers, reduction, step, host)


def activations(
    config: Config,
    rows: int,
    seq_len: int,
    *,
    dtype: str = "bf16",
    checkpointing: bool | str = False,
    loss: str = "auto",
) -> Activations:
    """Return the bytes of activations of ``rows`` sequences of ``seq_len`` tokens, attention by SDPA or flash-attn.

    A token takes, with values of w bytes, hidden size h, mlp m, heads a and vocabulary V:

    - a layer ``w (7 h + 2 m) + 4 a + 8``, and ``2 w h`` more with dropout;
    - the final LayerNorm and the input of lm_head ``2 w h + 8``;
    - the loss ``4 V`` where it holds all logits, and ``8 V`` more for a moment;
    - ``w (2 h + 2 m)`` for the gradients on their way through a layer.

    With checkpointing a layer keeps its input, ``w h``, and one layer at a time is whole. With ``selective`` it keeps
    its input, its products and attention's output, ``w (6 h + m) + 4 a``.

    >>> from phigrow.models.config import load_config
    >>> round(activations(load_config("phi2.json"), 1, 2048).kept / GIB, 1)
    5.3
    """
    width = 2 if dtype == "bf16" else 4
    hidden, mlp, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    vocab, heads, tokens = config["vocab_size"], config["num_attention_heads"], rows * seq_len
    layer = width * (7 * hidden + 2 * mlp) + 4 * heads + 8
    if float(config.get("resid_pdrop") or 0) > 0:
        layer += 2 * width * hidden
    kept = width * hidden if checkpointing else layer
    if checkpointing == SELECTIVE:
        kept = width * (6 * hidden + mlp) + 4 * heads
    body = 2 * width * hidden + 8 + kept * layers
    full = loss_path(loss, tokens, vocab) == "full"
    passing = width * (2 * hidden + 2 * mlp) + (layer if checkpointing is True else layer - kept)
    head = 4 * vocab if full else 0
    peak = max(body + 3 * head, body + passing)
    return Activations(tokens * float(body + head), tokens * float(peak))


def muon_parameters(config: Config) -> int:
    """Count the parameters that Muon trains: those of matrices inside layers.

    >>> muon_parameters(load_config("phi2.json")) == 32 * (4 * 2560**2 + 2 * 2560 * 10240)
    True
    """
    family = family_of(config, "a configuration")
    sizes = family.sizes_of(config)
    each = (
        math.prod(p.shape(sizes)) for p in family.parameters if p.in_layer and p.present(config) and len(p.axes) == 2
    )
    return sizes["layer"] * sum(each)


def loss_path(loss: str, tokens: int, vocab: int) -> str:
    """Return the way to compute the loss, ``full`` or ``chunked``, from the key ``loss`` and the size of the logits."""
    return loss if loss != "auto" else "full" if tokens * vocab <= FULL_LOGITS else "chunked"


def capacity(
    config: str | Config,
    gpus: str,
    *,
    tokens: float | None = None,
    mfu: float = 0.4,
    peak: str = "a100",
    price: float | None = None,
    batch: int | None = None,
    micro_batch: int | None = None,
    seq_len: int | None = None,
    checkpointing: bool | str = False,
    optimizer: str = "adamw",
) -> Capacity:
    """Estimate the ZeRO stage at which a model fits on given GPUs, its memory there, and the time of training.

    Args:
        config: the model, as `phigrow.models.config.load_config` takes it.
        gpus: number and memory of the GPUs, ``8x80`` for eight of 80 GiB.
        tokens: of the whole run; None leaves time and cost out.
        mfu: share of the peak that model FLOPs reach.
        peak: one of `PEAK_FLOPS`.
        price: of one GPU for one hour, in any currency.
        batch: sequences a step over all GPUs; by default about a million tokens.
        micro_batch: sequences a GPU holds at once; by default the largest divisor of its share of ``batch`` that fits.
        seq_len: tokens a sequence; by default ``max_position_embeddings``.
        checkpointing: recompute every layer in the backward pass, or with ``selective`` its cheap operations only.
        optimizer: one of `OPTIMIZERS`. FLOPs of its steps are not counted.

    Raises:
        GrowthError: the model is not a Phi, or an option makes no sense; the error names the option.
    """
    number, memory = parse_gpus(gpus)
    model = load_config(config)
    if model.get("model_type") != "phi":
        raise GrowthError(
            f"capacity has no memory formula for model_type {model.get('model_type')!r}",
            where="--gpus",
            why="the activations of a layer were counted and measured for Phi only",
            fix="give the configuration of a Phi model",
        )
    seq_len = seq_len or context_of(model)
    if peak not in PEAK_FLOPS:
        raise GrowthError(
            f"phigrow does not know the GPU {peak!r}", where="--gpu", fix=f"choose one of {', '.join(PEAK_FLOPS)}"
        )
    if optimizer not in OPTIMIZERS:
        raise GrowthError(
            f"there is no memory formula for the optimizer {optimizer!r}",
            where="--optimizer",
            fix=f"choose one of {', '.join(OPTIMIZERS)}",
        )
    if not 0 < mfu <= 1:
        raise GrowthError(f"the MFU is {mfu}", where="--mfu", fix="give a share above 0 and at most 1, such as 0.4")
    batch = batch or number * max(1, round(2**20 / seq_len / number))
    if batch % number:
        raise GrowthError(
            f"the batch of {batch} sequences cannot be divided among {number} GPUs",
            where="--batch",
            fix=f"choose {nearest_multiples(batch, number)}",
        )
    share = batch // number
    if micro_batch and share % micro_batch:
        raise GrowthError(
            f"the {share} sequences of a GPU cannot be divided into micro-batches of {micro_batch}",
            where="--micro-batch",
            fix=f"choose a divisor of {share}",
        )
    cost = count_cost(model, seq_len)
    usable = memory * (1 - RESERVED)
    muon = muon_parameters(model) if optimizer == "muon" else 0
    fits = tuple(
        _fit(layout, model, (cost.parameters, muon), number, usable, seq_len, share, micro_batch, checkpointing)
        for layout in OPTIMIZERS[optimizer]
    )
    chosen = next((fit.layout for fit in fits if fit.fits and fit.layout.stage > 0), None)
    flops = None if tokens is None else tokens * cost.training_flops
    seconds = None if flops is None else flops / (number * PEAK_FLOPS[peak] * mfu)
    hours = None if seconds is None else seconds / 3600 * number
    rows = next((fit.micro_batch for fit in fits if fit.layout == chosen), 1)
    return Capacity(
        parameters=cost.parameters,
        gpus=number,
        gpu_bytes=memory,
        usable_bytes=usable,
        seq_len=seq_len,
        batch=batch,
        checkpointing=checkpointing,
        loss=loss_path("auto", rows * seq_len, model["vocab_size"]),
        fits=fits,
        chosen=chosen,
        tokens=tokens,
        flops=flops,
        peak_flops=PEAK_FLOPS[peak],
        mfu=mfu,
        seconds=seconds,
        gpu_hours=hours,
        cost=None if price is None or hours is None else price * hours,
        optimizer=optimizer,
    )


def lightest_recomputation(plan: Capacity, config: str | Config, **options: Any) -> bool | str | None:
    """Return the value of ``checkpointing`` that recomputes least and with which a model fits, if a plan fits nothing.

    Args:
        plan: the result of `capacity`.
        config: the model.
        options: those of the plan, without ``checkpointing``.

    Returns:
        ``selective`` or True; None if neither fits, or neither recomputes more than the plan.
    """
    heavier = {False: (SELECTIVE, True), SELECTIVE: (True,)}.get(plan.checkpointing, ())
    return next((each for each in heavier if capacity(config, checkpointing=each, **options).chosen), None)


def _fit(
    layout: ZeroLayout,
    model: Config,
    parameters: tuple[int, int],
    ranks: int,
    usable: float,
    seq_len: int,
    share: int,
    micro_batch: int | None,
    checkpointing: bool | str,
) -> Fit:
    states = model_states(parameters[0], ranks, layout, muon=parameters[1])

    def total(rows: int) -> float:
        return states.peak(activations(model, rows, seq_len, checkpointing=checkpointing).peak)

    divisors = [rows for rows in range(1, share + 1) if share % rows == 0]
    largest = max((rows for rows in divisors if total(rows) <= usable), default=0)
    rows = micro_batch or largest or 1
    used = activations(model, rows, seq_len, checkpointing=checkpointing)
    return Fit(layout, states, used, rows, largest, total(rows), total(rows) <= usable)


def parse_gpus(text: str) -> tuple[int, float]:
    """Return the number of GPUs and the bytes of each: ``8x80`` means eight GPUs of 80 GiB.

    Raises:
        GrowthError: the text has another form.

    >>> parse_gpus("96x80")[0]
    96
    """
    match = re.fullmatch(r"([1-9]\d{0,6})x(\d{1,6}(?:\.\d+)?)(?:G(?:i?B)?)?", text.strip())
    if match is None or float(match[2]) == 0:
        raise GrowthError(
            f"{text!r} does not describe GPUs",
            where="--gpus",
            fix="give number x memory in GiB, such as 8x80 for eight GPUs of 80 GiB",
        )
    return int(match[1]), float(match[2]) * GIB


def parse_amount(text: str, where: str = "--tokens") -> float:
    """Return a number that may end with K, M, B or T: ``100B`` is 1e11.

    Raises:
        GrowthError: the text has another form, or the number is not above 0.

    >>> parse_amount("1.4T")
    1400000000000.0
    """
    match = re.fullmatch(r"(\d{1,20}(?:\.\d+)?(?:e\d{1,2})?)([KMBT]?)", text.strip().replace("_", ""))
    if match is None or float(match[1]) == 0:
        raise GrowthError(
            f"{text!r} is not a positive amount", where=where, fix="give a number, such as 100B, 1.4T or 5e9"
        )
    return float(match[1]) * {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[match[2]]
