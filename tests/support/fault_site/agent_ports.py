"""Tell a raylet the ports of its agents before they have started. Imports nothing slow.

A raylet waits 15 s for the file with a port that each agent writes, and ends without it. On a busy
machine an agent, which imports Ray, takes longer. Here the agent's interpreter chooses the ports
and writes the files before it imports anything; the agent writes the same ports again.
"""

from __future__ import annotations

import random
import socket
import sys
from pathlib import Path

# below those that Linux gives to sockets without a port: no other process takes one meanwhile
LOWEST, HIGHEST = 20_000, 32_000
# a part of an agent's command -> the names of its port files, and its options
PORTS = {
    "/dashboard/agent.py": {
        "metrics_agent_port": "--grpc-port",
        "metrics_export_port": "--metrics-export-port",
        "dashboard_agent_listen_port": "--listen-port",
    },
    "/runtime_env/agent/main.py": {"runtime_env_agent_port": "--runtime-env-agent-port"},
}


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that nothing listens on, each another."""
    found: list[int] = []
    opened: list[socket.socket] = []
    drawn = random.SystemRandom().sample(range(LOWEST, HIGHEST), 1000)
    while len(found) < count:
        port = drawn.pop()
        try:
            opened.append(socket.create_server(("", port)))
        except OSError:  # taken
            continue
        found.append(port)
    for one in opened:
        one.close()
    return found


def publish_ports() -> None:
    """Choose the ports of this process, which is to become an agent; else do nothing."""
    command = " ".join(sys.orig_argv)
    for script, ports in PORTS.items():
        if script in command:
            for name, option in ports.items():
                _publish_port(name, option)


def _publish_port(name: str, option: str) -> None:
    session, node = _value_of("--session-dir"), _value_of("--node-id")
    port = int(_value_of(option)) or free_ports(1)[0]
    sys.argv[:] = [
        f"{option}={port}" if word.startswith(f"{option}=") else word for word in sys.argv
    ]
    whole = Path(session, f"{name}_{node}")
    part = whole.with_name(f".{whole.name}.tmp")
    part.write_text(str(port))
    part.rename(whole)


def _value_of(option: str) -> str:
    (value,) = [word.partition("=")[2] for word in sys.argv if word.startswith(f"{option}=")]
    return value
