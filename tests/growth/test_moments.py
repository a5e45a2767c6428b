"""Gradients of grown models against those of their sources, and the moments that follow, in float64."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from table_lines import table_lines
from tiny_models import logits, model_of, phi_config, probe, random_pair

import phigrow
from phigrow.errors import GrowthError
from phigrow.expansion.logits import widen_norms
from phigrow.growth.lift import InMemory, lift
from phigrow.growth.moments import POWER, STATES, moment_recipe, moment_source
from phigrow.models.families import all_families

EXACT = 1e-10
SHAPES = 3
FAMILIES = all_families()
WAYS = {
    "lossless": {}, "lemon": {}, "gesmundo": {}, "net2net": {}, "fpi": {}, "hypercloning": {"snr": "none"},
    "tile": {"scale": "preserve"}, "staged": {},
}  # fmt: skip
"""Every method that is exact somewhere, without noise."""
NOISY = {"hypercloning": {"snr": "10"}, "tile": {"scale": "preserve", "noise": 0.3}}


def gradients(model, ids):
    """Name, as checkpoints have it -> gradient of the loss, float64."""
    model.zero_grad()
    found = model(ids, use_cache=False).logits[:, :-1]
    torch.nn.functional.cross_entropy(found.flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def stored(plan, found):
    """Names of a live model's parameters -> those of checkpoints."""
    names = {ours: theirs for theirs, ours in plan.table.live_names.items()}
    return {names.get(name, name): value for name, value in found.items()}


def plans(family, method, options, shapes):
    """Exact plans between random sizes: uneven, whole, of one hidden, with tied embeddings and without."""
    rng, found = random.Random(f"{family}/{method}"), 0
    for k in range(40):
        src, dst = random_pair(FAMILIES[family], rng, whole=k % 2 == 1, tie_word_embeddings=k % 3 == 2)
        if k % 4 == 3:
            layers = dst["num_hidden_layers"] + 1
            dst = src | {"intermediate_size": src["intermediate_size"] + 7, "num_hidden_layers": layers}
        try:
            plan = phigrow.plan(src, dst, method, depth="identity", **options)
        except GrowthError:
            continue
        if plan.exact:
            yield plan
            found += 1
        if found == shapes:
            return
    raise AssertionError(f"{method} is exact nowhere in {family}")


def measured(plan, method, options):
    """Both models' gradients."""
    source = model_of(plan.src_config)
    grown = phigrow.expand_model(source, plan.dst_config, method=method, depth="identity", **options)
    widen_norms(grown)
    ids = probe(plan.src_config["vocab_size"])
    return tuple(stored(plan, gradients(model, ids)) for model in (source, grown))


def legs(growth):
    """(E, R, map) of what a tensor writes, then of what it reads (a vector reads nothing); dense, means included."""
    stored = [growth.written, *(k for k in range(len(growth.maps)) if k != growth.written)]
    return [(*growth.maps[k].dense_legs(), growth.maps[k]) for k in stored]


def turned(growth, values):
    """A matrix as [written, read], whichever is stored first."""
    return values.T if len(growth.maps) == 2 and growth.written == 1 else values


def normed_gain(growth):
    """What a normalised stream carries of the gain of the stream; a head's own norm takes all of it off."""
    return growth.maps[0].write if growth.norm_read is growth.maps[0] else growth.norm_read.write


def by_legs(growth, source):
    """``R_out^T G E_in^T``, dense and only of copies; [written, read]."""
    (_, read, _), *inner = legs(growth)
    said = read.T @ turned(growth, source)
    if growth.parameter.kind == "scale":
        return said * normed_gain(growth)
    return said @ np.where(held(inner[0][2]), inner[0][0].T, 0) if inner else said


def held(axis):
    """bool: coordinates that come from the source."""
    return axis.is_copy | (axis.dense is not None)


def nothing_reads(plan, growth):
    """bool: new coordinates of what a tensor writes that no gradient comes back from."""
    axes = dict(plan.axes)
    # What is read of a key's new coordinate is what its query holds there.
    axes["k"] = replace(axes["k"], read_random=axes["q"].write_random)
    axis = replace(plan, axes=axes).composites[growth.parameter.written]
    return ~axis.is_copy & ~axis.read_random


