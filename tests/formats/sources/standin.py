"""A local server that answers as the Hugging Face hub does, for reading and for writing, and can misbehave."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves the files below `root` as the repository `me/coders`; counts what is fetched."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.root = root
        self.commit = COMMIT
        self.status = 0
        """Answer everything with this."""
        self.gated = self.renamed = False
        self.cut_after: int | None = None
        """Bytes of a weights file after which the connection drops, each time `cuts` allows it."""
        self.cuts = 0
        self.fetched: list[str] = []
        self.ranges: list[str] = []
        self.tokens: set[str] = set()
        self.repos: dict[str, dict[str, object]] = {}
        self.pushed: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.refuses_objects = False
        self.large = 1000
        """Bytes from which a pushed file goes through LFS."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def size_of(self, path: Path) -> int:
        """A file's size; `NAME` with `NAME.claims` beside it has the size that stands in that."""
        claims = path.with_name(f"{path.name}.claims")
        return int(claims.read_text()) if claims.is_file() else path.stat().st_size

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.write()

    def do_PUT(self) -> None:
        self.write()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.server.status:
            self.reply(self.server.status, b"{}")
        elif path == "/api/whoami-v2":
            self.server.tokens |= {self.headers["Authorization"]} if "Authorization" in self.headers else set()
            self.say({"name": "me", "type": "user", "orgs": []})
        elif self.server.gated:
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif self.server.renamed and "/old/name" in path:
            self.reply(307, b"", {"Location": self.path.replace("/old/name", "/me/coders")})
        elif path.removeprefix("/api/models").startswith("/me/private"):
            self.reply(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif not path.removeprefix("/api/models").startswith("/me/coders"):
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api/models/me/coders/tree/"):
            self.tree(path.removeprefix("/api/models/me/coders/tree/"))
        elif path.startswith("/api/models/me/coders"):
            self.info(path.removeprefix("/api/models/me/coders").removeprefix("/revision/"))
        else:
            self.file(path.removeprefix("/me/coders/resolve/"))

    def info(self, revision: str) -> None:
        if revision not in ("", "main", "v1", self.server.commit):
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            self.say({"id": "me/coders", "sha": self.server.commit})

    def tree(self, rest: str) -> None:
        revision, _, inside = rest.partition("/")
        folder = self.server.root / inside
        if revision not in ("main", "v1", self.server.commit):
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif not folder.is_dir():
            self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        else:
            found = sorted(folder.rglob("*") if "recursive=true" in self.path.lower() else folder.iterdir())
            self.say(
                [
                    {"type": "directory" if f.is_dir() else "file", "oid": "0" * 40, "size": self.server.size_of(f),
                     "path": f.relative_to(self.server.root).as_posix()}
                    for f in found if f.suffix != ".claims"
                ]
            )  # fmt: skip

    def file(self, rest: str) -> None:
        path = self.server.root / rest.partition("/")[2]
        if not path.is_file():
            self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        data = path.read_bytes()
        headers = {"X-Repo-Commit": self.server.commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        self.serve(data, headers, rest.partition("/")[2])

    def serve(self, data: bytes, headers: dict[str, str], name: str) -> None:
        """A file, or the rest of it that a range asks for; broken off where the test wants that."""
        if self.command == "GET":
            self.server.fetched.append(name)
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        if wanted:
            self.server.ranges.append(wanted)
            headers |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        cut = self.server.cut_after
        if cut is None or self.command != "GET" or self.server.cuts <= 0 or len(data) - start <= cut:
            self.reply(206 if wanted else 200, data[start:], headers)
            return
        self.server.cuts -= 1
        self.head(206 if wanted else 200, headers, len(data) - start)
        self.wfile.write(data[start : start + cut])
        self.close_connection = True

    def write(self) -> None:
        """Make a repository, say how each file goes up, take large files, take a commit."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.server.tokens |= {self.headers["Authorization"]} if "Authorization" in self.headers else set()
        if self.server.status:
            self.reply(self.server.status, b"{}")
        elif path == "/api/repos/create":
            told = json.loads(body)
            name = f"{told.get('organization') or 'me'}/{told['name']}"
            self.server.repos[name] = told
            self.say({"url": f"{self.server.url}/{name}", "name": name})
        elif "/branch/" in path:
            self.say({})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = ["lfs" if f["size"] >= self.server.large else "regular" for f in files]
            self.say(
                {"files": [{"path": f["path"], "uploadMode": m, "shouldIgnore": False} for f, m in zip(files, modes)]}
            )
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": o["oid"],
                    "size": o["size"],
                    "actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}},
                }
                for o in json.loads(body)["objects"]
            ]
            self.say({"transfer": "basic", "objects": objects})
        elif path.startswith("/lfs/") and self.server.refuses_objects:
            self.reply(500, b"")
        elif path.startswith("/lfs/"):
            self.server.objects[path.removeprefix("/lfs/")] = body
            self.reply(200, b"")
        elif "/commit/" in path:
            self.commit(body)
        elif path == "/api/validate-yaml":
            self.say({"errors": [], "warnings": []})
        else:
            self.reply(404, b"{}")

    def commit(self, body: bytes) -> None:
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.server.pushed[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.server.pushed[value["path"]] = self.server.objects[value["oid"]]
        url = f"{self.server.url}/me/coders/commit/{self.server.commit}"
        self.say({"success": True, "commitOid": self.server.commit, "commitUrl": url, "pullRequestUrl": None})

    def say(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.head(status, headers or {}, len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def head(self, status: int, headers: dict[str, str], length: int) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """The server in a thread of its own, gone at the end."""
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
