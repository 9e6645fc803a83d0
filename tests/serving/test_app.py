from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.server import ServerState

from s4g_ray.serving.batching import Batcher
from s4g_ray.serving.config import ServeConfig
from s4g_ray.serving.server import LEAST_READ, HeadTimeoutProtocol
from tests.support.local_service import BOUNDARY, Client, local_service, make_form, make_photo
from tests.support.stand_in_gallery import HOLD, NUM_TILES, StandInGallery, write_stand_in

FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> StandInGallery:
    return StandInGallery(write_stand_in(tmp_path_factory.mktemp("gallery")))


@pytest.fixture(scope="module")
def client(gallery: StandInGallery) -> Iterator[Client]:
    with local_service(
        gallery,
        max_photo_mb=1,
        max_request_mb=2,
        max_photos=4,
        max_megapixels=1,
    ) as (client, _):
        yield client


def test_a_photo_is_answered_with_its_candidates(client: Client) -> None:
    answered = client.locate(make_photo(77), query="?top=3", names=["walk.png"])
    assert answered.status == 200
    (answer,) = answered.json["answers"]
    assert [candidate["id"] for candidate in answer["candidates"]] == [77, 78, 79]
    assert answer["photo"] == "walk.png"
    assert answered.json["gallery"]["version"] == 1
    assert answered.json["gallery"]["num_tiles"] == NUM_TILES
    assert 0 < answered.json["seconds"] < 30


def test_each_photo_of_a_request_has_its_answer_in_order(client: Client) -> None:
    greys = [9, 200, 31]
    answered = client.locate(*map(make_photo, greys))
    assert [answer["candidates"][0]["id"] for answer in answered.json["answers"]] == greys


def test_geojson_names_the_photo_of_each_feature(client: Client) -> None:
    answered = client.locate(make_photo(5), make_photo(6), query="?format=geojson&top=1")
    assert answered.headers["content-type"] == "application/geo+json"
    assert answered.json["type"] == "FeatureCollection"
    squares = [
        (feature["properties"]["photo_number"], feature["properties"]["id"])
        for feature in answered.json["features"]
        if feature["properties"]["role"] == "candidate"
    ]
    assert squares == [(0, 5), (1, 6)]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?top=0", "1..1000"),
        ("?top=ten", "1..1000"),
        ("?top=99999999999999999999", "1..1000"),
        ("?turns=1000", "1..32"),
        ("?near=40,-112", "belong together"),
        ("?near=91,0&within_km=1", "not on the Earth"),
        ("?near=nan,0&within_km=1", "finite"),
        ("?near=40&within_km=1", "LAT,LON"),
        ("?near=4_0,1&within_km=1", "not a number"),
        ("?near=40,-112&within_km=-1", "0..20040"),
        ("?near=0,0&within_km=1", "no tile of the gallery"),
        ("?format=xml", "geojson"),
        ("?refine=perhaps", "true nor false"),
        ("?tpo=3", "unknown parameter 'tpo'"),
    ],
)
def test_a_bad_parameter_is_refused_with_its_limit(
    client: Client, query: str, message: str
) -> None:
    answered = client.locate(make_photo(), query=query)
    assert (answered.status, answered.code) == (422, "bad_parameter")
    assert message in answered.json["error"]["message"]


BOMB = make_photo(0, size=1100)
PIXELS_AT = 33  # of a PNG file: its signature and IHDR chunk come first
PROFILE = bytes(3) + b"\x06iCCPp\0\0abc" + bytes(4)
TEXT = bytes(3) + b"\x03tEXtk\0a" + bytes(4)
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'


