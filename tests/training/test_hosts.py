"""Two hosts, as two network namespaces joined by a virtual cable, each with DeepSpeed's launcher in its no-ssh mode."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from jobs import PRETRAIN, STEPS, end, finish, last_step, launcher, prepared, start, wait_for, words
from launching import losses, records

from phigrow.checkpoints.run_checkpoints import marked_checkpoints

pytestmark = pytest.mark.slow
HOSTS = {"a": "10.213.77.1", "b": "10.213.77.2"}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[dict[str, str]]:
    """Two namespaces by the letter of their host."""
    if shutil.which("ip") is None:
        pytest.skip("no 'ip' command (iproute2)")
    names = {host: f"phigrow-{os.getpid()}-{host}" for host in HOSTS}
    with contextlib.ExitStack() as stack:
        try:
            for name in names.values():
                ip("netns", "add", name)
                stack.callback(ip, "netns", "delete", name)
            a, b = names.values()
            ip("link", "add", "eth-a", "netns", a, "type", "veth", "peer", "name", "eth-b", "netns", b)
            for host, name in names.items():
                ip("-n", name, "address", "add", f"{HOSTS[host]}/24", "dev", f"eth-{host}")
                ip("-n", name, "link", "set", f"eth-{host}", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        yield names


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = prepared(tmp_path_factory.mktemp("hosts"))
    (folder / "hostfile").write_text("".join(f"{address} slots=1\n" for address in HOSTS.values()))
    code, output = finish(start([*launcher(2), *words(folder, "one-host")]))
    assert code == 0, output[-6000:]
    return folder


def launched(names: dict[str, str], folder: Path, out: str) -> dict[str, subprocess.Popen[str]]:
    """Start the same command on both hosts."""
    jobs = {}
    for rank, (host, name) in enumerate(names.items()):
        runner = [*launcher(1)[:3], f"--hostfile={folder / 'hostfile'}", "--no_ssh", f"--node_rank={rank}"]
        runner += [f"--master_addr={HOSTS['a']}", "--master_port=29871", str(PRETRAIN)]
        command = ["ip", "netns", "exec", name, *runner, *words(folder, out)]
        jobs[host] = start(command, GLOO_SOCKET_IFNAME=f"eth-{host}", DEEPSPEED_TIMEOUT="1")
    return jobs


def test_two_hosts_train_as_two_ranks_of_one(hosts, folder):
    jobs = launched(hosts, folder, "two-hosts")
    ended = {host: finish(job) for host, job in jobs.items()}
    assert [code for code, _ in ended.values()] == [0, 0], ended["a"][1][-4000:] + ended["b"][1][-4000:]
    assert "ranks: 2 on" in ended["a"][1]
    assert "ranks: 2 on" not in ended["b"][1]  # rank 0 speaks for all
    (meta,) = records(folder / "two-hosts", "run")
    assert meta["world_size"] == 2
    assert losses(folder / "two-hosts") == losses(folder / "one-host")
    assert losses(folder / "two-hosts", "eval") == losses(folder / "one-host", "eval")


@pytest.mark.parametrize("lost", ["b", "a"])
def test_a_host_that_is_lost_ends_the_other_and_one_host_goes_on(hosts, folder, lost):
    out = folder / f"lost-{lost}"
    jobs = launched(hosts, folder, out.name)
    try:
        wait_for(lambda: last_step(out) >= 13, jobs["a"])
        # Everything on one host at once, its launcher too.
        for pid in subprocess.check_output(["ip", "netns", "pids", hosts[lost]], text=True).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        survivor = "a" if lost == "b" else "b"
        code, output = finish(jobs[survivor], 100)
    finally:
        for job in jobs.values():
            end(job)
            job.communicate()
    assert code != 0
    said = re.search(r"rank (\d) lost another rank[\s\S]*continues from the checkpoint of step (\d+)", output)
    assert said, output[-4000:]
    assert said[1] == ("0" if survivor == "a" else "1")
    assert int(said[2]) == marked_checkpoints(out)[0][-1].progress.step >= 10
    if lost == "b":
        code, output = finish(start([*launcher(1), *words(folder, out.name), "--universal"]))
        assert code == 0, output[-4000:]
        assert [r["step"] for r in records(out, "step")] == list(range(1, STEPS + 1))
        np.testing.assert_allclose(losses(out), losses(folder / "one-host"), rtol=1e-5)
