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


_STRIX_HALO = ("strixhalo", "8060s", "max395", "ryzenmax395", "ryzenmax395w8060s", "0x1586")

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
#   RTX PRO 5000, 4500, 4000     technical.city/en/video/RTX-PRO-4500-Blackwell-vs-RTX-PRO-5000-72-GB-Blackwell;
#     (BF16 as measured, 257)    github.com/xzwgit/gpu-flops-bench
#   T4                           hmc-tech.com/gpu/nvidia-a16-vs-nvidia-t4 (rates); sysrqmts.com (320 GB/s, PCIe 3.0)
#   V100 (900 GB/s, 125 TFLOP/s) developer.nvidia.com/programming-tensor-cores-cuda-9-0; elchapuzasinformatico.com
#   RTX 3080, 3070 (bandwidth)   techpowerup.com/review/nvidia-geforce-ampere-architecture-…
#   RTX 4070, 4070 Ti            thefpsreview.com/gpu-family/…rtx-4070…; fpsbench.com/compare/gpu/…rtx-4070-ti
#   memory of H100, A100, A10, L40S, L4, T4 as nvidia-smi says it: modal-labs/modal-client#2797
#   MI250, MI250X                zexron.com/amd-mi250-x-aldebaran-as-mcm-…; yobitel.com/knowledge-base/amd-mi250
#   MI355X (288 GB, 8 TB/s)      aiwiki.ai/wiki/amd_instinct_mi355x
#   MI300X (rates, H200's too)   github.com/alpharomercoma/MI300X-vs-H200
#   RX 7800 XT (74.6 TFLOP/s)    hmc-tech.com/gpu/amd-radeon-rx-9060-vs-amd-radeon-rx-7800-xt
#   RX 9060 XT (bandwidth)       pcpartdb.com/gpus/compare/amd-radeon-rx-9060-xt-16-gb--vs--amd-radeon-rx-7900-xtx
#   Strix Halo (59.4, 256 GB/s)  llm-tracker.info/_TOORG/Strix-Halo
#   MI300X (bandwidth, memory)   codesota.com/hardware/mi300x
#   MI325X (6 TB/s, PCIe 5 x16)  wiaix.com/amd-instincttm-mi325x-accelerators
#   RX 7900 XTX, XT              guru3d.com/review/xfx-radeon-rx-7900-xtx-magair-review/page-4
#   RX 9070 XT (640 GB/s)        multiplayer.it/notizie/amd-radeon-rx-9070-xt-rx-9070-specifiche.html
# and in December 2026 these, which all agreed:
#   RTX A5000 (768 GB/s)         topcpu.net/en/gpu-c/tesla-t4-vs-rtx-a5000
#   RTX A4000, A40 (bandwidth)   cpu-gpu.alldbin.com/graphics-card-comparison/RTX-A40-and-RTX-A4000-comparison.html
#   RTX 5000, 4000 Ada           topcpu.net/en/gpu-c/rtx-4000-ada-generation-vs-rtx-5000-ada-generation (bandwidth);
#                                hmc-tech.com/gpu/nvidia-rtx-5000-ada-vs-nvidia-rtx-4000-ada (rates)
#   RTX 4500 Ada (432 GB/s)      askgeek.io/es/gpus/NVIDIA/RTX-4500-Ada-Generation
#   RTX 5060 (bandwidth, lanes)  utechway.com/nvidia-confirms-rtx-5060-series-specs; tochka.by/articles/technology/…
#   RTX 3060, 3090 Ti            cpu-gpu.alldbin.com/graphics-card-comparison/GeForce-RTX-3090-Ti-and-GeForce-RTX-3060-…
#   RTX 3080 12GB (912 GB/s)     sysrqmts.com/tr/gpus/compare/nvidia-geforce-rtx-3080-12-gb-vs-nvidia-rtx-a4000
#   RTX 3060 Ti (448 GB/s)       cputronic.com/gpu/compare/nvidia-geforce-rtx-3060-ti-vs-…
#   H100 NVL (94 GB, 3.93 TB/s)  grokipedia.com/page/210100120
#   A30 (165 TFLOP/s)            calwoo.github.io/notes/concepts/deep-learning-engineering/nvidia-gpu-hardware
#   MI50 (1024 GB/s, PCIe 4)     en.wikipedia.org/wiki/Radeon_Instinct
#   MI350X, MI355X (8 TB/s)      gangliao.me/blog/2026/amd-gpu-architecture-deep-dive
#   RX 6900 XT (rates)           fpsbench.com/compare/gpu/amd-radeon-rx-6900-xt-vs-amd-radeon-rx-vega-56
#   PRO W7900 (864 GB/s)         itcreations.com/amd-gpu/amd-radeon-pro-w7900-gpu
#   RTX A6000 (rates; bandwidth) llmperf.net/categories/gpu/Nvidia-A6000-GPUs
#   RTX 4080 SUPER (736 GB/s)    elchapuzasinformatico.com/2023/12/nvidia-rtx-4080-super-memorias-gddr6x-23-gbps
#   DGX Spark (273 GB/s)         ai-infrastructure.net/dgx-spark; dgx-spark.warehack.ing/hardware
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
    Spec("A800", ("a800", "a80080"), 80, 81920, 2039, (4, 16), 312, 624, None),
    Spec("A30", ("a30",), 24, 24576, 933, (4, 16), 165, 330, None),
    # NVIDIA L40S, L40, L4, A40, A10 datasheets.
    Spec("L40S", ("l40s",), 48, 46068, 864, (4, 16), 362, 733, 733),
    Spec("L40", ("l40",), 48, 46068, 864, (4, 16), 181, 362, 362),
    Spec("L4", ("l4",), 24, 23034, 300, (4, 16), 121, 242, 242),
    Spec("A40", ("a40",), 48, 46068, 696, (4, 16), 149.7, 299.3, None),
    Spec("A10", ("a10",), 24, 23028, 600, (4, 16), 125, 250, None),
    # NVIDIA V100, T4, Titan RTX and Quadro RTX 8000 datasheets, Turing whitepaper: no BF16, the rate is that of FP16.
    Spec("V100 32GB", ("v100", "v10032", "v100sxm2", "v100pcie"), 32, 32768, 900, (3, 16), 125, None, None),
    Spec("V100 16GB", ("v100", "v10016", "v100sxm2", "v100pcie"), 16, 16384, 900, (3, 16), 125, None, None),
    Spec("T4", ("t4",), 16, 15360, 320, (3, 16), 65, 130, None),
    Spec("Quadro RTX 8000", ("8000", "rtx8000"), 48, 48601, 672, (3, 16), 130.5, 261, None),
    Spec("Titan RTX", ("titan", "titanrtx"), 24, 24219, 672, (3, 16), 130.5, 261, None),
    Spec("RTX 2080 Ti", ("2080ti",), 11, 11264, 616, (3, 16), 53.8, 215.2, None),
    # NVIDIA Tesla P40 datasheet: no tensor cores, and FP16 slower than FP32, whose rate is listed; int8 by dp4a.
    Spec("P40", ("p40",), 24, 23040, 346, (3, 16), 11.8, 47, None),
    # NVIDIA RTX A6000, A5000, A4000 and RTX 6000 Ada datasheets (tensor rates without sparsity).
    Spec("RTX A6000", ("a6000",), 48, 49140, 768, (4, 16), 154.8, 309.7, None),
    Spec("RTX A5000", ("a5000",), 24, 24564, 768, (4, 16), 111.1, 222.2, None),
    Spec("RTX A4000", ("a4000",), 16, 16376, 448, (4, 16), 76.7, 153.4, None),
    Spec("RTX 6000 Ada", ("6000ada",), 48, 49140, 960, (4, 16), 364.2, 728.5, 728.5),
    # NVIDIA RTX 5000, 4500, 4000 Ada datasheets.
    Spec("RTX 5000 Ada", ("5000ada",), 32, 32760, 576, (4, 16), 261.1, 522.1, 522.1),
    Spec("RTX 4500 Ada", ("4500ada",), 24, 24570, 432, (4, 16), 158.5, 317, 317),
    Spec("RTX 4000 Ada", ("4000ada",), 20, 20475, 360, (4, 16), 106.9, 213.8, 213.8),
    # NVIDIA RTX PRO Blackwell datasheets (6000: Workstation and Server Edition): an eighth of "AI TOPS" in BF16.
    Spec("RTX PRO 6000", ("pro6000",), 96, 97887, 1792, (5, 16), 503.8, 1007.6, 1007.6),
    Spec("RTX PRO 5000", ("pro5000", "pro500048"), 48, 48935, 1344, (5, 16), 258, 516, 516),
    Spec("RTX PRO 5000 72GB", ("pro5000", "pro500072"), 72, 73415, 1344, (5, 16), 258, 516, 516),
    Spec("RTX PRO 4500", ("pro4500",), 32, 32623, 896, (5, 16), 210.9, 421.8, 421.8),
    Spec("RTX PRO 4000", ("pro4000",), 24, 24467, 672, (5, 16), 147.3, 294.5, 294.5),
    # NVIDIA Ampere GA102 whitepaper, appendix A, and the product pages.
    Spec("RTX 3060 12GB", ("3060", "306012"), 12, 12288, 360, (4, 16), 25.5, 101.9, None),
    Spec("RTX 3060 Ti", ("3060ti",), 8, 8192, 448, (4, 16), 32.4, 129.6, None),
    Spec("RTX 3070", ("3070",), 8, 8192, 448, (4, 16), 40.6, 162.6, None),
    Spec("RTX 3070 Ti", ("3070ti",), 8, 8192, 608, (4, 16), 43.5, 174, None),
    Spec("RTX 3080", ("3080",), 10, 10240, 760, (4, 16), 59.5, 238, None),
    Spec("RTX 3080 12GB", ("3080", "308012"), 12, 12288, 912, (4, 16), 61.3, 245.1, None),
    Spec("RTX 3080 Ti", ("3080ti",), 12, 12288, 912, (4, 16), 68.2, 272.8, None),
    Spec("RTX 3090", ("3090",), 24, 24576, 936, (4, 16), 71, 284, None),
    Spec("RTX 3090 Ti", ("3090ti",), 24, 24564, 1008, (4, 16), 80, 320, None),
    # NVIDIA Ada GPU architecture whitepaper, appendix A.
    Spec("RTX 4060 Ti 16GB", ("4060ti", "4060ti16"), 16, 16380, 288, (4, 8), 44.1, 176.5, 88.2),
    Spec("RTX 4060", ("4060",), 8, 8188, 272, (4, 8), 30.2, 120.9, 60.5),
    Spec("RTX 4060 Ti 8GB", ("4060ti", "4060ti8"), 8, 8188, 288, (4, 8), 44.1, 176.5, 88.2),
    Spec("RTX 4070", ("4070",), 12, 12282, 504, (4, 16), 58.3, 233.2, 116.6),
    Spec("RTX 4070 SUPER", ("4070super", "4070s"), 12, 12282, 504, (4, 16), 71, 283.9, 141.9),
    Spec("RTX 4070 Ti", ("4070ti",), 12, 12282, 504, (4, 16), 80.2, 320.7, 160.4),
    Spec("RTX 4070 Ti SUPER", ("4070tisuper", "4070tis"), 16, 16376, 672, (4, 16), 88.2, 352.8, 176.4),
    Spec("RTX 4080", ("4080",), 16, 16376, 717, (4, 16), 97.5, 389.9, 194.9),
    Spec("RTX 4080 SUPER", ("4080super", "4080s"), 16, 16376, 736, (4, 16), 104.4, 417.6, 208.8),
    Spec("RTX 4090", ("4090",), 24, 24564, 1008, (4, 16), 165.2, 660.6, 330.3),
    # NVIDIA RTX Blackwell GPU architecture whitepaper, appendix A.
    Spec("RTX 5060 Ti 16GB", ("5060ti", "5060ti16"), 16, 16311, 448, (5, 8), 47.4, 189.9, 94.9),
    Spec("RTX 5060", ("5060",), 8, 8151, 448, (5, 8), 38.4, 153.5, 76.8),
    Spec("RTX 5060 Ti 8GB", ("5060ti", "5060ti8"), 8, 8151, 448, (5, 8), 47.4, 189.9, 94.9),
    Spec("RTX 5070", ("5070",), 12, 12227, 672, (5, 16), 61.7, 246.9, 123.5),
    Spec("RTX 5070 Ti", ("5070ti",), 16, 16303, 896, (5, 16), 87.9, 351.5, 175.8),
    Spec("RTX 5080", ("5080",), 16, 16303, 960, (5, 16), 112.6, 450.2, 225.1),
    Spec("RTX 5090", ("5090",), 32, 32607, 1792, (5, 16), 209.5, 838, 419),
    # NVIDIA DGX Spark datasheet: 128 GB LPDDR5X shared with the CPU, 273 GB/s; 1 PFLOP/s FP4 with sparsity, so 125 in
    # BF16 without. 119.7 GiB is what its Linux reports.
    Spec("DGX Spark GB10", ("gb10", "dgxspark", "dgxsparkgb10", "spark"), 128, 122570, 273, None, 125, 250, 250),
    # AMD Instinct datasheets (MI50 to MI355X). The MI50 has no matrix cores: packed FP16 and dot4. An MI250 is two GPUs
    # of 64 GB to its driver: here it is one of both memories, read at the rate of one, since layers run in turn.
    Spec("MI50 32GB", ("mi50", "mi60", "0x66a1"), 32, 32752, 1024, (4, 16), 26.5, 53, None),
    Spec("MI50 16GB", ("mi5016", "mi50", "0x66a1"), 16, 16368, 1024, (4, 16), 26.5, 53, None),
    Spec("MI100", ("mi100",), 32, 32752, 1229, (4, 16), 92.3, 184.6, None),
    Spec("MI210", ("mi210", "0x740f"), 64, 65520, 1638, (4, 16), 181, 181, None),
    Spec("MI250", ("mi250", "0x740c"), 128, 131040, 1638, (4, 16), 181, 181, None),
    Spec("MI250X", ("mi250x", "0x7408"), 128, 131040, 1638, (4, 16), 191.5, 191.5, None),
    Spec("MI300A", ("mi300a", "0x74a0"), 128, 131072, 5300, None, 980.6, 1961, 1961),
    Spec("MI300X", ("mi300x", "0x74a1"), 192, 196592, 5300, (5, 16), 1307, 2615, 2615),
    Spec("MI325X", ("mi325x", "0x74a5"), 256, 262128, 6000, (5, 16), 1307, 2615, 2615),
    Spec("MI350X", ("mi350x", "0x75a0"), 288, 294896, 8000, (5, 16), 2306.9, 4613.7, 4613.7),
    Spec("MI355X", ("mi355x", "0x75a3"), 288, 294896, 8000, (5, 16), 2516.6, 5033.2, 5033.2),
    # AMD Ryzen AI Max+ 395: 40 units of 512 FP16 operations per cycle at 2.9 GHz; of 128 GB its driver can map 120 GiB.
    Spec("Strix Halo", _STRIX_HALO, 128, 122880, 256, None, 59.4, 59.4, None),
    # AMD product pages of the RX 6000, 7000 and 9000, PRO W7800, W7900, AI PRO R9700: "peak half precision (matrix)".
    Spec("RX 7900 XTX", ("7900xtx", "0x744c"), 24, 24560, 960, (4, 16), 122.8, 122.8, None),
    Spec("RX 7900 XT", ("7900xt", "0x744c"), 20, 20464, 800, (4, 16), 103, 103, None),
    Spec("RX 7900 GRE", ("7900gre",), 16, 16368, 576, (4, 16), 92, 92, None),
    Spec("RX 7800 XT", ("7800xt", "0x747e"), 16, 16368, 624, (4, 16), 74.6, 74.6, None),
    Spec("RX 7600 XT", ("7600xt",), 16, 16368, 288, (4, 8), 45.1, 45.1, None),
    Spec("RX 6800 XT", ("6800xt", "0x73bf"), 16, 16368, 512, (4, 16), 41.5, 82.9, None),
    Spec("RX 6900 XT", ("6900xt", "0x73bf"), 16, 16368, 512, (4, 16), 46.1, 92.2, None),
    Spec("PRO W7800", ("w7800", "prow7800"), 32, 32752, 576, (4, 16), 90.5, 90.5, None),
    Spec("PRO W7900", ("w7900", "prow7900"), 48, 49136, 864, (4, 16), 122.6, 122.6, None),
    Spec("RX 9060 XT 16GB", ("9060xt", "0x7590"), 16, 16304, 320, (5, 16), 103, 205, 205),
    Spec("RX 9070", ("9070",), 16, 16304, 640, (5, 16), 144.5, 289, 289),
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
        raise ConfigError(
            f"there is no GPU {name[:80]!r} in the table{_near(name, word)}, or describe it as 24GiB@1008"
        )
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


def _joined(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())


def _refuse_size(name: str, found: list[Spec]) -> list[Spec]:
    if found:
        sizes = ", ".join(f"{spec.name} with {spec.size_gb} GB" for spec in found)
        raise ConfigError(f"there is no GPU {name[:80]!r} in the table; there is {sizes}")
    return []


def _near(name: str, word: str) -> str:
    """``: did you mean RTX 4090?`` or the beginning of the list; names as typed first, which tell RTX from RX."""
    names = {_joined(spec.name): spec.name for spec in SPECS}
    keys = {key: spec.name for spec in SPECS for key in spec.keys}
    near = difflib.get_close_matches(_joined(name), names, n=1, cutoff=0.7)
    found = names[near[0]] if near else None
    cutoff = 0.5 if any(map(str.isdigit, word)) else 0.75  # nearly all have digits: "nan" is near to no Titan
    if found is None and len(word) > 2 and (near := difflib.get_close_matches(word, keys, n=1, cutoff=cutoff)):
        found = keys[near[0]]
    return f": did you mean {found}?" if found else ", which has for example H100, RTX 4090 and MI300X; try one"