@pytest.mark.parametrize(
    ("photo", "status", "code"),
    [
        pytest.param(b"", 400, "no_photo", id="empty"),
        pytest.param(b"%PDF-1.7 hello", 415, "no_photo", id="another-type"),
        pytest.param(SVG, 415, "no_photo", id="svg"),
        pytest.param(make_photo(kind="JPEG")[:-200], 422, "bad_photo", id="truncated"),
        pytest.param(make_photo()[:20], 422, "bad_photo", id="header-alone"),
        pytest.param(BOMB, 413, "too_many_pixels", id="pixels"),
        pytest.param(
            make_photo()[:PIXELS_AT] + 2 * PROFILE + make_photo()[PIXELS_AT:],
            422,
            "bad_photo",
            id="two-profiles",
        ),
        pytest.param(make_photo()[:-12] + 200 * TEXT, 422, "bad_photo", id="many-chunks"),
        pytest.param(b"\xff\xd8" + b"\xff" * 900_000, 422, "bad_photo", id="fill-bytes"),
        pytest.param(b"P6" + b" " * 900_000, 422, "bad_photo", id="blanks"),
        pytest.param(make_photo() + bytes(1_000_000), 413, "too_large", id="bytes"),
    ],
)
def test_a_bad_photo_is_refused_by_name_and_those_beside_it_are_answered(
    client: Client, photo: bytes, status: int, code: str
) -> None:
    name = "../../bad\x07.png"
    answered = client.locate(photo, names=[name])
    assert (answered.status, answered.code) == (status, code)
    file, _, reason = answered.json["error"]["message"].partition(": ")
    assert file == "bad.png"
    together = client.locate(make_photo(9), photo, make_photo(8), names=["a.png", name, "c.png"])
    assert together.status == 200
    first, bad, last = together.json["answers"]
    assert [first["candidates"][0]["id"], last["candidates"][0]["id"]] == [9, 8]
    assert (bad["photo"], bad["error"]) == ("bad.png", reason)
    assert not bad["is_located"]
    assert bad["candidates"] == []


