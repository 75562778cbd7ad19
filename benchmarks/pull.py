"""What `glmlocal pull` reaches of curl's throughput, from a hub on loopback to the same disk, SHA-256 included.

    python benchmarks/pull.py [--size 1GB] [--shards 1] [--repeats 5] [--connections 8] [--directory DIR]

The hub (tests/hub) runs in a process of its own and sends files from memory (/dev/shm). Rounds are interleaved: curl
fetches the files one after the other over one connection, then ours fetches them into an empty cache (in a process that
has started, which curl has not). Ours lists, hashes, journals and publishes; curl does none of
that. Neither waits for the disk, so two times are taken of each: until the model can be used, and until `fsync` of all
of its files has returned. Before each of them four times as much memory is written to and given back: in a virtual
machine whose host takes free memory away (virtio's free page reporting), whoever writes next would pay up to 2 s per GB
for getting it again, at random. The first rounds, which also make the hub hash its files, do not count. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from glmlocal.hub import pull
from glmlocal.hub.download import Options
from glmlocal.hub.huggingface import HuggingFace
from glmlocal.hub.names import Source
from glmlocal.units import MIB, parse_size

REPO = "bench/model"
_FIRST_ROUNDS = 2
_HUB = """
import json
import socket
import sys
from contextlib import suppress
from pathlib import Path
from hub.server import HubServer
with HubServer() as hub:
    with suppress(AttributeError, OSError):  # BBR paces by timers, which loopback's speed then is
        hub._server.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    hub.add(sys.argv[1], {"config.json": b"{}", **{path: Path(file) for path, file in json.loads(sys.argv[2]).items()}})
    print(hub.url, flush=True)
    sys.stdin.read()
"""


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds from the start of either, until all is there and until all is on disk."""

    curl_s: float
    curl_synced_s: float
    ours_s: float
    ours_synced_s: float

    def text(self, size: int) -> str:
        seconds = (self.curl_s, self.curl_synced_s, self.ours_s, self.ours_synced_s)
        return (
            "curl {:4.0f} MB/s, with fsync {:4.0f}; ours {:4.0f}, with fsync {:4.0f}: ".format(
                *(size / each / 1e6 for each in seconds)
            )
            + f"{self.curl_s / self.ours_s:.2f} of curl, {self.curl_synced_s / self.ours_synced_s:.2f} of curl + fsync"
        )


@contextmanager
def running_hub(files: Mapping[str, Path]) -> Iterator[str]:
    """The address of a hub that serves these files, by path, as REPO."""
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "tests")}
    command = [sys.executable, "-c", _HUB, REPO, json.dumps({path: str(file) for path, file in files.items()})]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def sync_all(files: Iterable[Path]) -> None:
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def take_memory(directory: Path, size: int) -> None:
    """Have the host give as much memory as the page cache is about to want, and more: in large pages and in its own."""
    block = bytes(2 * MIB)
    with mmap.mmap(-1, 3 * size // len(block) * len(block)) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        for _ in range(len(memory) // len(block)):
            memory.write(block)
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        for _ in range(size * 5 // 4 // MIB):
            file.write(block[:MIB])


def time_curl(url: str, names: Sequence[str], directory: Path) -> tuple[float, float]:
    """Seconds until curl has ended, and until the files are on disk."""
    target = directory / "curl"
    target.mkdir()
    wanted = [part for name in names for part in ("-o", target / name, f"{url}/{REPO}/resolve/main/{name}")]
    start = time.perf_counter()
    subprocess.run(["curl", "-sSfL", *wanted], check=True)
    done = time.perf_counter()
    sync_all(target.iterdir())
    synced = time.perf_counter()
    shutil.rmtree(target)
    return done - start, synced - start


def time_ours(url: str, directory: Path, options: Options) -> tuple[float, float]:
    """Seconds of a pull from the listing on: until the model is verified and visible, and until it is on disk."""
    cache = directory / "cache"
    hub = HuggingFace(url, cache, None, offline=False)
    start = time.perf_counter()
    snapshot = pull.pull(pull.prepare(Source("huggingface", REPO), hub), options)
    done = time.perf_counter()
    sync_all(snapshot.iterdir())
    synced = time.perf_counter()
    shutil.rmtree(cache)
    return done - start, synced - start


def shards(directory: Path, count: int, size: int) -> dict[str, Path]:
    """Files of noise with the names of a release's, and the index that names them."""
    single = count == 1
    names = (
        ["model.safetensors"] if single else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    )
    block = os.urandom(MIB)
    for number, name in enumerate(names):
        with open(directory / name, "wb") as file:
            file.write(number.to_bytes(8, "little"))  # two files with the same bytes would be one
            for _ in range(max(size // count // MIB, 1)):
                file.write(block)
    if not single:
        index = {"weight_map": {f"tensor.{i}": name for i, name in enumerate(names)}}
        names.append("model.safetensors.index.json")
        (directory / names[-1]).write_text(json.dumps(index))
    return {name: directory / name for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default=10**9, help="of all files together (default: 1GB)")
    parser.add_argument("--shards", type=int, default=1, help="how many files (default: 1)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--connections", type=int, default=Options().connections)
    parser.add_argument("--range-size", type=parse_size, default=Options().range_bytes, help="of one request")
    parser.add_argument("--sync-every", type=float, default=Options().sync_every_s, help="seconds between syncs")
    parser.add_argument("--directory", type=Path, help="on the disk to write to (default: the current directory's)")
    args = parser.parse_args()
    rounds: list[Round] = []
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as source,
        tempfile.TemporaryDirectory(prefix="bench-pull-", dir=args.directory or Path.cwd()) as work,
    ):
        files = shards(Path(source), args.shards, args.size)
        size = sum(file.stat().st_size for file in files.values())
        options = Options(connections=args.connections, range_bytes=args.range_size, sync_every_s=args.sync_every)
        with running_hub(files) as url:
            for number in range(args.repeats + _FIRST_ROUNDS):
                os.sync()
                take_memory(Path(work), size)
                curl = time_curl(url, list(files), Path(work))
                os.sync()
                take_memory(Path(work), size)
                ours = time_ours(url, Path(work), options)
                if number >= _FIRST_ROUNDS:
                    rounds.append(Round(*curl, *ours))
                    print(rounds[-1].text(size), flush=True)
    print(
        json.dumps({"size_bytes": size, "files": len(files), "connections": args.connections} | summary(size, rounds))
    )


def summary(size: int, rounds: Sequence[Round]) -> dict[str, object]:
    """Medians, and the spread of the ratios; MB/s."""
    ratios = {
        "to_curl": [each.curl_s / each.ours_s for each in rounds],
        "to_curl_fsync": [each.curl_synced_s / each.ours_synced_s for each in rounds],
    }
    seconds = {
        "curl": [each.curl_s for each in rounds],
        "curl_fsync": [each.curl_synced_s for each in rounds],
        "ours": [each.ours_s for each in rounds],
        "ours_fsync": [each.ours_synced_s for each in rounds],
    }
    speeds: dict[str, object] = {
        f"{name}_mb_per_s": round(size / median(column) / 1e6) for name, column in seconds.items()
    }
    spread = {f"{name}_range": (round(min(column), 3), round(max(column), 3)) for name, column in ratios.items()}
    medians = {name: round(median(column), 3) for name, column in ratios.items()}
    return {**medians, **spread, **speeds}


if __name__ == "__main__":
    main()
