"""Replicas in Ray: a dead one, a new version of the gallery, start and stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from s4g_ray.cli.app import app as commands
from s4g_ray.distributed.placement import Node
from s4g_ray.errors import InputError, RunError
from s4g_ray.freed_memory import VARIABLES
from s4g_ray.serving.app import build_app
from s4g_ray.serving.config import ServeConfig, make_config, read_token
from s4g_ray.serving.deployment import HandleBackend, bind_locator, bind_service
from s4g_ray.serving.metrics import ServiceMetrics
from s4g_ray.serving.server import check_room, open_port, running_replicas
from tests.support.forked_processes import python_path
from tests.support.local_service import Client, make_photo, served
from tests.support.stand_in_gallery import BEGUN, HOLD, open_stand_in, write_stand_in

ROOT = Path(__file__).parents[2]
Service = tuple[Client, ServiceMetrics, Path]


@pytest.fixture(scope="module")
def service(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two replicas."""
    from ray import serve

    folder = tmp_path_factory.mktemp("gallery")
    config = ServeConfig(
        gallery=write_stand_in(folder),
        replicas=2,
        cpus_per_replica=0.1,
        batch_size=2,
        reload_s=0.2,
    )
    metrics = ServiceMetrics()
    with running_replicas(config, "test", open_stand_in) as handle:
        backend = HandleBackend(handle, config.retries, metrics.count_retry)
        with served(build_app(backend, config, metrics=metrics)) as client:
            yield client, metrics, folder
    serve.shutdown()  # type: ignore[no-untyped-call]


@pytest.mark.cluster
def test_a_new_version_of_the_gallery_answers_without_a_restart(service: Service) -> None:
    client, _, folder = service
    before = client.get("/gallery").json["version"]
    write_stand_in(folder, version=before + 1)
    deadline = time.monotonic() + 120
    versions: set[int] = set()
    while versions != {before + 1} and time.monotonic() < deadline:
        # of both replicas
        answers = [client.locate(make_photo()).json for _ in range(4)]
        versions = {answer["gallery"]["version"] for answer in answers}
    assert versions == {before + 1}