def test_photos_that_are_all_bad_have_their_errors_in_geojson_too(client: Client) -> None:
    answered = client.locate(b"", b"text", query="?format=geojson")
    assert answered.status == 200
    found = [one["properties"] for one in answered.json["features"]]
    assert [(one["photo_number"], one["error"][:24]) for one in found] == [
        (0, "the file is empty"),
        (1, "not an image file of a k"),
    ]


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        pytest.param(b"hello", {}, 415, "no_form", id="no-form"),
        pytest.param(b"hello", FORM, 400, "bad_form", id="no-parts"),
        pytest.param(
            b"hello", {"Content-Type": "multipart/form-data"}, 400, "bad_form", id="boundary"
        ),
        pytest.param(
            make_form([b"x"]).replace(b'"photo"', b'"image"'), FORM, 400, "no_photo", id="field"
        ),
        pytest.param(make_form([make_photo()] * 5), FORM, 413, "too_many", id="photos"),
        pytest.param(bytes(3_000_000), FORM, 413, "too_large", id="body"),
        pytest.param(bytes(9_000_000), FORM, 413, "too_large", id="large-body"),
    ],
)
def test_a_bad_form_is_refused(
    client: Client, body: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    try:
        answered = client.ask("POST", "/locate", body, headers)
    except ConnectionError:  # closed while the rest of a far too large body was sent
        assert len(body) > 8_000_000
    else:
        assert (answered.status, answered.code) == (status, code)
    assert client.locate(make_photo(8)).status == 200


def test_a_body_without_a_length_is_measured_as_it_arrives(client: Client) -> None:
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as sender:
        head = "POST /locate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
        sender.sendall(f"{head}Content-Type: {FORM['Content-Type']}\r\n\r\n".encode())
        sent = 0
        try:
            while sent < 20_000_000:
                sender.sendall(b"10000\r\n" + bytes(65536) + b"\r\n")
                sent += 65536
        except ConnectionError:
            pass
        assert sent < 20_000_000


def test_a_slow_body_is_refused_after_its_seconds(gallery: StandInGallery) -> None:
    with (
        local_service(gallery, max_upload_s=0.5) as (client, _),
        socket.create_connection(("127.0.0.1", client.port), timeout=60) as sender,
    ):
        head = "POST /locate HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nslow"
        started = time.monotonic()
        sender.sendall(head.encode())
        assert sender.recv(4096).startswith(b"HTTP/1.1 408 ")
        assert 0.4 < time.monotonic() - started < 60


GET = b"GET /tiles/1 HTTP/1.1\r\nHost: x\r\n"
CHUNKED = b"POST /locate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n"


@pytest.mark.parametrize(
    ("start", "more"),
    [
        pytest.param(GET, b"a: " + b"b" * 5000 + b"\r\n", id="headers"),
        pytest.param(GET + b"a: ", b"b" * 65536, id="one-header"),
        pytest.param(b"GET /", b"b" * 65536, id="address"),
        pytest.param(b"", b"\r\n" * 5000, id="nothing"),
        pytest.param(CHUNKED + b"0\r\n", b"a: " + b"b" * 5000 + b"\r\n", id="trailers"),
        pytest.param(CHUNKED + b"0\r\na: ", b"b" * 65536, id="one-trailer"),
        pytest.param(CHUNKED + b"1;", b"b" * 65536, id="chunk"),
    ],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_head_without_end_closes_its_connection(
    client: Client, start: bytes, more: bytes, is_first: bool
) -> None:
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as sender:
        if not is_first:
            sender.sendall(GET + b"\r\n")
            assert sender.recv(4096).startswith(b"HTTP/1.1 200 ")
        sent = 0
        with contextlib.suppress(ConnectionError):
            sender.sendall(start)
            while sent < 20_000_000:
                sender.sendall(more)
                sent += len(more)
        assert sent < 20_000_000


@pytest.mark.parametrize("start", [b"", b"\r\n", b"GET /tiles/1", GET, GET + b"\r\n" + GET])
def test_a_head_that_does_not_come_to_its_end_closes_its_connection(
    client: Client, monkeypatch: pytest.MonkeyPatch, start: bytes
) -> None:
    monkeypatch.setattr("s4g_ray.serving.server.HEADERS_S", 0.2)
    with socket.create_connection(("127.0.0.1", client.port), timeout=60) as sender:
        sender.sendall(start)
        while sender.recv(4096):
            pass


def test_a_long_answer_outlives_the_time_of_a_head(
    gallery: StandInGallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s4g_ray.serving.server.HEADERS_S", 1.0)
    slow = StandInGallery(gallery.uri, seconds=1.5)
    with local_service(slow) as (client, _):
        assert client.locate(make_photo(9)).status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/tiles/-1",
        "/tiles/256",
        "/tiles/9223372036854775808",
        "/tiles/" + "9" * 5000,
        "/tiles/1e3",
        "/tiles/%C2%B2",
        "/tiles/../../etc/passwd",
        "/tiles/..%2f..%2fetc%2fpasswd",
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e/app.py",
        "/static//etc/passwd",
        "/tiles//",
        "/metrics/",  # no redirect to the host that the request names
        "/docs",
        "/redoc",
    ],
)
def test_no_path_leads_out_of_the_gallery_and_the_page(client: Client, path: str) -> None:
    answered = client.get(path)
    assert answered.status == 404
    assert answered.json["error"]["message"]


def test_a_tile_is_served_as_it_is_stored(client: Client) -> None:
    answered = client.get("/tiles/17")
    assert answered.status == 200
    assert answered.headers["content-type"] == "image/jpeg"
    assert answered.headers["x-content-type-options"] == "nosniff"
    assert answered.data == b"\xff\xd8 tile 17"


def test_the_gallery_and_its_health_are_described(client: Client) -> None:
    found = client.get("/gallery").json
    assert found["name"] == "lake"
    assert found["size_m"] == [60.0]
    west, south, east, north = found["bounds"]
    assert west < -112 < -111.85 < east
    assert south < 40 < 40.15 < north
    health = client.get("/healthz")
    assert (health.status, health.json["status"]) == (200, "ok")
    assert client.get("/openapi.json").json["paths"]["/locate"]["post"]["requestBody"]


def test_tiles_in_view_are_listed_unless_they_are_too_many(client: Client) -> None:
    unknown = client.get("/gallery/tiles?bound=-112,40,-111,41")
    assert (unknown.status, unknown.code) == (422, "bad_parameter")
    assert "unknown parameter 'bound'; there are bounds, limit" in unknown.json["error"]["message"]
    few = client.get("/gallery/tiles?bounds=-112.001,39.999,-111.979,40.001").json["tiles"]
    assert [tile["id"] for tile in few] == [0, 1, 2]
    assert client.get("/gallery/tiles?limit=1").json["tiles"] == []
    assert client.get("/gallery/tiles?bounds=1,2,3").code == "bad_parameter"


def test_another_method_is_refused_in_the_same_form(client: Client) -> None:
    answered = client.get("/locate")
    assert (answered.status, answered.code) == (405, "bad_method")


def test_a_token_is_asked_for_but_not_by_the_page_and_the_probe(gallery: StandInGallery) -> None:
    with local_service(gallery, token="secret") as (client, _):
        for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            answered = client.locate(make_photo(), **wrong)
            assert (answered.status, answered.code) == (401, "unauthorized")
            assert answered.headers["www-authenticate"] == "Bearer"
        assert client.get("/tiles/1").status == 401
        assert client.get("/metrics").status == 401
        assert client.get("/healthz").status == 200
        right = {"Authorization": "Bearer secret"}
        assert client.locate(make_photo(), **right).status == 200
        assert client.get("/tiles/1", **right).status == 200


def test_a_page_of_another_site_can_neither_ask_nor_point_its_name_here(
    gallery: StandInGallery,
) -> None:
    names = ServeConfig(gallery=gallery.uri).allowed_hosts
    with local_service(gallery, hosts=names) as (client, _):
        for own in ("localhost", "127.0.0.1:80", "[::1]:8000", "LOCALHOST:1"):
            assert client.get("/gallery", Host=own).status == 200
        for other in ("evil.example", "localhost.evil.example:80", "127.0.0.1.nip.io", "[::2]"):
            answered = client.get("/gallery", Host=other)
            assert (answered.status, answered.code) == (421, "wrong_host")
            assert client.get("/healthz", Host=other).status == 200
        site = {"Sec-Fetch-Site": "cross-site", "Origin": "http://evil.example"}
        for answered in (client.locate(make_photo(), **site), client.get("/tiles/1", **site)):
            assert (answered.status, answered.code) == (403, "cross_site")
            assert "access-control-allow-origin" not in answered.headers
        assert client.get("/", **site).status == 200  # a link
        own_page = {"Sec-Fetch-Site": "same-origin"}
        assert client.locate(make_photo(), **own_page).status == 200
    assert ServeConfig(gallery="x", host="0.0.0.0").allowed_hosts == ()


def test_a_client_that_does_not_read_is_cut_off(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s4g_ray.serving.server.WRITE_S", 0.2)
    lost = threading.Event()
    end = HeadTimeoutProtocol.connection_lost

    def note_end(protocol: HeadTimeoutProtocol, error: Exception | None) -> None:
        end(protocol, error)
        lost.set()

    monkeypatch.setattr(HeadTimeoutProtocol, "connection_lost", note_end)
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.settimeout(60)
        reader.connect(("127.0.0.1", client.port))
        for _ in range(40):  # answers of 350 kB each
            reader.sendall(b"GET /static/world.geojson HTTP/1.1\r\nHost: x\r\n\r\n")
        assert lost.wait(60)
    assert client.get("/static/world.geojson").status == 200


class _Clock:
    """A loop whose timers run when they are told to."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def call_later(self, _seconds: float, check: Callable[[], None]) -> Any:
        self.waiting.append(check)
        return SimpleNamespace(cancel=lambda: self.waiting.remove(check))

    def run_next(self) -> None:
        self.waiting.pop()()


def test_a_client_that_reads_slowly_is_not_cut_off() -> None:
    config = uvicorn.Config(lambda: None, http=HeadTimeoutProtocol)
    clock: Any = _Clock()
    protocol = HeadTimeoutProtocol(config, ServerState(), {}, clock)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(bytes(50_000))  # the system holds them
        buffered = [90_000]
        aborted: list[bool] = []
        transport: Any = SimpleNamespace(
            get_write_buffer_size=lambda: buffered[0],
            get_extra_info=lambda name: ours if name == "socket" else None,
            abort=lambda: aborted.append(True),
            pause_reading=lambda: None,
        )
        protocol.transport = transport
        protocol.flow = FlowControl(transport)
        protocol.pause_writing()
        theirs.recv(50_000, socket.MSG_WAITALL)  # from the system's queue
        clock.run_next()
        buffered[0] -= 30_000  # from the process
        clock.run_next()
        assert not aborted
        buffered[0] -= LEAST_READ - 1
        clock.run_next()
        assert aborted
        assert not clock.waiting


def wait_until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_more_requests_than_the_queue_holds_are_refused_at_once(tmp_path: Path) -> None:
    held = StandInGallery(write_stand_in(tmp_path))
    (tmp_path / HOLD).touch()
    with local_service(held, max_queue=4, batch_size=2) as (client, _):
        found: list[int] = []

        def ask() -> None:
            answered = client.locate(make_photo())
            found.append(answered.status)
            if answered.status == 503:
                assert answered.code == "overloaded"
                assert int(answered.headers["retry-after"]) >= 1

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(found) == 8)
        assert found == [503] * 8  # before any batch has ended
        (tmp_path / HOLD).unlink()
        for thread in threads:
            thread.join()
        assert sorted(found) == [200] * 4 + [503] * 8
        assert client.locate(make_photo()).status == 200  # it has recovered


def test_requests_that_wait_are_located_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[object] = []
    submit = Batcher.submit

    async def note(self: Any, item: Any) -> Any:
        submitted.append(item)
        return await submit(self, item)

    monkeypatch.setattr(Batcher, "submit", note)
    held = StandInGallery(write_stand_in(tmp_path))
    (tmp_path / HOLD).touch()
    with local_service(held, batch_size=8) as (client, _):
        threads = [threading.Thread(target=client.locate, args=(make_photo(),)) for _ in range(9)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(submitted) == 9)  # decoded
        (tmp_path / HOLD).unlink()
        for thread in threads:
            thread.join()
    assert sum(held.batches) == 9
    assert len(held.batches) <= 3  # one that waited, and the others in two


def test_a_request_that_is_too_late_is_refused(tmp_path: Path) -> None:
    slow = StandInGallery(write_stand_in(tmp_path), seconds=0.6)
    with local_service(slow, max_answer_s=0.3) as (client, _):
        answered = client.locate(make_photo())
    assert (answered.status, answered.code) == (503, "too_late")


def test_photos_are_checked_beside_other_requests_and_within_the_time_of_the_answer(
    gallery: StandInGallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds: list[float] = []
    with local_service(gallery, max_answer_s=0.4) as (client, _):

        def check_slowly(*_: object) -> None:
            started = time.monotonic()
            client.get("/tiles/1")
            seconds.append(time.monotonic() - started)
            time.sleep(0.8)

        monkeypatch.setattr("s4g_ray.serving.app.check_photos", check_slowly)
        answered = client.locate(make_photo())
    assert (answered.status, answered.code) == (503, "too_late")
    assert max(seconds) < 60


def test_metrics_count_requests_answers_and_seconds(gallery: StandInGallery) -> None:
    with local_service(gallery) as (client, _):
        client.locate(make_photo(50), b"no photo")
        client.locate(make_photo(0))
        client.locate(b"no photo")
        client.get("/nowhere/../else")
        text = client.get("/metrics").data.decode()
    values = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert values["s4g_serve_requests_total", ("route", "/locate"), ("status", "200")] == 2
    assert values["s4g_serve_requests_total", ("route", "/locate"), ("status", "415")] == 1
    assert values["s4g_serve_requests_total", ("route", "other"), ("status", "404")] == 1
    assert values["s4g_serve_photos_total", ("answer", "located")] == 1
    assert values["s4g_serve_photos_total", ("answer", "none")] == 1
    assert values["s4g_serve_photos_total", ("answer", "unreadable")] == 1
    assert values["s4g_serve_refusals_total", ("code", "no_photo")] == 1
    for stage in ("decode", "wait", "locate", "total"):
        assert values["s4g_serve_seconds_count", ("stage", stage)] == 2
