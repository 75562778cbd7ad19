"""For the tests of the demo: a tiny wheel, and a package index on loopback that serves it with faults."""

from __future__ import annotations

import hashlib
import json
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from glmlocal.demo.fetch import WheelPin

FILENAME, MEMBER = "mini-1.0-py3-none-any.whl", "mini/model.gguf"


def make_wheel(directory: Path, gguf: bytes) -> bytes:
    path = directory / FILENAME
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../evil", "never unpacked")
        archive.writestr(MEMBER, gguf)
    data = path.read_bytes()
    path.unlink()
    return data


def make_pin(index: Index, gguf: bytes, model_size: int = 400_000) -> WheelPin:
    return WheelPin(
        requirement="mini==1.0",
        filename=FILENAME,
        size=len(index.wheel),
        sha256=hashlib.sha256(index.wheel).hexdigest(),
        member=MEMBER,
        member_size=len(gguf),
        member_sha256=hashlib.sha256(gguf).hexdigest(),
        index_url=index.project_url,
        model_size=model_size,
    )


@dataclass
class Index:
    """What the server does: ``faults`` are used up, one per request for the file, then it behaves."""

    wheel: bytes
    url: str = ""
    faults: list[str] = field(default_factory=list)
    page: bytes | None = None
    num_file_requests: int = 0
    ranges: list[str | None] = field(default_factory=list)

    @property
    def project_url(self) -> str:
        return f"{self.url}/simple/mini/"


@contextmanager
def serve(wheel: bytes) -> Iterator[Index]:
    index = Index(wheel)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self.close_connection = True
            if self.path == "/simple/mini/" and "simple.v1+json" in self.headers["Accept"]:
                page = json.dumps({"files": [{"filename": FILENAME, "url": "../../moved"}]}).encode()
                return self.answer(200, page if index.page is None else index.page)
            if self.path == "/moved":
                return self.answer(302, b"", Location=f"{index.url}/file")
            if self.path != "/file":
                return self.answer(404, b"")
            index.num_file_requests += 1
            index.ranges.append(self.headers["Range"])
            fault = index.faults.pop(0) if index.faults else ""
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")) if self.headers["Range"] else 0
            if fault.isdigit():
                return self.answer(int(fault), b"no")
            if start and fault != "no-range":
                where = f"bytes {start}-{len(wheel) - 1}/{len(wheel)}"
                return self.answer(206, wheel[start:], **{"Content-Range": where})
            match fault:
                case "wrong":
                    self.answer(200, bytes(len(wheel)))
                case "short":  # and honest about it
                    self.answer(200, wheel[:-100])
                case "long":
                    self.answer(200, wheel + b"x")
                case "cut":  # the connection breaks half way
                    self.answer(200, wheel[: len(wheel) // 2], **{"Content-Length": str(len(wheel))})
                case "silent":
                    self.answer(200, wheel[:10], **{"Content-Length": str(len(wheel))})
                    time.sleep(1.0)
                case "slow":
                    self.answer(200, b"", **{"Content-Length": str(len(wheel))})
                    for at in range(0, len(wheel), len(wheel) // 100):
                        self.wfile.write(wheel[at : at + len(wheel) // 100])
                        time.sleep(0.02)
                case _:
                    self.answer(200, wheel)

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body)), "Connection": "close"} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        def handle(self) -> None:
            with suppress(BrokenPipeError, ConnectionResetError):  # clients go away, some tests make them
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    index.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield index
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
