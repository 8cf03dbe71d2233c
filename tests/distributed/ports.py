"""A port for rank 0 to listen at, which nobody takes between its choice and its use.

The kernel gives outgoing connections ports from 32768 on, so one that it chose and that was given back may go to another job's
connection before rank 0 listens: seconds later, and likelier the more workers of pytest run. Lower ports are given to nobody.
"""

from __future__ import annotations

import itertools
import random
import socket

_candidates = itertools.count(random.SystemRandom().randrange(10_000, 20_000))  #: runs beside this one start elsewhere


def free_port() -> int:
    for port in _candidates:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError("unreachable: the candidates are endless")
