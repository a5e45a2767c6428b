"""How runs begin: a start that fails, a request to stop while one starts, and what a run says of its beginning."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import records
from scenarios import SEQ_LEN, SETTINGS, TINY, FakeBlocks

from phigrow.corpus import open_stream, stream_settings, train_tokenizer
from phigrow.errors import GrowthError
from phigrow.training import RunConfig, initial_state, train
from phigrow.training.data import check_tokenizer
from phigrow.training.initial_state import InitialState
from phigrow.training.process import StopRequest, forget_stop, leave
from phigrow.training.run_info import goes_on

# What torch's own modules say when DeepSpeed imports them in this process.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def run(out: Path, **settings: Any) -> Any:
    return train(RunConfig(**SETTINGS | {"out": str(out), "zero": 1} | settings), FakeBlocks())


def test_a_start_that_failed_does_not_block_the_corrected_command(alone, tmp_path):
    with pytest.raises(GrowthError, match="no configuration 'small'"):
        run(tmp_path, model="small")
    with pytest.raises(GrowthError, match="the model has a vocabulary of 90 tokens, but the data has one of 96"):
        run(tmp_path, vocab_size=90)
    assert run(tmp_path, steps=1, warmup=0).finished
    (record,) = records(tmp_path, "run")
    # What the blocks have, rather than the default of what nothing was prepared with.
    assert (record["config"]["seq_len"], record["seq_len"], RunConfig().seq_len) == (SEQ_LEN, SEQ_LEN, 256)
    # Negative control: where something was trained another configuration is refused.
    with pytest.raises(GrowthError, match=r"with other settings[\s\S]*vocab_size \(None, now 97\)"):
        run(tmp_path, vocab_size=97)


def test_a_run_leaves_nothing_in_the_environment_and_another_follows_it(alone, tmp_path):
    before = dict(os.environ)
    assert run(tmp_path / "first", steps=1, warmup=0).finished
    assert dict(os.environ) == before
    leave()  # as the command does at its end
    assert not torch.distributed.is_initialized()
    # A process group of another program: a notebook that has used torch.distributed.
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    assert run(tmp_path / "second", steps=1, warmup=0).finished
    assert dict(os.environ) == before
    leave()
    assert torch.distributed.is_initialized()  # it is not phigrow's to end
    first, second = (records(tmp_path / name, "step") for name in ("first", "second"))
    assert first[0]["loss"] == second[0]["loss"]


def test_training_on_cpus_needs_no_compiler(alone, tmp_path, monkeypatch):
    from deepspeed.ops.op_builder import CPUAdamBuilder

    for name in ("PATH", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
        (tmp_path / name).mkdir()
    monkeypatch.delenv("CXX", raising=False)
    assert run(tmp_path / "run", steps=1, warmup=0, compile=False).finished
    assert list((tmp_path / "TORCH_EXTENSIONS_DIR").iterdir()) == []
    # Negative control: an extension cannot be built here.
    with pytest.raises(Exception, match=r"JIT load|Error building"):
        CPUAdamBuilder().load(verbose=False)


@pytest.mark.parametrize("when", ["before", "while it starts"])
def test_a_request_to_stop_counts_from_the_first_moment_of_a_run(alone, tmp_path, monkeypatch, when):
    stop, initial_state_of = tmp_path / "stop", initial_state.initial_state_of

    def starting(*words: Any) -> InitialState:
        assert not stop.exists()  # one that asked a run before this one is gone
        if when == "while it starts":
            stop.touch()
        return initial_state_of(*words)

    if when == "before":
        stop.touch()
    monkeypatch.setattr(initial_state, "initial_state_of", starting)
    summary = run(tmp_path, log_every=1, steps=4, eval_every=0)
    assert (summary.finished, summary.step < 4) == ((True, False) if when == "before" else (False, True))
    assert not stop.exists()


def test_a_request_is_forgotten_by_rank_0_alone_and_read_once(tmp_path, monkeypatch):
    stop = tmp_path / "stop"
    stop.touch()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    forget_stop(stop)
    assert stop.exists()
    with StopRequest(stop) as request:
        assert request.asked
        assert not stop.exists()
        assert request.asked
    stop.touch()
    monkeypatch.setenv("RANK", "0")
    forget_stop(stop)
    forget_stop(stop)
    with StopRequest(stop) as request:
        assert not request.asked


def test_a_run_says_what_it_goes_on_from():
    config = RunConfig(steps=40, batch=16)
    later = RunConfig(steps=40, batch=16, schedule_start=40, warmup=0)
    assert goes_on(config, InitialState()) == []
    grown = InitialState(Path("large-optimizer"), 40, state="scale", step=40)
    assert goes_on(config, grown) == [
        "continues from: Adam's state of large-optimizer (step 40, scale), data from block 640, schedule from step 0 "
        "of 40"
    ]
    assert goes_on(later, InitialState(Path("reset"), 0, state="reset", step=7)) == [
        "continues from: fp32 masters of reset (step 7), Adam's moments at zero, data from block 0, schedule from step "
        "40 of 80"
    ]
    assert goes_on(config, InitialState(first=3)) == ["continues from: data from block 48, schedule from step 0 of 40"]
    assert goes_on(later, InitialState()) == ["continues from: schedule from step 40 of 80"]


def test_data_of_another_tokenizer_than_the_checkpoints_is_refused(tmp_path):
    init, other = tmp_path / "init", train_tokenizer(["another text " * 9], 260)
    tokenizer = train_tokenizer(["to be or not to be " * 9], 260)
    tokenizer.save_pretrained(init)
    other.save_pretrained(tmp_path / "data" / "tokenizer")
    message = (
        r"another tokenizer\n  where: .*\n  why: one token id stands for two different tokens\n"
        r"  what to do: prepare the data with 'phigrow data --tokenizer .*init'"
    )
    with pytest.raises(GrowthError, match=message):
        check_tokenizer(init, FakeBlocks(tokenizer_dir=tmp_path / "data" / "tokenizer"))

    def stream_of(tokenizer: Path) -> Any:
        """A stream, which has its tokenizer in memory."""
        (tmp_path / "text.txt").write_text("to be or not to be " * 9)
        values = {"ref": str(tmp_path / "text.txt"), "tokenizer": str(tokenizer), "heldout": 0}
        return open_stream(stream_settings(values), SEQ_LEN)

    with pytest.raises(GrowthError, match=r"where: the stream's tokenizer, and .*init/tokenizer.json"):
        check_tokenizer(init, stream_of(tmp_path / "data" / "tokenizer"))
    check_tokenizer(init, stream_of(init))
    check_tokenizer(init, FakeBlocks(tokenizer_dir=init))
    check_tokenizer(init, FakeBlocks())
    check_tokenizer(tmp_path, stream_of(tmp_path / "data" / "tokenizer"))


def test_a_run_compares_the_tokenizers_before_it_trains(alone, tmp_path):
    from transformers import PhiConfig, PhiForCausalLM

    init = tmp_path / "init"
    PhiForCausalLM(PhiConfig(**TINY)).save_pretrained(init)
    train_tokenizer(["to be or not to be " * 9], 260).save_pretrained(init)
    train_tokenizer(["another text " * 9], 260).save_pretrained(tmp_path / "other")
    config = RunConfig(**SETTINGS | {"out": str(tmp_path / "run"), "init": str(init), "model": None})
    with pytest.raises(GrowthError, match="the data was prepared with another tokenizer"):
        train(config, FakeBlocks(tokenizer_dir=tmp_path / "other"))
    assert not (tmp_path / "run" / "records.jsonl").exists()
