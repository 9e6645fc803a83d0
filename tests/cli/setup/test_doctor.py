"""`s4g doctor`: what it finds on machines that lack something, and what it says to do."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from typer.testing import CliRunner

from s4g_ray.cli.app import app
from s4g_ray.cli.setup import access, libraries, machine
from s4g_ray.cli.setup.finding import Finding, summarize
from s4g_ray.storage import files
from s4g_ray.storage.store_errors import RequestError, permanent_error
from tests.support.json_fields import documented

GB = 10**9


def test_the_command_prints_one_object_and_fails_for_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)
    done = CliRunner().invoke(app, ["doctor", str(tmp_path), "--write", "--json"])
    value = json.loads(done.stdout)
    fields = documented("s4g doctor")
    assert (value.keys(), value["checks"][0].keys()) == (fields.own, fields.nested)
    names = [check["name"] for check in value["checks"]]
    assert names == [
        *("versions", "libraries", "extras", "FAISS", "cores", "memory", "GPUs"),
        *("shared memory", "temporary folder", "HOME", "Ray cluster", "Ray token"),
        f"access {tmp_path}",
    ]
    states = [check["state"] for check in value["checks"]]
    assert value["errors"] == states.count("error")
    assert value["ok"] is (value["errors"] == 0)
    assert done.exit_code == (0 if value["ok"] else 1)
    assert list(tmp_path.iterdir()) == []
    for check in value["checks"]:
        assert check["state"] == "ok" or check["remedy"], check

    missing = tmp_path / "[red]no"
    done = CliRunner().invoke(app, ["doctor", str(missing)])
    assert done.exit_code == 1
    (line,) = [line for line in done.stdout.splitlines() if str(missing) in line]
    assert line.split()[0] == "error"
    assert "there is no such folder" in line


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_a_container_is_read(
    tmp_path: Path, files: dict[str, str], expected: float | None
) -> None:
    write(tmp_path, files)
    assert machine.read_cpu_quota(tmp_path) == expected
    found = machine.check_cores(tmp_path)
    if expected == 1.5:
        assert found.state == "warning"
        assert found.value.startswith("1.5 of ")


@pytest.mark.parametrize(
    "files",
    [
        {
            "memory.max": str(8 * GB),
            "memory.current": str(7 * GB),
            "memory.stat": f"anon 1\ninactive_file {2 * GB}\n",
        },
        {
            "memory/memory.limit_in_bytes": str(8 * GB),
            "memory/memory.usage_in_bytes": str(7 * GB),
            "memory/memory.stat": f"cache 1\ninactive_file {2 * GB}\n",
        },
    ],
)
def test_the_limit_of_a_container_counts_and_its_cache_does_not(
    tmp_path: Path, files: dict[str, str]
) -> None:
    write(tmp_path, {**files, "meminfo": "MemTotal: 64000000 kB\nMemAvailable: 60000000 kB\n"})
    found = machine.check_memory(tmp_path, tmp_path / "meminfo")
    assert found.value == "3.0 GB free of 8.0 GB (limit of the container)"
    assert found.state == "warning"
    write(tmp_path / "none", {"meminfo": "MemTotal: 64000000 kB\nMemAvailable: 60000000 kB\n"})
    found = machine.check_memory(tmp_path / "none", tmp_path / "none/meminfo")
    assert (found.state, found.value) == ("ok", "61.4 GB free of 65.5 GB")


def write(folder: Path, contents: dict[str, str]) -> None:
    for name, text in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_temporary_folder_that_ray_cannot_use_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert machine.check_temporary_folder().value.startswith("/tmp, ")
    for folder, fault in ((f"/{'x' * 100}", "is too long"), ("/no/such", "is no folder")):
        monkeypatch.setenv("RAY_TMPDIR", folder)
        found = machine.check_temporary_folder()
        assert found.state == "error"
        assert fault in found.value
        assert "set RAY_TMPDIR" in found.remedy


def test_a_home_that_cannot_be_written_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert machine.check_home() == Finding("HOME", "ok", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    found = machine.check_home()
    assert (found.state, found.value) == ("error", f"{tmp_path}/none: No such file or directory")


def install_driver(folder: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    """Install an nvidia-smi that runs one line of shell."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_driver_with_gpus_that_torch_cannot_use_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_driver(tmp_path, monkeypatch, "echo 'NVIDIA H100, 81559 MiB'")
    gpus = machine.list_gpus()
    assert gpus == ["NVIDIA H100, 81559 MiB"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = machine.check_gpus(gpus)
    assert found.state == "error"
    assert "torch" in found.value
    assert found.remedy
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert machine.check_gpus(gpus).state == "ok"
    install_driver(tmp_path, monkeypatch, "echo 'no driver'; exit 9")
    assert machine.list_gpus() == []


@pytest.mark.parametrize(
    ("variables", "state", "value"),
    [
        ({}, "ok", "home/.ray/auth_token is made when Ray starts here"),
        ({"RAY_AUTH_TOKEN": "secret"}, "ok", "RAY_AUTH_TOKEN holds it"),
        ({"RAY_AUTH_TOKEN_PATH": "own"}, "ok", "own"),
        ({"RAY_AUTH_TOKEN_PATH": "none"}, "error", "RAY_AUTH_TOKEN_PATH=none holds no token"),
        ({"RAY_AUTH_MODE": "disabled"}, "warning", "RAY_AUTH_MODE=disabled: anyone who reaches"),
    ],
)
def test_the_token_is_looked_for_where_ray_does(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    state: str,
    value: str,
) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "own").write_text("secret")
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    found = access.check_token()
    assert found.state == state
    assert value in found.value
    assert bool(found.remedy) is (state != "ok")
    assert "secret" not in found.value


