"""What goes into the engine and what comes out: plain values, torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from glmlocal.errors import RequestError

_RANGES: dict[str, tuple[float, float, str]] = {  # name: least, most, how to write the range
    "temperature": (0.0, 100.0, "0 … 100"),
    "top_p": (0.0, 1.0, "above 0, at most 1"),
    "min_p": (0.0, 1.0, "0 … 1"),
    "repetition_penalty": (1e-3, 1e3, "above 0"),
    "presence_penalty": (-2.0, 2.0, "-2 … 2"),
    "frequency_penalty": (-2.0, 2.0, "-2 … 2"),
}
MAX_STOP_STRINGS, MAX_STOP_CHARS, MAX_LOGPROBS, MAX_LOGIT_BIAS = 64, 4096, 128, 65_536
GRAMMAR_KINDS = ("json_schema", "json_object", "regex", "lark", "choice")
MAX_GRAMMAR_CHARS = 262_144


class FinishReason(StrEnum):
    """Why a request ended, in the words of the OpenAI API."""

    STOP = "stop"  # an EOS token, a stop token or a stop string
    LENGTH = "length"  # max_tokens reached, or the context is full
    ABORT = "abort"  # cancelled by the caller
    ERROR = "error"  # a step failed; ``RequestOutput.error`` says how


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the answer must look like, from the token after ``after_token_id`` on (``</think>``; None: from the start).

    ``source`` is a JSON schema, a regular expression, a Lark grammar or a JSON list of strings; "json_object" has none.
    Raises RequestError for an unknown kind or a source that is too long.
    """

    kind: str
    source: str = ""
    after_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in GRAMMAR_KINDS:
            raise RequestError(f"grammar kind is {self.kind!r}, wanted one of {', '.join(GRAMMAR_KINDS)}")
        if not isinstance(self.source, str) or len(self.source) > MAX_GRAMMAR_CHARS:
            raise RequestError(f"the grammar is not text of at most {MAX_GRAMMAR_CHARS:,} characters; shorten it")
        if self.after_token_id is not None and not (_is_integer(self.after_token_id) and self.after_token_id >= 0):
            raise RequestError(f"after_token_id is {self.after_token_id!r}, wanted a token id")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen; names, ranges and order of application as in vLLM.

    Penalties and ``logit_bias`` come first, then temperature, then min-p, top-k and top-p on what is left.
    ``temperature`` 0 is greedy: the largest penalised logit, the lowest id among equals.
    Raises RequestError, naming the field, for a value outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0 or -1: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output, as in transformers
    presence_penalty: float = 0.0  # over the output
    frequency_penalty: float = 0.0  # over the output
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None  # None: until the context is full; 0: the prompt is computed, and that is all
    min_tokens: int = 0  # no EOS or stop token before that many
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # how many alternatives to report per token; 0 reports the chosen one alone
    prompt_logprobs: int | None = None  # the same of the prompt's tokens, which are all computed then, cached or not
    grammar: Grammar | None = None  # what may follow; EOS only where it may end

    def __post_init__(self) -> None:
        for name, (least, most, legal) in _RANGES.items():
            value = getattr(self, name)
            if not _is_number(value) or not least <= value <= most or (name == "top_p" and value == 0):
                raise RequestError(f"{name} is {value!r}, wanted a number {legal}")
        given: object = self.stop  # callers may give one string, or a list
        stop = (given,) if isinstance(given, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        self._check_integers()
        if len(stop) > MAX_STOP_STRINGS or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARS for s in stop):
            raise RequestError(
                f"stop is {len(stop)} entries, wanted at most {MAX_STOP_STRINGS} non-empty strings "
                f"of up to {MAX_STOP_CHARS} characters"
            )
        if len(self.logit_bias) > MAX_LOGIT_BIAS or not all(
            _is_integer(token) and token >= 0 and _is_number(bias) for token, bias in self.logit_bias.items()
        ):
            raise RequestError(
                f"logit_bias must map token ids to finite numbers, at most {MAX_LOGIT_BIAS} of them; "
                f"found {str(dict(self.logit_bias))[:80]}"
            )

    @property
    def looks_back(self) -> bool:
        """Does the choice of a token depend on those generated before it?"""
        return bool(
            self.min_tokens or self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        )

    def _check_integers(self) -> None:
        checks: tuple[tuple[str, int | None, int, int], ...] = (
            ("top_k", self.top_k, -1, 2**31 - 1),
            ("min_tokens", self.min_tokens, 0, 2**31 - 1),
            ("max_tokens", self.max_tokens, 0, 2**31 - 1),
            ("seed", self.seed, -(2**63), 2**64 - 1),
            ("logprobs", self.logprobs, 0, MAX_LOGPROBS),
            ("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS),
        )
        for name, value, least, most in checks:
            if value is not None and not (_is_integer(value) and least <= value <= most):
                raise RequestError(f"{name} is {value!r}, wanted an integer from {least} to {most}")
        if not all(_is_integer(token) and token >= 0 for token in self.stop_token_ids):
            raise RequestError(f"stop_token_ids is {self.stop_token_ids!r}, wanted token ids")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise RequestError(f"grammar is {str(self.grammar)[:80]!r}, wanted a Grammar")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Named values → SamplingParams; an unknown name is a RequestError that lists the known ones."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise RequestError(f"unknown sampling parameter {', '.join(unknown)}; known are {', '.join(known)}")
        return cls(**values)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to complete. ``stop_token_ids`` of the params are added to ``eos_token_ids`` of the model.

    Requests of different ``client_id`` take turns where they have to wait.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    client_id: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of a token before temperature and truncation (as OpenAI reports it), and its rivals."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one engine step did for one request."""

    request_id: str
    token_ids: tuple[int, ...]  # new tokens; a stop token that ended the request is included
    num_prompt_tokens: int
    num_computed_tokens: int  # of prompt and output, so that a caller can show prefill progress
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the EOS or stop token that ended it
    logprobs: tuple[TokenLogprob, ...] = ()
    num_cached_tokens: int = 0  # of the prompt: found in the prefix cache, not computed
    error: str | None = None  # with FinishReason.ERROR
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # of the prompt from its second token on, as far as is new
