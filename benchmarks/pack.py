"""Packing: the rate in MB/s of input, against what the disk and the arithmetic allow; memory; kills.

    python benchmarks/pack.py DIR [--quant int4] [--scratch DIR] [--kills 20]

DIR is a checkpoint of safetensors (``benchmarks/synth.py --format safetensors-bf16``). What is in the page cache stays
there. Measured are the arithmetic of records, on one core and on all at once, before and after; the pack itself, in a
process of its own; and the disk: sequential reads of the input, sequential writes and one fdatasync of as many bytes as
the pack has. The prediction is

    seconds = max(input / disk read, input / (threads x rate of a core when all work)) + output / disk write

because reading overlaps computing, while what was written must have reached the disk at the end. With --kills, packing
is killed that many times at random moments and resumed; the result must be byte-identical. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

_CHUNK = 8 << 20
_PACK = """
import json, resource, sys, time
from pathlib import Path
from glmlocal.formats.index import open_checkpoint
from glmlocal.packing.job import plan_job
from glmlocal.packing.local import pack_model
source, target, quant, threads = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
base = resource.getrusage(resource.RUSAGE_SELF)
began = time.monotonic()
checkpoint = open_checkpoint(Path(source))
job = plan_job(checkpoint, quant, model="bench", source="bench")
pack_model(checkpoint, job, quant, target, threads=threads, on_bytes=lambda num_bytes: None)
seconds = time.monotonic() - began
used = resource.getrusage(resource.RUSAGE_SELF)
cpu = used.ru_utime + used.ru_stime - base.ru_utime - base.ru_stime
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_rss_bytes": used.ru_maxrss * 1024}))
"""


def disk_rates(source: Path, scratch: Path, num_bytes: int) -> tuple[float, float]:
    """Bytes per second of reading the input's files, and of writing and syncing ``num_bytes``."""
    buffer = np.empty(_CHUNK, np.uint8)
    files = sorted(source.glob("*.safetensors"))
    total, began = 0, time.monotonic()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while got := file.readinto(buffer.data):
                total += got
    read = total / (time.monotonic() - began)
    buffer[:] = np.random.default_rng(0).integers(0, 256, _CHUNK, np.uint8)
    began = time.monotonic()
    with tempfile.NamedTemporaryFile(dir=scratch, buffering=0) as file:
        for _ in range(max(num_bytes // _CHUNK, 1)):
            file.write(buffer.data)
        os.fdatasync(file.fileno())
    return read, max(num_bytes // _CHUNK, 1) * _CHUNK / (time.monotonic() - began)


def core_rate(source: Path, quant: Any, threads: int) -> float:
    """Bytes of input per second and thread, with that many threads making records that are thrown away."""
    from glmlocal import kernels
    from glmlocal.formats.expert_pack import checksum, expert_name
    from glmlocal.formats.expert_pack_layout import MATRICES
    from glmlocal.formats.index import open_checkpoint
    from glmlocal.models.weights import WeightReader
    from glmlocal.packing.job import parts_of, plan_job

    checkpoint = open_checkpoint(source)
    job = plan_job(checkpoint, quant, model="bench", source="bench")
    reader = WeightReader(checkpoint.tensors, lambda num_bytes: None, quant)
    records = job.records()[: 8 * threads]

    def make(record: tuple[int, int]) -> None:
        layer, expert = record
        gate, up, down = (reader.rows(expert_name(layer, expert, matrix)) for matrix in MATRICES)
        checksum(kernels.pack_record((gate, up, down), job.header.layouts[layer]))

    make(records[0])
    began = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(make, records))
    num_bytes = sum(ref.nbytes for record in records for ref in parts_of(checkpoint.tensors, *record))
    return num_bytes / (time.monotonic() - began) / threads


def packed(source: Path, target: Path, quant: str, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-c", _PACK, str(source), str(target), quant, str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout))


def digests(directory: Path) -> dict[str, str]:
    def of(path: Path) -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return {path.name: of(path) for path in sorted(directory.iterdir())}


def killed_and_resumed(source: Path, target: Path, quant: str, threads: int, kills: int, seconds: float) -> int:
    """Kills until the pack is there; returns how many hit it at work."""
    rng, hit = random.Random(0), 0
    command = [sys.executable, "-c", _PACK, str(source), str(target), quant, str(threads)]
    while not target.exists() and hit < kills:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        partial = target.with_name(target.name + ".partial")
        while not partial.exists() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 2.2 * seconds / kills))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            hit += 1
        process.wait()
    if not target.exists():
        packed(source, target, quant, threads)
    return hit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path)
    parser.add_argument("--quant", choices=("keep", "int8", "int4"), default="int4")
    parser.add_argument("--scratch", type=Path, help="default: beside the source")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--kills", type=int, default=0)
    args = parser.parse_args()
    input_bytes = sum(path.stat().st_size for path in args.source.glob("*.safetensors"))
    with tempfile.TemporaryDirectory(dir=args.scratch or args.source.parent) as name:
        scratch = Path(name)
        one, all_at_once = core_rate(args.source, args.quant, 1), core_rate(args.source, args.quant, args.threads)
        found = packed(args.source, scratch / "pack", args.quant, args.threads)
        output_bytes = sum(path.stat().st_size for path in (scratch / "pack").iterdir())
        read, write = disk_rates(args.source, scratch, output_bytes)
        again = core_rate(args.source, args.quant, args.threads)
        at_work = (all_at_once + again) / 2
        predicted = max(input_bytes / read, input_bytes / (args.threads * at_work)) + output_bytes / write
        result: dict[str, Any] = {
            "quant": args.quant,
            "threads": args.threads,
            "input_bytes": input_bytes,
            "output_bytes": output_bytes,
            "disk_read_mb_per_s": round(read / 1e6),
            "disk_write_mb_per_s": round(write / 1e6),
            "core_mb_per_s": round(one / 1e6),
            "core_mb_per_s_all_at_work": round(at_work / 1e6),
            "seconds": round(found["seconds"], 2),
            "predicted_seconds": round(predicted, 2),
            "mb_per_s_per_core": round(input_bytes / found["seconds"] / args.threads / 1e6),
            "of_prediction": round(predicted / found["seconds"], 3),
            "cores_busy": round(found["cpu_seconds"] / found["seconds"], 2),
            "peak_rss_mib": round(found["peak_rss_bytes"] / 2**20),
        }
        if args.kills:
            want = digests(scratch / "pack")
            target = scratch / "killed"
            result["kills"] = killed_and_resumed(
                args.source, target, args.quant, args.threads, args.kills, found["seconds"]
            )
            result["byte_identical"] = digests(target) == want
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"(this process: {own} MiB)", file=sys.stderr)
    print(json.dumps(result))
    return 0 if result.get("byte_identical", True) else 1


if __name__ == "__main__":
    sys.exit(main())
