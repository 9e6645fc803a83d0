"""Access to s3://: its variables, the limits of retries, and the settings that go to a cluster."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from benchmarks.support.s3_server import environment
from s4g_ray.config.loading import load_config
from s4g_ray.data.dataset import open_dataset
from s4g_ray.datasets.inspection.image_files import decode_images, find_missing_files
from s4g_ray.datasets.inspection.inventory import Inventory
from s4g_ray.encoder.pretrained import read_state
from s4g_ray.errors import InputError, RunError, StoreError, WriteError
from s4g_ray.storage import files, object_store, s3_settings
from s4g_ray.storage.s3_settings import StorageConfig
from s4g_ray.storage.store_filesystem import store_filesystem
from tests.conftest import ATTEMPTS, tiny_config
from tests.support.faulty_s3 import Fault, Store


def test_a_configuration_becomes_the_standard_variables_of_its_values_without_defaults() -> None:
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


def test_retry_limits_come_from_the_environment_and_the_configuration_replaces_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for names in s3_settings.VARIABLES.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    assert s3_settings.RetryPolicy.read() == s3_settings.RetryPolicy(8, 30.0, 32)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "5")
    monkeypatch.setenv("S4G_S3_TIMEOUT_S", "9")
    s3_settings.apply(StorageConfig(timeout_s=2))
    assert s3_settings.RetryPolicy.read() == s3_settings.RetryPolicy(5, 2.0, 32)
    for wrong in ("many", "0"):
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", wrong)
        with pytest.raises(InputError, match="AWS_MAX_ATTEMPTS"):
            s3_settings.RetryPolicy.read()


def test_a_value_that_equals_its_default_leaves_the_environment_unchanged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    s3_settings.apply(StorageConfig(max_attempts=8))
    assert s3_settings.RetryPolicy.read().max_attempts == 3


def test_a_profile_together_with_a_key_in_the_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The key would be used instead of the profile."""
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
def test_an_invalid_endpoint_is_named_without_a_secret_that_it_holds(
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


def test_the_file_system_opens_while_another_thread_changes_the_environment() -> None:
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            os.environ["S4G_S3_OTHER"] = "1"
            os.environ.pop("S4G_S3_OTHER")

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(3000):
            store_filesystem("s3")
    finally:
        done.set()
        thread.join()


def test_waits_are_drawn_below_a_limit_that_doubles_up_to_20_s() -> None:
    for attempt, limit in ((1, 0.2), (2, 0.4), (5, 3.2), (30, 20.0)):
        drawn = [object_store.wait_before(attempt) for _ in range(200)]
        assert 0.7 * limit < max(drawn) <= limit
        assert min(drawn) < 0.3 * limit


@pytest.mark.parametrize("address", [None, "ray://head:1"])
def test_a_session_on_a_cluster_carries_the_stores_settings_and_no_credential(
    address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster that starts on this machine inherits the environment of this process."""
    import ray

    from s4g_ray.distributed import session, start_checks

    given: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        given.append(options)
        raise ConnectionError("no cluster")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(start_checks, "check_address", lambda *_, **__: None)
    monkeypatch.setattr(os, "environ", {**os.environ, **environment("http://s3")})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for values in ({}, {"endpoint_url": "http://minio:9000", "max_attempts": 3}):
        config = tiny_config(
            "s3://data/run", "s3://data/set", storage=values, ray={"address": address}
        )
        expected = InputError if address else RunError
        with pytest.raises(expected), session.ray_session(config.ray, config.storage):
            pass
    carried = {"AWS_ENDPOINT_URL_S3": "http://minio:9000", "AWS_MAX_ATTEMPTS": "3"}
    assert given[0]["runtime_env"] is None
    assert given[1]["runtime_env"] == ({"env_vars": carried} if address else None)
    assert carried.items() <= os.environ.items()


@pytest.mark.s3
def test_a_final_error_names_bucket_and_key_the_stores_message_and_the_remedy(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def message_of(error: type[Exception], work: Any, *arguments: Any) -> str:
        with pytest.raises(error) as caught:
            work(*arguments)
        assert os.environ.get("AWS_SECRET_ACCESS_KEY", "-" * 9) not in str(caught.value)
        return str(pickle.loads(pickle.dumps(caught.value)))

    store.proxy.reset(lambda operation, key, number: "slow_down" if "busy" in key else None)
    assert message_of(StoreError, files.read_bytes, "s3://data/busy/x") == (
        f"s3://data/busy/x: SlowDown (on cue) to get_object, {ATTEMPTS} times; check that"
        " the store works; to wait longer for it, raise storage.max_attempts or storage.timeout_s"
    )
    store.proxy.reset(lambda operation, key, number: "deny" if "secret" in key else None)
    denied = message_of(WriteError, files.write_bytes, "s3://data/secret/x", b"123")
    assert denied.startswith(
        "cannot write s3://data/secret/x (3 bytes): AccessDenied (on cue) to put_object; give"
    )
    assert len([key for _, key in store.proxy.requests if "secret" in key]) == 1  # one attempt
    assert "s3://data/secret" in message_of(StoreError, files.list_names, "s3://data/secret")
    assert "s3://data/secret/_MANIFEST.json" in message_of(
        WriteError, files.remove, "s3://data/secret"
    )
    missing = message_of(InputError, open_dataset, "s3://no-such-bucket/set")
    assert missing.startswith("s3://no-such-bucket/set/dataset.json: NoSuchBucket")
    assert "make the bucket, or fix the URI or storage.endpoint_url" in missing
    assert message_of(InputError, open_dataset, "s3://data/none").startswith(
        "no data set at s3://data/none"
    )
    assert (
        message_of(FileNotFoundError, files.read_bytes, "s3://data/none")
        == "s3://data/none is not there"
    )

    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    assert "s3://data/x: EndpointConnectionError (Could not connect" in message_of(
        StoreError, files.exists, "s3://data/x"
    )
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "fix storage.profile or AWS_PROFILE" in message_of(
        StoreError, files.read_bytes, "s3://data/x"
    )
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, storage.profile" in message_of(
        StoreError, files.read_bytes, "s3://data/x"
    )


@pytest.mark.s3
def test_an_outage_is_not_an_input_error_but_denied_access_and_a_missing_bucket_are(
    store: Store,
) -> None:
    """Exit code 1, after which a scheduler tries again, and exit code 2."""
    open_dataset("s3://data/synthetic")
    files.write_bytes("s3://data/first/weights.pth", b"x")
    inventory = Inventory.read(open_dataset("s3://data/synthetic"))
    quiet: Any = {"num_threads": 2, "on_progress": lambda *_: None}
    reads: list[Callable[[], Any]] = [
        lambda: open_dataset("s3://data/synthetic"),
        lambda: load_config("s3://data/first/config.yaml"),
        lambda: read_state("s3://data/first/weights.pth"),
    ]
    checks: list[Callable[[], Any]] = [
        lambda: decode_images(inventory, np.arange(2), **quiet),
        lambda: find_missing_files(inventory.paths, **quiet),
    ]
    expected: list[tuple[Fault, type[Exception]]] = [
        ("slow_down", StoreError),
        ("deny", InputError),
    ]
    for fault, error in expected:
        for read in reads:

            def failing(
                operation: str, key: str, number: int, fault: Fault = fault
            ) -> Fault | None:
                return fault if operation == "GET" else None

            store.proxy.reset(failing)
            with pytest.raises(error, match=r"s3://data/.*(SlowDown|AccessDenied)"):
                read()
    store.proxy.reset(
        lambda operation, key, number: "slow_down" if operation in ("GET", "LIST") else None
    )
    for check in checks:
        with pytest.raises(StoreError, match=r"s3://data/synthetic.*SlowDown"):
            check()
    store.proxy.reset()
    with pytest.raises(InputError, match="NoSuchBucket"):
        load_config("s3://no-such-bucket/config.yaml")
