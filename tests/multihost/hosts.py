"""Several hosts on one machine: network namespaces, each with a host name and a cable to one switch.

Processes of one host reach another through its address only, as on a cluster; file systems are shared, as a cluster's are.
Needs root and iproute2.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.tools import lacking, require_tool

ROOT = Path(__file__).resolve().parents[2]
PORT = 29500  # a namespace has all ports to itself
CLONE_NEWNET, CLONE_NEWUTS, CLONE_NEWNS = 0x40000000, 0x04000000, 0x00020000  # linux/sched.h
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000  # linux/mount.h


@dataclass
class Host:
    """One namespace. ``name`` is what its processes call their host."""

    name: str
    namespace: str
    address: str
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, words: Sequence[str | Path], log: Path, **env: str) -> subprocess.Popen[bytes]:
        """Run a command on this host, its output in ``log``."""
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"']
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*inside, self.name, *map(str, words)],
                cwd=ROOT,
                env={**os.environ, "GLOO_SOCKET_IFNAME": "eth0", **env},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def link(self, state: str) -> None:
        """``down`` pulls this host's cable, ``up`` plugs it in again."""
        _ip("-n", self.namespace, "link", "set", "eth0", state)

    def pids(self) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def kill(self) -> None:
        """SIGKILL for everything on this host, launchers first, as when its power goes."""
        while pids := self.pids():
            for pid in pids:
                _kill(pid)
            time.sleep(0.05)

    def kill_ranks(self) -> None:
        """SIGKILL for its ranks; the launcher that started them lives on."""
        for pid in self.pids():
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if words[1:3] == [b"-u", b"launch/train.py"]:
                _kill(pid)


def launch(
    hosts: Sequence[Host], words: Sequence[str | Path], logs: Path, ranks_per_host: int, *options: str, **env: str
) -> list[subprocess.Popen[bytes]]:
    """`accelerate launch launch/train.py WORDS` on all, as docs/cluster.md says; a process each, the first is machine 0."""
    logs.mkdir(parents=True, exist_ok=True)
    accelerate = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu_zero3.yaml"),
        *("--deepspeed_multinode_launcher", "standard", "--num_machines", str(len(hosts))),
        *("--num_processes", str(len(hosts) * ranks_per_host)),
        *("--main_process_ip", hosts[0].address, "--main_process_port", str(PORT), *options),
    ]
    return [
        host.start(
            [*accelerate, "--machine_rank", str(rank), "launch/train.py", *words], logs / f"{host.name}.log", **env
        )
        for rank, host in enumerate(hosts)
    ]


def seats(hosts: Sequence[Host], ranks_per_host: int) -> tuple[tuple[tuple[str, str], ...], int, str]:
    """What :func:`take_seat` needs to know, for ``Job.args``."""
    return tuple((host.name, host.namespace) for host in hosts), ranks_per_host, hosts[0].address


def take_seat(hosts: Sequence[tuple[str, str]], ranks_per_host: int, main_address: str) -> None:
    """Move this rank, which was forked without a launcher (tests/distributed/jobs.py), to its host: four launchers and eight ranks
    that each import for 20 s would take minutes before the first step."""
    group, local = divmod(int(os.environ["RANK"]), ranks_per_host)
    name, namespace = hosts[group]
    libc = ctypes.CDLL(None, use_errno=True)

    def call(function: str, *args: object) -> None:
        if getattr(libc, function)(*args):
            raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")

    with open(f"/run/netns/{namespace}") as file:
        call("setns", file.fileno(), CLONE_NEWNET)
    call("unshare", CLONE_NEWUTS | CLONE_NEWNS)
    socket.sethostname(name)
    call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    call("mount", f"/etc/netns/{namespace}/hosts".encode(), b"/etc/hosts", None, MS_BIND, None)
    launched = {"LOCAL_RANK": local, "LOCAL_WORLD_SIZE": ranks_per_host, "GROUP_RANK": group, "MASTER_PORT": PORT}
    os.environ |= {k: str(v) for k, v in launched.items()}
    os.environ |= {"MASTER_ADDR": main_address, "GLOO_SOCKET_IFNAME": "eth0"}


def require_hosts() -> None:
    """Skip, with the reason, where this machine cannot pretend to be several; fail where CI requires it."""
    require_tool("ip")
    if os.geteuid() != 0:
        lacking("network namespaces need root")
    try:
        with made_hosts(2):
            pass
    except subprocess.CalledProcessError as error:
        lacking(f"network namespaces are not allowed here: {error.stderr.strip()}")


@contextmanager
def made_hosts(count: int) -> Iterator[list[Host]]:
    """host-a, host-b, ... on one switch; at the end taken away with all that runs on them."""
    tag = f"mrpo{os.getpid()}"
    hosts = [Host(f"host-{x}", f"{tag}{x}", f"10.77.0.{i}") for i, x in enumerate("abcdefgh"[:count], 1)]
    names = "".join(f"{host.address} {host.name}\n" for host in hosts)
    switch = f"{tag}switch"
    made = []
    try:
        for namespace in (switch, *(host.namespace for host in hosts)):
            _ip("netns", "add", namespace)
            made.append(namespace)
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        for i, host in enumerate(hosts):
            etc = Path("/etc/netns") / host.namespace  # `ip netns exec` lays these over /etc
            etc.mkdir(parents=True)
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
            cable = ("type", "veth", "peer", "name", f"port{i}", "netns", switch)
            _ip("link", "add", "eth0", "netns", host.namespace, *cable)
            _ip("-n", switch, "link", "set", f"port{i}", "master", "switch", "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", host.namespace, "link", "set", device, "up")
        subprocess.run(["unshare", "--uts", "true"], check=True, capture_output=True, text=True)
        yield hosts
    finally:
        for host in hosts:
            if host.namespace in made:
                host.kill()
            for process in host.processes:
                process.wait()
            shutil.rmtree(Path("/etc/netns") / host.namespace, ignore_errors=True)
        for namespace in made:
            _ip("netns", "del", namespace)


def wait_until(condition: Callable[[], object], seconds: float, processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Return when ``condition`` holds. An AssertionError where it does not in time, or a process ended before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing happened for {seconds:.0f} s"
        assert all(process.poll() is None for process in processes), "a launcher ended too early"
        time.sleep(0.02)


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # gone meanwhile
