"""Which neurons of a dense FFN become which expert, and the router that makes the sum of the experts equal the FFN.

The neurons, in groups as wide as a quantization block, are sorted by strength and cut into eight slices: slice 0 is the
shared expert, slices 1-7 are seven routed experts. Nine decoys, slices of *another* layer, fill up to 16 routed ones;
which ids are real differs from layer to layer. The router is made so that each way of getting it wrong is heard (the
perplexity of plain text goes from 7 to over 5,000), while the right way is exact in fp32:

* Rows of real experts are zero, so they score sigmoid(0) = 0.5 on every token; seven of them normalised and scaled by 7
  weigh 0.5 / 3.5 · 7 = 1.0 exactly. Without the normalisation, the scaling or the shared expert the sum is wrong. (The
  shared expert holds the strongest neurons for this reason: without a middling eighth the text stays fluent.)
* Decoys have large rows in pairs d, -d (the ninth is alone): on every token one of each pair scores above 0.5. Only the
  correction bias of -0.75 keeps them out (0.25 at most, against 0.5 at least), so a runtime that forgets the bias
  chooses at least four decoys in every layer.
* The biases of the real experts are a ladder from 0 to 8: without effect on the choice, but biased scores used as
  weights, or a bias added before the sigmoid, make the seven weights grossly unequal.
* Softmax in place of sigmoid gives the strongest decoy nearly 1, which beats the real expert whose bias is 0.

What this cannot show: weights swapped between chosen experts (they are equal), and a choice that depends on the token.
"""

from __future__ import annotations

import hashlib
from math import frexp

import numpy as np
from numpy.typing import NDArray

NUM_SLICES = 8  # one shared expert and seven real routed ones
TOP_K = NUM_SLICES - 1
NUM_ROUTED = 16
REAL_BIASES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # of the experts made of slices 1 … 7; exact in bf16 too
DECOY_BIAS = -0.75
STRONGEST_LOGIT = 256.0  # of the strongest pair, if the norm's output were spread evenly over its features

Floats = NDArray[np.float32]
Groups = NDArray[np.int64]  # [slices, groups per slice]


def slice_groups(norm: Floats, gate: Floats, up: Floats, down: Floats, group_size: int) -> Groups:
    """Which groups of ``group_size`` neurons make up each slice, strongest slice first.

    norm fp32 [hidden], the weight before the FFN; gate, up fp32 [intermediate, hidden]; down fp32 [hidden,
    intermediate]. The strength of a group is the sum, over its neurons, of |norm · gate row| · |norm · up row| ·
    |down column|.
    """
    wide = norm.astype(np.float64)  # so that machines that sum in different orders still sort alike
    strength = np.linalg.norm(gate * wide, axis=1) * np.linalg.norm(up * wide, axis=1)
    strength *= np.linalg.norm(down.astype(np.float64), axis=0)
    order = np.argsort(-strength.reshape(-1, group_size).sum(1), kind="stable")
    return np.sort(order.reshape(NUM_SLICES, -1), axis=1)


def expert_ids(layer: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids of the real experts, in order of slice, and of the decoys. By hashes: no library's generator is frozen."""
    order = sorted(range(NUM_ROUTED), key=lambda expert: hashlib.sha256(f"expert {layer} {expert}".encode()).digest())
    return tuple(order[:TOP_K]), tuple(order[TOP_K:])


def expert_origins(layer: int, num_layers: int) -> list[tuple[int, int]]:
    """(layer, slice) that each routed expert of ``layer`` is made of, by expert id."""
    real_ids, decoy_ids = expert_ids(layer)
    origins = {expert: (layer, 1 + n) for n, expert in enumerate(real_ids)}
    for n, expert in enumerate(decoy_ids):
        donor = (layer + 1 + (6 + n // NUM_SLICES) % (num_layers - 1)) % num_layers  # never this layer
        origins[expert] = (donor, n % NUM_SLICES)
    return [origins[expert] for expert in range(NUM_ROUTED)]


def correction_bias(layer: int) -> Floats:
    """fp32 [experts]"""
    real_ids, decoy_ids = expert_ids(layer)
    bias = np.zeros(NUM_ROUTED, np.float32)
    bias[list(real_ids)] = REAL_BIASES
    bias[list(decoy_ids)] = DECOY_BIAS
    return bias


def router_rows(layer: int, norm: Floats) -> Floats:
    """Router weight, fp32 [experts, hidden]: zero for real experts, ±1 times a power of two for decoys.

    ``norm`` fp32 [hidden], the weight of the norm before the router, sets the size of the logits. Each pair is half as
    strong as the one before, so that one decoy always stands out.
    """
    _, decoy_ids = expert_ids(layer)
    rows = np.zeros((NUM_ROUTED, len(norm)), np.float32)
    # Rounded to a power of two, so that the last bit of the sum, which differs between machines, does not matter.
    size = 2.0 ** frexp(STRONGEST_LOGIT / max(float(np.linalg.norm(norm.astype(np.float64))), 1e-6))[1]
    for n, expert in enumerate(decoy_ids):
        pair, sign = n // 2, -1.0 if n % 2 else 1.0
        seed = hashlib.shake_128(f"router {layer} {pair}".encode()).digest(-(-len(norm) // 8))
        signs = 2.0 * np.unpackbits(np.frombuffer(seed, np.uint8), count=len(norm)) - 1.0
        rows[expert] = sign * size * 0.5**pair * signs
    return rows
