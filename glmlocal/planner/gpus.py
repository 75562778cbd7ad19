"""GPUs that are known by name: what their datasheets say, and what of it reaches a program.

Memory is what the driver reports (nvidia-smi, mem_info_vram_total), less than the number on the box. Rates are the
datasheets' peaks without sparsity; the forecast decides what part of them kernels reach. GeForce cards multiply FP16,
BF16 and FP8 with FP32 sums at half the rate of FP16 sums, and FP32 sums are what a model needs: that rate is listed.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from glmlocal.errors import ConfigError
from glmlocal.planner.machine import Gpu
from glmlocal.units import GIB, MIB

# Of a link's raw rate (8, 16, 32 GT/s per lane in 128b/130b), what copies from pinned host memory reach: nvbandwidth's
# host_to_device_memcpy_ce says 24–26 of 31.5 GB/s on an RTX 4090 (NVIDIA/nvbandwidth#15) and 56 of 63 GB/s on an
# RTX 5090 (tinygrad/open-gpu-kernel-modules#29). Packet headers and flow control take the rest.
LINK_EFFICIENCY = 0.83
_GT_PER_S = {1: 2.5 * 0.8, 2: 5 * 0.8, 3: 8 * 128 / 130, 4: 16 * 128 / 130, 5: 32 * 128 / 130, 6: 64 * 242 / 256}

# A GPU that is only described by memory and bandwidth computes, in proportion to its bandwidth, as little as an
# RTX 3090 does: 71 TFLOP/s at 936 GB/s, the least of the table's cards with tensor cores for int8 from this decade.
_TFLOP_PER_GB = 71 / 936

_LINK = re.compile(r"pcie(?:gen)?([1-6])(?:\.0)?x(1|2|4|8|16)")
_SIZE = re.compile(r"(\d+)\s*gi?b?\b")
_NOISE = re.compile(
    r"\b(?:nvidia|amd|geforce|radeon|instinct|tesla|quadro|graphics|gpu|generation|blackwell|workstation|server|"
    r"edition|max-q|oam|hbm\w*|sxm\d?|rtx|rx|ai)\b"
)
_KEY_NOISE = re.compile(r"^(?:rtx|rx|geforce|nvidia|amd)+(?=.)")


def link_gb_per_s(generation: int, lanes: int) -> float:
    """What a PCIe link carries from pinned host memory, in one direction."""
    return round(_GT_PER_S[generation] / 8 * lanes * LINK_EFFICIENCY, 1)


def parse_link(text: str) -> float:
    """``pcie4x16`` or ``25GB/s`` → GB/s from host memory. Raises ConfigError."""
    word = text.strip().lower().replace(" ", "")
    if match := _LINK.fullmatch(word):
        return link_gb_per_s(int(match[1]), int(match[2]))
    rate = re.fullmatch(r"([0-9]{1,4}(?:\.[0-9]{1,3})?)gb/s", word)
    if rate and float(rate[1]) > 0:
        return float(rate[1])
    raise ConfigError(
        f"cannot read {text[:80]!r} as a link; write PCIe's generation and lanes, for example pcie4x16 or pcie5x8, "
        "or a measured rate, 25GB/s"
    )


@dataclass(frozen=True, slots=True)
class Spec:
    """One card. ``keys`` are its names without vendor, ``rtx`` and blanks, as ``_key`` makes them."""

    name: str
    keys: tuple[str, ...]
    size_gb: int  # on the box; tells cards of one name apart
    memory_mib: int
    read_gb_per_s: float
    link: tuple[int, int] | None  # PCIe generation and lanes; None: memory shared with the host
    bf16_tflop_per_s: float
    int8_top_per_s: float | None
    fp8_tflop_per_s: float | None

    def gpu(self, memory_bytes: int | None = None) -> Gpu:
        return Gpu(
            name=self.name,
            memory_bytes=memory_bytes or self.memory_mib * MIB,
            read_gb_per_s=self.read_gb_per_s,
            link_gb_per_s=self.read_gb_per_s if self.link is None else link_gb_per_s(*self.link),
            bf16_tflop_per_s=self.bf16_tflop_per_s,
            int8_top_per_s=self.int8_top_per_s,
            fp8_tflop_per_s=self.fp8_tflop_per_s,
            is_unified=self.link is None,
        )


# Where two cards share a key the first is meant, unless a size says otherwise. Above each group is the datasheet; in
# November 2026 these pages were compared with the rows that they name, and agreed but for the RX 9070 XT's bandwidth:
#   H100 (rates; bandwidth)      glennklockwood.com/garden/processors/h100
#   H20 (rates, 4.0 TB/s)        willitrunai.com/es/gpus/h20-96gb
#   B200 (rates; 8 TB/s)         glennklockwood.com/garden/processors/B200
#   L40, L40S                    mullet.se/product.html?product_id=355414
#   L4, A100 40GB (rates)        hmc-tech.com/gpu/nvidia-l4-vs-nvidia-a100-40gb
#   A40 (rates)                  hmc-tech.com/gpu/nvidia-l40-vs-nvidia-a40
#   RTX 4090                     waredb.com/processor/nvidia-geforce-rtx-4090
#   RTX 5090 (rates; bandwidth)  main-horse.github.io/posts/5090-mm-perf; spheron.network/blog/nvidia-rtx-5090-specs
#   RTX 5060 Ti (PCIe 5.0 x8)    techpowerup.com/review/msi-geforce-rtx-5060-ti-gaming-trio-16-gb/2.html
#   RTX 5070 Ti (bandwidth)      topcpu.net/fr/news/nvidia-rtx-50-series-specifications-revealed-…
#   RTX PRO 6000 (1792 GB/s)     gpu.name/posts/nvidia-unveils-rtx-pro-6000-blackwell-gpu-…
#   MI300X (bandwidth, memory)   codesota.com/hardware/mi300x
#   MI325X (6 TB/s, PCIe 5 x16)  wiaix.com/amd-instincttm-mi325x-accelerators
#   RX 7900 XTX, XT              guru3d.com/review/xfx-radeon-rx-7900-xtx-magair-review/page-4
#   RX 9070 XT (640 GB/s)        multiplayer.it/notizie/amd-radeon-rx-9070-xt-rx-9070-specifiche.html
# The others rest on the datasheets alone: no page that lists them without sparsity was found again.
SPECS: tuple[Spec, ...] = (
    # NVIDIA H100 datasheet (SXM5, PCIe, NVL); memory from nvidia-smi, as are all lines' of NVIDIA.
    Spec("H100", ("h100", "h100sxm"), 80, 81559, 3350, (5, 16), 989, 1979, 1979),
    Spec("H100 PCIe", ("h100pcie",), 80, 81559, 2039, (5, 16), 756, 1513, 1513),
    Spec("H100 NVL", ("h100nvl",), 94, 95830, 3938, (5, 16), 835, 1671, 1671),
    Spec("H800", ("h800", "h800sxm"), 80, 81559, 3350, (5, 16), 989, 1979, 1979),
    # NVIDIA H200 datasheet.
    Spec("H200", ("h200", "h200sxm"), 141, 143771, 4800, (5, 16), 989, 1979, 1979),
    Spec("H200 NVL", ("h200nvl",), 141, 143771, 4800, (5, 16), 835, 1671, 1671),
    # NVIDIA H20 datasheet: 148 TFLOP/s BF16, 4.0 TB/s; H20-3e with 141 GB at 4.8 TB/s.
    Spec("H20", ("h20",), 96, 97871, 4000, (5, 16), 148, 296, 296),
    Spec("H20-3e", ("h203e", "h20"), 141, 143771, 4800, (5, 16), 148, 296, 296),
    # NVIDIA HGX B200 datasheet; bandwidth from the 7680-bit bus that drivers report (pytorch/ao#4002).
    Spec("B200", ("b200",), 180, 183359, 7672, (5, 16), 2250, 4500, 4500),
    # NVIDIA A100 datasheet (PCIe and SXM4, 40 and 80 GB).
    Spec("A100", ("a100", "a10080"), 80, 81920, 2039, (4, 16), 312, 624, None),
    Spec("A100 PCIe", ("a100pcie",), 80, 81920, 1935, (4, 16), 312, 624, None),
    Spec("A100 40GB", ("a10040", "a100", "a100pcie"), 40, 40960, 1555, (4, 16), 312, 624, None),
    # NVIDIA L40S, L40, L4, A40, A10 datasheets.
    Spec("L40S", ("l40s",), 48, 46068, 864, (4, 16), 362, 733, 733),
    Spec("L40", ("l40",), 48, 46068, 864, (4, 16), 181, 362, 362),
    Spec("L4", ("l4",), 24, 23034, 300, (4, 16), 121, 242, 242),
    Spec("A40", ("a40",), 48, 46068, 696, (4, 16), 149.7, 299.3, None),
    Spec("A10", ("a10",), 24, 23028, 600, (4, 16), 125, 250, None),
    # NVIDIA RTX A6000, A5000, A4000 and RTX 6000 Ada datasheets (tensor rates without sparsity).
    Spec("RTX A6000", ("a6000",), 48, 49140, 768, (4, 16), 154.8, 309.7, None),
    Spec("RTX A5000", ("a5000",), 24, 24564, 768, (4, 16), 111.1, 222.2, None),
    Spec("RTX A4000", ("a4000",), 16, 16376, 448, (4, 16), 76.7, 153.4, None),
    Spec("RTX 6000 Ada", ("6000ada",), 48, 49140, 960, (4, 16), 364.2, 728.5, 728.5),
    # NVIDIA RTX PRO 6000 Blackwell datasheet (Workstation and Server Edition).
    Spec("RTX PRO 6000", ("pro6000",), 96, 97887, 1792, (5, 16), 503.8, 1007.6, 1007.6),
    # NVIDIA Ampere GA102 whitepaper, appendix A, and the product pages.
    Spec("RTX 3060 12GB", ("3060", "306012"), 12, 12288, 360, (4, 16), 25.5, 101.9, None),
    Spec("RTX 3080", ("3080",), 10, 10240, 760, (4, 16), 59.5, 238, None),
    Spec("RTX 3090", ("3090",), 24, 24576, 936, (4, 16), 71, 284, None),
    Spec("RTX 3090 Ti", ("3090ti",), 24, 24564, 1008, (4, 16), 80, 320, None),
    # NVIDIA Ada GPU architecture whitepaper, appendix A.
    Spec("RTX 4060 Ti 16GB", ("4060ti", "4060ti16"), 16, 16380, 288, (4, 8), 44.1, 176.5, 88.2),
    Spec("RTX 4070", ("4070",), 12, 12282, 504, (4, 16), 58.3, 233.2, 116.6),
    Spec("RTX 4070 Ti SUPER", ("4070tisuper", "4070tis"), 16, 16376, 672, (4, 16), 88.2, 352.8, 176.4),
    Spec("RTX 4080", ("4080",), 16, 16376, 717, (4, 16), 97.5, 389.9, 194.9),
    Spec("RTX 4080 SUPER", ("4080super", "4080s"), 16, 16376, 736, (4, 16), 104.4, 417.6, 208.8),
    Spec("RTX 4090", ("4090",), 24, 24564, 1008, (4, 16), 165.2, 660.6, 330.3),
    # NVIDIA RTX Blackwell GPU architecture whitepaper, appendix A.
    Spec("RTX 5060 Ti 16GB", ("5060ti", "5060ti16"), 16, 16311, 448, (5, 8), 47.4, 189.9, 94.9),
    Spec("RTX 5070", ("5070",), 12, 12227, 672, (5, 16), 61.7, 246.9, 123.5),
    Spec("RTX 5070 Ti", ("5070ti",), 16, 16303, 896, (5, 16), 87.9, 351.5, 175.8),
    Spec("RTX 5080", ("5080",), 16, 16303, 960, (5, 16), 112.6, 450.2, 225.1),
    Spec("RTX 5090", ("5090",), 32, 32607, 1792, (5, 16), 209.5, 838, 419),
    # NVIDIA DGX Spark datasheet: 128 GB LPDDR5X shared with the CPU, 273 GB/s; 1 PFLOP/s FP4 with sparsity, so 125 in
    # BF16 without. 119.7 GiB is what its Linux reports.
    Spec("DGX Spark GB10", ("gb10", "dgxspark", "dgxsparkgb10", "spark"), 128, 122570, 273, None, 125, 250, 250),
    # AMD Instinct datasheets (MI50, MI100, MI210, MI300X, MI325X). The MI50 has no matrix cores: packed FP16 and dot4.
    Spec("MI50 32GB", ("mi50", "mi60", "0x66a1"), 32, 32752, 1024, (4, 16), 26.5, 53, None),
    Spec("MI50 16GB", ("mi5016", "mi50", "0x66a1"), 16, 16368, 1024, (4, 16), 26.5, 53, None),
    Spec("MI100", ("mi100",), 32, 32752, 1229, (4, 16), 92.3, 184.6, None),
    Spec("MI210", ("mi210", "0x740f"), 64, 65520, 1638, (4, 16), 181, 181, None),
    Spec("MI300X", ("mi300x", "0x74a1"), 192, 196592, 5300, (5, 16), 1307, 2615, 2615),
    Spec("MI325X", ("mi325x", "0x74a5"), 256, 262128, 6000, (5, 16), 1307, 2615, 2615),
    # AMD product pages of the RX 7900, RX 9070, PRO W7900 and AI PRO R9700: "peak half precision (matrix)".
    Spec("RX 7900 XTX", ("7900xtx", "0x744c"), 24, 24560, 960, (4, 16), 122.8, 122.8, None),
    Spec("RX 7900 XT", ("7900xt", "0x744c"), 20, 20464, 800, (4, 16), 103, 103, None),
    Spec("PRO W7900", ("w7900", "prow7900"), 48, 49136, 864, (4, 16), 122.6, 122.6, None),
    Spec("RX 9070 XT", ("9070xt", "0x7550"), 16, 16304, 640, (5, 16), 194.6, 389, 389),
    Spec("AI PRO R9700", ("r9700", "pror9700", "0x7551"), 32, 32624, 640, (5, 16), 191, 383, 383),
)


def find(name: str, memory_bytes: int | None = None) -> Gpu:
    """The card of that name, as people or drivers write it; of several, the one whose memory is nearest.

    With ``memory_bytes``, which a driver reported, the Gpu has exactly that. Raises ConfigError with a near miss.
    """
    word, size_gb = _words(name)
    found = [spec for spec in SPECS if word in spec.keys]
    if memory_bytes:
        found.sort(key=lambda spec: abs(spec.memory_mib * MIB - memory_bytes))
    elif size_gb is not None:
        found = [spec for spec in found if spec.size_gb == size_gb] or _refuse_size(name, found)
    if not found and not word and size_gb is not None:
        raise ConfigError(f"a GPU that is only described needs its memory's GB/s too: {name.strip()[:80]}@1008")
    if not found:
        raise ConfigError(f"there is no GPU {name[:80]!r} in the table{_near(word)}, or describe it as 24GiB@1008")
    return found[0].gpu(memory_bytes)


def described(memory_bytes: int, read_gb_per_s: float) -> Gpu:
    """A GPU of which only memory and bandwidth are known: on PCIe 4.0 x16, with little arithmetic and no FP8."""
    tflop = read_gb_per_s * _TFLOP_PER_GB
    name = f"{memory_bytes / GIB:.4g}GiB@{read_gb_per_s:g}"
    return Gpu(name, memory_bytes, read_gb_per_s, link_gb_per_s(4, 16), round(tflop, 1), round(4 * tflop, 1), None)


def _words(name: str) -> tuple[str, int | None]:
    """(key, size in GB where the name says one): ``NVIDIA A100-SXM4-80GB`` → (``a100``, 80)."""
    text = name.strip().casefold()
    size = _SIZE.search(text.replace("-", " "))
    size_gb = int(size[1][:4]) if size and size[1].isascii() else None
    text = _NOISE.sub(" ", _SIZE.sub(" ", text.replace("-", " ")).replace("max q", " "))
    key = _KEY_NOISE.sub("", re.sub(r"[^a-z0-9]", "", text))
    return key, size_gb


def _refuse_size(name: str, found: list[Spec]) -> list[Spec]:
    if found:
        sizes = ", ".join(f"{spec.name} with {spec.size_gb} GB" for spec in found)
        raise ConfigError(f"there is no GPU {name[:80]!r} in the table; there is {sizes}")
    return []


def _near(word: str) -> str:
    """``: did you mean RTX 4090?`` or the beginning of the list."""
    keys = {key: spec.name for spec in SPECS for key in spec.keys}
    near = difflib.get_close_matches(word, keys, n=1, cutoff=0.5)
    return f": did you mean {keys[near[0]]}?" if near else ", which has for example H100, RTX 4090 and MI300X; try one"
