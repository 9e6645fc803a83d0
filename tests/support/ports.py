"""Ports for servers that are told which port to listen on."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

# below those that Linux gives to sockets without a port: no other process takes one meanwhile
LOWEST, HIGHEST = 20_000, 32_000


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that nothing listens on, each another."""
    found: list[int] = []
    drawn = random.SystemRandom().sample(range(LOWEST, HIGHEST), 1000)
    with ExitStack() as stack:
        for port in drawn:
            if len(found) == count:
                break
            try:
                stack.enter_context(socket.create_server(("", port)))
            except OSError:  # taken
                continue
            found.append(port)
    assert len(found) == count
    return found
