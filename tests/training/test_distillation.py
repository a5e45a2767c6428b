"""Distillation: the loss against its formula, the teacher's checks and costs, and runs at every ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import assert_continued, losses, records
from scenarios import SEQ_LEN, SETTINGS, TINY, VOCAB, FakeBlocks
from torch import Tensor

import phigrow
from phigrow.checkpoints.stored_model import UntiedHead
from phigrow.errors import GrowthError
from phigrow.models.cost import count_cost
from phigrow.training import RunConfig
from phigrow.training import loss as loss_module
from phigrow.training.loss import TeacherOutput, attach_loss, distilled_loss, token_loss
from phigrow.training.teacher import Teacher, TeacherInfo, load_teacher, teacher_of
from phigrow.training.training_cost import source_of

TOKENS, HIDDEN, TAUGHT, WIDTH = 75, 12, 7, 211
SHARE, STEPS = 0.25, 4
SMALL = TINY | {"hidden_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 32}


def inputs(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, TeacherOutput]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)

    own = [draw(*shape).requires_grad_() for shape in ((TOKENS, HIDDEN), (WIDTH, HIDDEN), (WIDTH,))]
    targets = torch.randint(0, WIDTH, (TOKENS,), generator=generator)
    return own, targets, TeacherOutput(draw(TOKENS, TAUGHT), draw(WIDTH, TAUGHT), draw(WIDTH))


def reference(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, teacher: TeacherOutput) -> list[Tensor]:
    own = (hidden @ weight.T + bias).softmax(1)
    wanted = (teacher.hidden @ teacher.weight.T + teacher.bias).softmax(1)
    entropy = -own.gather(1, targets[:, None]).log().mean()
    divergence = (wanted * (wanted / own).log()).sum(1).mean()
    return [(1 - SHARE) * entropy + SHARE * divergence, entropy, divergence]


def results(function: Any, dtype: torch.dtype, *more: Any) -> list[Tensor]:
    own, targets, teacher = inputs(dtype)
    loss, *parts = function(*own, targets, teacher, *more)
    loss.backward()
    return [loss.detach(), *(part.detach() for part in parts), *(t.grad for t in own)]  # type: ignore[misc]


@pytest.mark.parametrize("mode", ["full", "chunked"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 4e-6), (torch.bfloat16, 3e-2)]
)
def test_the_distilled_loss_equals_its_formula(mode, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 8 * WIDTH)  # nine whole chunks and a rest
    wanted, found = results(reference, torch.float64), results(distilled_loss, dtype, SHARE, mode)
    for a, b in zip(wanted, found, strict=True):
        assert (a - b.double()).abs().max() <= tolerance * a.abs().max()
    assert found[0].dtype == found[2].dtype == torch.promote_types(dtype, torch.float32)


def test_its_cross_entropy_is_that_of_a_run_without_a_teacher():
    own, targets, teacher = inputs(torch.float32)
    for share in (0.0, 0.5, 1.0):
        loss, entropy, divergence = distilled_loss(*own, targets, teacher, share)
        torch.testing.assert_close(entropy, token_loss(*own, targets).detach(), rtol=1e-6, atol=0)
        assert float(loss.detach()) == pytest.approx((1 - share) * float(entropy) + share * float(divergence), rel=1e-6)


def test_the_divergence_is_the_teachers_and_zero_for_the_model_itself():
    own, targets, teacher = inputs(torch.float64)
    _, _, none = distilled_loss(*own, targets, TeacherOutput(*(t.detach() for t in own)), 1.0)
    assert abs(float(none)) < 1e-14
    # Negative control: KL(model || teacher) is another number.
    log_own = (own[0] @ own[1].T + own[2]).log_softmax(1)
    log_teacher = (teacher.hidden @ teacher.weight.T + teacher.bias).log_softmax(1)
    other = (log_own.exp() * (log_own - log_teacher)).sum(1).mean()
    assert abs(float(distilled_loss(*own, targets, teacher, 1.0)[2]) - float(other.detach())) > 0.1


def test_a_teacher_is_frozen_in_evaluation_mode_and_never_learns():
    from transformers import PhiConfig, PhiForCausalLM

    sizes = {key: value for key, value in TINY.items() if key not in ("architectures", "model_type")}
    model, taught = (PhiForCausalLM(PhiConfig(**sizes | {"resid_pdrop": 0.5})) for _ in range(2))
    teacher = Teacher(model.train())
    attach_loss(taught)
    blocks = torch.from_numpy(FakeBlocks().train.batch([0, 1]))
    first, second = teacher(blocks), teacher(blocks)
    assert torch.equal(first.hidden, second.hidden)  # dropout is off
    loss, *_ = taught(blocks, teacher=first, share=0.5)
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert all(p.grad is not None for p in taught.parameters())


# What is refused, and what is charged


def folder_of(path: Path, config: dict[str, Any], training: dict[str, Any] | None = None, seed: int = 0) -> Path:
    """Write a checkpoint of random weights, with the cost of its training."""
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(seed)
    sizes = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    model = PhiForCausalLM(PhiConfig(**sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.1)
    model.save_pretrained(path)
    if training:
        (path / "training.json").write_text(json.dumps(training))
    return path


COST = {"tokens": 1000, "flops": 5e6, "seconds": 2.0}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"teacher_steps": 3}, "teacher_steps is set, but there is no teacher"),
        ({"teacher": "a"}, "teacher_steps is 0"),
        ({"teacher": "a", "teacher_steps": 3, "teacher_weight": 1.5}, "teacher_weight is 1.5"),
        ({"teacher": "a", "teacher_steps": -1}, "teacher_steps is -1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, text):
    with pytest.raises(GrowthError, match=text):
        RunConfig(**settings)


def test_a_teacher_that_does_not_fit_is_refused(tmp_path):
    blocks, config = FakeBlocks(), RunConfig(teacher=str(tmp_path / "no"), teacher_steps=3)
    with pytest.raises(GrowthError, match="there is no checkpoint to take as teacher"):
        teacher_of(config, TINY, blocks)
    for name, change, text in (
        ("words", {"vocab_size": VOCAB + 1}, rf"a vocabulary of {VOCAB + 1} tokens, but the model has one of {VOCAB}"),
        ("short", {"max_position_embeddings": SEQ_LEN - 1}, f"blocks of {SEQ_LEN} tokens, but the teacher has 15"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(SMALL | change))
        with pytest.raises(GrowthError, match=text):
            teacher_of(RunConfig(teacher=str(tmp_path / name), teacher_steps=3), TINY, blocks)


@pytest.mark.filterwarnings("ignore:.*pickled weights")
@pytest.mark.parametrize("pickled", [False, True])
def test_a_teacher_has_the_head_that_is_stored(tmp_path, pickled):
    from types import SimpleNamespace

    from safetensors.torch import load_file, save_file
    from tiny_models import model_of

    folder, tied = tmp_path / "teacher", SMALL | {"tie_word_embeddings": True}
    model_of(tied, torch.float32).save_pretrained(folder)
    weights = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
    head = weights["model.embed_tokens.weight"] + 1
    save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors")
    if pickled:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    config = RunConfig(teacher=str(folder), teacher_steps=3, dtype="fp32")
    with pytest.warns(UntiedHead):
        info = teacher_of(config, TINY, FakeBlocks())
    assert info is not None
    assert info.config["tie_word_embeddings"] is False
    run: Any = SimpleNamespace(
        config=config, attention=SimpleNamespace(name="sdpa"), world=SimpleNamespace(device=torch.device("cpu"))
    )
    with pytest.warns(UntiedHead):
        teacher = load_teacher(info, run, None)
    assert torch.equal(teacher.model.get_output_embeddings().weight, head)
    assert torch.equal(teacher.model.get_input_embeddings().weight, weights["model.embed_tokens.weight"])


def test_data_of_another_tokenizer_than_the_teachers_is_refused(tmp_path, monkeypatch):
    from phigrow.corpus.tokenizer import train_tokenizer

    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL))
    train_tokenizer(["one text"], 258).save_pretrained(folder)
    train_tokenizer(["quite another text, another"], 258).save_pretrained(tmp_path / "data")
    content = (tmp_path / "data" / "tokenizer.json").read_text()
    monkeypatch.setattr(FakeBlocks, "tokenizer_json", lambda self: (content, "the data"))
    with pytest.raises(GrowthError, match="the data was prepared with another tokenizer"):
        teacher_of(RunConfig(teacher=str(folder), teacher_steps=3), TINY, FakeBlocks())


def test_the_forward_pass_of_the_teacher_is_charged_while_it_teaches(tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text(json.dumps(SMALL))
    config = RunConfig(teacher=str(tmp_path / "small"), teacher_steps=5, steps=20, warmup=0)
    info = teacher_of(config, TINY, FakeBlocks())
    assert info == TeacherInfo(SMALL, "small", 5, 0.5, count_cost(SMALL, SEQ_LEN).forward_flops)
    per_step = 128 * info.flops_per_token
    assert [info.flops(step, 128) / per_step for step in (0, 1, 5, 6, 20)] == [0, 1, 5, 5, 5]
    assert teacher_of(RunConfig(), TINY, FakeBlocks()) is None


def test_the_training_of_a_teacher_is_counted_once(tmp_path):
    source = folder_of(tmp_path / "source", SMALL, COST)
    other = folder_of(tmp_path / "other", SMALL, {"tokens": 70, "flops": 7.0, "seconds": 0.5}, seed=1)
    grown = tmp_path / "grown"
    phigrow.expand(source, {**SMALL, "intermediate_size": 48}, method="wr", out=grown)

    def cost(**settings: Any) -> tuple[Any, ...]:
        made = source_of(RunConfig(teacher_steps=2, **settings))
        return (*made.cost.values(), made.arm)

    assert cost(teacher=str(source)) == (1000, 5e6, 2.0, "scratch-distilled")
    assert cost(teacher=str(source), init=str(grown)) == (1000, 5e6, 2.0, "wr-distilled")
    assert cost(teacher=str(source), init=str(source)) == (1000, 5e6, 2.0, "continued-distilled")
    assert cost(teacher=str(other), init=str(grown)) == (1070, 5e6 + 7, 2.5, "wr-distilled")
    assert cost(teacher=str(other), init=str(grown), arm="mine")[-1] == "mine"
    given = {"source_tokens": 5.0, "source_flops": 6.0, "source_seconds": 7.0}
    assert cost(teacher=str(source), **given) == (5.0, 6.0, 7.0, "scratch-distilled")


# Runs

STAGES = [("fp32", 1), ("bf16", 2), ("fp32", 3)]


def scenarios(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """List distilled runs at every stage on two ranks, and on one rank those that they are compared with."""
    folder = folder / str(ranks)
    teacher = folder_of(folder / "teacher", SMALL, COST)
    base = {"teacher": str(teacher), "teacher_steps": STEPS, "teacher_weight": SHARE, "log_every": 1}
    if ranks == 1:
        runs = [
            {**base, "out": "plain", "zero": 0, "teacher": None, "teacher_steps": 0},
            {**base, "out": "taught", "zero": 0},
            {**base, "out": "chunked", "zero": 0, "loss": "chunked", "micro_batch": 2},
            {**base, "out": "weightless", "zero": 0, "teacher_weight": 0.0},
            {**base, "out": "compiled", "zero": 1, "compile": True},
            {**base, "out": "self", "zero": 0, "init": str(teacher), "model": None, "lr": 0.0},
        ]
    else:
        saved = {"save_every": 2, "export": "export", "export_dtype": "fp32"}
        runs = [
            {**base, **saved, **more, "out": f"{dtype}-{stage}{name}", "dtype": dtype, "zero": stage}
            for dtype, stage in STAGES
            for name, more in (("", {}), ("-cut", {"stop_at": 3}), ("-cut", {}))
        ]
    return [{**run, "out": f"{ranks}/{run['out']}"} for run in runs]


@pytest.fixture(scope="module")
def one(launches) -> Path:
    return launches(__name__) / "1"


@pytest.fixture(scope="module")
def two(launches) -> Path:
    return launches(__name__) / "2"


def divergences(folder: Path) -> list[float | None]:
    return [record.get("distillation_loss") for record in records(folder, "step")]


def test_records_hold_both_losses_and_the_teachers_cost(one):
    (run,), steps = records(one / "taught", "run"), records(one / "taught", "step")
    flops = count_cost(SMALL, SEQ_LEN).forward_flops
    assert run["teacher"] == {"name": "teacher", "steps": STEPS, "weight": SHARE, "flops_per_token": flops}
    assert (run["source_tokens"], run["arm"]) == (COST["tokens"], "scratch-distilled")
    assert ["distillation_loss" in step for step in steps] == [True] * STEPS + [False] * (len(steps) - STEPS)
    tokens = SETTINGS["batch"] * SEQ_LEN
    for step in steps:
        wanted = step["tokens"] * run["flops_per_token"] + min(step["step"], STEPS) * tokens * flops
        assert step["flops"] == wanted
    assert records(one / "taught", "eval")[-1]["flops"] == steps[-1]["flops"]
    assert "teacher" not in records(one / "plain", "run")[0]


def test_the_first_step_has_the_losses_that_transformers_computes(one):
    from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM

    from phigrow.training.process import World
    from phigrow.training.weights import fill_from_scratch

    blocks = FakeBlocks()
    ids = torch.from_numpy(blocks.train.batch(blocks.make_feed(0, SETTINGS["batch"]).rows(0)))
    sizes = {key: value for key, value in TINY.items() if key not in ("architectures", "model_type")}
    model = PhiForCausalLM(PhiConfig(**sizes)).eval()
    fill_from_scratch(model, 0, 0.02, World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu")))
    teacher = AutoModelForCausalLM.from_pretrained(one / "teacher").eval()
    with torch.no_grad():
        own, wanted = (m(input_ids=ids[:, :-1]).logits.double().log_softmax(-1) for m in (model, teacher))
    entropy = float(-own.gather(2, ids[:, 1:, None]).mean())
    divergence = float((wanted.exp() * (wanted - own)).sum(-1).mean())
    for name in ("taught", "chunked", "compiled"):
        assert losses(one / name)[0] == pytest.approx(entropy, rel=1e-6)
        assert divergences(one / name)[0] == pytest.approx(divergence, rel=1e-5)
    assert divergence > 0.01


def test_chunks_compilation_and_micro_batches_change_nothing(one):
    for name in ("chunked", "compiled"):
        torch.testing.assert_close(losses(one / name), losses(one / "taught"), rtol=2e-6, atol=0)


def test_a_teacher_changes_the_curve_and_one_without_weight_does_not(one):
    plain, taught = losses(one / "plain"), losses(one / "taught")
    torch.testing.assert_close(losses(one / "weightless"), plain, rtol=2e-6, atol=0)
    assert taught[0] == pytest.approx(plain[0], rel=1e-6)
    assert max(abs(a - b) for a, b in zip(taught, plain, strict=True)) > 1e-3


def test_a_model_does_not_diverge_from_itself(one):
    assert all(abs(value) < 1e-6 for value in divergences(one / "self")[:STEPS])  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "stage"), STAGES)
def test_every_stage_distils_alike_and_continues_to_the_bit(one, two, dtype, stage):
    run = two / f"{dtype}-{stage}"
    tolerance = {"fp32": 3e-6, "bf16": 2e-3}[dtype]
    torch.testing.assert_close(losses(run), losses(one / "taught"), rtol=tolerance, atol=0)
    torch.testing.assert_close(
        divergences(run)[:STEPS], divergences(one / "taught")[:STEPS], rtol={"fp32": 1e-5, "bf16": 2e-2}[dtype], atol=0
    )
    assert_continued(two / f"{dtype}-{stage}-cut", run)
    assert divergences(two / f"{dtype}-{stage}-cut") == divergences(run)
