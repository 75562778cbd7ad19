"""What a synthetic model is made of: the family's shapes, every tensor, and the statistics that make it behave.

* **Activations.** Embeddings have size 1, matrices 1/sqrt(fan_in), norms 0.8 to 1.2; what layers write to the residual
  is divided by sqrt(layers), so that together they weigh about as much as the embedding whatever the depth.
* **Routing.** The wanted share of each expert is Zipf-like: rank**-skew, at most CAP of all tokens, ranks shuffled in
  every layer. Router rows give logits of about N(0, 1), and the correction bias is solved so that sigmoid + bias is
  among the top k just that often (``correction_bias``). Tokens choose independently of one another: the persistence
  that real text shows from token to token is not modelled.
* **MTP.** With a chosen acceptance the model is a bigram: all words form one cycle, and the head's row of a word is the
  embedding of the word before it (times a power of two), so that the embedding outvotes the layers and the most likely
  next token is known. The MTP layer sees the same embedding through eh_proj and agrees, except for a random subset of
  1 - acceptance of the words: column 0 of their embeddings is marked, and eh_proj turns the mark into the direction
  that the head reads as one fixed wrong word. Drafts recycle well, so draft k is right with probability acceptance**k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from synthetic.storage import Bytes, Codec, FloatCodec, Floats, TableCodec, fp8_scales
from synthetic.text import Vocabulary

Ids = NDArray[np.int64]
Kind = Literal["vector", "correction_bias", "router", "linear", "table", "eh_proj"]
Written = Callable[[str], tuple[TableCodec, Bytes]]  # name → how a tensor already in the file is stored, its rows

CAP = 0.95  # no expert is chosen by more of the tokens
ROUTER_LOGIT_STD = 1.0
HEAD_GAIN = 3.0  # standard deviation of the logits of a random head
UNUSED_ROW_GAIN = 0.05  # of the head's rows for what is not a word: never the most likely token
MARK_GAIN = 4.0  # the mark, 0.9 or more, must outweigh the embedding, 1
HIDDEN_GAIN = 0.1  # how much of the previous hidden state the MTP layer takes in


@dataclass(frozen=True, slots=True)
class Shape:
    """A member of the family, in HF's names."""

    name: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    first_k_dense_replace: int
    n_routed_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    use_qk_norm: bool
    max_position_embeddings: int
    vocab_size: int = 151552


_355B = (5120, 92, 96, 8, 128, 12288, 1536, 3, 160, 8, 2.5, True)
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("GLM-4.5", *_355B, max_position_embeddings=131072),
        Shape("GLM-4.5-Air", 4096, 46, 96, 8, 128, 10944, 1408, 1, 128, 8, 1.0, False, 131072),
        Shape("GLM-4.6", *_355B, max_position_embeddings=202752),
        Shape("GLM-4.7", *_355B, max_position_embeddings=202752),
        Shape("tiny", 128, 4, 8, 2, 32, 256, 64, 1, 16, 4, 2.5, True, 4096, vocab_size=1024),
    )
}


class Fill(Protocol):
    """Where a tensor's rows come from."""

    def rows(self, codec: Any, rng: np.random.Generator, rows: slice, columns: int, written: Written) -> Bytes:
        """uint8 [rows, row_bytes] of these rows; ``rng`` belongs to them alone."""


@dataclass(frozen=True, slots=True)
class Random:
    """Independent weights of one standard deviation."""

    std: float

    def rows(self, codec: Codec, rng: np.random.Generator, rows: slice, columns: int, written: Written) -> Bytes:
        return codec.random(rng, np.full(rows.stop - rows.start, self.std, np.float32), columns)


@dataclass(frozen=True, slots=True)
class Values:
    """Floats computed for a slice of the rows: [rows, columns], or [1, n] for a vector."""

    compute: Callable[[np.random.Generator, slice, Written], Floats]

    def rows(self, codec: FloatCodec, rng: np.random.Generator, rows: slice, columns: int, written: Written) -> Bytes:
        return codec.encode(self.compute(rng, rows, written))


@dataclass(frozen=True, slots=True)
class Fp8Scales:
    """``weight_scale`` [rows, 1] of an FP8 matrix whose weights are to have this standard deviation."""

    std: float

    def rows(self, codec: FloatCodec, rng: np.random.Generator, rows: slice, columns: int, written: Written) -> Bytes:
        return codec.encode(fp8_scales(rng, self.std, rows.stop - rows.start)[:, None])


@dataclass(frozen=True, slots=True)
class Embedding:
    """Rows of size 1, with the mark of the words that the MTP layer gets wrong."""

    marked: NDArray[np.bool_] | None  # [vocab]

    def rows(self, codec: TableCodec, rng: np.random.Generator, rows: slice, columns: int, written: Written) -> Bytes:
        data = codec.random(rng, np.ones(rows.stop - rows.start, np.float32), columns)
        if self.marked is not None:
            codec.mark(data, self.marked[rows])
        return data


