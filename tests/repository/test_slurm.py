"""Run cluster/slurm.sh with stand-ins for Slurm, Ray and s4g that record their calls."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

from tests.support.linters import find_linter

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm.sh"


def test_the_shells_linter_finds_nothing_in_the_slurm_script() -> None:
    for command in (["bash", "-n"], [find_linter("shellcheck"), "--color=never"]):
        found = subprocess.run([*command, str(SCRIPT)], capture_output=True, text=True, check=False)
        assert (found.returncode, found.stdout + found.stderr) == (0, "")


# The programs that the script calls. Each records its arguments, its node and its token.
PROGRAMS = {
    "scontrol": "printf 'n1\\nn2\\nn3\\n'",
    "hostname": "echo $ADDRESSES",
    "srun": """echo "srun $* cpus=$SRUN_CPUS_PER_TASK" >>"$LOG"
               while [[ $1 == --* ]]; do shift; done; "$@" """,
    "ray": """[[ $1 == start || -e $LOG.answers ]] || { touch "$LOG.answers"; exit 1; }
              echo "ray $* mode=$RAY_AUTH_MODE token=${#RAY_AUTH_TOKEN}" >>"$LOG" """,
    # waits until the other nodes have joined, for at most a minute
    "s4g": """for _ in {1..1200}; do
                (($(grep -c '^ray start' "$LOG") == 2)) && break; sleep 0.05
              done
              echo "s4g $*" >>"$LOG"; trap 'echo signaled >>"$LOG"; exit 3' TERM
              [[ $* == *wait* ]] || exit 5; touch "$LOG.runs"; while :; do sleep 0.05; done""",
}


TIMEOUT_S = 120  # long enough for a busy machine


def start_slurm_job(
    folder: Path, *arguments: str, addresses: str = "2001:db8::7 127.0.1.1 192.0.2.7 192.0.2.8"
) -> subprocess.Popen[str]:
    """Start slurm.sh as Slurm would on the first of three nodes, with PROGRAMS as stand-ins."""
    bin_ = folder / "venv" / "bin"
    bin_.mkdir(parents=True)
    (bin_ / "python").symlink_to(sys.executable)
    for name, body in PROGRAMS.items():
        (bin_ / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (bin_ / name).chmod(stat.S_IRWXU)
    slurm = {
        "JOB_NODELIST": "n[1-3]",
        "JOB_ID": "123456",
        "JOB_NUM_NODES": "3",
        "CPUS_ON_NODE": "16",
        "CPUS_PER_TASK": "12",
        "GPUS_ON_NODE": "1",
    }
    given = {
        "LOG": str(folder / "log"),
        "ADDRESSES": addresses,
        "S4G_VENV": str(folder / "venv"),
        **{f"SLURM_{k}": v for k, v in slurm.items()},
    }
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.Popen(command, env={**os.environ, **given}, text=True, stderr=subprocess.PIPE)


def test_a_slurm_job_starts_a_head_and_the_other_nodes_and_ends_as_its_run_ends(
    tmp_path: Path,
) -> None:
    job = start_slurm_job(tmp_path, "configs/earth.yaml", "run_dir=runs/a b")
    assert job.wait(TIMEOUT_S) == 5
    lines = (tmp_path / "log").read_text().split("\n")
    started = [line for line in lines if line.startswith("ray start")]
    (head,) = (line for line in started if "--head" in line)
    assert "--include-dashboard=false" in head
    assert len(started) == 2
    assert all(line.endswith("mode=token token=64") for line in started)
    assert [line for line in lines if line.startswith("s4g")] == [
        "s4g train configs/earth.yaml ray.nodes_timeout_s=300 run_dir=runs/a b "
        "ray.address=192.0.2.7:23456 --resume"
    ]
    assert all(line.endswith(" cpus=12") for line in lines if line.startswith("srun"))
    (others,) = (line for line in lines if line.startswith("srun") and "--exclude" in line)
    assert "--nodes=2 --ntasks=2 --exclude=n1 ray start --address=192.0.2.7:23456" in others


def test_a_slurm_job_whose_head_has_no_address_for_others_fails_with_the_reason(
    tmp_path: Path,
) -> None:
    job = start_slurm_job(tmp_path, "configs/earth.yaml", addresses="::1 127.0.1.1")
    _, message = job.communicate(timeout=TIMEOUT_S)
    assert job.returncode == 1
    assert (
        "n1 calls itself ::1 127.0.1.1, which other nodes cannot reach; give it its IPv4 address"
        in message
    )
    assert "ray start" not in (tmp_path / "log").read_text()


def test_a_slurm_job_passes_sigterm_to_its_run_and_waits_for_it(tmp_path: Path) -> None:
    job = start_slurm_job(tmp_path, "wait")
    limit = time.monotonic() + TIMEOUT_S
    while not (tmp_path / "log.runs").exists():
        assert job.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(TIMEOUT_S) == 3
    assert (tmp_path / "log").read_text().endswith("signaled\n")