@pytest.mark.cluster
def test_a_killed_replica_loses_no_request(service: Service) -> None:
    import ray

    client, metrics, folder = service
    (folder / HOLD).touch()
    found: list[tuple[int, int]] = []

    def ask(grey: int) -> None:
        answered = client.locate(make_photo(grey))
        best = answered.json["answers"][0]["candidates"][0]["id"] if answered.status == 200 else -1
        found.append((answered.status, best))

    threads = [threading.Thread(target=ask, args=(grey,)) for grey in range(20, 36)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 120
    while len(list(folder.glob(f"{BEGUN}*"))) < 2:  # each replica has a batch
        assert time.monotonic() < deadline
        time.sleep(0.02)
    ray.kill(_replicas()[0])
    while b"s4g_serve_retries_total 0.0" in metrics.text():  # it dies with its batch, later
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (folder / HOLD).unlink()
    for thread in threads:
        thread.join()
    assert sorted(found) == [(200, grey) for grey in range(20, 36)]
    assert b"s4g_serve_retries_total 0.0" not in metrics.text()


def _replicas() -> list[Any]:
    import ray

    named = ray.util.list_named_actors(all_namespaces=True)
    return [
        ray.get_actor(one["name"], one["namespace"])
        for one in named
        if one["name"].startswith("SERVE_REPLICA::test#")
    ]


@pytest.mark.cluster
def test_a_gallery_that_cannot_be_opened_ends_the_start_with_its_reason(service: Service) -> None:
    def refuse(uri: str) -> Any:
        raise RuntimeError(f"{uri} is damaged")

    config = ServeConfig(gallery="broken", cpus_per_replica=0.1)
    with (
        pytest.raises(RunError, match="broken is damaged"),
        running_replicas(config, "broken", refuse),
    ):
        pass


@pytest.mark.cluster
def test_the_application_runs_behind_the_proxies_of_serve_too(service: Service) -> None:
    from ray import serve
    from ray.serve.config import HTTPOptions

    _, _, folder = service
    serve.shutdown()  # type: ignore[no-untyped-call]
    with open_port(ServeConfig(gallery="x", port=0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    config = ServeConfig(gallery=str(folder), cpus_per_replica=0.1, cpus_of_front=0.1)
    serve.run(bind_service(config, open_stand_in), name="proxied")
    client = Client(port)
    answered = client.locate(make_photo(41))
    assert answered.json["answers"][0]["candidates"][0]["id"] == 41
    assert client.locate(b"no photo").code == "no_photo"
    assert client.get("/healthz").status == 200


@pytest.mark.cluster
def test_a_stopped_service_answers_what_it_has_accepted_and_leaves_no_process(
    tmp_path: Path,
) -> None:
    folder = write_stand_in(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.stand_in_service", folder],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": python_path(), "S4G_TEST_MARK": folder},
        start_new_session=True,
    )
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    client = Client(int(address.rstrip("/").rpartition(":")[2]))
    assert client.locate(make_photo(7)).status == 200
    assert len(_marked(folder)) > 2
    with ThreadPoolExecutor(1) as asking:
        accepted = asking.submit(client.locate, make_photo(8))
        while b"s4g_serve_queue 1.0" not in client.get("/metrics").data and accepted.running():
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert accepted.result(60).status == 200
    assert process.stdout.read().strip() == "stopped"
    assert process.wait(60) == 0
    deadline = time.monotonic() + 60
    while _marked(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _marked(folder) == []


def _marked(mark: str) -> list[int]:
    """Return the processes that were started with S4G_TEST_MARK=mark."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"S4G_TEST_MARK={mark}".encode() in variables:
            found.append(int(process.name))
    return found


@pytest.mark.parametrize("gpus", [0, 0.5])
def test_replicas_on_cpus_keep_what_they_free(gpus: float, malloc_not_chosen: None) -> None:
    made: Any = bind_locator(make_config({"gallery": "none", "gpus_per_replica": gpus}))
    options = made._bound_deployment.ray_actor_options
    expected = {} if gpus else {"env_vars": VARIABLES}
    assert options.get("runtime_env", {}) == expected


def test_a_port_in_use_is_refused_before_anything_starts() -> None:
    with open_port(ServeConfig(gallery="x", port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} of 127.0.0.1 cannot be used"):
            open_port(ServeConfig(gallery="x", port=port))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--replicas", "2,1"], "min <= max"),
        (["--replicas", "many"], "--replicas many"),
        (["--port", "70000"], "port=70000"),
        (["max_queu=3"], "did you mean 'max_queue'"),
        (["max_photo_mb=50"], "max_request_mb"),
        (["max_queue"], "key=value"),
    ],
)
def test_a_bad_setting_is_one_message(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(commands, ["serve", "gallery", *arguments])
    assert isinstance(done.exception, InputError)  # exit code 2
    assert message in str(done.exception)


def test_token_and_port_are_checked_before_the_gallery(monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(*arguments: str) -> str:
        done = CliRunner().invoke(commands, ["serve", "no-gallery", *arguments])
        assert isinstance(done.exception, InputError)
        assert done.stdout == ""
        return str(done.exception)

    monkeypatch.delenv("S4G_TOKEN", raising=False)
    assert "S4G_TOKEN holds no token" in serve("--token-env", "S4G_TOKEN")
    with open_port(ServeConfig(gallery="x", port=0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 cannot be used" in serve("--port", str(port))
    assert "no-gallery is no gallery" in serve("--port", "0")


def test_a_missing_token_and_replicas_without_room_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config({"gallery": "x"}, ["replicas=[3, 5]", "token_env=S4G_TOKEN"])
    monkeypatch.delenv("S4G_TOKEN", raising=False)
    with pytest.raises(InputError, match="S4G_TOKEN"):
        read_token(config)
    for guessable in ("secret", "ein-Schlüssel-von-zwanzig"):
        monkeypatch.setenv("S4G_TOKEN", guessable)
        with pytest.raises(InputError, match="at least 16 of ASCII"):
            read_token(config)
    monkeypatch.setenv("S4G_TOKEN", " 0123456789abcdef\n")
    assert read_token(config) == "0123456789abcdef"
    check_room(config, [Node(2), Node(1)])
    with pytest.raises(InputError, match="room for 2"):
        check_room(config, [Node(2)])
