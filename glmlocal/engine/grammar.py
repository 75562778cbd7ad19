"""Grammars: which tokens may come next. Compiled by llguidance, bounded in time and memory. Torch-free."""

from __future__ import annotations

import concurrent.futures
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

from glmlocal.engine.request import Grammar
from glmlocal.errors import EngineError, RequestError
from glmlocal.text.tokenizer import Tokenizer
from glmlocal.units import MIB

# Between the parts of JSON: a space, or a new line that is indented. llguidance's own limit is none, and a small model
# that may write line after line does so until its tokens are used up.
JSON_SPACE: Any = {"whitespace_pattern": r" |\n[ ]{0,40}"}
_STACK_SIZE = threading.Lock()  # Python's setting for new threads is one for the process


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What one grammar may cost, and how many are kept."""

    timeout_s: float = 10.0
    max_nesting: int = 64  # the compilers recurse, and a native stack that overflows takes the process with it: so do
    max_references: int = 1000  # chains of "$ref" (5,000 of them overflow 8 MiB) and of Lark's rules
    stack_bytes: int = 256 * MIB  # of a compiling thread; memory only where it is touched
    max_lexer_states: int = 50_000  # of 1 to 2 KB each
    max_grammar_size: int = 100_000
    max_cached: int = 32
    num_workers: int = 2


class Constraint:
    """Where one answer stands in its grammar. Used by one thread at a time."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, after_token_id: int | None) -> None:
        self._matcher, self._vocab_size, self._after_token_id = matcher, vocab_size, after_token_id

    def allowed(self) -> NDArray[np.bool_] | None:
        """Which tokens may come next, [vocab]; None while all may. Raises EngineError when it got too large."""
        if self._after_token_id is not None:
            return None
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def accept(self, token_id: int) -> bool:
        """Take the token that was chosen; True if nothing may follow it. Raises EngineError as ``allowed`` does."""
        if self._after_token_id is not None:
            if token_id == self._after_token_id:
                self._after_token_id = None
            return False
        self._matcher.consume_token(token_id)
        self._check()
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise EngineError(f"the grammar cannot be followed further: {_first_line(self._matcher.get_error())}")


