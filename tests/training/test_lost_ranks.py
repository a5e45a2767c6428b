"""Errors and notices about ranks that are lost, with real collectives of gloo between threads of this process."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launching import ROOT

from phigrow.training import entry, lost_ranks, service
from phigrow.training.loop import engine_released
from phigrow.training.lost_ranks import (
    Answer,
    LostRank,
    RankWatch,
    exit_explained,
    groups_with_timeout,
    keep_traces,
    lost_rank_named,
    notice,
    timeout_minutes,
)
from phigrow.training.process import World

TWO = [World(rank, 2, rank, 2, torch.device("cpu")) for rank in (0, 1)]
NCCL_TIMEOUT = (
    "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=808, OpType=ALLREDUCE, NumelIn=9801523, "
    "NumelOut=9801523, Timeout(ms)=600000) ran for 600020 milliseconds before timing out."
)


@pytest.fixture
def store() -> Any:
    """A store of rank 0, as a launcher's."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def in_threads(work: Any) -> list[Any]:
    """Run `work` for ranks 0 and 1 side by side, and return both results."""
    out: list[Any] = [None, None]
    threads = [threading.Thread(target=lambda r=rank: out.__setitem__(r, work(r))) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


def test_a_rank_that_waits_too_long_names_step_line_wait_and_what_to_look_at(store, monkeypatch):
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "7")
    clients = [dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False) for _ in TWO]
    groups = in_threads(lambda rank: dist.ProcessGroupGloo(clients[rank], rank, 2, timedelta(seconds=20)))
    options = dist.AllreduceOptions()
    options.timeout = timedelta(seconds=0.3)
    watch = RankWatch(TWO[0], "run")
    watch.begin(13)
    with pytest.raises(LostRank) as lost, lost_rank_named(TWO[0], lambda: "ADVICE", watch):
        groups[0].allreduce([torch.ones(1)], options).wait()  # rank 1 never does
    text = str(lost.value)
    assert text.startswith("rank 0 lost another rank\n  where: step 13 after 0 s\n  why: ")
    assert "Timed out waiting" in text
    assert "'Out of memory' in dmesg" in text
    assert "NCCL_DEBUG=INFO" in text
    assert "A rank waits for 7 minutes" in text
    assert text.endswith("DEEPSPEED_TIMEOUT. ADVICE")


def test_nccl_names_its_collective_and_the_wait():
    watch = RankWatch(TWO[1], "run")
    watch.begin(13)
    with pytest.raises(LostRank, match=r"rank 1 lost another rank\n  where: step 13 allreduce after 600 s\n"):  # noqa: SIM117
        with lost_rank_named(TWO[1], lambda: "", watch):
            raise dist.DistBackendError(NCCL_TIMEOUT)


def test_a_collective_that_fails_by_itself_loses_no_rank():
    with pytest.raises(LostRank, match=r"^a collective failed on rank 1\n[\s\S]*memory of this GPU"):  # noqa: SIM117
        with lost_rank_named(TWO[1], lambda: ""):
            raise dist.DistBackendError(
                "NCCL error: unhandled cuda error. Last error: Failed to CUDA calloc async 4 bytes"
            )


def test_only_errors_of_communication_are_taken_for_a_lost_rank():
    with pytest.raises(LostRank, match=r"Connection closed by peer\n"), lost_rank_named(TWO[1], lambda: ""):
        raise RuntimeError("Connection closed by peer\nmore")
    with pytest.raises(RuntimeError, match="shape mismatch"), lost_rank_named(TWO[1], lambda: ""):
        raise RuntimeError("shape mismatch")
    alone = World(0, 1, 0, 1, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="Connection closed"), lost_rank_named(alone, lambda: ""):
        raise RuntimeError("Connection closed by peer")


def test_the_command_prints_one_error_and_exits_with_75(monkeypatch, capsys):
    ended: list[int] = []

    def train(config: Any) -> Any:
        with lost_rank_named(TWO[1], lambda: "ADVICE"):
            raise dist.DistBackendError(NCCL_TIMEOUT)

    def leave(code: int) -> Any:
        ended.append(code)
        raise SystemExit(code)

    monkeypatch.setattr("phigrow.training.loop.train", train)
    monkeypatch.setattr("os._exit", leave)
    with pytest.raises(SystemExit):
        entry.run(["--data", "data"])
    assert ended == [75]
    assert capsys.readouterr().err.startswith("error: rank 1 lost another rank\n  where: allreduce after 600 s\n")