def law(plan, growth, source):
    """The grown gradient by the rule, from the source's alone, and the values that the rule holds for; [written, read].

    It does not hold for old rows of an axis with means: `law_with_means` has the missing part.
    """
    _, *inner = legs(growth)
    out, closed = legs(growth)[0][2], nothing_reads(plan, growth)
    if growth.parameter.kind == "scale":  # the stream normalises to zero where the norm is not written at random
        return by_legs(growth, source), out.is_copy | closed | ~(out.is_copy | out.write_random)
    exact = out.is_copy & (not out.is_mean.any())
    if not inner:
        return by_legs(growth, source), exact | closed
    into = inner[0][2]
    nothing_comes = ~into.is_copy & ~into.write_random
    both = exact[:, None] & into.is_copy
    return np.where(both, by_legs(growth, source), 0.0), both | closed[:, None] | nothing_comes


def law_with_means(plan, growth, grown, source):
    """Old rows of an axis with means, for which gradients of the new rows have to be known; and these values."""
    (write, read, out), *inner = legs(growth)
    means = out.is_mean
    paid = read.T @ (write[means].T @ turned(growth, grown)[means])  # what means pass on, old rows pay for
    old = out.is_copy & bool(means.any())
    return by_legs(growth, source) - paid, old[:, None] & inner[0][2].is_copy if inner else old


def kept(plan):
    """The tensors outside of inserted layers."""
    return [growth for growth in table_lines(plan) if growth.layer not in plan.identity_layers]


def gap(plan, growth, grown, source, says=law):
    """Largest difference between a gradient and what a rule says of it, of 1 or of the source's largest value."""
    given = (grown[growth.name],) if says is law_with_means else ()
    said, speaks = says(plan, growth, *given, source[growth.source])
    off = np.abs(np.where(speaks, said - turned(growth, grown[growth.name]), 0)).max()
    return off / max(1.0, np.abs(source[growth.source]).max()), speaks


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", WAYS)
def test_grown_gradients_are_the_gradients_of_the_grown_model(method, family):
    """Every parameter of every exact method: the value of every copy, and zero where nothing reads or comes in.

    Old rows of what writes a stream with means are known only together with the new rows.
    """
    spoken = with_means = values = 0
    tied = set()
    for plan in plans(family, method, WAYS[method], SHAPES):
        tied.add(plan.dst_config["tie_word_embeddings"])
        source, grown = measured(plan, method, WAYS[method])
        for growth in table_lines(plan):
            values += grown[growth.name].size
            if growth.layer in plan.identity_layers:
                # Nothing reads an inserted layer; its writers of the stream, which are zero, are open.
                assert growth.is_zero or np.abs(grown[growth.name]).max() <= EXACT, growth.name
                spoken += 0 if growth.is_zero else grown[growth.name].size
                continue
            off, speaks = gap(plan, growth, grown, source)
            assert off <= EXACT, (growth.name, off)
            spoken += int(speaks.sum())
            if growth.parameter.kind != "scale":
                off, speaks = gap(plan, growth, grown, source, law_with_means)
                assert off <= EXACT, (growth.name, off)
                assert not speaks.any() or (FAMILIES[family].centred and method in ("lossless", "lemon"))
                with_means += int(speaks.sum())
    assert spoken > (0.3 if with_means else 0.5) * values
    assert bool(with_means) == (FAMILIES[family].centred and method in ("lossless", "lemon"))
    assert spoken + with_means > 0.5 * values
    assert False in tied


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", WAYS)
def test_moments_are_lifted_by_these_legs(method, family):
    """The same legs again, through `phigrow.growth.lift`; nothing for what is new, the squares for second moments."""
    (plan,) = plans(family, method, WAYS[method], 1)
    generator = np.random.default_rng(0)
    for growth in table_lines(plan):
        theirs = generator.normal(size=growth.source_shape)
        for moment, power in POWER.items():
            dual = moment_recipe(growth.recipe, plan, moment)
            if growth.layer in plan.identity_layers:
                assert dual is None
                continue
            found = lift(dual, {growth.source: InMemory(torch.from_numpy(theirs**power))}, torch.float64)
            want = turned(growth, by_legs(growth, theirs)) ** power
            assert np.abs(found.numpy() - want).max() <= 1e-14 * np.abs(want).max(), (growth.name, moment)


