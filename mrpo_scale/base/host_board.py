"""What the ranks of one host tell each other without the network: a slot for each in a file that all of them map."""

from __future__ import annotations

import json
import mmap
import os
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

SLOT = 1024  #: bytes of a rank's slot
NOTICE = 8192  #: bytes of the notice that all may write and read, behind the slots


@dataclass(frozen=True)
class Seat:
    """Where a rank sits. The ranks of a host follow each other, as launchers number them."""

    rank: int
    world_size: int
    local_rank: int
    ranks_on_host: int
    host: str

    @classmethod
    def from_launcher(cls) -> Seat:
        """This process's; without a launcher's variables a host of its own."""
        local_rank, on_host = (int(os.environ.get(name, n)) for name, n in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
        return cls(
            dist.get_rank(), dist.get_world_size(), local_rank, max(on_host, local_rank + 1), socket.gethostname()
        )

    @property
    def first(self) -> int:
        """The first rank of this host."""
        return self.rank - self.local_rank

    @property
    def ranks(self) -> range:
        """The ranks of this host."""
        return range(self.first, self.first + self.ranks_on_host)


class HostBoard:
    """Slots of JSON. Writing one is a copy in memory: nothing that can block, fill up or fail.

    A reader may meet a slot half written. It then reads nothing and looks again at its next turn.
    """

    def __init__(self, slots: int, path: Path | None = None) -> None:
        """Map ``path``; without one a board that only this process has.

        Raises:
            OSError, ValueError: there is no such file, or it is too small.
        """
        self.slots, self.path = slots, path
        size = slots * SLOT + NOTICE
        if path is None:
            self._map = mmap.mmap(-1, size)
        else:
            with path.open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), size)

    @classmethod
    def create(cls, slots: int) -> HostBoard:
        """In memory where the system has a folder for that. Only this user's processes can open it."""
        memory = Path("/dev/shm")
        descriptor, name = tempfile.mkstemp(
            prefix="mrpo-heartbeat-", dir=memory if os.access(memory, os.W_OK) else None
        )
        try:
            os.posix_fallocate(descriptor, 0, slots * SLOT + NOTICE)  # now, since a full disk would kill a writer later
        finally:
            os.close(descriptor)
        return cls(slots, Path(name))

    def unlink(self) -> None:
        """Take the name away: those who mapped the file keep it, and it goes with the last of them."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            self.path = None

    def write(self, slot: int, value: Any) -> None:
        """Raises ValueError where ``value`` is too long for a slot."""
        self._put(slot * SLOT, SLOT, value)

    def read(self, slot: int) -> Any:
        """None where nothing stands, or half of something."""
        return self._take(slot * SLOT, SLOT)

    def write_notice(self, value: Any) -> None:
        """Raises ValueError where ``value`` is too long."""
        self._put(self.slots * SLOT, NOTICE, value)

    def read_notice(self) -> Any:
        return self._take(self.slots * SLOT, NOTICE)

    def _put(self, start: int, size: int, value: Any) -> None:
        data = b"" if value is None else json.dumps(value).encode()
        if len(data) > size:
            raise ValueError(f"{len(data)} bytes do not fit into {size}")
        self._map[start : start + size] = data.ljust(size, b"\0")

    def _take(self, start: int, size: int) -> Any:
        if not self._map[start]:
            return None
        try:
            return json.loads(self._map[start : start + size].rstrip(b"\0"))
        except ValueError:
            return None