@dataclass(frozen=True, slots=True)
class Head:
    """Rows of words: random, or the embedding of the word before; rows of all other ids: random and small."""

    word_std: float
    words: range
    previous: Ids | None  # [vocab], for a bigram

    def rows(self, codec: TableCodec, rng: np.random.Generator, rows: slice, columns: int, written: Written) -> Bytes:
        ids = np.arange(rows.start, rows.stop)
        is_word = (ids >= self.words.start) & (ids < self.words.stop)
        std = np.where(is_word, self.word_std, self.word_std * UNUSED_ROW_GAIN).astype(np.float32)
        data = codec.random(rng, std, columns)
        if self.previous is not None:
            _, embedding = written("model.embed_tokens.weight")
            data[is_word] = codec.halve(embedding[self.previous[ids[is_word]]], round(np.log2(columns) / 2))
        return data


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor by HF name; ``experts.*`` in it means all experts of the layer, stacked in the first dimension."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    fill: Fill


@dataclass(frozen=True, slots=True)
class Bigram:
    """The cycle of words and where the MTP layer is wrong."""

    previous: Ids  # [vocab]; -1 for what is not a word
    marked: NDArray[np.bool_]  # [vocab]: after these words the MTP layer drafts the wrong one
    wrong_word: int  # what it drafts then

    @property
    def following(self) -> Ids:
        """The model's next token by token, int64 [vocab]; -1 where it is not by construction."""
        following = np.full_like(self.previous, -1)
        words = np.flatnonzero(self.previous >= 0)
        following[self.previous[words]] = words
        return following


def build_bigram(words: range, vocab_size: int, acceptance: float, rng: np.random.Generator) -> Bigram:
    """One random cycle through all words, of which 1 - acceptance are marked (all but one at 0)."""
    cycle = rng.permutation(np.arange(words.start, words.stop))
    previous = np.full(vocab_size, -1, np.int64)
    previous[cycle] = np.roll(cycle, 1)
    marked = np.zeros(vocab_size, np.bool_)
    # The word before the wrong word stays unmarked: there the wrong draft would be right.
    candidates = rng.permutation(cycle[1:])
    marked[candidates[: round((1 - acceptance) * len(cycle))]] = True
    return Bigram(previous, marked, int(cycle[1]))


def popularity(num_experts: int, top_k: int, skew: float) -> Floats:
    """Share of tokens that choose each expert, most popular first: rank**-skew, at most CAP, summing to top_k."""
    weights = np.arange(1, num_experts + 1, dtype=np.float64) ** -skew
    low, high = 0.0, num_experts / weights[-1]
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(CAP, middle * weights).sum() < top_k else (low, middle)
    return np.asarray(np.minimum(CAP, high * weights), np.float32)


