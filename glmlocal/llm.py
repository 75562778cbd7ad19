"""LLM: the Python API. Text in, text out, over one engine."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, overload

from torch import Tensor

from glmlocal import kernels
from glmlocal.completion import Completion, CompletionBuilder, CompletionDelta
from glmlocal.engine.engine import Engine
from glmlocal.engine.grammar import Constraint, GrammarCompiler
from glmlocal.engine.identity import model_identity
from glmlocal.engine.loader import load_engine
from glmlocal.engine.planning import plan_here
from glmlocal.engine.request import FinishReason, Request, RequestOutput, SamplingParams
from glmlocal.errors import CheckpointError, EngineError, RequestError
from glmlocal.formats.index import open_checkpoint
from glmlocal.models.config import ModelConfig
from glmlocal.models.weights import check_quant, quantized_already
from glmlocal.offload.stats import OffloadStats
from glmlocal.planner.plan import Plan, Wants
from glmlocal.progress import byte_bar
from glmlocal.resolve import resolve
from glmlocal.text.model_text import load_model_text
from glmlocal.text.stream_parser import ReasoningParser, starts_in_reasoning
from glmlocal.text.tokenizer import Tokenizer

OnBytes = Callable[[int, int], None]


class LLM:
    """A loaded model. Safe to use from several threads; their requests share the engine's batches.

    ``model`` is a directory, a ``.gguf`` file or ``demo``. ``context`` is in tokens, prompt and answer together
    (None: the model's limit or what memory allows); ``kv_dtype`` is what the KV cache stores: fp32, bf16, fp8 (e4m3),
    int8 (with a scale per token and head), or auto: fp32 for small and for fp32 checkpoints, else bf16; ``threads``
    limits the CPU threads; ``max_batch`` is how many requests run at once. ``quant`` "int8" or "int4" quantizes linear
    weights that are not quantized yet while they are loaded; "keep" leaves them as stored; "auto" takes what the
    planner would. ``activations`` is what quantized weights are multiplied with: "int8", rounded in groups of 32, which
    is several times faster, "fp32", exact, or auto: fp32 for small checkpoints, else int8 (``models/precision.py``).
    ``ram`` ("16GiB") limits the memory that is planned with: routed experts of a packed model (``glmlocal pack``) that
    do not fit are read from the disk when they are needed, unless ``offload`` is False. ``gpus`` ("1xRTX4090", "none")
    hold experts of a packed model, at most ``vram_bytes`` on each, and of its layers' experts all but
    ``cpu_offload_bytes``; ``link`` is what is between them and the host.
    ``nvme_dir`` is where the model's pack is, if not beside it. ``plan``, from
    ``glmlocal plan --save``, is executed as it stands; the other wishes have then been said already and must not be
    said again. ``on_bytes(done, total)`` is told how loading comes along, from several threads.
    Raises CheckpointError, ConfigError, DownloadError or PlanError.
    """

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
        plan: Plan | None = None,
        progress: bool = False,
        on_bytes: OnBytes | None = None,
    ) -> None:
        start_s = time.perf_counter()
        if quant != "auto":
            check_quant(quant)
        kernels.set_num_threads(threads if plan is None else plan.resolved.threads)
        self.model_name = str(model)
        self._checkpoint = checkpoint = open_checkpoint(resolve(model, progress=progress), nvme_dir)
        self.config = ModelConfig.from_hf(checkpoint.config)
        #: Tokenizer, template, sampling defaults and stop tokens of the checkpoint.
        self.text = load_model_text(
            checkpoint.directory, checkpoint.config, checkpoint.gguf_metadata, self.config.vocab_size
        )
        self.chat_template = self.text.chat_template
        if plan is None:
            wants = Wants(
                context=context,
                batch=max_batch,
                kv_dtype=kv_dtype,
                activations=activations,
                vram_bytes=vram_bytes,
                cpu_offload_bytes=cpu_offload_bytes,
                offload=offload,
                threads=threads,
            )
            plan = plan_here(checkpoint, quant, wants, ram, gpus, link)
        #: What is executed: where every byte is, and how fast it should be.
        self.plan = plan
        num_bytes = checkpoint.tensors.nbytes
        with byte_bar("loading", num_bytes, show=progress) as bar:
            report = bar if on_bytes is None else partial(_report, on_bytes, num_bytes)
            self._engine = load_engine(checkpoint, plan, report)
        if self.has_tokenizer:
            self._engine.grammars = GrammarCompiler(self.tokenizer, self.config.vocab_size, self.text.eos_token_ids)
        #: What of the caller's wishes did not apply, in a line for people; None when all did.
        self.note = None if plan.resolved.quant == "keep" else quantized_already(checkpoint.tensors)
        self._lock = threading.Lock()  # guards the engine and the queues
        self._queues: dict[str, deque[RequestOutput]] = {}
        self._num_requests = 0
        self.load_s = time.perf_counter() - start_s

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises CheckpointError where the checkpoint has none: then only token ids go in and out."""
        if self.text.tokenizer is None:
            raise CheckpointError(
                f"{self.model_name} has no tokenizer (tokenizer.json, or GGUF metadata); "
                "copy the one it was released with beside it, or pass token ids"
            )
        return self.text.tokenizer

    @property
    def has_tokenizer(self) -> bool:
        return self.text.tokenizer is not None

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self._engine.scheduler.context

    @property
    def engine(self) -> Engine:
        """For measurements that look inside. It is not locked: leave it alone while requests run."""
        return self._engine

    @property
    def identity(self) -> str:
        """Names the model and how it is computed with, for what outlives the process (KV snapshots)."""
        run = self.plan.resolved
        return model_identity(self._checkpoint, run.quant, run.activations)

    @property
    def offload_stats(self) -> OffloadStats | None:
        """Hit rates, bytes read, time spent waiting for the disk since the start; None where all experts are in RAM."""
        return self._engine.offloads.stats()

    @property
    def supports_thinking(self) -> bool:
        """Does the chat template know reasoning (``<think>``)?"""
        return self.chat_template is not None and self.chat_template.supports_thinking

    def default_sampling(self, **overrides: Any) -> SamplingParams:
        """The model's generation_config under the caller's values; None means "not given"."""
        given = {name: value for name, value in overrides.items() if value is not None}
        return SamplingParams.from_dict({**self.text.defaults.sampling(), **given})

    @overload
    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, stream: Literal[False] = False, **options: Any
    ) -> Completion: ...
    @overload
    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, stream: Literal[True], **options: Any
    ) -> Iterator[CompletionDelta]: ...
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
        """Answer a conversation (OpenAI-style messages). ``sampling`` are fields of SamplingParams.

        Raises RequestError: malformed messages, a prompt longer than the context, a bad sampling value, or a base
        model, which has no chat template (use ``generate``).
        """
        if self.chat_template is None:
            raise RequestError(
                f"{self.model_name} is a base model: it has no chat template; use generate() or chat --raw"
            )
        switches = {"enable_thinking": enable_thinking, **(chat_template_kwargs or {})}
        prompt = self.chat_template.render(messages, tools=tools, add_generation_prompt=True, **switches)
        parser = None
        if self.chat_template.supports_thinking:
            thinking = bool(switches["enable_thinking"])
            parser = ReasoningParser(starts_in_reasoning(prompt, thinking_enabled=thinking))
        token_ids = self.tokenizer.encode(prompt)
        return self._complete(token_ids, parser, stream, sampling)

    @overload
    def generate(
        self, prompt: str | Sequence[int] | Tensor, *, stream: Literal[False] = False, **sampling: Any
    ) -> Completion: ...
    @overload
    def generate(
        self, prompt: str | Sequence[int] | Tensor, *, stream: Literal[True], **sampling: Any
    ) -> Iterator[CompletionDelta]: ...
    def generate(
        self, prompt: str | Sequence[int] | Tensor, *, stream: bool = False, **sampling: Any
    ) -> Completion | Iterator[CompletionDelta]:
        """Continue raw text, or token ids, without a chat template."""
        token_ids = self.tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else _ids(prompt)
        return self._complete(token_ids, None, stream, sampling)

    def logits(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        """Logits after every token of a text: fp32 [tokens, vocab]. Raises RequestError."""
        with self._lock:
            return self._engine.logits(_ids(token_ids))

    def close(self) -> None:
        """Abort what is running and let go of the files."""
        with self._lock:
            for request_id in list(self._queues):
                self._abort(request_id)
            self._engine.offloads.close()
        self._checkpoint.tensors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _complete(
        self, token_ids: list[int], parser: ReasoningParser | None, stream: bool, sampling: Mapping[str, Any]
    ) -> Completion | Iterator[CompletionDelta]:
        params = self.default_sampling(**sampling)
        if params.max_tokens == 0:
            raise RequestError("max_tokens is 0, wanted at least 1; logits() scores a text without generating")
        with self._lock:
            request_id = f"request-{self._num_requests}"
            self._num_requests += 1
            request = Request(request_id, tuple(token_ids), params, self.text.eos_token_ids)
            self._engine.check(request)  # a bad request is refused by the call, not by the first next()
        constraint = self._engine.constraint_for(request)
        deltas = self._stream(request, constraint, parser)
        if stream:
            return deltas
        *_, last = deltas
        assert last.completion is not None
        return last.completion

    def _stream(
        self, request: Request, constraint: Constraint | None, parser: ReasoningParser | None
    ) -> Iterator[CompletionDelta]:
        """Runs the request from the first ``next()`` until it ends or the iterator is closed."""
        request_id = request.request_id
        builder = CompletionBuilder(self.text.tokenizer, request.params, parser, self.load_s)
        with self._lock:
            self._engine.add(request, constraint)
            self._queues[request_id] = deque()
        try:
            while True:
                delta = builder.push(self._next_output(request_id))
                yield delta
                if delta.completion is not None:
                    return
        finally:
            with self._lock:
                self._abort(request_id)

    def _next_output(self, request_id: str) -> RequestOutput:
        """The request's next output, stepping the engine for everybody until there is one."""
        while True:
            with self._lock:
                queue = self._queues.get(request_id)
                if queue is None:
                    raise RequestError("the model was closed while the answer was being written")
                if queue:
                    output = queue.popleft()
                    if output.finish_reason is FinishReason.ERROR:
                        raise EngineError(output.error or "computing the answer failed")
                    return output
                for output in self._engine.step():
                    if output.request_id in self._queues:
                        self._queues[output.request_id].append(output)

    def _abort(self, request_id: str) -> None:
        self._engine.abort(request_id)
        self._queues.pop(request_id, None)


def _report(on_bytes: OnBytes, total_bytes: int, done_bytes: int) -> None:
    on_bytes(done_bytes, total_bytes)


def _ids(token_ids: Sequence[int] | Tensor) -> list[int]:
    """Token ids of a list, a numpy array or a tensor [tokens]; what is no id is found by the engine's own check."""
    return list(token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids)
