"""Resolve a model configuration as transformers does, and spell it so that every version loads the same model.

transformers fills missing keys with defaults of its own, some of them null in one family and 32 in another, and refuses
others. So transformers builds every configuration, and the empty model, before phigrow writes a byte. transformers 4
reads ``rope_theta``, ``partial_rotary_factor``, ``rope_scaling`` and ``torch_dtype``, where version 5 writes
``rope_parameters`` and ``dtype``; where its own keys are missing, it computes another function without a word.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.models.bounds import MOST
from phigrow.models.config import ORIGINAL, READS_ORIGINAL, Config, context_of, normalised
from phigrow.models.families import family_of
from phigrow.models.family import Family, Sizes
from phigrow.models.function import function_differences, function_of
from phigrow.models.transformers_errors import transformers_errors
from phigrow.models.versions import reads_rope_parameters

LEFT_OUT = (
    "auto_map", "quantization_config", "compression_config", "dtype", "torch_dtype", "_attn_implementation",
    "attn_implementation", "_attn_implementation_internal", "_flash_attn_2_enabled",
)  # fmt: skip
"""Keys that do not describe the model: code beside the configuration, how its weights were stored, and the attention
kernel of the machine that saved it."""

ROTARY_KEYS = (
    "rope_theta",
    "partial_rotary_factor",
    "rotary_emb_base",
    "rotary_pct",
    "rope_scaling",
    "rope_parameters",
)
"""Every spelling of the rotary embedding, in all versions and families."""

_FIX = "give every size and setting that the configuration leaves out, in one spelling"


@dataclass(frozen=True)
class ResolvedConfig:
    """A configuration that transformers accepts and reads as phigrow does.

    Attributes:
        family: its family.
        where: its place, for messages.
        spelled: the configuration without a dtype, with every key on which the model depends, in the spellings of
            transformers 4 and 5.
        hf_config: transformers' configuration object.
    """

    family: Family
    where: str
    spelled: Config
    hf_config: Any

    def stored(self, dtype: str, ids: Config) -> Config:
        """Return the content of ``config.json``, with sorted keys as in transformers' files.

        Args:
            dtype: of the weights.
            ids: of the special tokens, see `phigrow.checkpoints.token_ids.TokenIds`.
        """
        architectures = self.spelled.get("architectures") or [self.family.architecture]
        stored = {**self.spelled, "architectures": architectures, "dtype": dtype, "torch_dtype": dtype, **ids}
        return dict(sorted(stored.items()))

    def check_tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare tensors that are to be written with the parameters of the model that transformers builds.

        Args:
            shapes: stored name -> shape.

        Raises:
            GrowthError: transformers cannot build the model, or it has other parameters or another rotary embedding.
        """
        built, frequencies = self._empty_model()
        if set(built) != set(shapes):
            name = min(set(built) ^ set(shapes))
            owner, other = ("transformers", "phigrow") if name in built else ("phigrow", "transformers")
            raise self._disagreement(f"{name} is a tensor for {owner}, but not for {other}")
        for name, shape in shapes.items():
            if built[name] != tuple(shape):
                raise self._disagreement(f"{name} is {list(built[name])} for transformers, {list(shape)} for phigrow")
        rotary = self.family.sizes_of(self.spelled)["rotary"]
        if frequencies is not None and frequencies != -(-rotary // 2):
            raise self._disagreement(
                f"the rotary part of a head is {2 * frequencies} coordinates for transformers, {rotary} for phigrow"
            )

    def _empty_model(self) -> tuple[dict[str, tuple[int, ...]], int | None]:
        """Return stored name -> shape of the model's parameters, and its number of rotary frequencies."""
        import torch
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.hf_config)]
        with transformers_errors("build the model", self.where), torch.device("meta"):
            model = model_class(copy.deepcopy(self.hf_config))
            model.tie_weights()
        shapes = {self.family.stored_name(name): tuple(value.shape) for name, value in model.named_parameters()}
        inverse = [buffer.shape[0] for name, buffer in model.named_buffers() if name.endswith("rotary_emb.inv_freq")]
        return shapes, inverse[0] if inverse else None

    def _disagreement(self, why: str) -> GrowthError:
        return GrowthError(
            "transformers builds another model from the configuration than phigrow", where=self.where, why=why, fix=_FIX
        )


def resolve_config(config: Config, where: str) -> ResolvedConfig:
    """Let transformers build a configuration, and compare every value that phigrow reads with the one it resolved.

    Args:
        config: of a family that phigrow knows, in any spelling.
        where: its place, for messages.

    Raises:
        GrowthError: an impossible value, a configuration that transformers refuses or reads in another way.
    """
    family = family_of(config, where)
    sizes = family.sizes_of(config)
    asked = {key: value for key, value in config.items() if key not in LEFT_OUT}
    if asked.get("head_dim", 0) is None:
        del asked["head_dim"]  # several models of transformers compute with the null
    asked.pop("layer_types", None)  # derived from the number of layers, and stale where that was changed
    asked |= {key: value for key, value in family.without_effect.items() if key in asked}
    hf_config = _built(_readable(asked, family), family, where)
    resolved = _read_by_transformers(hf_config)
    if differences := _differences(family, config, sizes, resolved):
        raise GrowthError(
            "transformers reads the configuration as another model than phigrow does",
            where=where,
            why="; ".join(differences),
            fix=_FIX,
        )
    return ResolvedConfig(family, where, _spelled(asked, resolved, hf_config, family), hf_config)


def _built(asked: Config, family: Family, where: str) -> Any:
    with transformers_errors("read the configuration", where):
        return _config_class(family).from_dict(copy.deepcopy(asked))  # which changes nested objects