def test_ranks_that_wait_for_their_next_run_end_in_the_same_way(monkeypatch, capsys, tmp_path):
    def lose(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:5")

    def leave(code: int) -> Any:
        raise SystemExit(code)

    monkeypatch.setattr(service, "start", lambda: TWO[1])
    monkeypatch.setattr(service, "on_rank_zero", lose)
    monkeypatch.setattr("os._exit", leave)
    with pytest.raises(SystemExit) as ended:
        service.main(tmp_path)
    assert ended.value.code == 75
    assert "error: rank 1 lost another rank\n" in capsys.readouterr().err


def reports(store: Any, monkeypatch: Any, capsys: Any, ranks: list[int], size: int) -> str:
    """Return the notices of these ranks if no step ends; their main threads are in a function of torch."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    watches = [
        RankWatch(World(rank, size, rank, size, torch.device("cpu")), "run", patience=0.2, grace=0.4) for rank in ranks
    ]
    for watch in watches:
        watch.begin(5)
        watch.__enter__()
    time.sleep(1.0)
    for watch in watches:
        watch.__exit__()
    return capsys.readouterr().err


def test_a_notice_names_the_rank_that_does_not_answer(store, monkeypatch, capsys):
    text = reports(store, monkeypatch, capsys, [0, 2], 3)
    first, *rest = text.splitlines()
    assert first == "notice: no step has ended for 0 s" or first == "notice: no step has ended for 1 s"
    assert rest[0].startswith("  ranks 0, 2: step 5, ")
    assert rest[1].startswith("  rank 1: no answer; its process or host has ended or is stopped")
    assert len(rest) == 2  # rank 0 alone prints


def test_without_a_rank_that_is_missing_the_notice_lists_none(store, monkeypatch, capsys):
    text = reports(store, monkeypatch, capsys, [0, 1], 2)
    assert "  ranks 0-1: step 5, " in text
    assert "no answer" not in text


def test_a_store_that_is_gone_is_rank_0s(monkeypatch, capsys):
    gone = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = gone.port
    del gone
    text = reports(type("Gone", (), {"port": port}), monkeypatch, capsys, [1], 2)
    assert "  rank 0: its store does not answer" in text


def test_a_run_whose_steps_end_prints_nothing(monkeypatch, capsys):
    with RankWatch(TWO[0], "run", patience=0.3) as watch:
        for step in range(1, 12):
            watch.begin(step)
            time.sleep(0.05)
    assert capsys.readouterr().err == ""
    one = RankWatch(World(0, 1, 0, 1, torch.device("cpu")), "run", patience=0.0)
    with one:
        assert "phigrow-ranks" not in [thread.name for thread in threading.enumerate()]


def test_many_ranks_are_named_by_ranges():
    answers = [Answer(rank, 9, "all_reduce (phigrow/training/step.py, line 1)") for rank in range(96) if rank != 41]
    assert notice(300.0, answers, [41]).splitlines()[1:] == [
        "  ranks 0-40, 42-95: step 9, all_reduce (phigrow/training/step.py, line 1)",
        "  rank 41: no answer; its process or host has ended or is stopped. Look at its output, and at dmesg on its "
        "host",
    ]


def test_the_timeout_is_deepspeeds(monkeypatch):
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "30")
    assert timeout_minutes() == 30
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "")
    assert timeout_minutes() == 10


def test_groups_of_deepspeed_get_the_timeout_too(monkeypatch):
    """torch.distributed.new_group, which DeepSpeed calls without a timeout, in a process group of one rank."""
    made: list[timedelta] = []

    class Noted(dist.ProcessGroupGloo):
        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            made.append(timeout)
            super().__init__(store, rank, size, timeout=timeout)

    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "3")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(minutes=3))
    monkeypatch.setattr("torch.distributed.distributed_c10d.ProcessGroupGloo", Noted)
    try:
        with groups_with_timeout():
            dist.new_group([0])
        dist.new_group([0])  # the negative control
    finally:
        dist.destroy_process_group()
    assert made == [timedelta(minutes=3), timedelta(minutes=30)]


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.13.0+cpu", {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "TORCH_FR_DUMP_TEMP_FILE": "/run/nccl-trace-rank-"}),
        (
            "2.6.0",
            {
                "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
                "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/run/nccl-trace-rank-",
                "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
            },
        ),
    ],
)
def test_torch_writes_its_last_collectives_into_the_runs_folder(monkeypatch, version, expected):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(os, "environ", {})
    keep_traces(Path("/run"))
    assert os.environ == expected
    monkeypatch.setattr(os, "environ", {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/mine"})
    keep_traces(Path("/run"))
    assert set(os.environ.values()) <= {"1", "2000", "/mine"}


@pytest.mark.parametrize(
    ("code", "words"), [(134, "NCCL's watchdog"), (250, "NCCL's watchdog"), (-9, "killed"), (137, "killed")]
)
def test_exit_codes_of_signals_are_explained(code, words):
    assert words in str(exit_explained(code))


def test_other_exit_codes_are_not_explained():
    assert [exit_explained(code) for code in (0, 1, 2, 75, 130, 143)] == [None] * 6


def test_the_slurm_script_explains_the_signals_that_ended_a_rank(tmp_path):
    script = ROOT / "phigrow" / "recipes" / "slurm" / "pretrain.sbatch"
    text = script.read_text()
    assert lost_ranks.DUMPS in text
    for name, content in (("scontrol", "#!/bin/bash\n[ $1 = show ] && echo here || true\n"), ("srun", "")):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "here", "SLURM_NTASKS": "1", "SLURM_NNODES": "1"}
    for code, words in ((134, "another rank was lost"), (137, "'Out of memory' in dmesg"), (75, "")):
        (tmp_path / "srun").write_text(f"#!/bin/bash\nexit {code}\n")
        done = subprocess.run(
            ["bash", str(script), "demo"],
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **job},
            capture_output=True,
            text=True,
            check=True,
        )
        assert (words in done.stderr) if words else done.stderr == ""


def test_an_engine_is_released_after_every_end_but_a_lost_rank(monkeypatch):
    released: list[str] = []
    monkeypatch.setattr("phigrow.training.zero.release", released.append)
    with engine_released("one"):
        pass
    with pytest.raises(ValueError, match="bad"), engine_released("two"):
        raise ValueError("bad")
    with pytest.raises(LostRank), engine_released("three"):
        raise LostRank("rank 1 is gone")
    assert released == ["one", "two"]

    def broken(engine: str) -> None:
        raise RuntimeError("a hook is gone")

    monkeypatch.setattr("phigrow.training.zero.release", broken)
    with pytest.raises(ValueError, match="bad"), engine_released("four"):  # the first error, not the second
        raise ValueError("bad")
    with pytest.raises(RuntimeError, match="a hook is gone"), engine_released("five"):
        pass
