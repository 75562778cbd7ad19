"""``glmlocal eval MODEL``: perplexity of a text, and how far the predictions are from another model's."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmlocal.cli.options import add_engine_options, at_least, engine_options
from glmlocal.cli.pull import offer_to_pull
from glmlocal.cli.stdin import decode_text
from glmlocal.cli.terminal import Console, bar, safe_text
from glmlocal.errors import ConfigError
from glmlocal.units import MIB, format_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from glmlocal.evaluate import Divergence, Perplexity, Window
    from glmlocal.formats.logits_file import LogitsWriter, SavedLogits
    from glmlocal.llm import LLM

    LogProbs = Callable[[int, int], NDArray[np.float64]]  # targets first … last - 1 → their rows [last - first, vocab]

DEFAULT_CONTEXT = 512
MAX_TEXT_BYTES = 64 * MIB
BUNDLED = "bundled text"
_EPILOG = """\
How tokens are scored: windows of --context tokens advance by --stride. The first window scores all its tokens but the
first; each later one scores only the tokens that are new in it, the rest is what they are predicted from. Every token
but the first is scored once. ± is one standard error, with tokens taken as independent.

KL divergence is that of the reference's distribution from MODEL's, per scored token, in nats; delta p is the
probability that MODEL gives the right token minus that of the reference. --against holds both models in memory at
once; where they do not fit together, run the reference first with --save-logits (fp16 log-probabilities: two bytes per
token and vocabulary entry), then MODEL with --against-logits, which takes text, context and stride from the file.
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "eval",
        help="measure perplexity, and KL divergence from another checkpoint",
        description="Measure how well MODEL predicts a text, and how far its predictions are from another model's.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a checkpoint directory, a .gguf file, or demo")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text (default: a short one that is bundled)")
    parser.add_argument(
        "--context", type=at_least(2), metavar="N", help=f"tokens per window (default: {DEFAULT_CONTEXT})"
    )
    parser.add_argument("--stride", type=at_least(1), metavar="N", help="tokens between windows (default: half of N)")
    reference = parser.add_mutually_exclusive_group()
    reference.add_argument("--against", metavar="MODEL2", help="compare with this model as it is stored, run exactly")
    reference.add_argument("--against-logits", type=Path, metavar="FILE", help="compare with saved predictions")
    parser.add_argument("--save-logits", type=Path, metavar="FILE", help="save MODEL's predictions")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_engine_options(parser)


@dataclass(frozen=True, slots=True)
class Task:
    """What is scored."""

    source: str  # where the text came from
    token_ids: list[int]
    context: int
    stride: int


@dataclass(frozen=True, slots=True)
class Reference:
    """Whose predictions MODEL's are compared with."""

    name: str
    log_probs: Callable[[Window], LogProbs]


@dataclass(frozen=True, slots=True)
class Report:
    """What came out."""

    model: str
    task: Task
    perplexity: Perplexity
    reference: str | None = None
    reference_perplexity: Perplexity | None = None
    divergence: Divergence | None = None


def run(args: argparse.Namespace) -> int:
    console = Console()
    text = None if args.against_logits else _read_text(args.text)
    if args.against_logits and args.text:
        raise ConfigError("--against-logits carries its own text; leave out --text")
    if args.save_logits is not None and args.save_logits.exists():  # before minutes of loading, not after
        raise ConfigError(f"{str(args.save_logits)!r} exists; choose another name for --save-logits or remove it")
    saved = _open_saved(args)
    context = saved.header.context if saved else args.context or DEFAULT_CONTEXT
    stride = saved.header.stride if saved else args.stride or context // 2
    if not 1 <= stride < context:
        raise ConfigError(
            f"--stride {stride} leaves no overlap in windows of {context} tokens; wanted 1 … {context - 1}"
        )

    offer_to_pull(args)
    from glmlocal.llm import LLM

    def load(model: str, options: dict[str, Any]) -> LLM:
        return LLM(model, context=context, max_batch=1, progress=console.err_is_screen, **options)

    exact = {"threads": args.threads, "quant": "keep", "activations": "fp32", "kv_dtype": "fp32"}
    with ExitStack() as stack:
        llm = stack.enter_context(load(args.model, engine_options(args)))
        if llm.note is not None:
            console.note(f"--quant {args.quant}: {llm.note}")
        if saved is not None:
            _check_saved(llm, saved, args.against_logits)
            task = Task(str(args.against_logits), saved.token_ids.tolist(), context, stride)
        else:
            assert text is not None
            task = Task(str(args.text or BUNDLED), llm.tokenizer.encode(text, add_special_tokens=True), context, stride)
        reference = None if saved is None else _saved_reference(saved)
        if args.against is not None and text is not None:
            other = stack.enter_context(load(args.against, exact))
            _check_same_tokens(llm, other, task.token_ids, other.tokenizer.encode(text, add_special_tokens=True))
            reference = Reference(other.model_name, lambda window: _model_log_probs(other, task.token_ids, window))
        report = _evaluate(llm, task, reference, args.save_logits, console)
    print(_as_json(report) if args.json else _as_text(report))
    return 0


