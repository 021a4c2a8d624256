"""A hub on the loopback address that speaks what huggingface_hub asks: enough to download, and to be refused."""

import hashlib
import json
import re
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<rev>[^/]+)/?(?P<file>.*))?")
FILE = re.compile(r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<file>.+)")


class FakeHub(ThreadingHTTPServer):
    """``repositories`` are folders by id; ``gated`` ones may be listed and not read, as on the real hub."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.token: str | None = None
        """What opens the gated ones."""
        self.status: int | None = None
        """What every request is answered with, if anything."""
        self.delay_s = 0.0
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def downloads(self) -> Counter[str]:
        """How often each file was sent."""
        return Counter(match["file"] for kind, path in self.requests if kind == "GET" and (match := FILE.match(path)))


class Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        match = FILE.fullmatch(path) or API.fullmatch(path)
        if self.server.status or match is None:
            return self.answer(self.server.status or 404)
        name, rev, file = match["id"], match["rev"] or "main", match["file"]
        folder = self.server.repositories.get(name)
        if folder is None:
            return self.answer(401, {"X-Error-Code": "RepoNotFound"})
        commit = hashlib.sha1(name.encode()).hexdigest()
        if rev not in ("main", commit):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        if match.re is API:
            return self.answer(200, body=json.dumps(self.listing(folder, match, commit)).encode())
        known = {"X-Repo-Commit": commit}
        if name in self.server.gated and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.answer(401, known | {"X-Error-Code": "GatedRepo"})
        if not (folder / file).is_file():
            return self.answer(404, known | {"X-Error-Code": "EntryNotFound"})
        body = (folder / file).read_bytes()
        if self.command == "GET":
            time.sleep(self.server.delay_s)
        self.answer(200, known | {"ETag": f'"{hashlib.sha256(body).hexdigest()}"'}, body)

    def listing(self, folder: Path, match: re.Match, commit: str) -> object:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        names = [path.relative_to(folder).as_posix() for path in files]
        if match["what"] != "tree":
            return {"id": match["id"], "sha": commit, "siblings": [{"rfilename": name} for name in names]}
        return [
            {"type": "file", "path": name, "size": path.stat().st_size, "oid": hashlib.sha1(name.encode()).hexdigest()}
            for name, path in zip(names, files, strict=True)
            if name.startswith(match["file"])
        ]

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextmanager
def fake_hub():
    """A hub that answers while the block lasts."""
    with FakeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
