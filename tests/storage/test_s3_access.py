"""Credentials, region and address of S3, found where AWS's standards put them."""

from __future__ import annotations

import json
import os
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from s4g_ray.errors import InputError, StoreError
from s4g_ray.storage import files, s3_access
from s4g_ray.storage.s3_access import S3Access
from tests.support.faulty_s3 import Fault, Store
from tests.support.http_server import Handler, serving


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Leave an environment without AWS's variables and files."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))


def write_profiles(folder: Path, config: str, credentials: str = "") -> None:
    (folder / "config").write_text(textwrap.dedent(config))
    (folder / "credentials").write_text(textwrap.dedent(credentials))


TEAM = """
    [team]
    aws_access_key_id = TEAMKEY
    aws_secret_access_key = teamsecret
"""


def test_a_profile_names_key_region_and_address_and_variables_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = """
        [profile team]
        region = eu-north-1
        endpoint_url = http://minio:9000
    """
    write_profiles(tmp_path, config, TEAM)
    monkeypatch.setenv("AWS_PROFILE", "team")
    found = S3Access.find()
    assert found.current_credentials() == {
        "access_key_id": "TEAMKEY",
        "secret_access_key": "teamsecret",
        "token": None,
        "expires_at": None,
    }
    assert (found.region, found.endpoint) == ("eu-north-1", "http://minio:9000")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://other:9000")
    found = S3Access.find()
    assert (found.region, found.endpoint) == ("us-west-2", "http://other:9000")
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    assert S3Access.find().endpoint is None


def test_a_private_certificate_and_unsigned_requests_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_profiles(tmp_path, "", TEAM.replace("team]", "default]"))
    (tmp_path / "ca.pem").write_bytes(b"a certificate")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    assert S3Access.find().ca_bundle == b"a certificate"
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert S3Access.find().credentials is None


def test_a_process_that_a_profile_names_gives_credentials_that_are_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a single sign-on's helper does. botocore renews what expires within 10 minutes."""
    answer = {"Version": 1, "AccessKeyId": "A", "SecretAccessKey": "B", "SessionToken": "C"}
    (tmp_path / "calls").touch()
    for name, minutes in (("soon", 5), ("late", 60)):
        expiry = datetime.now(UTC) + timedelta(minutes=minutes)
        text = json.dumps({**answer, "Expiration": expiry.isoformat()})
        (tmp_path / name).write_text(f"echo x >> {tmp_path}/calls\ncat <<'END'\n{text}\nEND\n")
    config = "".join(
        f"[profile {name}]\ncredential_process = sh {tmp_path}/{name}\n"
        for name in ("soon", "late")
    )
    write_profiles(tmp_path, config)
    counts = []
    for name in ("late", "soon"):
        monkeypatch.setenv("AWS_PROFILE", name)
        (tmp_path / "calls").write_text("")
        access = S3Access.find()
        for _ in range(3):
            found = access.current_credentials()
            assert (found["access_key_id"], found["token"]) == ("A", "C")
            left = found["expires_at"] - datetime.now(UTC)
            assert timedelta(minutes=5) < left <= s3_access.CREDENTIALS_KEPT
        counts.append(len((tmp_path / "calls").read_text().split()))
    assert counts[0] == 1
    assert counts[1] > 1


@contextmanager
def answering(content: str) -> Iterator[str]:
    """Answer every request with a text, as a container's agent does. Yields the address."""

    class Agent(Handler):
        def serve(self) -> None:
            self.answer(200, content.encode())

        do_GET = serve  # noqa: N815

    with serving(Agent) as address:
        yield address


def test_the_role_of_a_container_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    expiry = (datetime.now(UTC) + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    role = {"AccessKeyId": "R", "SecretAccessKey": "S", "Token": "T", "Expiration": expiry}
    with answering(json.dumps(role)) as address:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{address}/role")
        found = S3Access.find().current_credentials()
    assert [found[key] for key in ("access_key_id", "secret_access_key", "token")] == list("RST")


@pytest.mark.s3
def test_roles_are_assumed_by_a_profile_and_by_a_web_identity(
    object_server: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the store is read with what the role gives."""
    server = f"http://{object_server.proxy.upstream}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    config = """
        [profile assumed]
        role_arn = arn:aws:iam::123456789012:role/reader
        source_profile = team
        region = us-east-1
    """
    write_profiles(tmp_path, config, TEAM)
    (tmp_path / "token").write_text("a token")
    object_server.client.put_object(Bucket="data", Key="role/x", Body=b"there")
    keys = []
    for variables in (
        {"AWS_PROFILE": "assumed"},
        {
            "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/reader",
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token"),
            "AWS_DEFAULT_REGION": "us-east-1",
        },
    ):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            found = S3Access.find().current_credentials()
            assert found["token"]
            keys.append(found["access_key_id"])
            assert files.read_bytes("s3://data/role/x") == b"there"
    assert "TEAMKEY" not in keys
    assert len(set(keys)) == 2


@pytest.mark.s3
def test_credentials_that_expire_are_asked_for_again_between_requests(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    expiry = (datetime.now(UTC) + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    role = {"AccessKeyId": "R", "SecretAccessKey": "S", "Token": "T", "Expiration": expiry}
    calls: list[int] = []
    current = S3Access.current_credentials

    def count(self: S3Access) -> dict[str, object]:
        calls.append(1)
        return current(self)

    monkeypatch.setattr(S3Access, "current_credentials", count)
    monkeypatch.setattr(s3_access, "CREDENTIALS_KEPT", timedelta(minutes=1))
    with answering(json.dumps(role)) as address:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{address}/role")
        for number in range(3):
            files.write_bytes(f"s3://data/renewed/{number}", b"x")
            time.sleep(0.2)  # obstore asks at most every 0.1 s
    assert len(calls) >= 3  # more where a request is repeated


@pytest.mark.s3
def test_credentials_that_cannot_be_renewed_are_named_with_the_remedy(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_profiles(tmp_path, "[profile broken]\ncredential_process = sh -c 'exit 3'\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "broken")
    with pytest.raises(
        StoreError, match=r"^s3://data.*: CredentialRetrievalError \(.*renew the credentials: AWS_"
    ):
        files.read_bytes("s3://data/x")


@pytest.mark.s3
def test_a_bucket_in_another_region_is_asked_for_its_region_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write_bytes("s3://data/far", b"there")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-north-1")  # the bucket is in us-east-1
    read = ("GET", "data/far")

    def move_first(operation: str, key: str, number: int) -> Fault | None:
        return "moved" if (operation, number) == ("GET", 1) else None

    store.proxy.reset(move_first)
    for _ in range(2):
        assert files.read_bytes("s3://data/far") == b"there"
    assert store.proxy.requests == [read, ("HEAD", "data"), read, read]
    store.proxy.reset(lambda operation, key, number: "moved" if operation == "GET" else None)
    with pytest.raises(StoreError, match=r"s3://data/far: PermanentRedirect .*storage\.region"):
        files.read_bytes("s3://data/far")


@pytest.mark.parametrize("key", ["a//b", "a/../b", "./a"])
def test_a_key_that_the_store_client_cannot_name_is_refused(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "A")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "B")
    with pytest.raises(InputError, match=rf"s3://data/{key}.*leave out empty parts"):
        files.read_bytes(f"s3://data/{key}")
