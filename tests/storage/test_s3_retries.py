"""How s3:// is reached: variables, patience, and what travels to a cluster."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest

from benchmarks.support.s3_server import environment
from s4g_ray.errors import InputError
from s4g_ray.storage import files, s3_filesystem, s3_retries, s3_settings
from s4g_ray.storage.s3_settings import StorageConfig
from tests.conftest import tiny_config


def test_a_configuration_is_the_standard_variables_of_what_it_gives_and_defaults_leave_the_environment_alone() -> (
    None
):
    assert s3_settings.variables(StorageConfig()) == {}
    given = StorageConfig(
        endpoint_url="http://minio:9000",
        profile="team",
        region="eu-north-1",
        max_attempts=3,
        timeout_s=7.5,
        max_connections=4,
    )
    assert s3_settings.variables(given) == {
        "AWS_ENDPOINT_URL_S3": "http://minio:9000",
        "AWS_PROFILE": "team",
        "AWS_DEFAULT_REGION": "eu-north-1",
        "AWS_REGION": "eu-north-1",
        "AWS_MAX_ATTEMPTS": "3",
        "S4G_S3_TIMEOUT_S": "7.5",
        "S4G_S3_MAX_CONNECTIONS": "4",
    }


def test_a_store_is_waited_for_as_the_environment_says_and_the_configuration_goes_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for names in s3_settings.VARIABLES.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    assert s3_retries.RetryPolicy.read() == s3_retries.RetryPolicy(8, 30.0, 32)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "5")
    monkeypatch.setenv("S4G_S3_TIMEOUT_S", "9")
    s3_settings.apply(StorageConfig(timeout_s=2))
    assert s3_retries.RetryPolicy.read() == s3_retries.RetryPolicy(5, 2.0, 32)
    for wrong in ("many", "0"):
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", wrong)
        with pytest.raises(InputError, match="AWS_MAX_ATTEMPTS"):
            s3_retries.RetryPolicy.read()


def test_what_equals_its_default_leaves_the_environment_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    s3_settings.apply(StorageConfig(max_attempts=8))
    assert s3_retries.RetryPolicy.read().max_attempts == 3


def test_a_profile_beside_a_key_of_the_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The key would be used."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-the-environment")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    s3_settings.apply(StorageConfig())
    with pytest.raises(
        InputError, match=r"storage\.profile='team' and AWS_ACCESS_KEY_ID .* unset"
    ) as caught:
        s3_settings.apply(StorageConfig(profile="team"))
    assert "key-of-the-environment" not in str(caught.value)
    assert "AWS_PROFILE" not in os.environ
    del os.environ["AWS_ACCESS_KEY_ID"]
    s3_settings.apply(StorageConfig(profile="team"))
    assert os.environ["AWS_PROFILE"] == "team"


@pytest.mark.parametrize(
    "url",
    [
        "nonsense",
        "minio:9000",
        "http://",
        "http://h:port",
        "http://[::1",
        "ftp://h",
        "KEY:SECRET@h",
        "//K:SECRET@h",
        "http://K:SECRET@h:1",
        "http://h/K:SECRET@",
    ],
)
def test_an_endpoint_that_is_none_is_named_and_a_secret_in_it_is_not(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="endpoint_url") as of_key:
        tiny_config("run", "set", storage={"endpoint_url": url})
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(name, url)
        with pytest.raises(InputError, match=f"{name}(=| holds)") as of_variable:
            files.read_bytes("s3://data/x")
        monkeypatch.delenv(name)
        for caught in (of_key, of_variable):
            assert "SECRET" not in str(caught.value)
            assert url in str(caught.value) or "@" in url


def test_a_store_is_found_while_another_thread_changes_the_environment() -> None:
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            os.environ["S4G_S3_OTHER"] = "1"
            os.environ.pop("S4G_S3_OTHER")

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(3000):
            s3_filesystem.s3_filesystem()
    finally:
        done.set()
        thread.join()


def test_waits_are_drawn_below_a_limit_that_doubles_until_it_stays() -> None:
    for attempt, limit in ((1, 0.2), (2, 0.4), (5, 3.2), (30, 20.0)):
        drawn = [s3_retries.wait_before(attempt) for _ in range(200)]
        assert 0.7 * limit < max(drawn) <= limit
        assert min(drawn) < 0.3 * limit


@pytest.mark.parametrize("address", [None, "ray://head:1"])
def test_a_session_on_a_cluster_carries_what_is_configured_of_the_store_and_no_credential(
    address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster that is started here has this process's environment anyway."""
    import ray

    from s4g_ray.distributed.session import ray_session

    given: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        given.append(options)
        raise ConnectionError("no cluster")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(os, "environ", {**os.environ, **environment("http://s3")})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for values in ({}, {"endpoint_url": "http://minio:9000", "max_attempts": 3}):
        config = tiny_config(
            "s3://data/run", "s3://data/set", storage=values, ray={"address": address}
        )
        with pytest.raises(InputError), ray_session(config.ray, config.storage):
            pass
    carried = {"AWS_ENDPOINT_URL_S3": "http://minio:9000", "AWS_MAX_ATTEMPTS": "3"}
    assert given[0]["runtime_env"] is None
    assert given[1]["runtime_env"] == ({"env_vars": carried} if address else None)
    assert carried.items() <= os.environ.items()