def _config_class(family: Family) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[family.model_type]


def _differences(family: Family, config: Config, sizes: Sizes, resolved: Config) -> list[str]:
    """Return every value that both libraries read in different ways, as ``name: phigrow's -> transformers'``.

    Args:
        family, config, sizes: the configuration as phigrow reads it.
        resolved: the values that transformers reads.
    """
    theirs = family.sizes_of(resolved)
    names = [f"the axis {axis}: {size} -> {theirs[axis]}" for axis, size in sizes.items() if theirs[axis] != size]
    return names or function_differences(function_of(family, config), function_of(family, resolved))


def _spelled(asked: Config, resolved: Config, hf_config: Any, family: Family) -> Config:
    """Return a configuration with every key that phigrow read, and the rotary embedding in all spellings."""
    spelled = {key: copy.deepcopy(value) for key, value in asked.items() if key not in ROTARY_KEYS}
    for key in (*MOST, *family.function_keys):
        if key not in ROTARY_KEYS and spelled.get(key) is None and resolved.get(key) is not None:
            spelled[key] = resolved[key]
    return spelled | _rotary(dict(hf_config.rope_parameters), family, asked)


def _rotary(rope: Config, family: Family, config: Config) -> Config:
    """Spell a rotary embedding for transformers 4 and 5.

    Args:
        rope: the settings in version 5's spelling, complete.
        family: its family.
        config: the configuration, in any spelling.
    """
    null = {"truncate": False} if rope.get("truncate", True) is None else {}  # transformers computes with this null
    rope = {key: value for key, value in {**rope, **null}.items() if key != "type" and value is not None}
    kind, context = rope["rope_type"], context_of(config)
    original = rope.get(ORIGINAL, context)
    if kind == "yarn":
        rope.setdefault("factor", context / original)
    if kind == "longrope":
        # Version 4 takes this factor from other keys. The frequencies do not depend on it.
        rope["attention_factor"] = function_of(family, config).rotary.at(1).scaling
    if not _has_part(family, config):
        rope.pop("partial_rotary_factor", None)
    theta, part = rope["rope_theta"], rope.get("partial_rotary_factor")
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if kind == "yarn" and original == context:
        # With this key version 4.51 puts context / original in place of the factor.
        del scaling[ORIGINAL]
    spelled = {"rope_theta": theta, "rope_scaling": None if kind == "default" else scaling, "rope_parameters": rope}
    if part is not None:
        spelled["partial_rotary_factor"] = part
    if kind == "longrope":
        spelled[ORIGINAL] = original  # version 4 reads it here alone
    if family.model_type == "gpt_neox":
        spelled |= {"rotary_emb_base": theta, "rotary_pct": part}
    return spelled


def _has_part(family: Family, config: Config) -> bool:
    """Return True if a part of each head may turn. Version 5 ignores that part in other families, and 4 does not."""
    return bool({"partial_rotary_factor", "rotary_pct"} & set(family.config_of(family.sizes_of(config))))


def _readable(config: Config, family: Family) -> Config:
    """Return a configuration that the installed transformers reads as version 5 does.

    Version 4 ignores ``rope_parameters``, and takes a base and a part on top before those inside of ``rope_scaling``.
    """
    if reads_rope_parameters():
        return config
    read = normalised(config)
    rope = {"rope_theta": read["rope_theta"], "rope_type": read["rope_type"], **read["rope_settings"]}
    if rope["rope_type"] in READS_ORIGINAL:
        rope.setdefault(ORIGINAL, context_of(config))
    if _has_part(family, config):
        rope["partial_rotary_factor"] = read.get("partial_rotary_factor", _config_class(family)().partial_rotary_factor)
    others = {key: value for key, value in config.items() if key not in (*ROTARY_KEYS, ORIGINAL)}
    others |= {key: value for key, value in family.without_effect.items() if key in others}
    return others | _rotary(rope, family, config)


def _read_by_transformers(hf_config: Any) -> Config:
    """Return the values of a configuration object on which transformers' models depend."""
    values: Config = hf_config.to_dict()
    if not reads_rope_parameters():
        values.pop("rope_parameters", None)
    return values


def stored_hf_config(folder: Path, stored: Config, where: str) -> Any:
    """Return transformers' configuration object of a checkpoint, with the function that version 5 gives it.

    Version 4 ignores ``rope_parameters``, and ties a head to the embedding that is stored with other values.

    Args:
        folder: the checkpoint.
        stored: the configuration of its weights, see `phigrow.checkpoints.stored_model`.
        where: its place, for messages.

    Raises:
        GrowthError: transformers refuses the configuration.
    """
    if reads_rope_parameters():
        from transformers import AutoConfig

        with transformers_errors("read the configuration", where):
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    family = family_of(stored, where)
    return _built(_readable(stored, family), family, where)


def check_live_config(config: Config, where: str) -> None:
    """Check that the transformers that loaded a live model read its configuration as phigrow does.

    Args:
        config: the content of its configuration object.
        where: for messages.

    Raises:
        GrowthError: transformers 4 loaded the model without its ``rope_parameters``.
    """
    if reads_rope_parameters() or not config.get("rope_parameters"):
        return
    family = family_of(config, where)
    alone = {key: value for key, value in config.items() if key != "rope_parameters"}
    if differences := _differences(family, config, family.sizes_of(config), alone):
        raise GrowthError(
            "transformers 4 loaded the model with another rotary embedding than its configuration has",
            where=where,
            why=f"it ignores rope_parameters: {'; '.join(differences)}",
            fix="install transformers 5.5 or later, or expand the folder of the checkpoint",
        )
