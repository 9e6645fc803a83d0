"""Make hosts of Linux namespaces on one machine: each with its own network, processes and folders.

A host has its own address, process ids, /tmp, /dev/shm, /run and home. The hosts share the disk of
the machine, which is read-only to them, and a bridge. The first process of a host (INIT) ends all
others when it ends.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NETWORK = "10.77.0"  # the command itself has the address 10.77.0.1
TOOLS = ("ip", "mount", "nsenter", "setpriv", "unshare")
NAMESPACES = ("--mount", "--net", "--pid", "--uts", "--ipc")
UNSHARE = ("unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc")
INIT = "while :; do sleep 3600 & wait; done"  # reaps the processes of its host
STARTED = time.monotonic()
START_S = 120.0  # for a host or a server to start
# Run in a new host as `sh -ec FURNISH sh NAME IMAGE ...`, with its hosts file on standard input
FURNISH = """
name=$1 n=0 m=0; shift
mount -t tmpfs tmpfs /mnt
for image; do n=$((n + 1)); mkdir /mnt/$n; mount --bind "$image" /mnt/$n; done
mount -o remount,bind,ro /
for own in /tmp /var/tmp /run /dev/shm /root; do mount -t tmpfs -o mode=1777 tmpfs $own; done
for image; do
  m=$((m + 1)); mkdir -p "$image"; mount --bind /mnt/$m "$image"; mount -o remount,bind,ro "$image"
done
umount -R /mnt
cat > /run/hosts
mount --bind /run/hosts /etc/hosts
hostname "$name"
"""


class HostsError(Exception):
    """A host, a server or a run that does not do as expected."""


def log_line(line: str) -> None:
    """Print a line after the seconds since the start."""
    print(f"{time.monotonic() - STARTED:6.1f} s  {line}", flush=True)


def execute(*command: str, stdin: str = "") -> str:
    """Run a command and return its standard output.

    Raises HostsError with the last 15 lines of its output when it fails.
    """
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        output = (done.stderr or done.stdout).strip().splitlines()[-15:]
        failure = f"{' '.join(command[:12])} failed with exit code {done.returncode}:"
        raise HostsError("\n".join([failure, *output]))
    return done.stdout


def wait_until(is_true: Callable[[], Any], failure: str, timeout_s: float = START_S) -> None:
    """Wait until a condition is true. Raises HostsError with `failure` after timeout_s."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > deadline:
            raise HostsError(f"{failure} within {timeout_s:g} s")
        time.sleep(0.1)


def child_of(process: int) -> int:
    """Return the process that `unshare --fork` has started."""
    children = Path(f"/proc/{process}/task/{process}/children")
    wait_until(lambda: children.read_text().split(), "no namespace was made")
    return int(children.read_text().split()[0])


def shared_folders() -> list[str]:
    """Return the folders of the repository and of the Python environment.

    A host sees them wherever they lie, even below one of the folders that it has for itself.
    """
    folders = {
        ROOT,
        Path(sys.prefix),
        Path(sys.base_prefix),
        Path(sys.executable).resolve().parent,
    }
    return sorted(str(folder) for folder in folders)


@dataclass
class Host:
    """A host. When its first process ends, all its processes end."""

    name: str
    number: int  # the last number of its address
    pid: int  # of its first process

    @property
    def address(self) -> str:
        """Return the address of its only interface."""
        return f"{NETWORK}.{self.number}"

    def enter(self) -> list[str]:
        """Return the words before a command that run it in the host."""
        return ["nsenter", "--target", str(self.pid), *NAMESPACES]

    def inside(self, *command: str) -> list[str]:
        """Return the command that runs a command in the host, in the repository's folder."""
        return [*self.enter(), "env", f"--chdir={ROOT}", *command]

    def execute(self, *command: str, stdin: str = "") -> str:
        """Run a command in the host, as execute() does."""
        return execute(*self.inside(*command), stdin=stdin)

    def cut_off(self) -> None:
        """Disconnect the host, then kill all its processes. No other host is notified."""
        execute("ip", "link", "set", f"host{self.number}", "down")
        os.kill(self.pid, signal.SIGKILL)


class Hosts:
    """The network of the hosts, to which hosts are added by name."""

    def __init__(self, names: Sequence[str]) -> None:
        self.token = secrets.token_hex(32)
        self._numbers = {name: number for number, name in enumerate(names, 2)}
        for command in (
            "link set lo up",
            "link add bridge type bridge",
            f"address add {NETWORK}.1/24 dev bridge",
            "link set bridge up",
        ):
            execute("ip", *command.split())

    def add(self, name: str) -> Host:
        """Start a host, and connect it. Nothing runs there but its first process."""
        unshare = subprocess.Popen(
            [*UNSHARE, "sh", "-c", INIT], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        host = Host(name, self._numbers[name], child_of(unshare.pid))
        self._connect(host)
        lines = ["127.0.0.1 localhost"]
        lines.extend(f"{NETWORK}.{number} {known}" for known, number in self._numbers.items())
        furnish = ["sh", "-ec", FURNISH, "sh", name, *shared_folders()]
        execute(*host.enter(), *furnish, stdin="".join(f"{line}\n" for line in lines))
        host.execute("sh", "-c", "umask 077; cat > /run/token", stdin=self.token)
        log_line(f"{name} is at {host.address}")
        return host

    def _connect(self, host: Host) -> None:
        """Connect a host's interface eth0 to the bridge."""
        link = f"host{host.number}"
        for command in (
            f"add {link} type veth peer eth0 netns {host.pid}",
            f"set {link} master bridge up",
        ):
            execute("ip", "link", *command.split())
        for command in (
            "link set lo up",
            f"address add {host.address}/24 dev eth0",
            "link set eth0 up",
        ):
            execute(*host.enter(), "ip", *command.split())


def check_apart(hosts: Sequence[Host]) -> None:
    """Raise HostsError when a host sees files of another, or can write to the shared disk."""
    for host in hosts:
        folders = ("/tmp", "/dev/shm", "/run", "/root")
        host.execute("sh", "-c", f"touch {' '.join(f'{folder}/{host.name}' for folder in folders)}")
    for host in hosts:
        names = host.execute("sh", "-c", "ls /tmp /dev/shm /run /root").split()
        others = {other.name for other in hosts if other is not host}
        seen = sorted(others & set(names))
        if seen:
            raise HostsError(f"{host.name} sees files of {', '.join(seen)}")
        for folder in ("/", "/usr", str(ROOT), sys.prefix):
            probe = f"touch '{folder}/probe' 2>/dev/null && echo written || true"
            if host.execute("sh", "-c", probe):
                raise HostsError(f"{host.name} can write to {folder}, which the hosts share")
    log_line("no host sees what another has written, or can write to what they share")
