"""The application before a gallery with an encoder, and before hostile requests."""

from __future__ import annotations

import resource
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from s4g_ray.cli.app import app as commands
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.errors import InputError
from s4g_ray.gallery.gallery import open_gallery
from tests.conftest import NUM_TEST, NUM_TRAIN
from tests.support.galleries import build
from tests.support.local_service import (
    BOUNDARY,
    Answered,
    Client,
    local_service,
    make_form,
    make_photo,
)
from tests.support.stand_in_gallery import StandInGallery, write_stand_in

NUM_HOSTILE = 1000


def test_photos_are_answered_as_the_gallery_locates_them(
    synthetic: GeoDataset, one_thread: None, tmp_path: Path
) -> None:
    target = tmp_path / "gallery"
    build(tmp_path, synthetic.uri, target)
    gallery = open_gallery(str(target), device="cpu")
    files = [Path(synthetic.uri) / f"images/queries/{i}.png" for i in (3, 50)]
    photos = [file.read_bytes() for file in files]
    with local_service(gallery) as (client, _):
        answered = client.locate(*photos, query="?top=5")
        tile_id = answered.json["answers"][0]["candidates"][0]["id"]
        tile = client.get(f"/tiles/{tile_id}")
        facts = client.get("/gallery").json
    expected = [answer.to_json() for answer in gallery.locate(photos, top=5)]
    for found, own in zip(answered.json["answers"], expected, strict=True):
        ids = [candidate["id"] for candidate in own["candidates"]]
        assert [candidate["id"] for candidate in found["candidates"]] == ids
        assert found["lat"] == pytest.approx(own["lat"])
    assert tile.data == (Path(synthetic.uri) / f"images/references/{tile_id}.png").read_bytes()
    assert tile.headers["content-type"] == "image/png"
    assert facts["num_tiles"] == NUM_TRAIN + NUM_TEST


def test_a_folder_that_is_no_gallery_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(commands, ["serve", str(tmp_path), "--port", "0"])
    assert isinstance(done.exception, InputError)  # exit code 2
    assert str(tmp_path) in str(done.exception)


def _hostile_requests() -> list[Callable[[Client], Answered | None]]:
    photo = make_photo(kind="JPEG")
    noise = np.random.default_rng(0).bytes(5000)
    bomb = make_photo(0, size=5000)  # 75 MB of pixels in 300 kB
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    form = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    no_end = make_form([photo])[:-200]
    return [
        lambda client: client.locate(bytes(1_500_000)),
        lambda client: client.locate(photo[: len(photo) // 2]),
        lambda client: client.locate(b"%PDF-1.7" + noise),
        lambda client: client.locate(bomb),
        lambda client: client.locate(svg, names=["map.svg"]),
        lambda client: client.locate(photo + noise, names=["../../../etc/passwd"]),
        lambda client: client.locate(photo[:2] + noise, names=["a\x00b.jpg"]),
        lambda client: client.locate(photo, query="?top=1e9&near=%00"),
        lambda client: client.ask("POST", "/locate", no_end, form),
        lambda client: client.ask("POST", "/locate", noise, form),
        lambda client: client.get("/tiles/..%2f..%2fetc%2fpasswd"),
        lambda client: client.get("/tiles/" + "9" * 4000),
        lambda client: client.get("/static/..%2f..%2fconfig.py"),
        _send_slowly,
        _send_without_end,
        _send_no_http,
    ]


def _send(client: Client, data: bytes) -> None:
    with suppress(OSError), socket.create_connection(("127.0.0.1", client.port), 5) as sender:
        sender.sendall(data)
        sender.settimeout(3)
        sender.recv(100)


def _send_slowly(client: Client) -> None:
    _send(client, b"POST /locate HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\nslow")


def _send_without_end(client: Client) -> None:
    head = b"POST /locate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    _send(client, head + (b"40000\r\n" + bytes(0x40000) + b"\r\n") * 10)


def _send_no_http(client: Client) -> None:
    _send(client, b"\x16\x03\x01\x02\x00 GET / \xff\r\n\r\n")


def test_a_thousand_hostile_requests_leave_it_serving_in_the_same_memory(tmp_path: Path) -> None:
    gallery = StandInGallery(write_stand_in(tmp_path))
    kinds = _hostile_requests()
    limits: dict[str, Any] = {
        "max_photo_mb": 1,
        "max_request_mb": 1,
        "max_megapixels": 16,
        "max_upload_s": 0.3,
    }
    statuses: list[int] = []
    lock = threading.Lock()

    def attack(number: int) -> None:
        with suppress(OSError):  # a connection that is closed at once is an answer, too
            answered = kinds[number % len(kinds)](client)
            with lock:
                statuses.append(answered.status if answered is not None else 0)

    with local_service(gallery, max_buffered_mb=20, **limits) as (client, _):
        with ThreadPoolExecutor(16) as senders:
            list(senders.map(attack, range(64)))  # memory that is kept from here on
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            list(senders.map(attack, range(NUM_HOSTILE)))
            grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert client.locate(make_photo(9)).json["answers"][0]["candidates"][0]["id"] == 9
    assert len(statuses) > 800
    assert 500 not in statuses
    assert {400, 404, 413, 415, 422} <= set(statuses)
    assert grown_kb < 100_000