def _read_text(path: Path | None) -> str:
    """The text to score. Raises ConfigError or OSError."""
    if path is None:
        from importlib.resources import files

        return files("glmlocal").joinpath("data", "eval.txt").read_text("utf-8")
    with path.open("rb") as file:
        data = file.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise ConfigError(f"{str(path)!r} is larger than {format_bytes(MAX_TEXT_BYTES)}; score a part of it")
    return decode_text(data, repr(str(path)))


def _open_saved(args: argparse.Namespace) -> SavedLogits | None:
    """The file of --against-logits, checked against the other options."""
    if args.against_logits is None:
        return None
    from glmlocal.formats.logits_file import open_logits

    saved = open_logits(args.against_logits)
    for option, wanted, found in (
        ("--context", args.context, saved.header.context),
        ("--stride", args.stride, saved.header.stride),
    ):
        if wanted not in (None, found):
            raise ConfigError(
                f"{option} is {wanted}, but {str(args.against_logits)!r} was saved with {found}; leave it out"
            )
    return saved


def _vocab_size(llm: LLM) -> int:
    return int(llm.config.vocab_size)


def _check_saved(llm: LLM, saved: SavedLogits, path: Path) -> None:
    if saved.header.vocab_size != _vocab_size(llm) or saved.header.vocabulary != vocabulary_digest(llm):
        raise ConfigError(
            f"{llm.model_name} and {str(path)!r} (from {saved.header.model}) have different vocabularies of "
            f"{_vocab_size(llm)} and {saved.header.vocab_size} tokens; only models with the same tokens can be compared"
        )


def _check_same_tokens(llm: LLM, other: LLM, token_ids: list[int], other_ids: list[int]) -> None:
    same = vocabulary_digest(llm) == vocabulary_digest(other) and _vocab_size(llm) == _vocab_size(other)
    if not same:
        raise ConfigError(
            f"{llm.model_name} and {other.model_name} have different vocabularies of {_vocab_size(llm)} and "
            f"{_vocab_size(other)} tokens; only models with the same tokens can be compared"
        )
    if token_ids != other_ids:
        raise ConfigError(
            f"{llm.model_name} and {other.model_name} split the text differently, into {len(token_ids)} and "
            f"{len(other_ids)} tokens; their predictions cannot be compared"
        )


def vocabulary_digest(llm: LLM) -> str:
    """SHA-256 over the tokens' bytes in order of their ids, each after its length."""
    digest = hashlib.sha256()
    for token_id in range(llm.tokenizer.vocab_size):
        token = llm.tokenizer.token_bytes(token_id)
        digest.update(len(token).to_bytes(4, "little") + token)
    return digest.hexdigest()


def _evaluate(llm: LLM, task: Task, reference: Reference | None, save_to: Path | None, console: Console) -> Report:
    """Score all windows; logits become float64 a few rows at a time."""
    import numpy as np

    from glmlocal import evaluate

    token_ids = np.asarray(task.token_ids, np.int64)
    windows = list(evaluate.windows(len(token_ids), task.context, task.stride))
    nll: list[NDArray[np.float64]] = []
    reference_nll: list[NDArray[np.float64]] = []
    comparisons: list[evaluate.RowComparison] = []
    with ExitStack() as stack:
        writer = None if save_to is None else stack.enter_context(_writer(llm, task, save_to, console))
        for number, window in enumerate(windows):
            console.status(_progress(number, windows, nll))
            log_probs = _model_log_probs(llm, task.token_ids, window)
            reference_log_probs = None if reference is None else reference.log_probs(window)
            for first, last in _chunks(window, evaluate.ROWS_AT_ONCE):
                targets, rows = token_ids[first:last], log_probs(first, last)
                nll.append(evaluate.target_nll(rows, targets))
                if writer is not None:
                    writer.write(rows)
                if reference_log_probs is not None:
                    reference_rows = reference_log_probs(first, last)
                    reference_nll.append(evaluate.target_nll(reference_rows, targets))
                    comparisons.append(evaluate.compare_rows(reference_rows, rows, targets))
    console.clear_status()
    measured = evaluate.perplexity(np.concatenate(nll))
    if reference is None:
        return Report(llm.model_name, task, measured)
    of_reference = evaluate.perplexity(np.concatenate(reference_nll))
    return Report(llm.model_name, task, measured, reference.name, of_reference, evaluate.divergence(comparisons))


