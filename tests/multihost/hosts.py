"""Two hosts on one machine: two network namespaces with a cable between them, and a host name for each.

Processes of one host reach the other through its address only, as on a cluster; file systems are shared, as a cluster's are.
Needs root and iproute2.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PORT = 29500  # a namespace has all ports to itself


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


@dataclass
class TwoHosts:
    a: Host
    b: Host

    def link(self, state: str) -> None:
        """``down`` cuts the cable, ``up`` mends it."""
        _ip("-n", self.b.namespace, "link", "set", "eth0", state)

    def launch(
        self, words: Sequence[str | Path], logs: Path, ranks_per_host: int, *options: str, **env: str
    ) -> list[subprocess.Popen[bytes]]:
        """`accelerate launch launch/train.py WORDS` on both, as docs/cluster.md says; a process each, `a` is machine 0."""
        logs.mkdir(parents=True, exist_ok=True)
        return [
            host.start(
                [
                    *(sys.executable, "-m", "accelerate.commands.launch"),
                    *(
                        "--config_file",
                        "launch/accelerate/cpu_zero3.yaml",
                        "--deepspeed_multinode_launcher",
                        "standard",
                    ),
                    *("--num_machines", "2", "--num_processes", str(2 * ranks_per_host), "--machine_rank", str(rank)),
                    *("--main_process_ip", self.a.address, "--main_process_port", str(PORT), *options),
                    *("launch/train.py", *words),
                ],
                logs / f"{host.name}.log",
                **env,
            )
            for rank, host in enumerate((self.a, self.b))
        ]


def why_not() -> str | None:
    """The reason why this machine cannot pretend to be two; None where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with two_hosts():
            return None
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not allowed here: {error.stderr.strip()}"


@contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Made, and at the end taken away with all that runs on them."""
    tag = f"mrpo{os.getpid()}"
    a, b = (Host(f"host-{x}", f"{tag}{x}", f"10.77.0.{i}") for i, x in enumerate("ab", 1))
    made = []
    try:
        for host in (a, b):
            _ip("netns", "add", host.namespace)
            made.append(host)
            etc = Path("/etc/netns") / host.namespace  # `ip netns exec` lays these over /etc
            etc.mkdir(parents=True)
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n{a.address} {a.name}\n{b.address} {b.name}\n")
        _ip("link", "add", "eth0", "netns", a.namespace, "type", "veth", "peer", "name", "eth0", "netns", b.namespace)
        for host in (a, b):
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", host.namespace, "link", "set", device, "up")
        subprocess.run(["unshare", "--uts", "true"], check=True, capture_output=True, text=True)
        yield TwoHosts(a, b)
    finally:
        for host in made:
            host.kill()
            for process in host.processes:
                process.wait()
            _ip("netns", "del", host.namespace)
            shutil.rmtree(Path("/etc/netns") / host.namespace, ignore_errors=True)


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