@pytest.mark.parametrize(("method", "options"), [*WAYS.items(), *NOISY.items()])
def test_copies_share_what_their_source_gets(method, options):
    """The chain rule through the weights' own legs, ``E_out^T G' R_in^T`` summed over layers: with noise as without."""
    for plan in plans("phi", method, options, 1):
        source, grown = measured(plan, method, options)
        summed = dict.fromkeys(source, 0.0)
        for growth in table_lines(plan):
            if growth.is_zero:
                continue
            (write, _, out), *inner = legs(growth)
            back = turned(growth, grown[growth.name])
            if growth.parameter.kind == "scale":
                gain = np.divide(out.write, normed_gain(growth), out=np.ones(out.dst_size), where=out.is_copy)
                back = back * np.where(out.is_copy, gain / np.where(out.write == 0, 1, out.write), 0)
            back = write.T @ back
            summed[growth.source] = summed[growth.source] + turned(growth, back @ inner[0][1].T if inner else back)
        for name, gradient in source.items():
            assert np.abs(summed[name] - gradient).max() <= EXACT * max(1.0, np.abs(gradient).max()), name


def test_what_the_law_does_not_say_is_seen():
    """Negative controls: legs that did not change places, means that pass nothing on, noise."""

    def weights_legs(plan, growth, source):
        (write, _, out), *inner = legs(growth)
        said = write @ turned(growth, source)
        said = said @ inner[0][1] if inner else said
        return said, (out.is_copy[:, None] & inner[0][2].is_copy) if inner else out.is_copy

    def without_means(plan, growth, source):
        return by_legs(growth, source), law_with_means(plan, growth, np.zeros(growth.recipe.shape), source)[1]

    (plan,) = plans("phi", "lossless", {}, 1)
    source, grown = measured(plan, "lossless", {})
    worst = {
        says: {
            g.parameter.name: gap(plan, g, grown, source, says)[0] for g in kept(plan) if g.parameter.kind != "scale"
        }
        for says in (law, law_with_means, weights_legs, without_means)
    }
    assert max(max(worst[law].values()), max(worst[law_with_means].values())) <= EXACT
    assert worst[weights_legs]["model.layers.{layer}.mlp.fc2.weight"] > 1e-3
    assert worst[without_means]["model.layers.{layer}.mlp.fc2.weight"] > 1e-6
    assert worst[without_means]["model.layers.{layer}.mlp.fc1.weight"] <= EXACT  # a reader: nothing to pay
    for options in (NOISY["hypercloning"], {"snr": "none"}):
        (plan,) = plans("phi", "hypercloning", options, 1)
        source, grown = measured(plan, "hypercloning", options)
        off = max(gap(plan, growth, grown, source)[0] for growth in kept(plan))
        assert (off <= EXACT) == (options["snr"] == "none"), off


TURNED = [("phi", {}), ("llama", {}), ("qwen2", {}), ("gpt_neox", {}), ("gpt_neox", {"attention_bias": False})]


def turned_pair(family, flags):
    """A source, its growth by an isometry, their weights and gradients, and the plan."""
    src, dst = random_pair(FAMILIES[family], random.Random(6), tie_word_embeddings=False)
    plan = phigrow.plan(src | flags, dst | flags, "isometric")
    assert plan.exact
    model = model_of(src | flags)
    grown = phigrow.expand_model(model, dst | flags, method="isometric")
    widen_norms(grown)
    ids = probe(src["vocab_size"])
    found = [stored(plan, gradients(each, ids)) for each in (model, grown)]
    weights = [stored(plan, {n: p.detach().numpy() for n, p in each.named_parameters()}) for each in (model, grown)]
    return plan, *weights, *found


