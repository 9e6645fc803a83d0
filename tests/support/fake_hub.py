"""Stand in for the Hugging Face hub: what its file system asks of one data set, read only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.http_server import Handler, serving

REPO = "owner/places"
COMMIT = "0" * 40


@dataclass
class Hub:
    """The files of the data set by path, and the requests that were made."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)

    def describe(self, path: str) -> dict[str, Any] | None:
        """Return the hub's entry of a file or folder; None where there is none."""
        if path in self.files:
            data = self.files[path]
            return {
                "type": "file",
                "path": path,
                "size": len(data),
                "oid": hashlib.sha1(data).hexdigest(),
            }
        if any(name.startswith(f"{path}/") for name in self.files):
            return {"type": "directory", "path": path, "oid": COMMIT, "size": 0}
        return None

    def list_folder(self, folder: str) -> list[dict[str, Any]]:
        """Return the entries of a folder; "" is the root."""
        start = f"{folder}/" if folder else ""
        names = {
            name[len(start) :].partition("/")[0] for name in self.files if name.startswith(start)
        }
        return [entry for name in sorted(names) if (entry := self.describe(start + name))]


class _Handler(Handler):
    hub: Hub

    def serve(self) -> None:
        body = self.read_body()
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        api = f"/api/datasets/{REPO}"
        resolve = f"/datasets/{REPO}/resolve/"
        if path.startswith(resolve):
            self.send_file(path.removeprefix(resolve).partition("/")[2])
        elif path.startswith(f"{api}/paths-info/"):
            self.send_paths(body)
        elif path.startswith(f"{api}/tree/"):
            rest = path.removeprefix(f"{api}/tree/").partition("/")[2]
            found = self.hub.list_folder(rest)
            if found:
                self.send_json(found)
            else:
                self.send_json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        elif path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            self.send_json({"id": REPO, "sha": COMMIT, "siblings": [], "tags": []})
        else:
            self.send_json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    do_GET = do_POST = do_HEAD = serve  # noqa: N815

    def send_paths(self, body: bytes) -> None:
        text = body.decode()
        asked = json.loads(text) if text.startswith("{") else parse_qs(text)
        paths = asked["paths"]
        names = [paths] if isinstance(paths, str) else paths
        self.send_json([entry for name in names if (entry := self.hub.describe(name))])

    def send_file(self, name: str) -> None:
        data = self.hub.files.get(name)
        if data is None:
            self.send_json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            return
        headers = {"X_Repo_Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        wanted = self.headers.get("Range")
        if wanted is None:
            self.answer(200, data, **headers)
            return
        start, _, end = wanted.removeprefix("bytes=").partition("-")
        last = min(int(end) if end else len(data) - 1, len(data) - 1)
        headers["Content_Range"] = f"bytes {start}-{last}/{len(data)}"
        self.answer(206, data[int(start) : last + 1], **headers)

    def send_json(self, value: Any, status: int = 200, **headers: str) -> None:
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json", **headers)


@contextmanager
def fake_hub() -> Iterator[Hub]:
    """Run a hub on a free port, until the block ends."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with serving(handler) as hub.address:
        yield hub
