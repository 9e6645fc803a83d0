"""storage.anonymous: requests to public buckets of all three stores have no signature."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from s4g_ray.errors import InputError, StoreError
from s4g_ray.storage import files, s3_settings
from s4g_ray.storage.s3_settings import StorageConfig
from tests.support.public_bucket import PublicBucket, public_bucket

STORES = {
    # where each finds the address of its store, beside credentials that anonymous requests ignore
    "s3": {"AWS_ENDPOINT_URL_S3": "{address}", "AWS_DEFAULT_REGION": "us-east-1"},
    "gs": {"GOOGLE_BASE_URL": "{address}"},
    "az": {"AZURE_STORAGE_ENDPOINT": "{address}", "AZURE_STORAGE_ACCOUNT_NAME": "account"},
}
CREDENTIALS = {
    "s3": {"AWS_ACCESS_KEY_ID": "KEY", "AWS_SECRET_ACCESS_KEY": "secret"},
    "gs": {},
    "az": {"AZURE_STORAGE_ACCOUNT_KEY": "c2VjcmV0"},
}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[PublicBucket]:
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_", "S4G_S3_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    with public_bucket() as running:
        for name in s3_settings.VARIABLES["anonymous"]:  # restored after the test
            monkeypatch.setenv(name, "false")
        yield running


def point_to(
    bucket: PublicBucket, scheme: str, monkeypatch: pytest.MonkeyPatch, *, with_key: bool
) -> None:
    variables = {**STORES[scheme], **(CREDENTIALS[scheme] if with_key else {})}
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(address=bucket.address))


@pytest.mark.parametrize("with_key", [False, True])
@pytest.mark.parametrize("scheme", STORES)
def test_a_public_bucket_is_read_without_a_signature(
    bucket: PublicBucket, monkeypatch: pytest.MonkeyPatch, scheme: str, with_key: bool
) -> None:
    point_to(bucket, scheme, monkeypatch, with_key=with_key)
    given = s3_settings.apply(StorageConfig(anonymous=True))
    assert given == dict.fromkeys(s3_settings.VARIABLES["anonymous"], "true")
    uri = f"{scheme}://bucket/folder/object.bin"
    assert files.read_bytes(uri) == bucket.data
    assert files.read_bytes(uri, 3, 4) == b"3456"
    assert (bucket.num_signed, bucket.num_unsigned) == (0, 2)
    with pytest.raises(StoreError, match=r"private.*this is not public.*storage\.anonymous=false"):
        files.read_bytes(f"{scheme}://bucket/other.bin")


@pytest.mark.parametrize("scheme", ["s3", "az"])
def test_with_credentials_requests_are_signed(
    bucket: PublicBucket, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    point_to(bucket, scheme, monkeypatch, with_key=True)
    with pytest.raises(StoreError, match="InvalidAccessKeyId"):
        files.read_bytes(f"{scheme}://bucket/folder/object.bin")
    assert (bucket.num_signed, bucket.num_unsigned) == (1, 0)


def test_without_credentials_the_message_names_the_setting(
    bucket: PublicBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to(bucket, "s3", monkeypatch, with_key=False)
    with pytest.raises(StoreError, match=r"storage\.anonymous=true for a public bucket"):
        files.read_bytes("s3://bucket/folder/object.bin")
    assert bucket.requests == []


def test_a_profile_of_anonymous_requests_is_refused() -> None:
    with pytest.raises(InputError, match=r"storage\.profile='team' and storage\.anonymous=true"):
        s3_settings.apply(StorageConfig(anonymous=True, profile="team"))
