"""Every setting of a training run, one declaration each, in sections.

A new setting is one line here and the place that uses it. `RunConfig` puts the sections together.
"""

# ruff: noqa: RUF009  (key is dataclasses.field with the help beside the default)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from phigrow.models.capacity import SELECTIVE
from phigrow.training.declaration import (
    ARMS,
    BRANCH,
    DECIDED,
    HELDOUT,
    INPUT,
    OPERATIONAL,
    RESUME,
    STAGES,
    START,
    STUDY,
    key,
)
from phigrow.training.optimizers import optimizer_names

SCRATCH = "scratch"
AUTO = "auto"
DEMO = "demo"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Model and first weights"""

    init: str = key(
        SCRATCH,
        "'scratch', or the folder of any Hugging Face checkpoint to start from.",
        role=RESUME | START | DECIDED | INPUT,
        path=True,
    )
    init_optimizer: str | None = key(
        None,
        "Folder written by 'phigrow grow-optimizer' for init: fp32 masters, moments and Adam's step to start with.",
        role=RESUME | START | DECIDED | INPUT,
        path=True,
    )
    model: str | dict[str, Any] | None = key(
        None,
        "Model to train from scratch: 'demo', a shipped configuration (phi-1-small, phi-1, phi-1_5, phi2), a"
        " config.json, or a mapping in the YAML file (default: demo). Leave it out with a checkpoint.",
        role=RESUME | START | DECIDED | INPUT,
        path=True,
    )
    vocab_size: int | None = key(
        None,
        "Rows of the embedding of a model trained from scratch (default: the model's; for demo the data's).",
        role=RESUME | START,
        ge=1,
    )


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Data"""

    data: str | dict[str, Any] | None = key(
        None,
        "Folder written by 'phigrow data', or several with weights, {textbooks: 0.8, code: 0.2}. The word"
        " embedded is the documentation of Python, prepared beside the run folder (default: embedded for the demo's"
        " model; every other run must give data or stream).",
        role=DECIDED,
        path=True,
    )
    mixture: dict[str, Any] | None = key(
        None,
        "Weights of the sources inside one folder, {source: weight}. A source without a weight is not read.",
        role=ARMS,
    )
    stream: dict[str, Any] | None = key(
        None,
        "Text that does not fit on disk and is tokenised during training, {ref: ..., tokenizer: ...}. Set it instead of"
        " data; see docs/data.md.",
        role=DECIDED,
    )
    documents: str = key(
        "plain",
        "With plain, attention crosses from one document of a block into the next, as in Phi. With within, it stays"
        " inside each document.",
        role=RESUME | ARMS,
        choices=("plain", "within"),
    )
    seq_len: int = key(
        256, "Tokens per block of the embedded corpus or of a stream. Packed data has its own block length.", ge=2
    )
    data_start: int | None = key(
        None,
        "Number of blocks of the data's order to skip, because an earlier run read them (default: 0, or with"
        " init_optimizer the position of the run that wrote it).",
        role=RESUME | DECIDED,
        ge=0,
        unset=0,
    )
    data_part: list[int] | None = key(
        None,
        "Part of the train blocks to read, as first,last,of: blocks whose number modulo of is first to last - 1. Blocks"
        " are numbered within each source of a mixture (default: all blocks).",
        role=RESUME,
        ge=0,
    )


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """Length, batch and learning-rate schedule"""

    seed: int = key(0, "Seed of data order, scratch weights and dropout.", role=RESUME | ARMS | DECIDED, ge=0)
    steps: int = key(300, "Optimizer steps of the run.", role=RESUME | ARMS | BRANCH | DECIDED, ge=1)
    batch: int = key(16, "Sequences per optimizer step, over all ranks.", role=RESUME | ARMS, ge=1)
    schedule: str = key(
        "cosine",
        "Learning rate after warmup: cosine decay, wsd (constant, then linear decay) or constant.",
        role=RESUME | ARMS | STUDY,
        choices=("cosine", "wsd", "constant"),
    )
    warmup: int = key(20, "Steps over which the learning rate rises linearly from 0.", role=RESUME, ge=0)
    decay: int | None = key(
        None,
        "Last steps of the schedule, over which wsd decays (default: a fifth of the schedule).",
        role=RESUME | BRANCH | STUDY,
        ge=0,
    )
    schedule_start: int | None = key(
        None,
        "Steps of the schedule that an earlier run has done, for a run that continues it (default: 0).",
        role=RESUME | DECIDED,
        ge=0,
        unset=0,
    )
    schedule_steps: int | None = key(
        None,
        "Length of the whole schedule, where several runs share one (default: schedule_start + steps).",
        role=RESUME | DECIDED,
        ge=1,
    )
    rewarm: int | None = key(
        None,
        "Steps over which the schedule's rate rises from 0 a second time, for example after a growth (default: 0).",
        role=RESUME,
        ge=0,
        unset=0,
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Optimizer"""

    optimizer: str = key("adamw", "Name of the optimizer.", role=RESUME, choices=optimizer_names())
    lr: float = key(1e-3, "Peak learning rate. For muon, try 0.02 first.", role=RESUME | ARMS, ge=0)
    lr_base_width: int | None = key(
        None,
        "Hidden size for which lr was chosen. With AdamW, matrices inside layers and lm_head then learn at lr *"
        " lr_base_width / hidden size, as in muP (default: all parameters learn at lr).",
        role=RESUME,
        ge=1,
    )
    min_lr: float = key(0.1, "Final learning rate of cosine and wsd, as a fraction of lr.", role=RESUME, ge=0, le=1)
    weight_decay: float = key(
        0.1,
        "Decoupled weight decay of matrices, embeddings and lm_head. Biases and norms do not decay.",
        role=RESUME,
        ge=0,
    )
    beta1: float = key(0.9, "Decay rate of AdamW's first moment.", role=RESUME, ge=0, le=1)
    beta2: float = key(0.95, "Decay rate of AdamW's second moment.", role=RESUME, ge=0, le=1)
    eps: float = key(1e-8, "AdamW's epsilon.", role=RESUME, ge=0)
    grad_clip: float | None = key(
        None,
        "Largest global norm of the gradients, which are scaled down to it. 0 turns clipping off (default: 1; with muon"
        " 0, and no other value is possible).",
        role=RESUME,
        ge=0,
    )
    momentum: float = key(0.95, "Decay rate of Muon's momentum.", role=RESUME, ge=0, le=1)
    adam_lr: float = key(
        0.3,
        "Learning rate of the parameters that Muon leaves to AdamW (embeddings, lm_head, biases, norms), as a multiple"
        " of lr.",
        role=RESUME,
        ge=0,
    )
    fresh_lr: float = key(
        1.0,
        "Learning rate of a grown checkpoint's fresh values (not copied from the source), as a multiple of lr.",
        role=RESUME,
        ge=0,
    )
    fresh_warmup: int = key(
        0, "Steps over which the multiple for fresh values rises from 0 to fresh_lr.", role=RESUME, ge=0
    )
    copied_lr: float = key(
        1.0,
        "Learning rate of a grown checkpoint's copied values, as a multiple of lr.",
        role=RESUME,
        ge=0,
    )


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """Distillation"""

    teacher: str | None = key(
        None,
        "Folder of a Hugging Face checkpoint of the same vocabulary, which teaches the model in the first steps.",
        role=RESUME | STUDY | INPUT,
        path=True,
    )
    teacher_steps: int = key(
        0, "Steps from the beginning of the run in which the model learns from the teacher too.", role=RESUME, ge=0
    )
    teacher_weight: float = key(
        0.5,
        "Share of the loss in these steps that is the divergence from the teacher's next-token distribution. The rest"
        " is the cross entropy of the text.",
        role=RESUME,
        ge=0,
        le=1,
    )


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Precision, memory and speed"""

    dtype: str = key(
        AUTO,
        "Data type of weights and activations. The optimizer's master weights are fp32. auto takes bf16 on a GPU that"
        " has it, fp16 on an older one, and on a CPU the faster of bf16 and fp32 in a timing of half a second. A run"
        " keeps its choice when it resumes.",
        role=RESUME,
        choices=(AUTO, "bf16", "fp16", "fp32"),
    )
    reduce_dtype: str = key(
        "fp32",
        "Data type in which gradients are summed over ranks. bf16 halves the traffic, and rounds the sum of many ranks"
        " several times.",
        choices=("fp32", "bf16", "fp16"),
    )
    micro_batch: int | None = key(
        None,
        "Sequences that a rank processes at once (default: the largest divisor of its share of the batch with at most"
        " 16,384 tokens).",
        role=OPERATIONAL,
        ge=1,
    )
    zero: int | None = key(None, "DeepSpeed ZeRO stage (default: the DeepSpeed file's, else 1).", ge=0, le=3)
    deepspeed: str | None = key(
        None, "DeepSpeed JSON file. The settings of the run are put into its configuration.", path=True
    )
    offload_optimizer: str | None = key(
        None,
        "Device of the optimizer state: cpu (ZeRO 1 to 3) or nvme (ZeRO 3) (default: the DeepSpeed file's, else the"
        " accelerator).",
        choices=("cpu", "nvme"),
    )
    offload_param: str | None = key(
        None,
        "Device of the parameters: cpu or nvme, both at ZeRO 3 (default: the DeepSpeed file's, else the accelerator).",
        choices=("cpu", "nvme"),
    )
    offload_dir: str | None = key(None, "Folder on the disk that nvme uses.", role=OPERATIONAL, path=True)
    activation_checkpointing: bool | str = key(
        False,
        "Recompute every layer in the backward pass. It takes less memory and about a third more time. selective (ZeRO"
        " 0 to 2) recomputes only normalisations, rotary embeddings and activations, and keeps products and attention.",
        choices=(True, False, SELECTIVE),
    )
    deterministic: bool = key(
        False,
        "Use only kernels that give the same result in every run, so that on GPUs a resumed run repeats every bit, as"
        " on CPUs. An operation without such a kernel ends the run.",
    )
    attention: str = key(
        "auto",
        "Attention implementation. On a GPU, auto takes flash-attn 2, or PyTorch's if it is clearly faster."
        " varlen is PyTorch's kernel for documents: within.",
        choices=("auto", "flash_attention_2", "varlen", "sdpa", "eager"),
    )
    loss: str = key(
        "auto",
        "How the loss is computed. chunked never holds all logits; full is faster where they fit into memory; auto"
        " takes chunked above 2^26 logits.",
        choices=("auto", "chunked", "full"),
    )
    compile: bool | str = key(
        False,
        "Compile the training pass with torch.compile (ZeRO 0 to 2). layers compiles one graph for all layers. auto"
        " compiles on a CPU where the training is long enough to pay for it. A run keeps its choice when it resumes.",
        choices=(True, False, "layers", AUTO),
    )
    auto_choices: dict[str, Any] | None = key(
        None, "Values for settings that are auto, which a study chose for all of its runs.", role=DECIDED
    )
    threads: int | None = key(
        None, "CPU threads per rank (default: the machine's cores divided by its ranks).", role=OPERATIONAL, ge=1
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Evaluation"""

    eval_every: int = key(
        50, "Steps between evaluations on held-out blocks. The first and the last step are evaluated too.", ge=0
    )
    eval_at: list[int] | None = key(None, "Further steps after which to evaluate, such as 1,10,100.", ge=1)
    eval_blocks: int = key(
        64,
        "Held-out blocks that an evaluation reads, the same in every run. 0 reads all of them.",
        role=ARMS | HELDOUT,
        ge=0,
    )
    eval_part: list[int] | None = key(
        None,
        "Part of the held-out blocks to evaluate on, as first,last,of (see data_part). eval_blocks chooses from this"
        " part (default: all blocks).",
        role=RESUME | ARMS,
        ge=0,
    )
    diagnostics_every: int = key(
        0,
        "Steps between diagnostics of a grown model: how far copies have moved apart, the rank of the residual, and"
        " the share of new values in the update. 0 turns them off.",
        ge=0,
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Run folder, checkpoints and export"""

    out: str | None = key(None, "Folder of the run (default: runs/<model>-<arm>-seed<seed>).", role=DECIDED, path=True)
    resume: str = key(
        "auto",
        "auto continues from the last complete checkpoint in out. never refuses a folder that has one.",
        role=DECIDED,
        choices=("auto", "never"),
    )
    universal: bool = key(
        False,
        "Continue from a checkpoint that was written with another number of ranks, ZeRO stage or offload. It is"
        " converted to DeepSpeed's universal format.",
        role=DECIDED,
    )
    save_every: int = key(
        500, "Steps between checkpoints. The last step is saved too. 0 saves none.", role=OPERATIONAL, ge=0
    )
    keep: int = key(2, "Number of checkpoints to keep. 0 keeps all.", role=OPERATIONAL, ge=0)
    save_at: list[int] | None = key(
        None, "Further steps after which to save. These checkpoints are kept, whatever keep is.", role=STUDY, ge=1
    )
    trunk: str | None = key(
        None,
        "Name that a trunk and its branches share in the records. A run with wsd and decay 0 is the trunk.",
        role=DECIDED,
    )
    branch_from: str | None = key(
        None,
        "Folder of a trunk. The run starts from the trunk's checkpoint of step (steps - decay) and trains the decay"
        " alone (wsd only).",
        role=DECIDED,
        path=True,
    )
    export: str | None = key(
        "export",
        "Folder of the final Hugging Face checkpoint, inside out unless the path is absolute. none writes"
        " no checkpoint.",
        role=STAGES,
        path=True,
    )
    export_dtype: str | None = key(
        None,
        "Data type of the export (default: dtype). fp32 writes the master weights.",
        role=STAGES,
        choices=("bf16", "fp16", "fp32"),
    )


@dataclass(frozen=True, kw_only=True)
class RecordSettings:
    """Records and progress"""

    arm: str | None = key(
        None, "Name of the arm in the records (default: scratch, the growth method, or continued).", role=DECIDED
    )
    lr_chosen_by: dict[str, Any] | None = key(
        None, "Sweep that chose lr, for the records. Arms that share a sweep may have different rates.", role=DECIDED
    )
    study: dict[str, Any] | None = key(
        None,
        "Properties of the run that a study writes and its report reads, for the records. Training does not use them.",
        role=DECIDED,
    )
    log_every: int = key(
        10,
        "Steps between lines of progress. At these steps, losses are read from the device and requests to stop are"
        " obeyed.",
        role=OPERATIONAL,
        ge=1,
    )
    nonfinite_limit: int = key(
        10,
        "Number of skipped steps after which a launch ends. A step is skipped if the loss or a gradient is not finite."
        " With 0, a launch never ends for this reason.",
        role=OPERATIONAL,
        ge=0,
    )
    monitor: str | None = key(
        None,
        "Monitors beside the records: csv, tensorboard, wandb or comet, several separated by commas. Values are plotted"
        " against tokens.",
        role=OPERATIONAL,
    )
    source_tokens: float | None = key(
        None, "Tokens spent on training the checkpoint (default: read from its folder).", role=DECIDED, ge=0
    )
    source_flops: float | None = key(
        None, "FLOPs spent on training the checkpoint (default: read from its folder).", role=DECIDED, ge=0
    )
    source_seconds: float | None = key(
        None, "Seconds spent on training the checkpoint (default: read from its folder).", role=DECIDED, ge=0
    )


SECTIONS: tuple[type, ...] = (
    ModelSettings,
    DataSettings,
    ScheduleSettings,
    OptimizerSettings,
    TeacherSettings,
    EngineSettings,
    EvaluationSettings,
    CheckpointSettings,
    RecordSettings,
)
"""In the order of ``--help`` and of docs/settings.md; the docstring of each is its heading."""
