"""Variables of launchers in the environment, and signals that ask a run to stop."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

from phigrow.errors import GrowthError, MachineError
from phigrow.training import RunConfig, entry, service
from phigrow.training.engine import check_dtype
from phigrow.training.lost_ranks import LostRank, unreachable_named
from phigrow.training.process import StopRequest, environment_kept, own_rank, prepare_environment, start
from phigrow.training.step import dropout_seed

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """Set variables of a launcher, and nothing else of one; all are restored."""

    def put(**variables: str) -> None:
        for name in LAUNCHER:
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize("stray", [{"RANK": ""}, {"RANK": "1"}, {"RANK": "3", "WORLD_SIZE": ""}, {"WORLD_SIZE": "8"}])
def test_a_rank_without_companions_is_no_launch(environment, stray):
    environment(**stray)
    assert own_rank() == 0
    prepare_environment()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")
    assert int(os.environ["MASTER_PORT"]) > 0


def test_a_launch_is_left_as_it_is(environment):
    environment(RANK="1", WORLD_SIZE="2", MASTER_PORT="5", MASTER_ADDR="here", LOCAL_RANK="1")
    assert own_rank() == 1
    prepare_environment()
    assert (os.environ["RANK"], os.environ["MASTER_PORT"]) == ("1", "5")


@pytest.mark.parametrize("variables", [{"RANK": "first", "WORLD_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "-2"}])
def test_a_variable_that_is_no_number_is_one_error(environment, variables, capsys):
    environment(**variables)
    with pytest.raises(GrowthError, match=r"(?s)environment variable .* is '.*unset RANK and WORLD_SIZE"):
        own_rank()
    assert entry.run(["--steps", "x"]) == (2, False)
    assert capsys.readouterr().err.startswith("error: the environment variable ")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but MASTER_ADDR, MASTER_PORT, LOCAL_RANK are not set"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "5", "LOCAL_RANK": ""},
            "WORLD_SIZE is 2, but LOCAL_RANK is not set",
        ),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "http"}, "the environment variable MASTER_PORT is 'http'"),
    ],
)
def test_a_launch_with_incomplete_variables_is_one_error(environment, variables, message):
    environment(**variables)
    with pytest.raises(GrowthError) as error:
        prepare_environment()
    assert error.value.what == message
    assert "start the run with deepspeed or torchrun" in str(error.value.fix)


@pytest.mark.parametrize("local_rank", ["1", "7"])
def test_a_rank_without_a_device_is_refused_before_data_is_read(environment, monkeypatch, capsys, tmp_path, local_rank):
    chosen = []
    accelerator = SimpleNamespace(
        device_name=lambda: "cuda", device_count=lambda: 1, set_device=chosen.append,
        communication_backend_name=lambda: "nccl",
    )  # fmt: skip

    def init_distributed(**settings):
        raise RuntimeError("this rank has a device")

    comm = SimpleNamespace(is_initialized=lambda: False)
    deepspeed = SimpleNamespace(comm=comm, init_distributed=init_distributed)
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    monkeypatch.setitem(sys.modules, "deepspeed.accelerator", SimpleNamespace(get_accelerator=lambda: accelerator))
    monkeypatch.setattr("phigrow.training.process.without_shared_memory_kernel", contextlib.nullcontext)
    launch = {"RANK": local_rank, "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "5"}
    (tmp_path / "data").mkdir()  # which is no folder of blocks
    words = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--model", "phi-1"]
    environment(**launch, LOCAL_RANK=local_rank)
    monkeypatch.setattr(entry, "WAIT_SECONDS", 0)
    assert entry.run(words) == (2, False)
    assert f"LOCAL_RANK is {local_rank}, but this host has 1 device\n" in capsys.readouterr().err
    assert chosen == []
    assert not (tmp_path / "run").exists()
    environment(**launch, LOCAL_RANK="0")  # negative control
    with pytest.raises(RuntimeError, match="this rank has a device"):
        start()
    assert chosen == [0]


def test_a_rank_that_does_not_reach_rank_0_is_lost_and_a_port_in_use_is_an_error(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node-7")
    monkeypatch.setenv("MASTER_PORT", "29500")
    network = type("DistNetworkError", (RuntimeError,), {})

    def joined(error: Exception, size: int) -> None:
        with unreachable_named(1, size):
            raise error

    late = network("The client socket has timed out after 600000ms while trying to connect to (node-7, 29500).")
    with pytest.raises(LostRank, match=r"rank 1: rank 0 cannot be reached at node-7:29500[\s\S]*timed out"):
        joined(late, 2)
    for error, size in ((late, 1), (network("port: 29500, name: EADDRINUSE"), 2), (RuntimeError("a bug"), 2)):
        with pytest.raises(RuntimeError) as caught:
            joined(error, size)
        assert caught.value is error


def test_one_rank_needs_no_companions(environment):
    environment(RANK="0", WORLD_SIZE="1")
    prepare_environment()
    assert (os.environ["LOCAL_RANK"], os.environ["MASTER_ADDR"]) == ("0", "127.0.0.1")
    assert int(os.environ["MASTER_PORT"]) > 0


def test_the_only_process_of_a_launch_prints_its_error(environment, monkeypatch, capsys):
    environment(RANK="1", WORLD_SIZE="2")
    waited: list[float] = []
    monkeypatch.setattr(entry.time, "sleep", waited.append)
    assert entry.run(["--stepz", "3"]) == (2, False)
    assert waited == [entry.WAIT_SECONDS]  # a launcher has ended this rank by then, if there is a rank 0
    assert capsys.readouterr().err.startswith("error on rank 1: there is no key 'stepz'")


def test_variables_of_a_run_do_not_outlive_it(environment, monkeypatch):
    environment(MASTER_PORT="7")
    monkeypatch.setenv("GOMP_SPINCOUNT", "1")
    before = dict(os.environ)

    @environment_kept()
    def fail() -> None:
        prepare_environment()
        assert os.environ["RANK"] == "0"
        assert os.environ["MASTER_PORT"] != "7"  # another program's
        os.environ["WANDB_NAME"] = "first"
        del os.environ["GOMP_SPINCOUNT"]
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (OSError(28, "No space left on device", "runs/records.jsonl"), "the disk is full\n  where: runs/records.jsonl"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 8 vs 4"), "PyTorch could not write"),
        (ImportError("/x/op.so: failed to map segment from shared object"), "a compiled extension cannot be loaded"),
        (OSError(116, "Stale file handle", "data/a.arrow"), "the operating system refuses a file"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "the memory of the accelerator"),
    ],
)
def test_what_the_machine_refuses_during_a_run_says_how_to_continue(
    environment, monkeypatch, tmp_path, capsys, raised, message
):
    environment()

    def failing(config: object) -> None:
        raise raised

    monkeypatch.setattr("phigrow.training.loop.train", failing)
    out = tmp_path / "run"
    assert entry.run(["demo", "--out", str(out)]) == (75, False)
    before = capsys.readouterr().err
    assert before.startswith(f"error: {message}")
    assert "complete checkpoint" not in before
    out.mkdir()
    assert entry.run(["demo", "--out", str(out)]) == (75, False)
    assert f"There is no complete checkpoint in {out}: the same command starts at step 0." in capsys.readouterr().err
    monkeypatch.setattr("phigrow.training.loop.train", lambda config: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):  # negative control: a bug keeps its traceback
        entry.run(["demo", "--out", str(out)])


def test_refusals_that_were_described_before_have_their_own_exit_code_and_bad_input_keeps_2(
    environment, monkeypatch, capsys
):
    environment()
    for error, code in (
        (MachineError("the stream cannot be read", fix="start again"), 75),
        (pickle.loads(pickle.dumps(MachineError("the disk is full"))), 75),  # noqa: S301 - as rank 0 sends it
        (MachineError("the disk is full").at("runs/a"), 75),
        (GrowthError("lr is -1"), 2),  # negative control
    ):

        def failing(config: object, error: GrowthError = error) -> None:
            raise error

        monkeypatch.setattr("phigrow.training.loop.train", failing)
        assert entry.run(["demo"]) == (code, False)
        assert capsys.readouterr().err.startswith(f"error: {error.what}")
    assert (entry.TEMPORARY, entry.BAD_INPUT) == (os.EX_TEMPFAIL, 2)


def test_ranks_of_a_service_that_the_machine_refuses_exit_with_the_code_for_a_later_start(
    environment, monkeypatch, tmp_path
):
    environment()
    for error, code in ((OSError(28, "No space left on device"), 75), (GrowthError("WORLD_SIZE is 2"), 2)):

        def failing(error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(service, "start", failing)
        assert service.main(tmp_path) == code


def test_a_start_refuses_data_types_that_the_device_does_not_have(monkeypatch):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    message = r"dtype fp16 does not work on this device[\s\S]*set dtype: bf16 or fp32"
    with pytest.raises(GrowthError, match=message):
        check_dtype(RunConfig(dtype="fp16"))
    check_dtype(RunConfig(dtype="bf16"))
    monkeypatch.setattr(get_accelerator(), "is_bf16_supported", lambda: False)
    with pytest.raises(GrowthError, match=r"dtype bf16 does not work[\s\S]*set dtype: fp32"):
        check_dtype(RunConfig(dtype="bf16"))
    check_dtype(RunConfig(dtype="fp32"))


def test_seeds_of_dropout_are_those_of_the_first_release_and_never_too_large():
    import torch

    assert dropout_seed(3, 17, 2) == (3 * 1_000_003 + 17) * 4096 + 2
    large = [dropout_seed(10**18 + seed, step, 0) for seed in range(3) for step in range(3)]
    assert len(set(large)) == 9
    for seed in (*large, dropout_seed(10**30, 10**6, 4095)):
        torch.Generator().manual_seed(seed)
    with pytest.raises((ValueError, RuntimeError)):  # negative control: the value before it is reduced
        torch.Generator().manual_seed((10**18 * 1_000_003) * 4096)


def test_a_stray_rank_does_not_silence_a_bad_option(environment, capsys):
    environment(RANK="1")
    assert entry.run(["--stepz", "3"]) == (2, False)
    assert "no key 'stepz'" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_signals_ask_a_run_to_stop(number):
    former = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
    assert signal.getsignal(number) == former


def test_nohup_stays_in_force():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGHUP, former)
