"""check_method and check_family name what is broken: the parameter, the family, and by how much."""

import re
from dataclasses import replace

import numpy as np
import pytest
from tiny_models import phi_config

from phigrow.growth.growth_spec import GrowthSpec
from phigrow.growth.planner import make_plan
from phigrow.methods import (
    Method,
    average_maps,
    axis_map,
    block,
    copy_reasons,
    kept_stream,
    statistics_kept,
    unread,
    wrap,
)
from phigrow.models.families import built_in_families
from phigrow.testing import ContractError, check_family, check_method


def averaged(task, options):
    return average_maps(task, lambda name, src, dst: wrap(src, dst))


def reasons(task, options):
    src, dst = task.sizes(task.family.residual)
    return copy_reasons(task, even=dst % src == 0)


def nothing(task, options):
    return []


def changed(maps, axis, **columns):
    return {**maps, axis: replace(maps[axis], **{name: change(maps[axis]) for name, change in columns.items()})}


def unscaled_mlp(task, options):
    """The mlp is read without dividing by the number of copies."""
    return changed(averaged(task, options), "mlp", read=lambda axis: np.ones_like(axis.read))


def unscaled_queries(task, options):
    """Queries forget that attention divides by the root of a larger head."""
    maps = unread(task)
    query = maps["q"]
    return {
        **maps,
        **kept_stream(task, statistics_kept(task)),
        "q": replace(query, write=np.sign(query.write), read=np.sign(query.read)),
    }


def zeros_in_the_stream(task, options):
    """New coordinates of the stream are zero, so the mean and the variance that a norm sees are others."""
    maps = {**unread(task), **kept_stream(task, statistics_kept(task))}
    src, dst = task.sizes("hidden")
    return {**maps, "hidden": axis_map(src, block(src, dst), fresh_write="zero")}


def dead_units(task, options):
    """New mlp units are written with zeros and read with zeros."""
    maps = {**unread(task), **kept_stream(task, statistics_kept(task))}
    src, dst = task.sizes("mlp")
    return {**maps, "mlp": axis_map(src, block(src, dst), fresh_write="zero", fresh_read="zero")}


def drawn_twice(task, options):
    """Sources come from a generator that the seed does not decide."""
    random = np.random.default_rng()
    return average_maps(task, lambda name, src, dst: np.r_[np.arange(src), random.integers(0, src, dst - src)])


def not_a_number(task, options):
    return changed(
        averaged(task, options), "hidden", write=lambda axis: axis.write * np.where(axis.source == 2, np.nan, 1)
    )


def other_tokens(task, options):
    """Tokens are exact as long as the vocabulary does not grow; then each is another one."""
    maps = {**unread(task), **kept_stream(task, statistics_kept(task))}
    src, dst = task.sizes("vocab")
    return {**maps, "vocab": axis_map(src, (block(src, dst) if src == dst else np.arange(dst)[::-1] % src))}


def method(maps, claims=nothing):
    return Method(name="broken", summary="broken", depth="identity", axis_maps=maps, approximations=claims)


def lossless_claims(task, options):
    return ["new tokens get a logit"] if task.grows("vocab") else []