@pytest.mark.parametrize(
    ("code", "endpoint", "remedy"),
    [
        ("AccessDenied", None, "give these credentials access"),
        ("NoSuchBucket", None, "make the bucket, or fix the URI or storage.endpoint_url"),
        ("NoCredentialsError", None, "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("PermanentRedirect", None, "set storage.region"),
        ("EndpointConnectionError", None, "check that the store works; to wait longer"),
        (
            "EndpointConnectionError",
            "http://minio:9000",
            "check that a store answers at http://minio:9000, or correct storage.endpoint_url",
        ),
        ("ReadTimeoutError", "http://minio:9000", "check that a store answers at http://minio"),
        ("SlowDown", "http://minio:9000", "check that the store works; to wait longer"),
    ],
)
def test_a_fault_of_a_store_has_its_own_remedy(
    monkeypatch: pytest.MonkeyPatch, code: str, endpoint: str | None, remedy: str
) -> None:
    def refuse(uri: str) -> list[str]:
        raise permanent_error(RequestError(code, "on cue", "list", 8, may_pass=True), uri)

    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    if endpoint is not None:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    monkeypatch.setattr(files, "list_names", refuse)
    found = access.check_store("s3://bucket/set", write=False)
    assert (found.state, found.value) == (
        "error",
        f"s3://bucket/set: {code} (on cue) to list, 8 times",
    )
    assert found.remedy.startswith(remedy)
    assert ("AWS_ACCESS_KEY_ID" in found.remedy) is (code == "NoCredentialsError")


def test_a_driver_that_does_not_answer_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_driver(tmp_path, monkeypatch, "exec sleep 60")
    monkeypatch.setattr(machine, "ANSWER_S", 0.2)
    gpus = machine.list_gpus()
    assert gpus is None
    found = machine.check_gpus(gpus)
    assert (found.state, found.value) == ("error", "nvidia-smi does not answer within 0.2 s")
    assert found.remedy == "restart the driver, or the machine"


def test_an_address_is_tried_without_ray() -> None:
    assert access.check_address(None).state == "ok"
    found = access.check_address("http://10.0.0.5:8265")
    assert found.state == "error"
    assert "dashboard" in found.value
    assert found.remedy.startswith("unset it")
    assert access.check_address("somewhere").state == "error"


def test_a_library_that_is_missing_or_too_old_is_named_with_the_command() -> None:
    required = [Requirement(text) for text in ("numpy>=2", "numpy>=999", "no-such-library>1")]
    found = libraries.check_requirements(required)
    assert found.state == "error"
    assert "no-such-library is missing" in found.value
    assert found.remedy == "pip install 'numpy>=999' 'no-such-library>1'"
    assert libraries.check_requirements(required[:1]).state == "ok"
    assert libraries.check_requirements(None).state == "warning"


def test_the_requirements_are_those_without_extras() -> None:
    required = libraries.read_requirements()
    assert required is not None
    names = {one.name for one in required}
    assert {"ray", "torch", "rich"} <= names
    assert not names & {"pytest", "faiss-cpu", "rasterio"}


def test_faiss_without_gpu_support_is_a_warning_beside_a_gpu() -> None:
    assert libraries.check_faiss(has_gpu=False).state == "ok"
    with_gpu = libraries.check_faiss(has_gpu=True)
    assert with_gpu.state == ("warning" if "faiss-cpu" in with_gpu.value else "ok")


def test_a_warning_is_no_error() -> None:
    found = [Finding("a", "ok", "x"), Finding("b", "warning", "y", "z")]
    assert summarize(found)["ok"]
    assert not summarize([*found, Finding("c", "error", "y", "z")])["ok"]


@pytest.mark.cluster
def test_ray_is_tried_when_asked(ray_cluster: None) -> None:
    found = access.check_ray(None)
    assert found.state == "ok"
    assert "nodes 1, CPUs 4" in found.value
