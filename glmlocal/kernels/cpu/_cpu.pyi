"""The native extension (src/bindings.cpp). Addresses are those of contiguous CPU memory that the caller has checked."""

import numpy as np
from numpy.typing import NDArray

TILE_ROWS: int
PANEL_TILES: int
BLOCK_COLUMNS: int
KEY_TILE: int
KEY_SPLIT: int

class MatrixFormat:
    def __init__(
        self,
        codes: str,
        *,
        scale_type: str = "f16",
        group_size: int = 0,
        super_size: int = 0,
        has_sub_scale: bool = False,
        has_min: bool = False,
        has_sub_min: bool = False,
    ) -> None: ...
    @property
    def codes(self) -> str: ...
    @property
    def scale_type(self) -> str: ...
    @property
    def group_size(self) -> int: ...
    @property
    def super_size(self) -> int: ...
    @property
    def has_sub_min(self) -> bool: ...

class MatrixLayout:
    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def tiles(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def groups(self) -> int: ...
    @property
    def supers(self) -> int: ...
    @property
    def codes_offset(self) -> int: ...
    @property
    def scale_offset(self) -> int: ...
    @property
    def sub_scale_offset(self) -> int: ...
    @property
    def min_offset(self) -> int: ...
    @property
    def sub_min_offset(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

class Matrix:
    def __init__(
        self,
        layout: MatrixLayout,
        format: MatrixFormat,
        data: NDArray[np.uint8],
        zero_point: float,
        values: list[float],
        int8_activations: bool = ...,
    ) -> None: ...
    def linear(self, x: int, num_rows: int, bias: int, out: int) -> None: ...
    def unpack(self, out: int) -> None: ...

class Experts:
    def __init__(self, gate: list[Matrix], up: list[Matrix], down: list[Matrix]) -> None: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    def ffn(self, x: int, num_tokens: int, topk_ids: int, topk_weights: int, top_k: int, out: int) -> None: ...

class RecordMatrix:
    def __init__(
        self,
        layout: MatrixLayout,
        format: MatrixFormat,
        offset: int,
        zero_point: float,
        values: list[float],
        int8_activations: bool,
    ) -> None: ...

class SlotExperts:
    def __init__(
        self, gate: RecordMatrix, up: RecordMatrix, down: RecordMatrix, num_experts: int, record_bytes: int
    ) -> None: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def row_floats(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    def rows(
        self, x: int, num_tokens: int, topk_ids: int, top_k: int, experts: list[int], addresses: list[int], out: int
    ) -> None: ...
    def weigh(self, rows: int, num_tokens: int, topk_ids: int, topk_weights: int, top_k: int, out: int) -> None: ...

SECTOR_BYTES: int
SHORT_READ: int
CANCELLED: int

class NvmeReader:
    def __init__(self, path: str, threads: int, piece_bytes: int, max_queued: int, direct: bool = True) -> None: ...
    @property
    def direct(self) -> bool: ...
    @property
    def descriptor(self) -> int: ...
    @property
    def bytes_read(self) -> int: ...
    @property
    def busy_s(self) -> float: ...
    def submit(self, token: int, offset: int, num_bytes: int, destination: int, urgent: bool = True) -> bool: ...
    def hurry(self, token: int) -> bool: ...
    def cancel(self, token: int) -> bool: ...
    def next(self, timeout_s: float) -> tuple[int, int] | None: ...

class LayerCache:
    def __init__(
        self,
        type: str,
        keys: int,
        key_strides: tuple[int, ...],
        key_scales: int,
        values: int,
        value_strides: tuple[int, ...],
        value_scales: int,
        shape: tuple[int, ...],
    ) -> None: ...

class StepIndex:
    def __init__(
        self,
        tokens: int,
        positions: int,
        slots: int,
        block_tables: int,
        max_blocks: int,
        query_start_loc: int,
        seq_lens: int,
        requests: int,
    ) -> None: ...

class AttentionBlock:
    def __init__(
        self,
        hidden_size: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        eps: float,
        vectors: dict[str, int],
        matrices: dict[str, Matrix],
        cos_sin: int,
        max_positions: int,
        rotary_dim: int,
    ) -> None: ...
    def set_router(
        self,
        gate: Matrix,
        correction_bias: int,
        top_k: int,
        n_group: int,
        topk_group: int,
        norm_topk_prob: bool,
        routed_scaling_factor: float,
    ) -> None: ...
    def run(
        self,
        step: StepIndex,
        cache: LayerCache,
        x: int,
        residual: int,
        hidden: int,
        topk_ids: int,
        topk_weights: int,
    ) -> None: ...

def combine(
    ffn: tuple[Matrix, ...] | None, residual: int, hidden: int, routed: int, rows: int, hidden_size: int, out: int
) -> None: ...
def matrix_layout(out_features: int, in_features: int, format: MatrixFormat) -> MatrixLayout: ...
def swiglu_ffn(gate: Matrix, up: Matrix, down: Matrix, x: int, num_rows: int, out: int) -> None: ...
def allocate(num_bytes: int) -> NDArray[np.uint8]: ...
def quantize_rows(
    weights: int,
    rows: int,
    columns: int,
    low: float,
    high: float,
    candidates: list[float],
    limit: float,
    codes: int,
    scales: int,
) -> bool: ...
def poison_scratch() -> None: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def configure_threads(cpus: list[int], num_threads: int) -> None: ...
def num_threads() -> int: ...
def read_bandwidth(num_bytes: int = ...) -> float: ...
def fma_peak() -> float: ...
def int8_peak() -> float: ...
def fork_join(tasks: int, cost_ns: float) -> None: ...
def rms_norm(x: int, rows: int, features: int, weight: int, eps: float, out: int) -> None: ...
def rope_store(
    q: int,
    tokens: int,
    heads: int,
    k: int,
    v: int,
    q_norm: int,
    k_norm: int,
    eps: float,
    cos_sin: int,
    max_positions: int,
    rotary_dim: int,
    positions: int,
    slots: int,
    cache_type: str,
    k_cache: int,
    k_strides: tuple[int, ...],
    k_scales: int,
    v_cache: int,
    v_strides: tuple[int, ...],
    v_scales: int,
    cache_shape: tuple[int, ...],
) -> None: ...
def attention_operands() -> str: ...
def paged_attention(
    q: int,
    tokens: int,
    heads: int,
    cache_type: str,
    k_cache: int,
    k_strides: tuple[int, ...],
    k_scales: int,
    v_cache: int,
    v_strides: tuple[int, ...],
    v_scales: int,
    cache_shape: tuple[int, ...],
    block_tables: int,
    max_blocks: int,
    query_start_loc: int,
    seq_lens: int,
    requests: int,
    scale: float,
    out: int,
) -> None: ...
def router_topk(
    logits: int,
    rows: int,
    experts: int,
    correction_bias: int,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    topk_ids: int,
    topk_weights: int,
) -> None: ...
