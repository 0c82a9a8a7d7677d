"""A Hugging Face hub on 127.0.0.1 that serves folders, and fails on demand: the fixture `hub`."""

import hashlib
import json
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

import orrery.weights.hub

CHUNK = 1000  # bytes that huggingface_hub writes at a time, 10 MB outside tests
LARGE = (".safetensors", ".pt", ".pth", ".bin")  # kept outside of git by the hub and named by their SHA-256


@dataclass(frozen=True)
class Request:
    """What came: method, path without the query, the Range and the Authorization header; and how many bytes went."""

    method: str
    path: str
    range: str | None
    token: str | None
    storage: bool
    sent: int = 0


class Hub:
    """Folders as repositories, each with the one revision `main` and the commit that its files make.

    hub.folders["owner/name"] = folder    serve a folder; it is read anew with every request
    hub.requests, hub.sent(file)          what was asked; the bytes of a file that went out
    hub.cut(5000)                         break the next transfer of more than 5000 bytes after 5000 (times=N;
                                          how="reset": the connection is reset; "stall": nothing more comes)
    hub.refuse("owner/name", 401, "GatedRepo")     every file of it is refused with this status and X-Error-Code
    hub.busy(2)                           the next 2 requests are answered with 503
    hub.announced["a.bin"] = 10           lie about a size; None: say none
    hub.ranges = False                    ignore Range, as some proxies do
    hub.xet = True                        large files say that they are stored in Xet (which is not served)
    hub.portal = True                     everything is answered with a login page, as some networks do
    hub.stop()                            nobody answers any more

    Large files are redirected to a second server, as the hub does to its storage.
    """

    def __init__(self) -> None:
        self.folders: dict[str, Path] = {}
        self.requests: list[Request] = []
        self.announced: dict[str, int | None] = {}
        self.refused: dict[str, tuple[int, str | None]] = {}
        self.ranges, self.xet, self.portal = True, False, False
        self.cuts: list[tuple[int, str]] = []
        self.busy_for = 0
        self.lock, self.stopped, self.stalled = threading.Lock(), threading.Event(), threading.Event()
        self._servers = [self._start(storage) for storage in (False, True)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def _start(self, storage: bool) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self, "storage": storage})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    def cut(self, after: int, times: int = 1, how: str = "close") -> None:
        self.cuts = [(after, how)] * times

    def busy(self, times: int) -> None:
        self.busy_for = times

    def refuse(self, repo: str, status: int, code: str | None = None) -> None:
        self.refused[repo] = status, code

    def files(self, repo: str) -> dict[str, bytes]:
        folder = self.folders[repo]
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

    def commit(self, repo: str) -> str:
        return hashlib.sha1(repr(self.files(repo)).encode()).hexdigest()

    def asked(self, method: str, file: str = "") -> list[Request]:
        """The requests of a method for a file (any path that ends so), redirects not counted."""
        return [item for item in self.requests if item.method == method and item.path.endswith(file)]

    def sent(self, file: str) -> int:
        return sum(item.sent for item in self.asked("GET", file))

    def stop(self) -> None:
        from huggingface_hub.utils import close_session

        close_session()
        if not self.stopped.is_set():
            self.stopped.set()
            for server in self._servers:
                server.shutdown()
                server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    storage: bool

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        with self.hub.lock:
            busy, self.hub.busy_for = self.hub.busy_for > 0, max(self.hub.busy_for - 1, 0)
        if busy:
            self._record(path)
            return self._send(503)
        if self.hub.portal:
            self._record(path)
            return self._send(200, {"Content-Type": "text/html"}, b"<html>Welcome!</html>")
        if path.startswith("api/models/"):
            return self._api(path)
        repo, found, rest = path.partition("/resolve/")
        if not found or "/" not in rest:
            self._record(path)
            return self._send(404)
        self._file(path, repo, *rest.split("/", 1))

    def _missing(self, repo: str, revision: str) -> bool:
        """Answers what cannot be served, and says whether it did."""
        if repo not in self.hub.folders:
            self._send(404, {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", self.hub.commit(repo)):
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            return False
        return True

    def _api(self, path: str) -> None:
        """GET /api/models/REPO[/revision/REVISION]?blobs=True and /api/models/REPO/tree/REVISION?recursive=True."""
        self._record(path)
        parts = path.split("/")[2:]
        repo, kind, revision = "/".join(parts[:2]), *(parts[2:4] or ("revision", "main"))
        if self._missing(repo, revision):
            return
        if kind == "tree":
            assert parse_qs(urlsplit(self.path).query)["recursive"] == ["true"]
            listing: object = [self._entry(name, data) for name, data in self.hub.files(repo).items()]
        else:
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.hub.files(repo).items()]
            listing = {"id": repo, "sha": self.hub.commit(repo), "siblings": siblings}
        self._send(200, {"Content-Type": "application/json"}, json.dumps(listing).encode())

    def _entry(self, name: str, data: bytes) -> dict[str, object]:
        entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            if self.hub.xet:
                entry["xetHash"] = "a" * 64
        return entry

    def _file(self, path: str, repo: str, revision: str, name: str) -> None:
        """HEAD and GET of /REPO/resolve/REVISION/FILE; large files are with the second server."""
        if repo in self.hub.refused:
            self._record(path)
            status, code = self.hub.refused[repo]
            return self._send(status, {"X-Error-Code": code} if code else {})
        if self._missing(repo, revision):
            return self._record(path)
        commit, data = self.hub.commit(repo), self.hub.files(repo).get(name)
        if data is None:
            self._record(path)
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        size = self.hub.announced.get(name, len(data))
        if not name.endswith(LARGE):
            etag = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
            return self._transfer(path, data, headers, size)
        if self.storage:
            return self._transfer(path, data, {"Accept-Ranges": "bytes"}, size)
        headers = {
            "X-Repo-Commit": commit,
            "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "Location": self.hub.storage_url + self.path,
        }
        if size is not None:
            headers["X-Linked-Size"] = str(size)
        if self.hub.xet:
            headers |= {"X-Xet-Hash": "a" * 64, "X-Xet-Refresh-Route": f"{self.hub.url}/xet-token"}
        if self.command == "HEAD":
            self._record(path)
        self._send(302, headers)

    def _transfer(self, path: str, data: bytes, headers: dict[str, str], announced: int | None) -> None:
        if self.command == "HEAD":
            self._record(path)
            return self._send(200, headers | {"Content-Length": str(announced or 0)})
        start, status = 0, 200
        if self.hub.ranges and self.headers["Range"]:
            start, status = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")), 206
            if start >= len(data):
                self._record(path)
                return self._send(416, {"Content-Range": f"bytes */{len(data)}"})
            headers = headers | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        body = data[start:]
        with self.hub.lock:
            cut = bool(self.hub.cuts) and self.hub.cuts[0][0] < len(body)
            after, how = self.hub.cuts.pop(0) if cut else (len(body), "")
        self._record(path, len(body[:after]))
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:after])
        self.wfile.flush()
        if how == "stall":
            self.hub.stalled.set()
            self.hub.stopped.wait(20)
        if how == "reset":  # linger for no time: the other side gets "connection reset by peer"
            threading.Event().wait(0.1)  # let it read first what was sent
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = self.close_connection or bool(how)

    def _record(self, path: str, sent: int = 0) -> None:
        headers = self.headers
        with self.hub.lock:
            self.hub.requests.append(
                Request(self.command, path, headers["Range"], headers["Authorization"], self.storage, sent)
            )

    def _send(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A `Hub` that huggingface_hub talks to, here and in child processes, with an empty cache in tmp_path/"hub"."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http, close_session

    served = Hub()
    cache, token = tmp_path / "hub", tmp_path / "token"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"ENDPOINT": served.url, "HUB_CACHE": cache, "TOKEN_PATH": token, "HUB_DISABLE_XET": 0}.items():
        monkeypatch.setenv(f"HF_{name}", str(value))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(token))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(constants, "HF_XET_HIGH_PERFORMANCE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    for module in (file_download, _http, orrery.weights.hub):  # nothing waits between two tries
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))
    close_session()  # one that was opened under other settings
    yield served
    served.stop()