FAULTS = {
    "a gain": (
        method(unscaled_mlp, reasons), {},
        r"in the family phi: it claims to preserve the function, but R E is not I on mlp\n"
        r"  model.layers.\{layer\}.mlp.fc2.weight reads mlp: R E differs from I by 1 "
        r"\(source coordinate 0 is written times read 2\)\n  growth: .*mlp \d+ -> \d+",
    ),
    "a temperature": (
        method(unscaled_queries), {},
        r"in the family phi: it claims to preserve the function, but logits differ by [\d.]+\n"
        r"  first at model.layers.0.self_attn.dense.weight: its output differs by [\d.]+ at coordinate \d+ of hidden",
    ),
    "statistics": (
        method(zeros_in_the_stream), {},
        r"in the family phi: it claims to preserve the function, but logits differ by [\d.]+\n"
        r"  first at model.layers.0.input_layernorm.weight: its output differs by [\d.]+ at coordinate \d+ of normed\n",
    ),
    "dead units": (
        method(dead_units), {},
        r"in the family phi: new coordinates of mlp never learn\n"
        r"  model.layers.0.mlp.fc1.weight has no gradient at \d+ of them, the first is coordinate \d+\n",
    ),
    "no seed": (
        method(drawn_twice, reasons), {},
        r"in the family phi: it makes two plans of one task\n"
        r"  axis \w+ differs at coordinate \d+, source is \d+ and \d+; it is met first in ",
    ),
    "other tokens": (
        method(other_tokens), {},
        r"in the family phi: it claims to preserve the function, but vocab does not keep every token of the source\n"
        r"  growth: .*vocab \d+ -> \d+",
    ),
    "a false claim of change": (
        method(averaged, lambda task, options: ["it changes everything"]), {},
        r"in the family phi: it claims to change the function, but logits differ by only [\d.e-]+\n"
        r"  claims: it changes everything\n",
    ),
    "NaN": (
        method(not_a_number, reasons), {},
        r"in the family phi: method broken returned a wrong map for axis hidden: the write gain of coordinate 2 is nan"
        r"\n  .*test_contracts_of_others.py:\d+, axis hidden, met first in model.embed_tokens.weight\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_method_is_described(fault):
    broken, options, message = FAULTS[fault]
    with pytest.raises(ContractError, match=message):
        check_method(broken, families=["phi"], options=options)


def test_what_is_mended_passes():
    # Negative control of the faults above: the same methods without them.
    check_method(method(averaged, reasons), families=["phi"], shapes=2)
    whole = method(lambda task, options: {**unread(task), **kept_stream(task, statistics_kept(task))})
    check_method(whole, families=["phi"], shapes=2)


def test_a_method_that_refuses_everything_is_described():
    def refuse(task, options):
        raise task.refuse("refused", "hidden", "it is Tuesday", "wait")

    with pytest.raises(ContractError, match=r"phi: it took 0 of 8 shapes, and has to take 2\n  it refused: refused"):
        check_method(method(refuse), families=["phi"], shapes=2)


PHI, LLAMA = (built_in_families()[name] for name in ("phi", "llama"))


def with_line(family, old, new):
    assert old in family.table
    return replace(family, table=family.table.replace(old, new))


FAMILY_FAULTS = {
    "heads in another order": (
        with_line(LLAMA, "hidden <- (kv group v)", "hidden <- (group kv v)"), ["lossless"],
        r"method lossless in the family llama: it claims to preserve the function, but logits differ by [\d.]+\n"
        r"  first at model.layers.0.self_attn.o_proj.weight: its output differs by [\d.]+ at coordinate \d+ of hidden",
    ),
    "a tensor that is not there": (
        with_line(PHI, "mlp.fc1.weight|bias ", "mlp.fc0.weight|bias "), (),
        r"family phi: its table is not the model of transformers\n  model.layers.0.mlp.fc0.weight is in the table",
    ),
    "a tensor of another shape": (
        with_line(PHI, "mlp.fc2.weight|bias             hidden <- mlp", "mlp.fc2.weight|bias  mlp <- hidden"), (),
        r"model.layers.0.mlp.fc2.weight has shape \[\d+, \d+\] by the table, and \[\d+, \d+\] in the model",
    ),
    "a missing line": (
        replace(PHI, table=re.sub(r"lm_head.bias .*\n", "", PHI.table)), (),
        r"lm_head.bias is in the model, and the table has no such line",
    ),
    "an axis that is not there": (
        replace(PHI, mlp="ffn"), (), r"family phi: its mlp axis 'ffn' is not in its table\n  the table has vocab",
    ),
    "sizes": (
        replace(PHI, config_of=lambda sizes: PHI.config_of({**sizes, "mlp": sizes["mlp"] + 1})), (),
        r"family phi: config_of and sizes_of disagree on mlp: \d+ becomes \d+",
    ),
    "another forward pass": (
        replace(PHI, forward=lambda *given: PHI.forward(*given) * 1.5), (),
        r"family phi: its forward pass in numpy differs from transformers' model by \d",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAMILY_FAULTS)
def test_a_broken_family_is_described(fault):
    family, methods, message = FAMILY_FAULTS[fault]
    with pytest.raises(ContractError, match=message):
        check_family(family, methods=methods, shapes=6)
    assert built_in_families()[family.name] is not family


def test_noise_on_all_values_changes_the_function():
    whole = method(lambda task, options: {**unread(task), **kept_stream(task, statistics_kept(task))})
    noisy = replace(whole, takes_noise=True, noise_on="all")
    pair = phi_config(32, 4, 48, 2), phi_config(64, 8, 96, 2)
    assert make_plan(*pair, GrowthSpec(noisy, noise=0.1)).approximations == (
        "noise of 0.1 is added to all values of matrices",
    )
    assert make_plan(*pair, GrowthSpec(noisy)).exact  # negative control
