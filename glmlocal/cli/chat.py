"""``glmlocal chat MODEL``: the terminal app on a terminal, one answer with ``-p`` or a pipe, lines with ``--plain``.

The app is a program of its own: it starts a server of its own or talks to the one at ``--url`` (``chat_app``). In the
plain mode stdout holds the answer and nothing else; loading, thinking, notes and the footer go to stderr.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from glmlocal.cli.chat_app import add_server_options, app_fits, run_app
from glmlocal.cli.options import add_engine_options, add_plan_option, planned, tokens
from glmlocal.cli.pull import offer_to_pull
from glmlocal.cli.stdin import SILENCE_S, clean_argument, read_ready_stdin, read_stdin, stdin_is_screen
from glmlocal.cli.terminal import Console
from glmlocal.errors import ConfigError

if TYPE_CHECKING:
    from glmlocal.completion import CompletionDelta
    from glmlocal.llm import LLM

_EPILOG = """\
examples:
  glmlocal chat demo                               the terminal app; F1 lists keys and commands
  glmlocal chat demo --plain                       a conversation line by line
  glmlocal chat --url http://127.0.0.1:8000        the app with a server that runs already, of any make
  glmlocal chat demo -p "What is MoE?"             one answer on stdout
  glmlocal chat demo -p "Summarise:" < notes.txt   the prompt, a blank line, and the file
  git diff | glmlocal chat demo --json             the prompt from a pipe, the answer as JSON

With -p, a pipe that has sent nothing when the model is loaded is left alone, so -p never waits for one;
-p - reads the prompt from stdin for as long as it takes.
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk to a model",
        description="Talk to a model in the terminal app. MODEL is a directory, a .gguf file or demo.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a checkpoint directory, a .gguf file, or demo")
    parser.add_argument("--plain", action="store_true", help="a conversation line by line instead of the app")
    add_server_options(parser)
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="answer TEXT and exit; - reads it from stdin")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--context", type=tokens, metavar="N", help="tokens for prompt and answer together: 32K")
    parser.add_argument("--no-think", action="store_true", help="answer without thinking first")
    parser.add_argument("--raw", action="store_true", help="continue the text as it stands, without the chat template")
    parser.add_argument("--json", action="store_true", help="print one JSON object: text, reasoning, usage, timings")
    add_plan_option(parser)
    add_engine_options(parser)
    sampling = parser.add_argument_group("sampling", "What is not given comes from the model's own generation_config.")
    for option, field, kind, meaning in _SAMPLING:
        names = [option, f"--{field.replace('_', '-')}"] if option == "--temp" else [option]
        sampling.add_argument(*names, dest=field, type=kind, metavar="N", help=meaning)
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before TEXT (repeatable)")


_SAMPLING = (
    ("--max-tokens", "max_tokens", int, "end the answer after N tokens, thinking included"),
    ("--temp", "temperature", float, "0 always takes the likeliest token"),
    ("--top-p", "top_p", float, "sample among the likeliest tokens that hold this probability together"),
    ("--top-k", "top_k", int, "sample among the N likeliest tokens; 0 is all"),
    ("--min-p", "min_p", float, "leave out tokens less likely than N times the likeliest"),
    ("--repetition-penalty", "repetition_penalty", float, "above 1 discourages tokens of the prompt and the answer"),
    ("--presence-penalty", "presence_penalty", float, "above 0 discourages tokens that the answer has"),
    ("--frequency-penalty", "frequency_penalty", float, "above 0 discourages them for each time the answer has them"),
    ("--seed", "seed", int, "the same seed gives the same answer"),
)