def taken_out(growth, weights, source):
    """The source's gradient as it would be, were its normalisation not folded; written as the formulas have it."""
    fold, gradient = growth.fusion, source[growth.source]
    if fold is None or growth.parameter.kind == "bias":
        return gradient
    if growth.parameter.kind == "shift":
        return gradient * weights[fold.scale]
    seen = np.outer(source[fold.bias], weights[fold.shift]) if fold.shift else 0
    return (gradient - seen) / weights[fold.scale]


def aside(plan, growth, weights, source, power=1):
    """Gradients, or squares of them, of a normalisation whose bias lies along u; written as the formulas have it."""
    fold, gradient = growth.fusion, source[growth.source]
    dense = plan.axes[plan.table.residual].dense
    q, u = dense.write(np.float64) ** power, dense.bias_direction(np.float64) ** power
    weight, shift = weights[fold.scale], weights[fold.shift]
    if growth.parameter.kind == "shift":
        return q @ (weight * gradient) + u * (shift @ gradient)
    ratio = shift / weight
    over = gradient / weight
    # Normalised values add up to 0 over coordinates, and their squares to the number of coordinates.
    summed = over.sum(1) / ratio.sum() if power == 1 else over.mean(1) / (1 + ratio.mean())
    summed = source.get(fold.bias, summed)
    inner = over - np.outer(summed, ratio)
    inner = np.maximum(inner, 0) if power == 2 else inner
    (_, back, _), *_ = legs(growth)
    return (back.T**power) @ (inner @ q.T + np.outer(summed, u))


def of_the_norm(plan, growth, wide, grown):
    """The gradient of what a folded normalisation has left, from all that its readers get: weight, then bias."""
    norm, layer = growth.fusion.scale, growth.layer
    fused = [g for g in table_lines(plan) if g.layer == layer and g.fusion and g.fusion.scale == norm]
    readers = [g for g in fused if len(g.maps) == 2]
    gain, axis = 1 / growth.norm_read.write, growth.maps[0]
    across = axis.dense.bias_direction(np.float64) if growth.fusion.bias_direction else np.zeros(axis.dst_size)
    weight = bias = 0.0
    for reader in readers:
        matrix, gradient = wide[reader.name], grown[reader.name]
        # Along u a reader sees 1 in every token where the shift is read aside.
        own = reader.name.replace("weight", "bias")
        summed = grown[own] if own in grown else gradient @ across
        weight = weight + (matrix * (gradient - np.outer(summed, across))).sum(0)
        bias = bias + matrix.T @ summed
    return weight / gain, bias


@pytest.mark.parametrize(("family", "flags"), TURNED)
def test_gradients_of_a_turned_stream(family, flags):
    """Every parameter of the isometric method, those that took in a normalisation and what is left of it too."""
    plan, weights, wide, source, grown = turned_pair(family, flags)
    u = plan.axes[plan.table.residual].dense.bias_direction(np.float64)
    anything_aside = any(g.fusion and g.fusion.bias_direction for g in table_lines(plan))
    folded = spoken = values = 0
    not_taken_out = 0.0
    for growth in kept(plan):
        found, kind = grown[growth.name], growth.parameter.kind
        values += found.size
        tolerance = EXACT * max(1.0, np.abs(source[growth.source]).max())
        if growth.fusion is not None and kind in ("scale", "shift"):
            said = of_the_norm(plan, growth, wide, grown)[kind == "shift"]
            assert np.abs(said - found).max() <= tolerance, growth.name
            folded, spoken = folded + 1, spoken + found.size
        if growth.fusion is not None and growth.fusion.bias_direction:
            if kind != "scale":
                off = np.abs(aside(plan, growth, weights, source) - found)[held(legs(growth)[0][2])].max()
                assert off <= tolerance, (growth.name, off)
                folded, spoken = folded + 1, spoken + found.size
            continue
        if growth.fusion is not None and kind == "scale":
            continue
        said = by_legs(growth, taken_out(growth, weights, source))
        found, (out, *into) = turned(growth, found), [axis for _, _, axis in legs(growth)]
        if growth.parameter.written == (plan.table.residual,) and anything_aside:
            found = found - (np.outer(u, u @ found) if found.ndim == 2 else u * (u @ found))  # what reads u asks for u
        closed = nothing_reads(plan, growth) & ~held(out)
        speaks = held(out) | closed
        if into:
            nothing_comes = ~held(into[0]) & ~into[0].write_random
            speaks = (held(out)[:, None] & held(into[0])) | closed[:, None] | nothing_comes
            said = np.where(held(out)[:, None] & held(into[0]), said, 0.0)
        off = np.abs(np.where(speaks, said - found, 0)).max()
        assert off <= tolerance, (growth.name, off)
        without = np.where(speaks, by_legs(growth, source[growth.source]) * (said != 0) - found, 0)
        not_taken_out = max(not_taken_out, float(np.abs(without).max()))
        folded, spoken = folded + (growth.fusion is not None), spoken + int(speaks.sum())
    assert folded >= 6
    assert not_taken_out > 1e-3  # negative control: the normalisation left in
    assert spoken > 0.5 * values