def _saved_reference(saved: SavedLogits) -> Reference:
    # Row i of the file predicts token i + 1.
    return Reference(saved.header.model, lambda window: lambda first, last: saved.rows(first - 1, last - 1))


def _model_log_probs(llm: LLM, token_ids: list[int], window: Window) -> LogProbs:
    """Run one window; its log-probabilities are then made rows at a time."""
    from glmlocal.evaluate import log_softmax

    # The last token is only a target: nothing in the window follows it.
    logits = llm.logits(token_ids[window.begin : window.end - 1]).numpy()
    return lambda first, last: log_softmax(logits[first - 1 - window.begin : last - 1 - window.begin])


def _chunks(window: Window, size: int) -> Iterator[tuple[int, int]]:
    for first in range(window.first_target, window.end, size):
        yield first, min(first + size, window.end)


def _writer(llm: LLM, task: Task, path: Path, console: Console) -> LogitsWriter:
    import numpy as np

    from glmlocal.formats.logits_file import LogitsHeader, LogitsWriter

    header = LogitsHeader(
        model=llm.model_name,
        num_tokens=len(task.token_ids),
        vocab_size=_vocab_size(llm),
        context=task.context,
        stride=task.stride,
        vocabulary=vocabulary_digest(llm),
    )
    console.note(f"writing {format_bytes(header.data_bytes)} of fp16 log-probabilities to {path}")
    return LogitsWriter(path, header, np.asarray(task.token_ids, np.int32))


def _progress(number: int, windows: list[Window], nll: list[NDArray[np.float64]]) -> str:
    import math

    scored = sum(len(part) for part in nll)
    so_far = f" · perplexity so far {math.exp(sum(map(float, (p.sum() for p in nll))) / scored):.3f}" if scored else ""
    return f"{bar(number / len(windows))} window {number + 1} of {len(windows)}{so_far}"


def _as_json(report: Report) -> str:
    from glmlocal.cli.chat_render import dump_json

    fields: dict[str, Any] = {
        "model": report.model,
        "text": report.task.source,
        "tokens": len(report.task.token_ids),
        "context": report.task.context,
        "stride": report.task.stride,
        **_finite(asdict(report.perplexity)),
    }
    if report.divergence is not None and report.reference_perplexity is not None:
        fields["against"] = {
            "model": report.reference,
            **_finite(asdict(report.reference_perplexity)),
            **_finite(asdict(report.divergence)),
        }
    return dump_json(fields)


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    """JSON has no infinity."""
    return {name: value if abs(value) != float("inf") else None for name, value in values.items()}


def _as_text(report: Report) -> str:
    task, measured = report.task, report.perplexity
    lines = [
        f"{report.model} on {task.source}: {measured.num_scored:,} of {len(task.token_ids):,} tokens scored, "
        f"windows of {task.context} advancing by {task.stride}",
        _row("perplexity", f"{measured.perplexity:.4f} ± {measured.perplexity_stderr:.4f}"),
        _row("mean -log p", f"{measured.nll:.5f} ± {measured.nll_stderr:.5f} nats per token"),
    ]
    reference, distance = report.reference_perplexity, report.divergence
    if reference is not None and distance is not None:
        lines += [
            f"against {report.reference}",
            _row("its perplexity", f"{reference.perplexity:.4f} ± {reference.perplexity_stderr:.4f}"),
            _row("KL divergence", f"{distance.kl_mean:.3e} ± {distance.kl_stderr:.1e} nats, mean"),
            _row("", f"{distance.kl_median:.3e} median, {distance.kl_p99:.3e} 99 %, {distance.kl_max:.3e} largest"),
            _row("same top token", f"{distance.top1_agreement:.3%} ± {distance.top1_agreement_stderr:.3%}"),
            _row("delta p", f"{distance.delta_p_rms:.3%} RMS, {distance.delta_p_mean:+.3%} mean"),
        ]
    return safe_text("\n".join(lines))


def _row(name: str, value: str) -> str:
    return f"  {name:16}{value}"
