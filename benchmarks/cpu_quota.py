"""So many cores for a process, however many others run: what a rank with a machine of its own sees, on a machine that ranks share.

Where ranks share cores, one that waits lends its core to the others, and a wall clock does not show what waiting costs. Under a
quota each rank computes at its own speed and waits at its own cost.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONTROLLER = Path("/sys/fs/cgroup/cpu")  #: of cgroup v1; v2 is not served, since nothing here could test it
PERIOD = 10_000  #: microseconds, far below a micro-batch, so that the quota is a speed and not a stop


@contextmanager
def cpu_quota(cores: float) -> Iterator[None]:
    """Holds this process, with its threads and children, to ``cores`` (0.5: half of one) by the kernel's bandwidth control.
    Children have to end before it does.

    Raises:
        SystemExit: cgroup v1's cpu controller is not there, or this user may not write to it.
    """
    groups = [line.split(":") for line in Path("/proc/self/cgroup").read_text().splitlines()]
    before = CONTROLLER / next((path for _, names, path in groups if "cpu" in names.split(",")), "/").lstrip("/")
    group = before / f"mrpo-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise SystemExit(f"a CPU quota needs cgroup v1's cpu controller and root: {group}: {error.strerror}") from None
    try:
        (group / "cpu.cfs_period_us").write_text(str(PERIOD))
        (group / "cpu.cfs_quota_us").write_text(str(round(cores * PERIOD)))
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (before / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()
