"""Bytes and FLOPs against numbers worked out by hand."""

from __future__ import annotations

import pytest

from glmlocal.cost import HEAD, ModelCost, Part


def q4_0(name: str, weights: int, used: int = 1, of: int = 1) -> Part:
    return Part(name, "Q4_0", weights, weights * 18 // 32, True, used, of)


# Five layers of GLM-4.5-Air, the first of them dense: hidden 4096, 96 heads of 128 and 8 for keys and values.
AIR5 = (
    q4_0("attention", 5 * (2 * 4096 * 12288 + 2 * 4096 * 1024)),
    q4_0("dense FFN", 3 * 4096 * 10944),
    Part("router", "f32", 4 * 128 * 4096, 4 * 128 * 4096 * 4, False),
    q4_0("shared experts", 4 * 3 * 4096 * 1408),
    q4_0("routed experts", 4 * 128 * 3 * 4096 * 1408, 8, 128),
    q4_0(HEAD, 151552 * 4096),
)
KV5 = 2 * 5 * 8 * 128 * 2  # 16 bits
AIR = ModelCost(AIR5, num_layers=5, num_attention_heads=96, head_dim=128, kv_bytes_per_token=KV5)
ATTENTION_FLOPS = 4 * 96 * 128 * 5  # per query and position


def test_air_reads_1_09_gb_per_token() -> None:
    assert AIR.weight_bytes_per_token == 1_090_273_280
    assert AIR.nbytes == AIR.weight_bytes_per_token + 4 * 120 * 3 * 4096 * 1408 * 18 // 32
    assert AIR.weight_flops_per_token == 2 * (545_259_520 + 134_479_872 + 2_097_152 + 9 * 69_206_016 + 620_756_992)


def test_a_step_reads_the_context_and_what_it_has_just_written() -> None:
    assert KV5 * 46 // 5 == 188_416
    assert AIR.decode_bytes(0, 1) == AIR.weight_bytes_per_token + KV5
    assert AIR.decode_bytes(4096, 1) == AIR.weight_bytes_per_token + 4097 * KV5
    # 64 steps at 4097, 4098, … 4160 positions.
    assert AIR.decode_bytes(4096, 64) == AIR.weight_bytes_per_token + KV5 * sum(range(4097, 4161)) / 64
    assert AIR.decode_flops(4096, 64) == AIR.weight_flops_per_token + ATTENTION_FLOPS * 4128.5


def test_a_prompt_goes_through_the_head_once() -> None:
    body, head = 1_304_690_688, 620_756_992
    assert AIR.prefill_flops(1) == 2 * (body + head) + ATTENTION_FLOPS
    assert AIR.prefill_flops(3) == 2 * (3 * body + head) + ATTENTION_FLOPS * (1 + 2 + 3)
    assert AIR.prefill_flops(512) == 2 * (512 * body + head) + ATTENTION_FLOPS * sum(range(1, 513))


@pytest.mark.parametrize(
    ("parts", "integers"),
    [
        (AIR5, True),
        ((q4_0("dense FFN", 300), Part("attention", "bf16", 320, 640, False)), False),
        ((q4_0("dense FFN", 320), Part("attention", "bf16", 300, 600, False)), True),
        # The head is used once per prompt, idle experts not at all.
        ((q4_0(HEAD, 3200), Part("attention", "bf16", 300, 600, False)), False),
        ((q4_0("routed experts", 3200, 1, 32), Part("attention", "bf16", 320, 640, False)), False),
    ],
)
def test_the_ceiling_is_that_of_most_multiply_adds(parts: tuple[Part, ...], integers: bool) -> None:
    assert ModelCost(parts, 1, 1, 1, 1).computes_with_integers is integers
