"""Made-up /proc and /sys trees."""

from __future__ import annotations

from pathlib import Path

CPUINFO = """processor\t: 0
model name\t: Fast CPU 9000
flags\t\t: fpu avx2 fma f16c avx_vnni avx512f

processor\t: 1
model name\t: Other
flags\t\t: fpu"""


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def machine(root: Path) -> Path:
    """Two sockets of two cores with two threads each; an L3 per socket, one memory node each."""
    files = {"proc/cpuinfo": CPUINFO, "sys/devices/system/cpu/online": "0-7"}
    for number in range(8):
        core, socket = number % 4, number % 4 // 2
        base = f"sys/devices/system/cpu/cpu{number}"
        files |= {
            f"{base}/topology/thread_siblings_list": f"{core},{core + 4}",
            f"{base}/topology/physical_package_id": str(socket),
            f"{base}/cache/index0/level": "1",
            f"{base}/cache/index0/type": "Data",
            f"{base}/cache/index0/size": "48K",
            f"{base}/cache/index0/shared_cpu_list": f"{core},{core + 4}",
            f"{base}/cache/index3/level": "3",
            f"{base}/cache/index3/type": "Unified",
            f"{base}/cache/index3/size": "32M",
            f"{base}/cache/index3/shared_cpu_list": f"{2 * socket}-{2 * socket + 1},{2 * socket + 4}-{2 * socket + 5}",
        }
    for node in (0, 1):
        base = f"sys/devices/system/node/node{node}"
        files |= {
            f"{base}/cpulist": f"{2 * node}-{2 * node + 1},{2 * node + 4}-{2 * node + 5}",
            f"{base}/meminfo": f"Node {node} MemTotal:       {1024 * (node + 1)} kB\nNode {node} MemFree: 1 kB",
        }
    return tree(root, files)
