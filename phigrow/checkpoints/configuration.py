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
from typing import Any

from phigrow.errors import GrowthError
from phigrow.models.bounds import MOST
from phigrow.models.config import Config
from phigrow.models.families import family_of
from phigrow.models.family import Family, Sizes
from phigrow.models.function import function_differences, function_of
from phigrow.models.transformers_errors import transformers_errors

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
    hf_config = _built(asked, family, where)
    resolved = hf_config.to_dict()
    if differences := _differences(family, config, sizes, resolved):
        raise GrowthError(
            "transformers reads the configuration as another model than phigrow does",
            where=where,
            why="; ".join(differences),
            fix=_FIX,
        )
    return ResolvedConfig(family, where, _spelled(asked, resolved, hf_config, family, sizes), hf_config)


def _built(asked: Config, family: Family, where: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class: Any = CONFIG_MAPPING[family.model_type]
    with transformers_errors("read the configuration", where):
        return config_class.from_dict(copy.deepcopy(asked))  # which changes nested objects


def _differences(family: Family, config: Config, sizes: Sizes, resolved: Config) -> list[str]:
    """Return every value that both libraries read in different ways, as ``name: phigrow's -> transformers'``."""
    theirs = family.sizes_of(resolved)
    names = [f"the axis {axis}: {size} -> {theirs[axis]}" for axis, size in sizes.items() if theirs[axis] != size]
    return names or function_differences(function_of(family, config), function_of(family, resolved))


def _spelled(asked: Config, resolved: Config, hf_config: Any, family: Family, sizes: Sizes) -> Config:
    """Return a configuration with every key that phigrow read, and the rotary embedding in all spellings."""
    spelled = {key: copy.deepcopy(value) for key, value in asked.items() if key not in ROTARY_KEYS}
    for key in (*MOST, *family.function_keys):
        if key not in ROTARY_KEYS and spelled.get(key) is None and resolved.get(key) is not None:
            spelled[key] = resolved[key]
    has_part = bool({"partial_rotary_factor", "rotary_pct"} & set(family.config_of(sizes)))
    return spelled | _rotary(hf_config, family, has_part=has_part)


def _rotary(hf_config: Any, family: Family, *, has_part: bool) -> Config:
    """Spell a rotary embedding for transformers 4 and 5, from version 5's resolved configuration.

    Args:
        hf_config: transformers' configuration.
        family: its family.
        has_part: a part of each head may turn. Version 5 ignores that part in other families, and version 4 does not.
    """
    rope = {key: value for key, value in hf_config.rope_parameters.items() if key != "type" and value is not None}
    kind, context = rope["rope_type"], hf_config.max_position_embeddings
    original = rope.get("original_max_position_embeddings", context)
    if kind == "yarn":
        rope.setdefault("factor", context / original)
    if kind == "longrope":
        # Version 4 takes this factor from other keys. The frequencies do not depend on it.
        rope["attention_factor"] = _attention_factor(hf_config)
    if not has_part:
        rope.pop("partial_rotary_factor", None)
    theta, part = rope["rope_theta"], rope.get("partial_rotary_factor")
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if kind == "yarn" and original == context:
        # With this key version 4.51 puts context / original in place of the factor.
        del scaling["original_max_position_embeddings"]
    spelled = {"rope_theta": theta, "rope_scaling": None if kind == "default" else scaling, "rope_parameters": rope}
    if part is not None:
        spelled["partial_rotary_factor"] = part
    if kind == "longrope":
        spelled["original_max_position_embeddings"] = original  # version 4 reads it here alone
    if family.model_type == "gpt_neox":
        spelled |= {"rotary_emb_base": theta, "rotary_pct": part}
    return spelled


def _attention_factor(hf_config: Any) -> float:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = copy.deepcopy(hf_config)
    return float(ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, None)[1])