def run(args: argparse.Namespace) -> int:
    start_s = time.monotonic()
    sampling = sampling_options(args)
    prompt, system = clean_option(args.prompt, "-p"), clean_option(args.system, "--system")
    if args.raw and system is not None:
        raise ConfigError("--system has no place in a raw completion; leave out --raw or --system")
    interactive = prompt is None and stdin_is_screen()
    if args.url is not None or (interactive and app_fits(args)):
        return run_app(args, sampling, system, interactive=interactive)
    if args.model is None:
        raise ConfigError(
            "the following arguments are required: MODEL, or --url of a server; see `glmlocal chat --help`"
        )
    if args.api_key_file is not None:
        raise ConfigError("--api-key-file goes with --url; leave it out")
    if interactive and args.json:
        raise ConfigError("--json prints one answer: give the prompt with -p TEXT or through a pipe")
    if prompt in (None, "-") and not interactive:
        prompt = read_stdin()
        if not prompt.strip():
            raise ConfigError("there is no prompt: stdin is empty; write -p TEXT, pipe a text in, or run in a terminal")
        joins_stdin = False
    else:
        joins_stdin = not interactive and not stdin_is_screen()

    offer_to_pull(args)
    from glmlocal.kernels import cpu
    from glmlocal.llm import LLM

    console = Console()
    options = planned(args, context=None)
    if not cpu.available:
        console.note(f"running slowly on the plain kernels: {cpu.describe()}")
    with LLM(
        args.model,
        context=args.context,
        max_batch=1,
        progress=console.err_is_screen,
        **options,
    ) as llm:
        llm.tokenizer  # noqa: B018 - a checkpoint without one is refused before anything is said about it
        if llm.note is not None:
            console.note(f"--quant {args.quant}: {llm.note}")
        raw = args.raw or llm.chat_template is None
        if raw and system is not None:
            raise ConfigError(f"{llm.model_name} is a base model: it has no chat template and takes no --system")
        if interactive:
            return _converse(llm, args, sampling, system, raw=raw, console=console)
        assert prompt is not None
        if joins_stdin:
            prompt = _with_stdin(prompt, start_s + SILENCE_S - time.monotonic(), console)
        if not prompt:
            raise ConfigError("the prompt is empty; write a text after -p")
        if raw and not args.raw:
            console.note(
                f"{llm.model_name} is a base model: without a chat template it continues the text as it stands"
            )
        return _answer_once(llm, args, sampling, system, prompt, raw=raw, console=console)


def clean_option(text: str | None, name: str) -> str | None:
    return None if text is None else clean_argument(text, name)


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that were given. Raises RequestError, before a model is loaded, for a value out of range."""
    from glmlocal.engine.request import SamplingParams

    names = [field for _, field, _, _ in _SAMPLING]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.stop is not None:
        given["stop"] = tuple(clean_argument(text, "--stop") for text in args.stop)
    SamplingParams.from_dict(given)
    return given


def _with_stdin(prompt: str, wait_s: float, console: Console) -> str:
    """The prompt, then what a pipe or file holds, if anything comes before the wait is over."""
    piped = read_ready_stdin(wait_s)
    if piped is None:
        console.note("stdin is open but silent: only -p is used (-p - waits for stdin)")
    return "\n\n".join(part for part in (prompt, piped) if part)


def _answer_once(
    llm: LLM,
    args: argparse.Namespace,
    sampling: dict[str, Any],
    system: str | None,
    prompt: str,
    *,
    raw: bool,
    console: Console,
) -> int:
    from glmlocal.cli.chat_render import AnswerView, as_json, ending, footer
    from glmlocal.cli.main import EXIT_INTERRUPTED

    def start() -> Iterator[CompletionDelta]:
        if raw:
            return llm.generate(prompt, stream=True, **sampling)
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        return llm.chat(messages, stream=True, enable_thinking=not args.no_think, **sampling)

    answer = AnswerView(console, quiet=args.json).run(start)
    completion = answer.completion
    if args.json:
        if completion is None:
            return EXIT_INTERRUPTED
        print(as_json(llm.model_name, completion), flush=True)
        return 0
    console.answer("\n")
    console.note(footer(answer, llm.context, llm.offload_stats))
    if completion is None:
        return EXIT_INTERRUPTED
    reason = ending(completion, llm.context)
    if reason is not None:
        console.note(reason)
    return 0


def _converse(
    llm: LLM, args: argparse.Namespace, sampling: dict[str, Any], system: str | None, *, raw: bool, console: Console
) -> int:
    from glmlocal.cli.chat_prompt import line_reader, open_history
    from glmlocal.cli.chat_session import Conversation, Session

    # Leave by unwinding, so that the terminal gets its settings back.
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGHUP, _leave)
    reader = line_reader(sys.stdout if console.out_is_screen else sys.stderr, open_history(_history_path(console)))
    session = Session(
        llm,
        console,
        reader,
        Conversation(system),
        sampling,
        thinking=llm.supports_thinking and not args.no_think,
        raw=raw,
        debug=args.debug,
    )
    return session.run()


def _leave(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)


def _history_path(console: Console) -> Path | None:
    """Where typed lines are remembered; None, for this chat alone, where there is no place for them."""
    from glmlocal.paths import cache_home

    try:
        return cache_home() / "chat_history"
    except ConfigError as error:
        console.note(f"what you type is not remembered: {error}")
        return None
