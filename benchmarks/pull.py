"""What `glmlocal pull` reaches of curl's throughput, from a hub on loopback to the same disk, SHA-256 included.

    python benchmarks/pull.py [--size 1GB] [--repeats 5] [--connections 8] [--directory DIR]

The hub (tests/hub) runs in a process of its own and sends a file from memory (/dev/shm). Rounds are interleaved: curl
to a file, then ours into an empty cache. Ours hashes the file, has it on disk (fsync) before it becomes visible, and
journals on the way; curl does none of that, so curl followed by fsync is printed too. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from glmlocal.hub import pull
from glmlocal.hub.download import Options
from glmlocal.hub.huggingface import HuggingFace
from glmlocal.hub.names import Source
from glmlocal.units import MIB, format_bytes, parse_size

REPO, NAME = "bench/one-file", "model.safetensors"
_HUB = """
import sys
from pathlib import Path
from hub.server import HubServer
with HubServer() as hub:
    hub.add(sys.argv[1], {"config.json": b"{}", sys.argv[2]: Path(sys.argv[3])})
    print(hub.url, flush=True)
    sys.stdin.read()
"""


@contextmanager
def running_hub(source: Path) -> Iterator[str]:
    """The address of a hub that serves ``source`` as the one weight file of REPO."""
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "tests")}
    command = [sys.executable, "-c", _HUB, REPO, NAME, str(source)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def time_curl(url: str, directory: Path) -> tuple[float, float]:
    """Seconds until curl has ended, and until the file is on disk."""
    target = directory / "curl.bin"
    start = time.perf_counter()
    subprocess.run(["curl", "-sSfL", "-o", target, f"{url}/{REPO}/resolve/main/{NAME}"], check=True)
    done = time.perf_counter()
    with open(target, "rb+") as file:
        os.fsync(file.fileno())
    synced = time.perf_counter()
    target.unlink()
    return done - start, synced - start


def time_ours(url: str, directory: Path, options: Options) -> float:
    """Seconds of a whole pull: listing, download, hash, fsync, publication."""
    cache = directory / "cache"
    hub = HuggingFace(url, cache, None, offline=False)
    start = time.perf_counter()
    pull.pull(pull.prepare(Source("huggingface", REPO), hub), options)
    seconds = time.perf_counter() - start
    shutil.rmtree(cache)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default=10**9, help="of the file (default: 1GB)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--connections", type=int, default=Options().connections)
    parser.add_argument("--directory", type=Path, help="on the disk to write to (default: the current directory's)")
    args = parser.parse_args()
    rounds: list[tuple[float, float, float]] = []
    with (
        tempfile.NamedTemporaryFile(dir="/dev/shm") as source,
        tempfile.TemporaryDirectory(prefix="bench-pull-", dir=args.directory or Path.cwd()) as work,
    ):
        block = os.urandom(MIB)
        for _ in range(-(-args.size // MIB)):
            source.write(block)
        source.flush()
        size = os.path.getsize(source.name)
        with running_hub(Path(source.name)) as url:
            for number in range(args.repeats + 1):
                os.sync()
                curl_s, synced_s = time_curl(url, Path(work))
                os.sync()
                ours_s = time_ours(url, Path(work), Options(connections=args.connections))
                if number:  # the first round also makes the hub hash its file
                    rounds.append((curl_s, synced_s, ours_s))
                    print(
                        f"curl {size / curl_s / 1e6:5.0f} MB/s, with fsync {size / synced_s / 1e6:5.0f}, "
                        f"ours {size / ours_s / 1e6:5.0f}: {curl_s / ours_s:.2f} and {synced_s / ours_s:.2f}",
                        flush=True,
                    )
    to_curl, to_synced = median(c / o for c, _, o in rounds), median(s / o for _, s, o in rounds)
    print(
        f"{format_bytes(size)}, {args.connections} connections: {to_curl:.2f} of curl, {to_synced:.2f} of curl + fsync"
    )
    mb_per_s = [round(size / median(column) / 1e6) for column in zip(*rounds, strict=True)]
    names = ("curl_mb_per_s", "curl_fsync_mb_per_s", "ours_mb_per_s")
    result = {"ratio": round(to_curl, 3), "ratio_to_fsynced": round(to_synced, 3), "size_bytes": size}
    print(json.dumps(result | {"connections": args.connections} | dict(zip(names, mb_per_s, strict=True))))


if __name__ == "__main__":
    main()