class GrammarCompiler:
    """Compiles grammars for one vocabulary and keeps the last ones. Safe from several threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: Collection[int],
        limits: GrammarLimits = GrammarLimits(),
    ) -> None:
        self._tokenizer, self._vocab_size, self._eos_token_ids = tokenizer, vocab_size, sorted(eos_token_ids)
        self._limits = limits
        self._lock = threading.Lock()  # guards what follows
        self._compiled: OrderedDict[tuple[str, str], llguidance.LLMatcher] = OrderedDict()
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._places = threading.BoundedSemaphore(limits.num_workers)

    def compile(self, grammar: Grammar) -> Constraint:
        """A fresh constraint at the grammar's start; waits for the compiler, at most ``timeout_s``.

        Raises RequestError that names what is wrong with the grammar, or that it is too large.
        """
        key = grammar.kind, grammar.source
        with self._lock:
            matcher = self._compiled.get(key)
            if matcher is not None:
                self._compiled.move_to_end(key)
                return Constraint(matcher.deep_copy(), self._vocab_size, grammar.after_token_id)
        matcher = self._build_elsewhere(grammar)
        with self._lock:
            self._compiled[key] = matcher
            while len(self._compiled) > self._limits.max_cached:
                self._compiled.popitem(last=False)
        return Constraint(matcher.deep_copy(), self._vocab_size, grammar.after_token_id)

    def _build_elsewhere(self, grammar: Grammar) -> llguidance.LLMatcher:
        """``_build`` on a thread that may take its time, and whose stack is large."""
        deadline_s = time.monotonic() + self._limits.timeout_s
        built: concurrent.futures.Future[llguidance.LLMatcher] = concurrent.futures.Future()

        def work() -> None:
            try:
                built.set_result(self._build(grammar))
            except Exception as error:
                built.set_exception(error)
            finally:
                self._places.release()

        try:
            if not self._places.acquire(timeout=self._limits.timeout_s):
                raise concurrent.futures.TimeoutError
            with _STACK_SIZE:
                before = threading.stack_size(self._limits.stack_bytes)
                try:
                    threading.Thread(target=work, name="grammar", daemon=True).start()
                finally:
                    threading.stack_size(before)
            return built.result(max(0.0, deadline_s - time.monotonic()))
        except concurrent.futures.TimeoutError:
            raise RequestError(
                f"the {grammar.kind} takes longer than {self._limits.timeout_s:g} s to compile; make it simpler"
            ) from None

    def _build(self, grammar: Grammar) -> llguidance.LLMatcher:
        matcher = llguidance.LLMatcher(
            self._tokens(),
            _definition(grammar, self._limits),
            log_level=0,
            limits=llguidance.LLParserLimits(
                max_lexer_states=self._limits.max_lexer_states,
                max_grammar_size=self._limits.max_grammar_size,
                verbose_errors=False,
            ),
        )
        if matcher.is_error():
            raise RequestError(f"the {grammar.kind} cannot be used: {_first_line(matcher.get_error())}")
        return matcher

    def _tokens(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._vocabulary is None:
                words = _Words(self._tokenizer, self._vocab_size, self._eos_token_ids)
                self._vocabulary = llguidance.LLTokenizer(
                    llguidance.TokenizerWrapper(words), n_vocab=self._vocab_size, eos_token=self._eos_token_ids or None
                )
            return self._vocabulary


class _Words:
    """The vocabulary as llguidance wants it. Added tokens are special: text of a grammar never spells one."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: list[int]) -> None:
        self._encode = tokenizer.encode
        self.tokens = [tokenizer.token_bytes(id_) for id_ in range(vocab_size)]
        special = set(tokenizer.added_ids) | set(eos_token_ids)
        self.special_token_ids = sorted(id_ for id_ in special if id_ < vocab_size)
        # A model without EOS gets an id past its tokens: a grammar's end is then told by ``Constraint.accept`` alone.
        self.eos_token_id = eos_token_ids[0] if eos_token_ids else vocab_size - 1
        self.bos_token_id = tokenizer.bos_id

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text.decode("utf-8", "replace"))


def _definition(grammar: Grammar, limits: GrammarLimits) -> str:
    """What llguidance compiles. Raises RequestError for what it would not survive, or accepts and should not."""
    kind, source = grammar.kind, grammar.source
    if "\0" in source:
        raise RequestError(f"the {kind} holds a NUL character")
    if _nesting(source) > limits.max_nesting:
        raise RequestError(f"the {kind} is nested deeper than {limits.max_nesting} brackets; make it flatter")
    references = source.count("$ref") if kind == "json_schema" else source.count(":") if kind == "lark" else 0
    if references > limits.max_references:
        raise RequestError(f"the {kind} has {references:,} references, more than {limits.max_references:,}; shorten it")
    if kind == "json_object":
        return llguidance.LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=JSON_SPACE)
    if kind == "lark":
        return llguidance.LLMatcher.grammar_from_lark(source)
    if kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(source)
    value = _parse_json(kind, source)
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(each, str) and each for each in value):
            raise RequestError("choice is not a JSON list of non-empty strings")
        return llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(each) for each in value))
    if not isinstance(value, dict | bool):
        raise RequestError(f"the json_schema is {type(value).__name__}, wanted an object")
    return llguidance.LLMatcher.grammar_from_json_schema(source, overrides=JSON_SPACE)


def _parse_json(kind: str, source: str) -> object:
    try:
        value: object = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the {kind} is not JSON: {error}") from None
    return value


def _nesting(source: str) -> int:
    """How deep brackets go, those in strings counted too: an upper bound is all that is wanted."""
    depth = deepest = 0
    for char in source:
        if char in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in ")]}" and depth:
            depth -= 1
    return deepest


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[0][:300] if lines else "no reason given"
