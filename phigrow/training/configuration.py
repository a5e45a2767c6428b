"""`RunConfig`: the settings of a training run together, and the checks that need no model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.files.paths import user_path
from phigrow.models.config import shipped_name
from phigrow.training.declaration import Role, check_ranges, expand_paths, names_with
from phigrow.training.deepspeed_file import read_deepspeed_file
from phigrow.training.optimizers import check_optimizer, default_grad_clip
from phigrow.training.settings import (
    DEMO,
    SCRATCH,
    CheckpointSettings,
    DataSettings,
    EngineSettings,
    EvaluationSettings,
    ModelSettings,
    OptimizerSettings,
    RecordSettings,
    ScheduleSettings,
    TeacherSettings,
)

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


@dataclass(frozen=True, kw_only=True)
class RunConfig(
    RecordSettings,
    CheckpointSettings,
    EvaluationSettings,
    EngineSettings,
    TeacherSettings,
    OptimizerSettings,
    ScheduleSettings,
    DataSettings,
    ModelSettings,
):
    """Settings of one training run, as asked; `phigrow.training.settings` declares each of them.

    The base classes are in reverse order, because the fields of a dataclass follow its bases from last to first.

    Raises:
        GrowthError: values contradict each other or lie outside their range. The error names the key.

    >>> RunConfig(steps=20, warmup=2).batch
    16
    """

    def __post_init__(self) -> None:
        expand_paths(self)
        check_optimizer(self.optimizer)
        if self.grad_clip is None:
            object.__setattr__(self, "grad_clip", default_grad_clip(self.optimizer))
        check_ranges(self)
        if self.branch_from is not None and (self.schedule != "wsd" or not self.decay_steps):
            raise GrowthError(
                f"branch_from requires schedule wsd and a decay (got {self.schedule} and {self.decay_steps})",
                where="branch_from",
                why="a branch starts where the learning rate is still constant",
                fix="give schedule: wsd and a decay",
            )
        if self.init_optimizer is not None and self.init == SCRATCH:
            raise GrowthError(
                "init_optimizer is set, but the run starts from scratch",
                where="init_optimizer",
                fix="set init to the folder that the optimizer's state was grown for",
            )
        if self.branch_from is not None and (self.schedule_start or self.rewarm or self.schedule_steps):
            raise GrowthError(
                "branch_from cannot be combined with schedule_start, schedule_steps or rewarm",
                where="branch_from",
                fix="remove one of them",
            )
        for name in ("beta1", "beta2", "momentum"):
            if getattr(self, name) == 1:
                raise GrowthError(
                    f"{name} is 1",
                    where=name,
                    why="at decay rate 1 the running average stays 0",
                    fix="give a value from 0 to below 1, such as 0.95",
                )
        whole = self.whole_schedule
        if (self.schedule_start or 0) + self.steps > whole:
            raise GrowthError(
                f"steps {(self.schedule_start or 0) + 1} to {(self.schedule_start or 0) + self.steps} do not fit into "
                f"a schedule of {whole} steps",
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
            other = "data" if self.data is not None else "mixture"
            raise GrowthError(f"stream and {other} are both set", where="stream", fix="remove one of them")
        if self.mixture is not None and not isinstance(self.data, str):
            raise GrowthError(
                "mixture requires data to be one folder",
                where="mixture",
                fix="give data: <folder>, or give data weights for several folders",
            )
        for name in ("data_part", "eval_part"):
            part = getattr(self, name)
            if part is not None and not (len(part) == 3 and part[0] < part[1] <= part[2]):
                raise GrowthError(
                    f"{name} is {part}",
                    where=name,
                    why="a part is given as first,last,of with first < last <= of",
                    fix="give, for example, 0,1,2 for every second block",
                )
        if self.stream is not None and self.data_part is not None:
            raise GrowthError(
                "data_part is set, but the data is a stream",
                where="data_part",
                why="blocks of a stream have no numbers",
                fix="prepare the text with 'phigrow data', or remove data_part",
            )
        if self.lr_base_width is not None and self.optimizer != "adamw":
            raise GrowthError(
                f"lr_base_width requires optimizer adamw (got {self.optimizer})",
                where="lr_base_width",
                why="the rule holds for Adam, which changes every value by about the learning rate",
                fix="remove lr_base_width, or set optimizer: adamw",
            )
        if (self.teacher is None) != (not self.teacher_steps):
            raise GrowthError(
                "teacher_steps is set, but there is no teacher" if self.teacher is None else "teacher_steps is 0",
                where="teacher, teacher_steps",
                fix="set teacher to the folder of a checkpoint, and teacher_steps to the steps that it teaches",
            )
        if (
            self.init == SCRATCH
            and self.teacher is None
            and any((self.source_tokens, self.source_flops, self.source_seconds))
        ):
            raise GrowthError(
                "source costs are set, but the run starts from scratch",
                where="source_tokens, source_flops, source_seconds",
                fix="remove them",
            )

    @property
    def decay_steps(self) -> int:
        """Number of steps over which wsd decays."""
        return self.whole_schedule // 5 if self.decay is None else self.decay

    @property
    def whole_schedule(self) -> int:
        """Number of steps of the learning-rate schedule, including those before and after this run."""
        return self.schedule_steps or (self.schedule_start or 0) + self.steps

    @property
    def is_demo(self) -> bool:
        """True if the run trains the model of the demonstration from scratch."""
        return self.init == SCRATCH and self.model in (None, DEMO)

    @property
    def is_trunk(self) -> bool:
        """True if this run never decays and others branch off it."""
        return self.trunk is not None and self.schedule == "wsd" and not self.decay_steps

    @property
    def model_name(self) -> str:
        """A short name of the model, for folder names."""
        if self.init != SCRATCH:
            return Path(self.init).resolve().name
        if isinstance(self.model, dict):
            return "model"
        name = self.model or DEMO
        path = user_path(name)
        return path.stem if shipped_name(name) or path.suffix == ".json" else path.name

    @property
    def stage(self) -> int:
        """The ZeRO stage that takes effect.

        Raises:
            GrowthError: ``zero`` and the DeepSpeed file disagree, or the file cannot be read.
        """
        in_file = self.deepspeed_file().get("zero_optimization", {}).get("stage")
        if self.zero is not None and in_file not in (None, "auto", self.zero):
            raise GrowthError(
                f"zero is {self.zero}, but the DeepSpeed file has stage {in_file}",
                where=str(self.deepspeed),
                fix="remove zero, or the stage in the file",
            )
        if self.zero is not None:
            return self.zero
        return 1 if in_file in (None, "auto") else int(in_file)

    @property
    def stored_dtype(self) -> str:
        """The data type of the export."""
        return self.export_dtype or self.dtype

    def deepspeed_file(self) -> dict[str, Any]:
        """Return the content of the DeepSpeed JSON file; an empty dictionary if the run has no such file.

        Raises:
            GrowthError: as `read_deepspeed_file`.
        """
        if self.deepspeed is None:
            return {}
        return read_deepspeed_file(Path(self.deepspeed))

    def as_dict(self) -> dict[str, Any]:
        """Return every key and value, for records."""
        return dataclasses.asdict(self)

    @classmethod
    def keys_with(cls, role: Role) -> tuple[str, ...]:
        """Name the keys that have any of the given roles.

        >>> "threads" in RunConfig.keys_with(Role.OPERATIONAL), "lr" in RunConfig.keys_with(Role.OPERATIONAL)
        (True, False)
        """
        return names_with(cls, role)

    def inputs(self) -> dict[str, Any]:
        """Return the settings that name an input."""
        return {name: getattr(self, name) for name in self.keys_with(Role.INPUT)}

    def reproducibility_keys(self) -> dict[str, Any]:
        """Return the settings on which the loss curves depend; a resumed run must repeat them.

        A trunk may be made longer, so its ``steps`` is None.
        """
        keys = {name: getattr(self, name) for name in self.keys_with(Role.RESUME | Role.HELDOUT)}
        return keys | {"steps": None} if self.is_trunk else keys


def comparison_keys() -> dict[str, Any]:
    """Return the rules by which a report compares settings, for the ``run`` record.

    Reports read them there, because `phigrow.measure` does not import `phigrow.training`. ``equal`` has the settings
    that all arms must share, ``named`` those that a report names if arms differ, and ``unset`` the values of null.
    """
    start = RunConfig.keys_with(Role.START)
    fields = {field.name: field for field in dataclasses.fields(RunConfig)}
    return {
        "equal": list(RunConfig.keys_with(Role.ARMS)),
        "named": [name for name in RunConfig.keys_with(Role.RESUME) if name not in start],
        "unset": {name: f.metadata["unset"] for name, f in fields.items() if f.metadata["unset"] is not None},
    }
