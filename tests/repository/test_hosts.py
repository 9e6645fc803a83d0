"""cluster/hosts.py: separate hosts that share nothing but an object store."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster" / "hosts.py"
# in place of the earth run's encoder and sizes
LIGHT = (
    "model.name=test_convnext",
    "model.pretrained=false",
    "data.query_size=[32,32]",
    "data.reference_size=[32,32]",
    "mining.num_searchers=1",
)


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("hosts", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hosts"] = module
    sys.path.insert(0, str(SCRIPT.parent))  # as Python does when it runs the script
    spec.loader.exec_module(module)
    return module


hosts = load_script()


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start the command; it heeds SIGINT, also where a shell runs these tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments],
            env={**os.environ, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def processes_of(token: str) -> list[str]:
    """The command lines of living processes with a token among their arguments or variables."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        if token.encode() in words + variables:
            found.append(words.replace(b"\0", b" ").decode())
    return found


def test_without_the_tools_that_make_hosts_the_command_ends_with_exit_code_2_and_names_them() -> (
    None
):
    process = start(PATH="/nonexistent")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    assert said == (
        "hosts: hosts need ip, mount, nsenter, setpriv, unshare, not found here; install iproute2"
        " and util-linux (Linux)\n"
    )


def test_users_other_than_root_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts.shutil, "which", lambda tool: f"/usr/sbin/{tool}")
    monkeypatch.setattr(hosts.os, "geteuid", lambda: 1000)
    assert hosts.refusal() == "network namespaces and mounts need root; run it with sudo"


def test_what_the_object_store_needs_and_is_not_installed_is_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hosts.shutil, "which", lambda tool: f"/usr/sbin/{tool}")
    monkeypatch.setattr(
        hosts.importlib.util, "find_spec", lambda name: None if name == "moto" else name
    )
    assert hosts.refusal() == (
        "the object store needs moto, not installed here; run pip install -e '.[cpu,dev]'"
    )


def test_namespaces_that_do_not_come_about_are_reported_and_their_process_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(_: int) -> int:
        raise hosts.HostsError("no namespace was made")

    monkeypatch.setattr(hosts, "child_of", never)
    monkeypatch.setattr(hosts.signal, "signal", lambda *_: None)  # this process keeps its own
    process = subprocess.Popen(["sleep", "600"])
    with (
        pytest.raises(hosts.HostsError, match="no namespace was made"),
        hosts.ended_by_signals(process),
    ):
        pass
    assert process.wait(60) == -signal.SIGKILL


@pytest.fixture
def can_make_hosts() -> None:
    if why := hosts.refusal():
        pytest.skip(why)


@pytest.mark.hosts
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_nothing_is_left_of_hosts_whose_command_is_ended(
    can_make_hosts: None, number: signal.Signals, code: int
) -> None:
    links, token = sorted(Path("/sys/class/net").iterdir()), f"token={uuid.uuid4().hex}"
    process = start(token)
    assert process.stdout is not None
    assert any("no host sees what another has written" in line for line in process.stdout)
    assert (
        len(processes_of(token)) >= 3
    )  # the command, the one that it has made namespaces by, the one in them
    process.send_signal(number)
    assert process.wait(120) == code
    deadline = time.monotonic() + 60
    while processes_of(token) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(token) == []
    assert sorted(Path("/sys/class/net").iterdir()) == links


# Takes minutes: a cluster of three hosts starts, with two runs on it, and a host that is cut off is
# missed only after it has not answered for 12 s.
@pytest.mark.hosts
@pytest.mark.cluster
@pytest.mark.s3
def test_a_run_whose_host_is_cut_off_in_the_middle_of_an_epoch_ends_with_the_right_weights(
    can_make_hosts: None,
) -> None:
    process = start(*LIGHT)
    try:
        said, _ = process.communicate(timeout=1200)
    finally:
        process.terminate()
    assert process.returncode == 0, said
    assert re.search(
        r"ranks of the training: 1 on worker-1, 1 on worker-2\n(.*\n)*?.*worker-2 is cut off", said
    ), said
    after = said[said.index("is cut off") :]
    lost = r"lost worker .*\n(.*\n)*?.*continuing with 2 workers after step \d+"
    assert re.search(lost, after), said
    ends = re.findall(r"weights of the run that .*: *([0-9a-f]{64})\n", said)
    assert len(ends) == 2
    assert ends[0] == ends[1]