@pytest.mark.parametrize(("family", "flags"), TURNED)
def test_moments_of_a_turned_stream(family, flags):
    """The library's moments against the formulas, both powers; zero only where the docstring says so."""
    plan, weights, _, _, _ = turned_pair(family, flags)
    values = np.random.default_rng(1)
    moments = {g.source: values.normal(size=g.source_shape) for g in table_lines(plan)}
    unknown = {g.name for g in kept(plan) if g.fusion and g.parameter.kind == "scale"}
    assert {g.name for g in kept(plan) if moment_recipe(g.recipe, plan, "exp_avg") is None} == unknown
    for moment, power in POWER.items():
        # Of gradients alone, or of independent parts: what was added is taken off again, squares from squares.
        def read(name, kind, power=power):
            return InMemory(torch.from_numpy(weights[name] if kind == "fp32" else np.abs(moments[name]) ** power))

        for growth in kept(plan):
            dual = moment_recipe(growth.recipe, plan, moment)
            if dual is None:
                continue
            squared = {name: value**power for name, value in weights.items()}
            given = {name: np.abs(value) ** power for name, value in moments.items()}
            if growth.fusion is not None and growth.fusion.bias_direction:
                want = turned(growth, aside(plan, growth, squared, given, power))
            else:
                want = taken_out(growth, squared, given)
                want = np.maximum(want, 0) if power == 2 else want
                (_, back, _), *inner = legs(growth)
                want = (back.T**power) @ turned(growth, want)
                if inner:
                    want = want @ np.where(held(inner[0][2]), inner[0][0].T, 0) ** power
            found = lift(dual, {growth.source: moment_source(growth.recipe, moment, read)}, torch.float64).numpy()
            assert np.abs(turned(growth, found) - want).max() <= 1e-12 * np.abs(want).max(), (growth.name, moment)


def test_moments_are_not_divided_by_weights_of_next_to_nothing():
    plan, weights, _, source, _ = turned_pair("phi", {})
    fc1 = {g.name: g for g in table_lines(plan)}["model.layers.0.mlp.fc1.weight"]
    held_weights = {**weights, fc1.fusion.scale: np.array([1e-9, -1e-9, 0.0, *weights[fc1.fusion.scale][3:]])}
    least = 0.01 * np.sqrt(np.square(held_weights[fc1.fusion.scale]).mean())
    for moment, power in POWER.items():
        given = {name: np.abs(value) ** power for name, value in source.items()}

        def read(name, kind, given=given):
            return InMemory(torch.from_numpy(held_weights[name] if kind == "fp32" else given[name]))

        found = moment_source(fc1.recipe, moment, read)
        taken = found.bits(0, 4).view(np.float64)
        over = given[fc1.source][:4] - np.outer(given[fc1.fusion.bias][:4], held_weights[fc1.fusion.shift] ** power)
        over = np.maximum(over, 0) if power == 2 else over
        sign = np.array([1, -1, 1]) if power == 1 else 1
        np.testing.assert_allclose(taken[:, :3], over[:, :3] * sign / least**power, rtol=1e-12)
        np.testing.assert_allclose(taken[:, 3:], over[:, 3:] / held_weights[fc1.fusion.scale][3:] ** power, rtol=1e-12)


LR, EPS, BETAS = 1e-2, 1e-3, (0.9, 0.95)
"""An epsilon that counts: where it does not match, the trajectories part."""


