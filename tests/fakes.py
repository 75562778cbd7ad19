"""FakeLLM: the shape of glmlocal.llm.LLM without a model, for tests of what is above it.

The model name decides what it is: "thinker" (a chat model that thinks), "talker" (a chat model that does not) or
"base" (no chat template). A token is a word with the blanks after it. Without a script it repeats the last message.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from glmlocal.completion import Completion, CompletionDelta, Timings, Usage
from glmlocal.engine.request import SamplingParams
from glmlocal.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    import pytest
    import torch

VOCAB_SIZE = 300  # bytes, and room above them


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model "generates"; ``error`` is raised after the text."""

    text: str
    reasoning: str = ""
    error: Exception | None = None


class FakeTokenizer:
    """One token per byte."""

    vocab_size = VOCAB_SIZE

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""


@dataclass(frozen=True, slots=True)
class FakeConfig:
    vocab_size: int = VOCAB_SIZE


class FakeLLM:
    """See the module's docstring. ``instances`` lists what was made, so that a test can look at the calls."""

    instances: list[FakeLLM] = []  # noqa: RUF012
    replies: list[Reply] = []  # noqa: RUF012  (used up front to back; empty: repeat the last message)
    token_delay_s = float(os.environ.get("FAKE_TOKEN_DELAY_S", "0"))

    def __init__(
        self,
        model: str | Path,
        *,
        context: int | None = None,
        kv_dtype: str = "auto",
        threads: int | None = None,
        max_batch: int = 8,
        quant: str = "keep",
        activations: str = "auto",
        ram: str | None = None,
        gpus: str = "auto",
        link: str | None = None,
        vram_bytes: int | None = None,
        cpu_offload_bytes: int | None = None,
        nvme_dir: Path | None = None,
        offload: bool = True,
        plan: Any = None,
        progress: bool = False,
        on_bytes: Any = None,
    ) -> None:
        self.plan = plan
        self.offload_stats = None
        self.model_name = str(model)
        self.quant = quant
        self.note = (
            None if quant == "keep" else "2 of 3 linear weights are quantized already (Q4_0) and stay as they are"
        )
        if self.model_name == "missing":
            raise CheckpointError("'missing' is not there; give a directory, a .gguf file or demo")
        self.context = context or 4096
        self.config = FakeConfig()
        self.tokenizer = FakeTokenizer()
        self.chat_template = None if self.model_name == "base" else "a template"
        self.supports_thinking = self.model_name == "thinker"
        self.load_s = 0.25
        self.calls: list[dict[str, Any]] = []
        self.num_aborted = 0
        self.closed = False
        FakeLLM.instances.append(self)

    def default_sampling(self, **overrides: Any) -> SamplingParams:
        return SamplingParams.from_dict({name: value for name, value in overrides.items() if value is not None})

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        stream: bool = False,
        **sampling: Any,
    ) -> Completion | Iterator[CompletionDelta]:
        if self.chat_template is None:
            raise RequestError(f"{self.model_name} is a base model")
        self.calls.append({"messages": [dict(m) for m in messages], "enable_thinking": enable_thinking, **sampling})
        text = "".join(str(part) for message in messages for part in message.values())
        thinking = enable_thinking and self.supports_thinking
        return self._complete(text, messages[-1]["content"], thinking, stream, sampling)

    def generate(
        self, prompt: str | Sequence[int], *, stream: bool = False, **sampling: Any
    ) -> Completion | Iterator[CompletionDelta]:
        self.calls.append({"prompt": prompt, **sampling})
        return self._complete(str(prompt), str(prompt), False, stream, sampling)

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Depends on the token, the one before it and how many came before, so that a wrong window shows."""
        import numpy as np
        import torch  # here: tests of the command line start many processes

        rng = np.random.default_rng(sum(self.model_name.encode()))
        table, previous = rng.normal(size=(2, VOCAB_SIZE, VOCAB_SIZE))
        ids = np.asarray(token_ids)
        before = np.concatenate([ids[:1], ids[:-1]])
        position = np.minimum(np.arange(len(ids)), 40)[:, None] / 20
        return torch.from_numpy((table[ids] + 0.5 * previous[before] * position).astype(np.float32))

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _complete(
        self, prompt: str, last: str, thinking: bool, stream: bool, sampling: Mapping[str, Any]
    ) -> Completion | Iterator[CompletionDelta]:
        params = self.default_sampling(**sampling)
        num_prompt_tokens = len(_words(prompt))
        if num_prompt_tokens >= self.context:
            raise RequestError(
                f"the prompt has {num_prompt_tokens} tokens, the context holds {self.context}; shorten it"
            )
        reply = FakeLLM.replies.pop(0) if FakeLLM.replies else Reply(last, "Let me see." if thinking else "")
        deltas = self._stream(reply, num_prompt_tokens, params)
        if stream:
            return deltas
        *_, final = deltas
        assert final.completion is not None
        return final.completion

    def _stream(self, reply: Reply, num_prompt_tokens: int, params: SamplingParams) -> Iterator[CompletionDelta]:
        reasoning, words = _words(reply.reasoning), _words(reply.text)
        room = min(params.max_tokens or self.context, self.context - num_prompt_tokens)
        pieces = [(word, True) for word in reasoning] + [(word, False) for word in words]
        cut = len(pieces) > room
        pieces = pieces[:room]
        finished = False
        try:
            yield CompletionDelta(prefill_progress=0.5)
            for number, (word, is_reasoning) in enumerate(pieces):
                time.sleep(self.token_delay_s)
                if is_reasoning:
                    yield CompletionDelta(reasoning=word, token_ids=(number,))
                else:
                    yield CompletionDelta(text=word, token_ids=(number,))
            if reply.error is not None:
                raise reply.error
            finished = True
            num_reasoning = sum(is_reasoning for _, is_reasoning in pieces)
            yield CompletionDelta(
                completion=Completion(
                    text="".join(word for word, is_reasoning in pieces if not is_reasoning),
                    reasoning="".join(word for word, is_reasoning in pieces if is_reasoning),
                    token_ids=tuple(range(len(pieces))),
                    finish_reason="length" if cut else "stop",
                    usage=Usage(num_prompt_tokens, len(pieces), num_reasoning),
                    timings=Timings(self.load_s, 0.125, num_prompt_tokens / 0.125, 50.0, 0.5),
                    logprobs=None,
                )
            )
        finally:
            self.num_aborted += not finished


def _words(text: str) -> list[str]:
    return re.findall(r"\s*\S+\s?|\s+", text)


def fake_llm_module() -> ModuleType:
    """What stands in for glmlocal.llm, whose import would take torch with it."""
    module = ModuleType("glmlocal.llm")
    module.LLM = FakeLLM  # type: ignore[attr-defined]
    return module


def main() -> int:
    """The command line of a process whose models are FakeLLMs."""
    sys.modules["glmlocal.llm"] = fake_llm_module()
    from glmlocal.cli.main import main as real_main

    return real_main()


def install(monkeypatch: pytest.MonkeyPatch, *replies: Reply) -> None:
    """Commands of this test load FakeLLMs, which answer with these replies first."""
    monkeypatch.setitem(sys.modules, "glmlocal.llm", fake_llm_module())
    monkeypatch.setattr(FakeLLM, "instances", [])
    monkeypatch.setattr(FakeLLM, "replies", list(replies))


@contextmanager
def stdin_holding(data: bytes | None) -> Iterator[None]:
    """Descriptor 0 is a pipe with that in it, then its end; for None one that stays open and silent."""
    before = os.dup(0)
    reading, writing = os.pipe()
    os.dup2(reading, 0)
    os.close(reading)
    try:
        if data is not None:
            os.write(writing, data)  # at most a pipe's 64 KiB
            os.close(writing)
        yield
    finally:
        os.dup2(before, 0)
        os.close(before)
        if data is None:
            os.close(writing)
