"""What a model must read and compute: bytes per decode step, FLOPs of a prompt. Plain arithmetic, torch-free.

Counted are the matrices and the KV cache. Norms, biases, a row of the embedding table, activations and the KV that is
written are left out: together less than a thousandth of a step of any GLM, and so a fraction of a ceiling is never
flattered by them. A multiply-add is two operations.
"""

from __future__ import annotations

from dataclasses import dataclass

HEAD = "head"


@dataclass(frozen=True, slots=True)
class Part:
    """Matrices that are used alike, of all layers together."""

    name: str  # "attention", "dense FFN", "router", "shared experts", "routed experts" or HEAD
    kind: str  # how the checkpoint stores them: "bf16", "Q4_0", …
    weights: int  # numbers in the matrices
    nbytes: int  # as held in memory
    is_integer: bool  # multiplied as integers: their peak is the ceiling
    used: int = 1  # of every ``of`` matrices a token uses so many: (8, 128) for routed experts
    of: int = 1

    @property
    def weights_per_token(self) -> int:
        return self.weights * self.used // self.of

    @property
    def bytes_per_token(self) -> int:
        return self.nbytes * self.used // self.of


@dataclass(frozen=True, slots=True)
class ModelCost:
    """The parts of a model and the shape of its attention."""

    parts: tuple[Part, ...]
    num_layers: int
    num_attention_heads: int
    head_dim: int
    kv_bytes_per_token: int  # keys and values of one position, all layers, at the cache's own width

    @property
    def weight_bytes_per_token(self) -> int:
        """Weights that one decode step reads: the routed experts of one token, and everything else once."""
        return sum(part.bytes_per_token for part in self.parts)

    @property
    def weight_flops_per_token(self) -> int:
        """Of a decode step, the head included, attention not."""
        return 2 * sum(part.weights_per_token for part in self.parts)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def computes_with_integers(self) -> bool:
        """Are most of a prompt's multiply-adds with weights that are integer codes?"""
        body = [part for part in self.parts if part.name != HEAD]
        integer = sum(part.weights_per_token for part in body if part.is_integer)
        return 2 * integer > sum(part.weights_per_token for part in body)

    def decode_bytes(self, context: int, num_tokens: int) -> float:
        """Bytes that each of ``num_tokens`` steps reads on average, the first of them at ``context`` stored positions.

        A step also reads the position that it has just written.
        """
        positions = context + 1 + (num_tokens - 1) / 2
        return self.weight_bytes_per_token + self.kv_bytes_per_token * positions

    def decode_flops(self, context: int, num_tokens: int) -> float:
        """FLOPs of such a step on average."""
        positions = context + 1 + (num_tokens - 1) / 2
        return self.weight_flops_per_token + self._attention_flops_per_position * positions

    def prefill_flops(self, num_tokens: int) -> int:
        """FLOPs of a prompt: every token goes through the layers, the last one through the head."""
        body = sum(part.weights_per_token for part in self.parts if part.name != HEAD)
        head = sum(part.weights_per_token for part in self.parts if part.name == HEAD)
        positions = num_tokens * (num_tokens + 1) // 2  # token i attends to i positions
        return 2 * body * num_tokens + 2 * head + self._attention_flops_per_position * positions

    @property
    def _attention_flops_per_position(self) -> int:
        return 2 * 2 * self.num_attention_heads * self.head_dim * self.num_layers
