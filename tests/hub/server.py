"""A real HTTP server with the API shapes of the Hugging Face hub and of ModelScope, which fails on demand.

    hub = HubServer()
    commit = hub.add("org/name", {"config.json": b"{}", "model.safetensors": data})
    hub.fail("model.safetensors", cut_after=1000, times=2)
    with hub: … hub.url …; hub.served["model.safetensors"] → [(begin, end), …]

Files that are large (``lfs``) are redirected to a "CDN", another host name of the same server, which asks for a
signature and refuses credentials, as the real one does. Shapes as ``huggingface_hub`` and ``modelscope_hub`` read them.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

Content = bytes | Path
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_CHUNK = 1 << 16


@dataclass
class Fault:
    """Something that goes wrong with a file (or with ``api``, the listing), a number of times."""

    times: int
    status: int = 0  # answer with this
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # bytes of the body, then the connection drops
    flip_at: int | None = None  # this byte of the file is wrong
    extra_bytes: int = 0  # the file is that much longer (or shorter) than listed
    bytes_per_s: int | None = None
    ignore_range: bool = False
    redirect_to_itself: bool = False
    overlong_range: bool = False  # sends more than was asked for
    wrong_range: bool = False  # sends another part than was asked for
    expired_signature: bool = False  # the CDN refuses the address that it gave out
    after: int = 0  # requests for it that go well before

    def matches_cdn(self) -> bool:
        return not (self.redirect_to_itself or (self.status and not self.expired_signature))


@dataclass
class Repo:
    commits: dict[str, dict[str, Content]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False


class HubServer:
    """Repositories, faults, and what was asked for and served."""

    def __init__(self, *, token: str | None = None, lfs_from: int = 1000, page_size: int = 1000) -> None:
        self.token = token  # the one that opens gated repositories; any other is refused everywhere
        self.lfs_from = lfs_from  # bytes
        self.page_size = page_size
        self.repos: dict[str, Repo] = {}
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self._served: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.requests: list[tuple[str, str, dict[str, str]]] = []  # method, target, headers
        self.sending = 0  # answers that are not counted in ``served`` yet
        self.lock = threading.Lock()
        self.on_request: Any = lambda handler: None
        self.redirect: Any = lambda handler: None  # a request → where it is redirected to, if it is
        self.rewrite: Any = lambda answer: answer  # what the API would answer → what it does: a value, or bytes
        self.hashes: dict[Path, str] = {}
        self._generation = 0
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def cdn(self) -> str:
        return f"http://localhost:{self.port}"  # another origin

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, repo_id: str, files: Mapping[str, Content], *, ref: str = "main", gated: bool = False) -> str:
        """Commit these files, move ``ref`` there, and return the commit."""
        self._generation += 1
        commit = hashlib.sha1(f"{repo_id} {self._generation}".encode()).hexdigest()
        repo = self.repos.setdefault(repo_id, Repo())
        repo.commits[commit], repo.refs[ref], repo.gated = dict(files), commit, gated
        repo.refs.setdefault("master", commit)
        repo.refs["master"] = repo.refs.get("main", commit)
        return commit

    def fail(self, path: str, *, times: int = 1, **what: Any) -> None:
        self.faults[path].append(Fault(times, **what))

    def fault(self, path: str, *, cdn: bool = True, part: tuple[int, int] = (0, 1 << 60)) -> Fault | None:
        """The next fault of a path (of bytes ``part`` of it), used up."""
        with self.lock:
            for fault in self.faults.get(path, ()):
                if fault.flip_at is not None and not part[0] <= fault.flip_at < part[1]:
                    continue
                if fault.times > 0 and (fault.matches_cdn() if cdn else not fault.matches_cdn()):
                    if fault.after > 0:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def sha256(self, content: Content) -> str:
        if isinstance(content, bytes):
            return hashlib.sha256(content).hexdigest()
        if content not in self.hashes:
            with open(content, "rb") as file:
                self.hashes[content] = hashlib.file_digest(file, "sha256").hexdigest()
        return self.hashes[content]

    def forget_served(self) -> None:
        """Count from here; what is still on its way belongs to before."""
        self._served = defaultdict(list)

    @property
    def served(self) -> dict[str, list[tuple[int, int]]]:
        """The bytes that left, per path. Answers that are just ending are waited for."""
        deadline = time.monotonic() + 2
        while self.sending and time.monotonic() < deadline:
            time.sleep(0.005)
        return self._served

    def served_bytes(self, path: str) -> int:
        return sum(end - begin for begin, end in self.served[path])


def size_of(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def git_sha1(content: Content) -> str:
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed are what this server is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    timeout = 30

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.server.hub
        with hub.lock:
            hub.requests.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        hub.on_request(self)
        if (location := hub.redirect(self)) is not None:
            return self._redirect(location, {})
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        path = unquote(parts.path)
        if path.startswith("/cdn/"):
            return self._cdn(path.removeprefix("/cdn/"), query)
        if self._credentials_are_wrong():
            return self._error(401, "", "Invalid credentials in Authorization header")
        if path.startswith("/api/v1/models/"):
            return self._modelscope(path.removeprefix("/api/v1/models/"), query)
        if path.startswith("/api/models/"):
            return self._huggingface_api(parts.path.removeprefix("/api/models/"), query)
        if match := _RESOLVE.fullmatch(path):
            return self._resolve(match[1], match[2], match[3])
        return self._error(404, "RepoNotFound", "Repository not found")

    # Hugging Face

    def _huggingface_api(self, rest: str, asked: dict[str, str]) -> None:
        org, name, kind, revision = [unquote(part) for part in [*rest.split("/"), "", ""][:4]]
        found = self._find(f"{org}/{name}", revision or "main")
        if found is None:
            return
        commit, files = found
        hub = self.server.hub
        if kind in ("", "revision"):
            siblings = [{"rfilename": path} for path in files]
            return self._json({"id": f"{org}/{name}", "sha": commit, "siblings": siblings, "private": False})
        start = int(asked.get("cursor", "0"))
        page = sorted(files)[start : start + hub.page_size]
        headers = {}
        if start + hub.page_size < len(files):
            following = (
                f"{hub.url}/api/models/{org}/{name}/tree/{revision}?recursive=true&cursor={start + hub.page_size}"
            )
            headers["Link"] = f'<{following}>; rel="next"'
        self._json([self._entry(path, files[path]) for path in page], headers)

    def _entry(self, path: str, content: Content) -> dict[str, Any]:
        hub, size = self.server.hub, size_of(content)
        if size < hub.lfs_from:
            return {"type": "file", "oid": git_sha1(content), "size": size, "path": path}
        lfs = {"oid": hub.sha256(content), "size": size, "pointerSize": 134}
        return {"type": "file", "oid": "f" * 40, "size": size, "path": path, "lfs": lfs, "xetHash": "e" * 64}

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        found = self._find(repo_id, revision)
        if found is None:
            return
        commit, files = found
        hub = self.server.hub
        if path not in files:
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        content = files[path]
        headers = {"X-Repo-Commit": commit}
        fault = hub.fault(path, cdn=False)
        if fault is not None and fault.redirect_to_itself:
            return self._redirect(f"{hub.url}{self.path}", headers)
        if fault is not None:
            return self._error(fault.status, "", "", fault.headers)
        if size_of(content) < hub.lfs_from:
            return self._send(path, content, headers | {"ETag": f'"{git_sha1(content)}"'})
        headers["X-Linked-ETag"] = f'"{hub.sha256(content)}"'
        headers["X-Linked-Size"] = str(size_of(content))
        headers["X-Xet-Hash"] = "e" * 64  # of the same bytes in another store: no SHA-256
        headers["Link"] = f'<{hub.url}/api/models/{repo_id}/xet-read-token/{commit}>; rel="xet-auth"'
        location = f"{hub.cdn}/cdn/{repo_id}/{commit}/{quote(path)}?signature=valid"
        return self._redirect(location, headers)

    def _cdn(self, rest: str, query: dict[str, str]) -> None:
        org, name, commit, path = rest.split("/", 3)
        hub = self.server.hub
        if self.headers.get("Authorization") or self.headers.get("Cookie") or query.get("signature") != "valid":
            return self._error(400, "", "Only one auth mechanism allowed")
        content = hub.repos[f"{org}/{name}"].commits[commit][path]
        self._send(path, content, {"ETag": 'W/"of-the-cdn"'})

    # ModelScope

    def _modelscope(self, rest: str, query: dict[str, str]) -> None:
        org, name, kind = rest.split("/", 2)
        repo = self.server.hub.repos.get(f"{org}/{name}")
        commit = repo.refs.get(query.get("Revision", "master")) if repo else None
        if repo is None or commit is None:
            return self._json({"Code": 10010205001, "Message": "record not found", "Success": False}, status=404)
        if repo.gated and not self._has_token():
            return self._json({"Code": 403, "Message": "access denied", "Success": False}, status=403)
        files = repo.commits[commit]
        if kind == "repo/files":
            if fault := self.server.hub.fault("api", cdn=False):
                return self._error(fault.status, "", "", fault.headers)
            entries = [
                {
                    "Name": path.rpartition("/")[2],
                    "Path": path,
                    "Type": "blob",
                    "Size": size_of(content),
                    "Sha256": self.server.hub.sha256(content),
                    "IsLFS": size_of(content) >= self.server.hub.lfs_from,
                }
                for path, content in files.items()
            ]
            entries += [{"Name": d, "Path": d, "Type": "tree", "Size": 0, "Sha256": ""} for d in _directories(files)]
            return self._json({"Code": 200, "Data": {"Files": entries}, "Message": "success", "Success": True})
        path = query.get("FilePath", "")
        if path not in files:
            return self._json({"Code": 404, "Message": "no such file", "Success": False}, status=404)
        fault = self.server.hub.fault(path, cdn=False)
        if fault is not None:
            return self._error(fault.status, "", "", fault.headers)
        self._send(path, files[path], {})

    # Both

    def _find(self, repo_id: str, revision: str) -> tuple[str, dict[str, Content]] | None:
        hub = self.server.hub
        fault = hub.fault("api", cdn=False) if self.path.startswith("/api/") else None
        repo = hub.repos.get(repo_id)
        if fault is not None:
            self._error(fault.status, "", "", fault.headers)
        elif repo is None:
            self._error(401 if not self._has_token() else 404, "RepoNotFound", "Repository not found")
        elif repo.gated and not self._has_token() and not self.path.startswith(f"/api/models/{repo_id}/revision"):
            self._error(401, "GatedRepo", f"Access to model {repo_id} is restricted.")
        else:
            commit = repo.refs.get(revision, revision)
            if commit in repo.commits:
                return commit, repo.commits[commit]
            self._error(404, "RevisionNotFound", "Invalid rev id")
        return None

    def _has_token(self) -> bool:
        return self.server.hub.token is not None and self._token() == self.server.hub.token

    def _token(self) -> str | None:
        header = self.headers.get("Authorization", "")
        return header.removeprefix("Bearer ") if header.startswith("Bearer ") else None

    def _credentials_are_wrong(self) -> bool:
        return self._token() is not None and self._token() != self.server.hub.token

    def _json(self, value: Any, headers: Mapping[str, str] = {}, status: int = 200) -> None:
        value = self.server.hub.rewrite(value)
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self._head(status, {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str, message: str, headers: Mapping[str, str] = {}) -> None:
        named = {"X-Error-Code": code, "X-Error-Message": message}
        self._json({"error": message}, {**{k: v for k, v in named.items() if v}, **headers}, status)

    def _redirect(self, location: str, headers: Mapping[str, str]) -> None:
        self._head(302, {"Location": location, "Content-Length": "0", **headers})

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, path: str, content: Content, headers: Mapping[str, str]) -> None:
        hub = self.server.hub
        served = hub._served
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        part = (int(wanted[1]), int(wanted[2] or 1 << 60) + 1) if wanted else (0, 1 << 60)
        fault = (hub.fault(path, part=part) if self.command == "GET" else None) or Fault(0)
        if fault.expired_signature:
            return self._error(403, "", "Request has expired")
        size = size_of(content) + fault.extra_bytes
        begin, end, status = 0, size, 200
        headers = {"Accept-Ranges": "bytes", **headers}
        if wanted and not fault.ignore_range:
            begin, end, status = int(wanted[1]), min(int(wanted[2] or size - 1) + 1, size), 206
            if begin >= size:
                return self._error(416, "", "", {"Content-Range": f"bytes */{size}"})
            if fault.wrong_range:
                begin, end = begin + 1, min(end + 1, size)
            if fault.overlong_range:
                end = min(end + 10, size)
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        self._head(status, {"Content-Length": str(end - begin), **headers})
        if self.command == "HEAD":
            return
        with hub.lock:
            hub.sending += 1
        stop = end if fault.cut_after is None else min(end, begin + fault.cut_after)
        position = begin
        try:
            for chunk in _chunks(content, begin, stop, fault, self.connection):
                if isinstance(chunk, int):  # sent already
                    position += chunk
                    continue
                self.connection.sendall(chunk)
                position += len(chunk)
                if fault.bytes_per_s:
                    time.sleep(len(chunk) / fault.bytes_per_s)
        finally:
            with hub.lock:
                served[path].append((begin, position))
                hub.sending -= 1
        if position < end:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)


def _chunks(content: Content, begin: int, end: int, fault: Fault, connection: socket.socket) -> Any:
    """Bytes to send, or the number that were sent by the system itself."""
    if isinstance(content, Path):
        with open(content, "rb") as file:
            while begin < end:
                sent = connection.sendfile(file, begin, min(end - begin, 8 << 20))
                begin += sent
                yield sent
        return
    step = min(_CHUNK, max(fault.bytes_per_s // 20, 1)) if fault.bytes_per_s else _CHUNK
    padded = content + b"\0" * max(end - len(content), 0)
    for start in range(begin, end, step):
        chunk = bytearray(padded[start : min(start + step, end)])
        if fault.flip_at is not None and start <= fault.flip_at < start + len(chunk):
            chunk[fault.flip_at - start] ^= 1
        yield bytes(chunk)


def _directories(files: Mapping[str, Content]) -> set[str]:
    return {path.rpartition("/")[0] for path in files if "/" in path}
