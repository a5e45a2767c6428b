"""What a training run is: every setting, with its unit and default, and the checks that need no model."""

# ruff: noqa: RUF009  (_key is dataclasses.field with the help beside the default)

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.models.config import shipped_name

SCRATCH = "scratch"
DEMO = "demo"

DEMO_MODEL: dict[str, Any] = {
    "architectures": ["PhiForCausalLM"],
    "model_type": "phi",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 512,
    "vocab_size": 4096,
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attention_dropout": 0.0,
    "qk_layernorm": False,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
"""The model of a run without arguments: Phi's geometry (heads of 64, 32 of them rotary) at a few million parameters."""


def _key(
    default: Any, help: str, *, curve: bool = False, operational: bool = False, choices: tuple[str, ...] = ()
) -> Any:
    """A field; ``curve`` says that a resumed run must have the same value, because the loss curve depends on it.

    ``operational`` marks a key that changes nothing in the records of a finished run but seconds: a study that adds or
    changes it keeps the runs that it has.
    """
    metadata = {"help": help, "curve": curve, "operational": operational, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run, as it is written in YAML; the help of each key is in its ``metadata``.

    Raises:
        GrowthError: values that contradict each other or lie outside their range, naming the key.

    >>> RunConfig(steps=20, warmup=2).batch
    16
    """

    init: str = _key(SCRATCH, "'scratch', or the folder of any Hugging Face checkpoint to start from", curve=True)
    optimizer: str | None = _key(
        None, "folder of 'phigrow grow-optimizer': masters, moments and Adam's step to start with, of init", curve=True
    )
    model: str | dict[str, Any] | None = _key(
        None,
        "for scratch: 'demo', a shipped configuration (phi-1-small, phi-1, phi-1_5, phi2), a config.json, or a mapping"
        " in the YAML file (default: demo); with a checkpoint leave it out",
        curve=True,
    )
    vocab_size: int | None = _key(
        None, "for scratch: rows of the embedding (default: the model's; for demo the data's)", curve=True
    )
    data: str | dict[str, Any] | None = _key(
        None,
        "folder written by 'phigrow data', or several with weights, {textbooks: 0.8, code: 0.2} (default: the embedded"
        " corpus, prepared beside the run folder)",
    )
    mixture: dict[str, Any] | None = _key(
        None, "weights of the sources inside one folder, {source: weight}; those left out are not read"
    )
    stream: dict[str, Any] | None = _key(
        None,
        "instead of data: text that does not fit on disk, tokenised on the way, {ref: ..., tokenizer: ...}; see"
        " docs/data.md",
    )
    documents: str = _key(
        "plain",
        "plain lets attention cross from one document of a block into the next, as Phi; within keeps it inside",
        curve=True,
        choices=("plain", "within"),
    )
    seq_len: int = _key(
        256, "tokens a block, where the embedded corpus is prepared or a stream is read; else the data's"
    )
    data_start: int | None = _key(
        None,
        "blocks of the data's order that were read before: the run begins after them (default: with optimizer where the"
        " run before it stood, else 0)",
        curve=True,
    )
    arm: str | None = _key(None, "name of the arm in records (default: scratch, the growth method, or 'continued')")
    out: str | None = _key(None, "folder of the run (default: runs/<model>-<arm>-seed<seed>)")
    seed: int = _key(0, "seed of data order, scratch weights and dropout", curve=True)
    steps: int = _key(300, "optimizer steps in the whole schedule", curve=True)
    batch: int = _key(16, "sequences an optimizer step, over all ranks", curve=True)
    micro_batch: int | None = _key(
        None,
        "sequences a rank holds at once (default: the largest divisor of its share within 16,384 tokens)",
        operational=True,
    )
    lr: float = _key(1e-3, "peak learning rate of AdamW", curve=True)
    min_lr: float = _key(0.1, "final learning rate as a fraction of lr (cosine and wsd)", curve=True)
    warmup: int = _key(20, "steps of linear warmup from 0", curve=True)
    schedule: str = _key("cosine", "after warmup", curve=True, choices=("cosine", "wsd", "constant"))
    decay: int | None = _key(None, "last steps over which wsd decays (default: a fifth of steps)", curve=True)
    schedule_start: int | None = _key(
        None, "steps of the schedule that came before, in a run that goes on from another (default: 0)", curve=True
    )
    schedule_steps: int | None = _key(
        None, "length of the whole schedule, where runs share one (default: schedule_start + steps)", curve=True
    )
    rewarm: int | None = _key(
        None, "steps over which the schedule's rate rises from 0 again, as after a growth (default: 0)", curve=True
    )
    weight_decay: float = _key(
        0.1, "on matrices, embeddings and lm_head included; never on biases or LayerNorm", curve=True
    )
    beta1: float = _key(0.9, "AdamW's first moment", curve=True)
    beta2: float = _key(0.95, "AdamW's second moment", curve=True)
    eps: float = _key(1e-8, "AdamW's epsilon", curve=True)
    grad_clip: float = _key(1.0, "largest global gradient norm; 0 does not clip", curve=True)
    fresh_lr: float = _key(
        1.0, "of a grown checkpoint: learning rate of the values that are no copies, as a multiple of lr", curve=True
    )
    fresh_warmup: int = _key(0, "of a grown checkpoint: steps over which that multiple rises from 0", curve=True)
    copied_lr: float = _key(
        1.0, "of a grown checkpoint: learning rate of the values that are copies, as a multiple of lr", curve=True
    )
    dtype: str = _key(
        "bf16", "of weights and activations; masters are fp32", curve=True, choices=("bf16", "fp16", "fp32")
    )
    zero: int | None = _key(None, "DeepSpeed ZeRO stage, 0 to 3 (default: the JSON file's, else 1)")
    deepspeed: str | None = _key(None, "DeepSpeed JSON file to start from; the keys above are put into it")
    offload_optimizer: str | None = _key(
        None,
        "where the optimizer's state lies: cpu (ZeRO 1 to 3) or nvme (ZeRO 3) (default: the JSON file's, else the GPU)",
        choices=("cpu", "nvme"),
    )
    offload_param: str | None = _key(
        None, "where the parameters lie: cpu or nvme (ZeRO 3) (default: the JSON file's)", choices=("cpu", "nvme")
    )
    offload_dir: str | None = _key(None, "folder on the disk for nvme", operational=True)
    activation_checkpointing: bool = _key(
        False, "recompute each layer in the backward pass: less memory, a third slower"
    )
    attention: str = _key(
        "auto",
        "auto takes flash-attn 2 if it is installed and there is a GPU, otherwise PyTorch's SDPA",
        choices=("auto", "flash_attention_2", "sdpa", "eager"),
    )
    loss: str = _key(
        "auto",
        "chunked never holds all logits; full is faster where they fit; auto takes chunked above 2^26 logits",
        choices=("auto", "chunked", "full"),
    )
    compile: bool = _key(False, "torch.compile the model (ZeRO 0 to 2)")
    eval_every: int = _key(50, "steps between evaluations on held-out blocks; also at step 0 and at the end")
    eval_at: list[int] | None = _key(None, "further steps after which to evaluate, such as 1,10,100")
    eval_blocks: int = _key(64, "held-out blocks an evaluation reads, the same in every run; 0 reads all")
    diagnostics_every: int = _key(
        0, "steps between diagnostics of symmetry in a grown start: copies, stream, what moves; 0 makes none"
    )
    save_every: int = _key(500, "steps between checkpoints; also at the end; 0 saves none", operational=True)
    keep: int = _key(2, "checkpoints kept; 0 keeps all", operational=True)
    save_at: list[int] | None = _key(
        None, "further steps after which to save; their checkpoints stay, whatever keep says"
    )
    trunk: str | None = _key(
        None, "name that a trunk and its branches share in the records; with wsd and decay 0 the run is the trunk"
    )
    branch_from: str | None = _key(
        None, "folder of a run to go on from, at steps - decay, instead of training up to there: wsd alone"
    )
    lr_chosen_by: dict[str, Any] | None = _key(None, "for the records: the sweep that chose lr, the same for every arm")
    log_every: int = _key(
        10,
        "steps between lines of progress; losses are read from the device, and requests to stop seen, then",
        operational=True,
    )
    nonfinite_limit: int = _key(
        10,
        "steps skipped because the loss or a gradient was not finite, after which a launch ends; 0 never ends it",
        operational=True,
    )
    monitor: str | None = _key(
        None,
        "besides the records: csv, tensorboard, wandb or comet, several separated by commas; against tokens",
        operational=True,
    )
    resume: str = _key("auto", "auto continues from the last complete checkpoint in out", choices=("auto", "never"))
    universal: bool = _key(
        False,
        "continue a checkpoint of other ranks, another ZeRO stage or another offload: it is converted to DeepSpeed's "
        "universal format",
    )
    export: str | None = _key("export", "final Hugging Face folder, inside out unless absolute; none writes none")
    export_dtype: str | None = _key(
        None, "dtype of the export (default: dtype); fp32 writes the masters", choices=("bf16", "fp16", "fp32")
    )
    threads: int | None = _key(
        None, "CPU threads a rank (default: the cores there are, shared among the ranks)", operational=True
    )
    source_tokens: float | None = _key(None, "tokens the checkpoint's training cost (default: what it says itself)")
    source_flops: float | None = _key(None, "FLOPs the checkpoint's training cost (default: what it says itself)")
    source_seconds: float | None = _key(None, "seconds the checkpoint's training cost (default: what it says itself)")

    def __post_init__(self) -> None:
        at_least = {
            "steps": 1,
            "batch": 1,
            "seq_len": 2,
            "micro_batch": 1,
            "threads": 1,
            "vocab_size": 1,
            "log_every": 1,
        }
        at_least |= dict.fromkeys(
            (
                "nonfinite_limit",
                "warmup",
                "decay",
                "eval_every",
                "eval_blocks",
                "diagnostics_every",
                "save_every",
                "keep",
                "data_start",
                "schedule_start",
                "rewarm",
            ),
            0,
        )
        at_least |= dict.fromkeys(("lr", "min_lr", "weight_decay", "eps", "grad_clip", "beta1", "beta2", "seed"), 0)
        for key, least in at_least.items():
            if (value := getattr(self, key)) is not None and value < least:
                raise GrowthError(f"{key} is {value}", where=key, fix=f"give {least} or more")
        for key in ("min_lr", "beta1", "beta2"):
            if getattr(self, key) > 1:
                raise GrowthError(f"{key} is {getattr(self, key)}", where=key, fix="give a fraction of 1")
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if choices and value is not None and value not in choices:
                raise GrowthError(f"{field.name} is {value!r}", where=field.name, fix=f"one of {', '.join(choices)}")
        if self.zero is not None and self.zero not in range(4):
            raise GrowthError(f"ZeRO stage {self.zero}", where="zero", fix="0, 1, 2 or 3")
        for key in ("eval_at", "save_at"):
            if wrong := [step for step in getattr(self, key) or [] if not isinstance(step, int) or step < 1]:
                raise GrowthError(f"{key} has {wrong[0]!r}", where=key, fix="give steps, 1 or more")
        if self.branch_from is not None and (self.schedule != "wsd" or not self.decay_steps):
            raise GrowthError(
                f"branch_from with schedule {self.schedule} and decay {self.decay_steps}",
                where="branch_from",
                why="a branch starts where the learning rate is still constant",
                fix="give schedule: wsd and a decay",
            )
        if self.optimizer is not None and self.init == SCRATCH:
            raise GrowthError("optimizer state without its weights", where="optimizer", fix="give init, a grown folder")
        if self.branch_from is not None and (self.schedule_start or self.rewarm or self.schedule_steps):
            raise GrowthError("a branch with a schedule of its own", where="branch_from", fix="leave one of them out")
        whole = self.whole_schedule
        if (self.schedule_start or 0) + self.steps > whole:
            raise GrowthError(
                f"steps {(self.schedule_start or 0) + 1} to {(self.schedule_start or 0) + self.steps} of a schedule of "
                f"{whole}",
                where="schedule_steps",
                fix="raise schedule_steps or lower steps",
            )
        if self.warmup + (self.decay_steps if self.schedule == "wsd" else 0) > whole:
            raise GrowthError(
                f"warmup {self.warmup} and decay {self.decay_steps} do not fit into {whole} steps"
                if self.schedule == "wsd"
                else f"warmup {self.warmup} is longer than the {whole} steps",
                where="warmup",
                fix="lower warmup or raise steps",
            )
        if self.stream is not None and (self.data is not None or self.mixture is not None):
            raise GrowthError("stream and data", where="stream", why="a run reads one or the other", fix="drop one")
        if self.mixture is not None and not isinstance(self.data, str):
            raise GrowthError(
                "mixture without one folder of data", where="mixture", fix="give data: <folder>, or weights to folders"
            )
        if self.init == SCRATCH and any((self.source_tokens, self.source_flops, self.source_seconds)):
            raise GrowthError("a scratch run has no source", where="source_tokens", fix="leave the source costs out")

    @property
    def decay_steps(self) -> int:
        """Steps over which wsd decays."""
        return self.whole_schedule // 5 if self.decay is None else self.decay

    @property
    def whole_schedule(self) -> int:
        """Steps of the learning-rate schedule, those before and after this run included."""
        return self.schedule_steps or (self.schedule_start or 0) + self.steps

    @property
    def is_trunk(self) -> bool:
        """Whether this run never decays and others branch off it."""
        return self.trunk is not None and self.schedule == "wsd" and not self.decay_steps

    @property
    def model_name(self) -> str:
        """A short name of the model, for folder names."""
        if self.init != SCRATCH:
            return Path(self.init).resolve().name
        if isinstance(self.model, dict):
            return "model"
        name = self.model or DEMO
        path = Path(name)
        return path.stem if shipped_name(name) or path.suffix == ".json" else path.name

    @property
    def stage(self) -> int:
        """The ZeRO stage in force.

        Raises:
            GrowthError: ``zero`` and the DeepSpeed file disagree, or the file cannot be read.
        """
        in_file = self.deepspeed_file().get("zero_optimization", {}).get("stage")
        if self.zero is not None and in_file not in (None, "auto", self.zero):
            raise GrowthError(
                f"zero is {self.zero}, but the DeepSpeed file says stage {in_file}",
                where=str(self.deepspeed),
                fix="drop one",
            )
        if self.zero is not None:
            return self.zero
        return 1 if in_file in (None, "auto") else int(in_file)

    def deepspeed_file(self) -> dict[str, Any]:
        """The content of the DeepSpeed JSON file, or an empty dictionary.

        Raises:
            GrowthError: the file is not there or is not a JSON object.
        """
        if self.deepspeed is None:
            return {}
        path = Path(self.deepspeed)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise GrowthError(
                "a DeepSpeed file that cannot be read", where=str(path.absolute()), why=str(error)
            ) from error
        if not isinstance(content, dict):
            raise GrowthError("a DeepSpeed file that is not a JSON object", where=str(path.absolute()))
        return content

    def as_dict(self) -> dict[str, Any]:
        """Every key and value, for records."""
        return dataclasses.asdict(self)

    @classmethod
    def operational(cls) -> frozenset[str]:
        """The keys that change nothing in the records of a finished run but seconds.

        >>> "threads" in RunConfig.operational(), "lr" in RunConfig.operational()
        (True, False)
        """
        return frozenset(field.name for field in dataclasses.fields(cls) if field.metadata["operational"])

    def curve(self) -> dict[str, Any]:
        """The keys that the loss curve depends on, as a resumed run must have them; a trunk may be made longer."""
        keys = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["curve"]}
        return keys | {"steps": None} if self.is_trunk else keys
