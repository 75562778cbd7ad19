"""``glmlocal <command>``: finds the command, runs it, and turns every failure into one line and an exit code.

Exit codes: 0 done, 1 a bug of ours or a measurement that cannot be, 2 bad input or a machine that cannot do it, 130
interrupted, 141 the reader of our output went away. A command is a module of this package with
``add_parser(subparsers)`` and ``run(args) -> int``; it imports nothing heavy before ``run``.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from glmlocal import __version__
from glmlocal.cli.terminal import one_line, safe_text, use_utf8
from glmlocal.errors import ConfigError, GlmlocalError

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

COMMANDS = ("plan", "pull", "ls", "show", "rm", "verify", "pack", "chat", "serve", "eval", "bench", "doctor")
EXIT_BUG, EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 2, 130, 141
_DEBUG_HELP = "show the traceback of an error"


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake on the command line is a ConfigError: one line, with a near miss where there is one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        if "expected one argument" in message:
            message += " (write a value that starts with - as --option=-value)"
        raise ConfigError(f"{message}; see `{self.prog} --help`")

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        (file or sys.stdout).write(self.format_help())  # argparse's own would swallow a full disk

    def suggest_option(self, unknown: str) -> str:
        """``: did you mean --temp?`` or nothing."""
        return _did_you_mean(unknown.split("=")[0], list(self._option_string_actions))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code, and never lets an exception through."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    use_utf8()
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except SystemExit as exit_:  # argparse, after --help
        code = exit_.code if isinstance(exit_.code, int) else 0
    except BaseException as error:
        code = _report(error, debug="--debug" in arguments)
    return _close_output(code)


def _run(arguments: list[str]) -> int:
    # The top level has no option with a value, so the first word is the command.
    name = next((word for word in arguments if not word.startswith("-")), None)
    if name is not None and name not in COMMANDS:
        raise ConfigError(
            f"there is no command {name!r}{_did_you_mean(name, list(COMMANDS))}; commands are {', '.join(COMMANDS)}"
        )
    arguments = _with_negative_values(arguments)
    asks_for_all = bool({"--help", "-h"} & set(arguments[: arguments.index(name)])) if name else True
    parser, commands = _build_parser(COMMANDS if name is None or asks_for_all else (name,))
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        chosen = commands.get(name or "", parser)
        raise ConfigError(
            f"{chosen.prog} does not know {' '.join(unknown)!r}{chosen.suggest_option(unknown[0])}; "
            f"see `{chosen.prog} --help`"
        )
    if args.version:
        print(f"glmlocal {__version__}")
        return 0
    if args.run is None:
        parser.print_help(sys.stderr)
        return EXIT_BAD_INPUT
    code = args.run(args)
    assert isinstance(code, int)
    return code


def _with_negative_values(arguments: Sequence[str]) -> list[str]:
    """``--ram -4GiB`` → ``--ram=-4GiB``, which argparse would take for an option: whoever reads the value says more."""
    joined: list[str] = []
    for word in arguments:
        option = joined[-1] if joined else ""
        if re.match(r"-[0-9]", word) and option.startswith("--") and option != "--" and "=" not in option:
            joined[-1] = f"{option}={word}"
        else:
            joined.append(word)
    return joined


def _build_parser(names: Sequence[str] = COMMANDS) -> tuple[Parser, dict[str, Parser]]:
    """The parser and those of its commands, by name; the modules of no others are imported."""
    parser = Parser(prog="glmlocal", description="Run GLM-4.5-class mixture-of-experts models on your own machine.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("--debug", action="store_true", help=_DEBUG_HELP)
    parser.set_defaults(run=None)
    subparsers = parser.add_subparsers(metavar="COMMAND", title="commands", parser_class=Parser)
    for name in names:
        module = importlib.import_module(f"glmlocal.cli.{name}")
        module.add_parser(subparsers)
        command: Parser = subparsers.choices[name]
        command.set_defaults(run=module.run)
        # SUPPRESS: without it the command's default would undo a --debug given before the command.
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=_DEBUG_HELP)
    return parser, dict(subparsers.choices)


def _did_you_mean(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f": did you mean {near[0]}?" if near else ""


def _report(error: BaseException, *, debug: bool) -> int:
    """Say what went wrong on stderr; returns the exit code."""
    if isinstance(error, BrokenPipeError):
        return EXIT_BROKEN_PIPE
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    message, code = describe(error)
    hint = "" if debug or isinstance(error, GlmlocalError) else " (run again with --debug for the traceback)"
    try:
        if debug:
            print(safe_text("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        print(f"glmlocal: error: {one_line(message)}{hint}", file=sys.stderr, flush=True)
    except OSError:  # nobody reads stderr; the exit code still tells
        pass
    return code


def describe(error: BaseException) -> tuple[str, int]:
    """An exception in one line for a person, and the exit code it stands for."""
    match error:
        case GlmlocalError():
            return str(error), EXIT_BAD_INPUT
        case OSError() if error.errno == errno.ENOSPC:
            where = f" while writing {error.filename}" if error.filename else ""
            return f"the disk is full{where}; free some space", EXIT_BAD_INPUT
        case OSError():
            what = error.strerror or str(error) or type(error).__name__
            return f"{what}: {error.filename}" if error.filename else what, EXIT_BAD_INPUT
        case MemoryError():
            return "out of memory; a smaller --context or model would need less", EXIT_BAD_INPUT
        case UnicodeDecodeError():
            return f"a text is not {error.encoding}: {error.reason} at byte {error.start}", EXIT_BAD_INPUT
        case _:
            return f"internal error: {type(error).__name__}: {error}", EXIT_BUG


def _close_output(code: int) -> int:
    """Flush both streams; one that cannot be flushed goes to devnull, so that the interpreter's own flush is mute."""
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except OSError as error:
            if code == 0:
                code = EXIT_BROKEN_PIPE if isinstance(error, BrokenPipeError) else _report(error, debug=False)
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return code