def correction_bias(shares: Floats, top_k: int, rng: np.random.Generator) -> Floats:
    """Bias that makes each expert one of the top k for its share of the tokens, when logits are N(0, 1).

    With many experts the k-th best score is nearly constant, and an expert passes it for a share p of the tokens when
    its bias is minus the (1 - p) quantile of its sigmoid. A few corrections on simulated tokens take care of the rest.
    """
    normal = NormalDist(0.0, ROUTER_LOGIT_STD)

    def thresholds(p: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        return np.array([normal.inv_cdf(1 - float(x)) for x in np.clip(p, 1e-4, 1 - 1e-4)])

    wanted = logits = thresholds(shares)
    scores = 1 / (1 + np.exp(-rng.normal(0.0, ROUTER_LOGIT_STD, (8192, len(shares))).astype(np.float32)))
    for _ in range(10):
        bias = -1 / (1 + np.exp(-logits))
        chosen = np.argpartition(scores + bias, -top_k, axis=1)[:, -top_k:]
        measured = np.bincount(chosen.ravel(), minlength=len(shares)) / len(scores)
        logits = logits + 0.5 * (wanted - thresholds(measured))
    return np.asarray(bias - bias.mean(), np.float32)


def plan_tensors(
    shape: Shape, vocabulary: Vocabulary, seed: int, skew: float, acceptance: float | None
) -> list[Tensor]:
    """Every tensor in the order of writing. With an ``acceptance``, layer num_hidden_layers is the MTP layer."""
    hidden, vocab_size = shape.hidden_size, len(vocabulary.tokens)
    words = range(vocabulary.first_word, vocabulary.first_special)
    bigram = None
    if acceptance is not None:
        bigram = build_bigram(words, vocab_size, acceptance, np.random.default_rng([seed, 1]))
    rng = np.random.default_rng([seed, 2])
    shares = popularity(shape.n_routed_experts, shape.num_experts_per_tok, skew)
    biases = correction_bias(shares, shape.num_experts_per_tok, rng)
    head = Head(HEAD_GAIN / hidden**0.5, words, None if bigram is None else bigram.previous)
    embedding = Embedding(None if bigram is None else bigram.marked)
    tensors = [Tensor("model.embed_tokens.weight", (vocab_size, hidden), "table", embedding)]
    for layer in range(shape.num_hidden_layers + (bigram is not None)):
        prefix = f"model.layers.{layer}."
        tensors += _attention(shape, prefix)
        if layer < shape.first_k_dense_replace:
            tensors += _ffn(f"{prefix}mlp.", hidden, shape.intermediate_size, shape.num_hidden_layers)
        else:
            tensors += _moe(shape, prefix, rng.permutation(biases))
    if bigram is not None:
        tensors += _mtp_glue(f"model.layers.{shape.num_hidden_layers}.", hidden, bigram)
    tensors.append(_norm("model.norm.weight", hidden))
    tensors.append(Tensor("lm_head.weight", (vocab_size, hidden), "table", head))
    return tensors


def _norm(name: str, size: int) -> Tensor:
    """A norm weight: 0.8 to 1.2."""

    def compute(rng: np.random.Generator, rows: slice, written: Written) -> Floats:
        return rng.uniform(0.8, 1.2, (1, size)).astype(np.float32)

    return Tensor(name, (size,), "vector", Values(compute))


def _bias(name: str, size: int) -> Tensor:
    def compute(rng: np.random.Generator, rows: slice, written: Written) -> Floats:
        return rng.normal(0.0, 0.2, (1, size)).astype(np.float32)

    return Tensor(name, (size,), "vector", Values(compute))


def _linear(name: str, out: int, inputs: int, *, residual_of: int = 1, experts: int = 0) -> Tensor:
    """Weights of size 1/sqrt(inputs), smaller for one of ``residual_of`` layers that write to the residual."""
    stack = (experts,) if experts else ()
    return Tensor(f"{name}.weight", (*stack, out, inputs), "linear", Random((inputs * residual_of) ** -0.5))


def _ffn(prefix: str, hidden: int, width: int, num_layers: int, experts: int = 0) -> list[Tensor]:
    return [
        _linear(f"{prefix}gate_proj", width, hidden, experts=experts),
        _linear(f"{prefix}up_proj", width, hidden, experts=experts),
        _linear(f"{prefix}down_proj", hidden, width, residual_of=num_layers, experts=experts),
    ]


def _attention(shape: Shape, prefix: str) -> list[Tensor]:
    hidden, head_dim = shape.hidden_size, shape.head_dim
    tensors = [_norm(f"{prefix}input_layernorm.weight", hidden)]
    kv_heads = shape.num_key_value_heads
    for name, heads in (("q", shape.num_attention_heads), ("k", kv_heads), ("v", kv_heads)):
        width = heads * head_dim
        tensors.append(_linear(f"{prefix}self_attn.{name}_proj", width, hidden))
        tensors.append(_bias(f"{prefix}self_attn.{name}_proj.bias", width))
    if shape.use_qk_norm:
        tensors += [_norm(f"{prefix}self_attn.{name}_norm.weight", head_dim) for name in ("q", "k")]
    inputs, layers = shape.num_attention_heads * head_dim, shape.num_hidden_layers
    tensors.append(_linear(f"{prefix}self_attn.o_proj", hidden, inputs, residual_of=layers))
    return [*tensors, _norm(f"{prefix}post_attention_layernorm.weight", hidden)]


def _moe(shape: Shape, prefix: str, biases: Floats) -> list[Tensor]:
    hidden, num_experts, width = shape.hidden_size, shape.n_routed_experts, shape.moe_intermediate_size
    router = Random(ROUTER_LOGIT_STD * hidden**-0.5)
    bias = Values(lambda rng, rows, written: biases[None])
    return [
        Tensor(f"{prefix}mlp.gate.weight", (num_experts, hidden), "router", router),
        Tensor(f"{prefix}mlp.gate.e_score_correction_bias", (num_experts,), "correction_bias", bias),
        *_ffn(f"{prefix}mlp.shared_experts.", hidden, width, shape.num_hidden_layers),
        *_ffn(f"{prefix}mlp.experts.*.", hidden, width, shape.num_hidden_layers, experts=num_experts),
    ]


def _mtp_glue(prefix: str, hidden: int, bigram: Bigram) -> list[Tensor]:
    """enorm, hnorm, shared_head.norm, and eh_proj = [1 + wrong direction · mark | a little of the hidden state]."""
    row_before_wrong_word = int(bigram.previous[bigram.wrong_word])

    def eh_proj(rng: np.random.Generator, rows: slice, written: Written) -> Floats:
        codec, embedding = written("model.embed_tokens.weight")
        direction = codec.decode(np.array(embedding[row_before_wrong_word][None]))[0]
        out = rng.normal(0.0, HIDDEN_GAIN * hidden**-0.5, (rows.stop - rows.start, 2 * hidden)).astype(np.float32)
        out[:, :hidden] = np.eye(rows.stop - rows.start, hidden, rows.start, dtype=np.float32)
        out[:, 0] += MARK_GAIN * direction[rows]
        return out

    names = ("enorm", "hnorm", "shared_head.norm")
    glue = Tensor(f"{prefix}eh_proj.weight", (hidden, 2 * hidden), "eh_proj", Values(eh_proj))
    return [*(_norm(f"{prefix}{name}.weight", hidden) for name in names), glue]