def doubled(family):
    """A model and its twofold growth, copies without noise; head, vocabulary and layers stay."""
    rng = random.Random(4)
    src, dst = random_pair(FAMILIES[family], rng, whole=True)
    dst |= {"intermediate_size": 2 * src["intermediate_size"], "num_hidden_layers": src["num_hidden_layers"]}
    plan = phigrow.plan(src, dst, "hypercloning", snr="none")
    assert plan.exact
    return plan, model_of(src)


def uniform(gains):
    gains = np.unique(gains)
    assert len(gains) == 1
    return float(gains[0])


def gains(growth, plan):
    """What a tensor's weights and its gradients are multiplied by: one number each in a doubled model."""
    product = 1.0
    for stored, axis in enumerate(growth.maps):
        leg = axis.write if stored == growth.written else axis.read
        product *= uniform(leg / (growth.norm_read.write if growth.parameter.kind == "scale" else 1.0))
    dual = moment_recipe(growth.recipe, plan, "exp_avg")
    return product, float(np.prod([uniform(leg.gain) for leg in dual.legs]))


def adam(model, plan=None, matched=True):
    """Adam, each tensor at the learning rate of its gain and the epsilon of its gradient's."""
    groups = []
    growths = {growth.name: growth for growth in table_lines(plan)} if plan else {}
    theirs = {ours: name for name, ours in plan.table.live_names.items()} if plan else {}
    for name, parameter in model.named_parameters():
        weight, gradient = gains(growths[theirs.get(name, name)], plan) if plan and matched else (1.0, 1.0)
        groups.append({"params": [parameter], "lr": LR * weight, "eps": EPS * gradient})
    return torch.optim.Adam(groups, betas=BETAS)


def give_moments(plan, source, old, grown, new, state):
    """Fill an optimizer with another's lifted state."""
    live = plan.table.live_names
    theirs, ours = dict(source.named_parameters()), dict(grown.named_parameters())
    for growth in table_lines(plan):
        parameter = ours[live.get(growth.name, growth.name)]
        entry = old.state[theirs[live.get(growth.source, growth.source)]]
        new.state[parameter] = {"step": entry["step"].clone() if state != "reset" else torch.zeros(())}
        for moment in POWER:
            dual = moment_recipe(growth.recipe, plan, moment, state)
            values = {growth.source: InMemory(entry[moment])}
            value = lift(dual, values, torch.float64) if dual else torch.zeros_like(parameter)
            new.state[parameter][moment] = value


def apart(family, state="scale", matched=True, steps=20):
    """max |dlogit| between a model and its double after every Adam step, both on the same tokens."""
    plan, source = doubled(family)
    old = adam(source)
    stream = torch.randint(
        plan.src_config["vocab_size"], (steps + 4, 2, 12), generator=torch.Generator().manual_seed(3)
    )
    for ids in stream[:4]:
        gradients(source, ids)
        old.step()
    grown = phigrow.expand_model(source, plan.dst_config, method="hypercloning", snr="none")
    widen_norms(grown)
    new = adam(grown, plan, matched)
    give_moments(plan, source, old, grown, new, state)
    found = []
    for ids in stream[4:]:
        for model, optimizer in ((source, old), (grown, new)):
            gradients(model, ids)
            optimizer.step()
        found.append(float((logits(source, ids) - logits(grown, ids)).abs().max()))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_doubled_model_with_scaled_state_takes_the_steps_of_its_source(family):
    assert max(apart(family)) <= EXACT


def test_the_oracle_tells_states_and_rates_apart():
    # Negative controls, after 1 and after 20 steps: each of these is another trajectory.
    for changes in ({"matched": False}, {"state": "copy"}, {"state": "reset"}, {"state": "asymmetric"}):
        found = apart("phi", **changes)
        assert min(found[0], found[-1]) > 1e-3, changes


