"""What `glmlocal pull` reaches of curl's throughput, from a hub on loopback to the same disk, SHA-256 included.

    python benchmarks/pull.py [--size 1GB] [--repeats 5] [--connections 8] [--directory DIR]

The hub (tests/hub) runs in a process of its own and sends a file from memory (/dev/shm). Rounds are interleaved: curl
to a file, then ours into an empty cache. Ours hashes the file, has it on disk (fsync) before it becomes visible, and
journals on the way; curl does none of that. So three times are compared: until every byte is there and its hash is
right, which is what curl does and more; until it is visible and will survive a power failure, against curl followed by
fsync; and the least that the latter can take, which is the disk's: the file's bytes at the rate of curl's fsync.
The last line is JSON.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from glmlocal.hub import pull
from glmlocal.hub.download import Options, Progress
from glmlocal.hub.huggingface import HuggingFace
from glmlocal.hub.names import Source
from glmlocal.units import MIB, parse_size

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


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds from the start of either."""

    curl_s: float
    curl_fsync_s: float
    verified_s: float
    visible_s: float

    @property
    def disk_s(self) -> float:
        """What the disk needs for the bytes. curl's are nearly all in the page cache when its fsync begins."""
        return self.curl_fsync_s - self.curl_s

    def text(self, size: int) -> str:
        seconds = (self.curl_s, self.curl_fsync_s, self.disk_s, self.verified_s, self.visible_s)
        return (
            "curl {:4.0f} MB/s, with fsync {:4.0f}, the disk {:4.0f}; ours verified {:4.0f}, visible {:4.0f}: ".format(
                *(size / each / 1e6 for each in seconds)
            )
            + f"{self.curl_s / self.verified_s:.2f} and {self.curl_s / self.visible_s:.2f} of curl, "
            f"{self.curl_fsync_s / self.visible_s:.2f} of curl + fsync"
        )


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


def time_ours(url: str, directory: Path, options: Options) -> tuple[float, float]:
    """Seconds of a pull from the listing on: until all is verified, and until it is on disk and visible."""
    cache = directory / "cache"
    hub = HuggingFace(url, cache, None, offline=False)
    verified = [0.0]

    def on_progress(files: Sequence[Progress]) -> None:
        if not verified[0] and all(file.is_verified for file in files):
            verified[0] = time.perf_counter()

    start = time.perf_counter()
    pull.pull(pull.prepare(Source("huggingface", REPO), hub), options, on_progress)
    done = time.perf_counter()
    shutil.rmtree(cache)
    return verified[0] - start, done - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default=10**9, help="of the file (default: 1GB)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--connections", type=int, default=Options().connections)
    parser.add_argument("--directory", type=Path, help="on the disk to write to (default: the current directory's)")
    args = parser.parse_args()
    rounds: list[Round] = []
    with (
        tempfile.NamedTemporaryFile(dir="/dev/shm") as source,
        tempfile.TemporaryDirectory(prefix="bench-pull-", dir=args.directory or Path.cwd()) as work,
    ):
        block = os.urandom(MIB)
        for _ in range(-(-args.size // MIB)):
            source.write(block)
        source.flush()
        size = os.path.getsize(source.name)
        options = Options(connections=args.connections, report_every_s=0.01)
        with running_hub(Path(source.name)) as url:
            for number in range(args.repeats + 1):
                os.sync()
                curl = time_curl(url, Path(work))
                os.sync()
                ours = time_ours(url, Path(work), options)
                if number:  # the first round also makes the hub hash its file
                    rounds.append(Round(*curl, *ours))
                    print(rounds[-1].text(size), flush=True)
    print(json.dumps({"size_bytes": size, "connections": args.connections} | summary(size, rounds)))


def summary(size: int, rounds: Sequence[Round]) -> dict[str, float]:
    """Medians: ratios of each round, and MB/s."""
    ratios = {
        "verified_to_curl": [each.curl_s / each.verified_s for each in rounds],
        "visible_to_curl": [each.curl_s / each.visible_s for each in rounds],
        "visible_to_curl_fsync": [each.curl_fsync_s / each.visible_s for each in rounds],
        "visible_to_disk": [each.disk_s / each.visible_s for each in rounds],
    }
    seconds = {
        "curl": [each.curl_s for each in rounds],
        "curl_fsync": [each.curl_fsync_s for each in rounds],
        "disk": [each.disk_s for each in rounds],
        "verified": [each.verified_s for each in rounds],
        "visible": [each.visible_s for each in rounds],
    }
    speeds = {f"{name}_mb_per_s": round(size / median(column) / 1e6) for name, column in seconds.items()}
    return {name: round(median(column), 3) for name, column in ratios.items()} | speeds


if __name__ == "__main__":
    main()