def test_every_state_says_where_moments_come_from():
    plan = phigrow.plan(phi_config(32, 4, 48, 2, 4), phi_config(48, 6, 70, 4, 4), "tile", scale="rms")
    growths = {growth.name: growth for growth in table_lines(plan)}
    fc2 = growths["model.layers.0.mlp.fc2.weight"]
    repeated = growths["model.layers.1.mlp.fc2.weight"]
    assert plan.layers[:2] == (0, 0)
    moment = torch.rand(fc2.source_shape, dtype=torch.float64)
    rows, columns = np.arange(48) % 32, np.arange(70) % 48
    picked = moment.numpy()[rows][:, columns]
    # Of hidden 16 coordinates have two copies, read with 1/sqrt(2); of mlp 22.
    twice = np.where(np.bincount(rows)[rows] == 2, np.sqrt(0.5), 1.0)
    old = (np.arange(48) < 32)[:, None] & (np.arange(70) < 48)
    want = {"copy": (picked, picked), "asymmetric": (picked * old, picked * old), "reset": (None, None)}
    want["scale"] = (picked * twice[:, None], picked * twice[:, None] ** 2)
    for state in STATES:
        for name, expected in zip(POWER, want[state], strict=True):
            dual = moment_recipe(fc2.recipe, plan, name, state)
            assert (dual is None) == (expected is None)
            if dual:
                found = lift(dual, {fc2.source: InMemory(moment)}, torch.float64).numpy()
                np.testing.assert_allclose(found, expected, rtol=1e-15, atol=0, err_msg=state)
    assert moment_recipe(repeated.recipe, plan, "exp_avg", "asymmetric") is None  # the second copy of a layer is new
    assert moment_recipe(repeated.recipe, plan, "exp_avg", "scale") is not None
    scale = growths["model.final_layernorm.weight"]
    for state in ("scale", "copy", "asymmetric"):
        recipe = moment_recipe(scale.recipe, plan, "exp_avg", state)
        found = lift(recipe, {scale.source: InMemory(torch.ones(32))}, torch.float32)
        assert (found[32:] == 0).all() == (state == "asymmetric")  # not 1, as a new weight is


def test_moments_of_neurons_from_the_layer_above_come_from_there():
    plan = phigrow.plan(phi_config(32, 4, 48, 2, 4), phi_config(48, 6, 70, 2, 4), "aki")
    fc1 = {growth.name: growth for growth in table_lines(plan)}["model.layers.0.mlp.fc1.weight"]
    below, above = (torch.full(fc1.source_shape, value) for value in (1.0, 2.0))
    tensors = {fc1.source: InMemory(below), "model.layers.1.mlp.fc1.weight": InMemory(above)}
    for state, new in (("copy", 2.0), ("asymmetric", 0.0)):
        found = lift(moment_recipe(fc1.recipe, plan, "exp_avg", state), tensors, torch.float32)
        assert (found[:48, :32] == 1).all()
        assert (found[48:, :32] == new).all()


@pytest.mark.parametrize("shift", ["none", "balanced", "plain"])
def test_the_gradient_of_a_missing_bias_is_not_amplified(shift):
    """GPT-NeoX's head: s is the sum of a row of G diag(1/g) over that of b/g, and 0 where the divisor is near 0."""
    plan, weights, _, source, _ = turned_pair("gpt_neox", {})
    head = {growth.name: growth for growth in table_lines(plan)}["embed_out.weight"]
    scale = weights[head.fusion.scale]
    ratio = {"none": 0.0, "balanced": np.resize([1.0, -1.0], len(scale) - len(scale) % 2), "plain": 0.3}[shift]
    ratio = np.concatenate([np.atleast_1d(ratio), np.zeros(len(scale))])[: len(scale)] if shift == "balanced" else ratio
    given = {**weights, head.fusion.shift: ratio * scale}

    def read(name, kind):
        return InMemory(torch.from_numpy(np.array(given[name] if kind == "fp32" else source[name])))

    rows, columns = head.source_shape
    found = moment_source(head.recipe, "exp_avg", read).bits(0, rows).view(np.float64)
    over = source[head.source] / scale
    summed = over.sum(1) / (0.3 * columns) if shift == "plain" else np.zeros(rows)
    want = np.column_stack([over - np.outer(summed, np.broadcast_to(ratio, columns)), summed])
    np.testing.assert_allclose(found, want, rtol=1e-12, atol=1e-14)
