from __future__ import annotations

import argparse
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from glmlocal import __version__
from glmlocal.cli import main as cli
from glmlocal.errors import CheckpointError, ConfigError, DownloadError, KernelUnavailable, PlanError, RequestError

KINDS = (ConfigError, CheckpointError, DownloadError, PlanError, KernelUnavailable, RequestError)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line with one more command, ``boom``, which raises or returns what it is given."""

    def call(
        *arguments: str, outcome: BaseException | int = 0, seen: list[argparse.Namespace] | None = None
    ) -> tuple[int, str, str]:
        module = ModuleType("glmlocal.cli.boom")

        def add_parser(subparsers: Any) -> None:
            subparsers.add_parser("boom", help="go wrong").add_argument("--level", type=int)

        def command(args: argparse.Namespace) -> int:
            if seen is not None:
                seen.append(args)
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        module.add_parser, module.run = add_parser, command  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "glmlocal.cli.boom", module)
        monkeypatch.setattr(cli, "COMMANDS", ("chat", "eval", "boom"))
        code = cli.main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        *((kind("what, found, next"), 2, "what, found, next") for kind in KINDS),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 2, "the disk is full while writing /x"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "Permission denied: /x"),
        (OSError("odd"), 2, "odd"),
        (MemoryError(), 2, "out of memory"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "not utf-8"),
        (RuntimeError("oops"), 1, "internal error: RuntimeError: oops"),
        (RecursionError("deep"), 1, "internal error: RecursionError: deep"),
    ],
)
def test_every_failure_is_one_line_and_an_exit_code(run: Run, error: Exception, code: int, message: str) -> None:
    found, out, err = run("boom", outcome=error)
    assert found == code
    assert out == ""
    assert err.startswith("glmlocal: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("error", [RuntimeError("oops"), OSError("odd"), MemoryError()])
def test_unexpected_failures_point_to_debug_and_expected_ones_do_not(run: Run, error: Exception) -> None:
    assert "run again with --debug" in run("boom", outcome=error)[2]
    assert "--debug" not in run("boom", outcome=ConfigError("no"))[2]


@pytest.mark.parametrize("arguments", [("--debug", "boom"), ("boom", "--debug"), ("boom", "--debug", "--level", "3")])
def test_debug_shows_the_traceback_before_or_after_the_command(run: Run, arguments: tuple[str, ...]) -> None:
    code, _, err = run(*arguments, outcome=ConfigError("no \x1b[2J"))
    assert code == 2
    assert "Traceback" in err
    assert err.endswith("glmlocal: error: no ␛[2J\n")
    assert "\x1b" not in err


@pytest.mark.parametrize("arguments", [("--debug", "boom"), ("boom", "--debug")])
def test_a_command_knows_that_it_is_debugged(run: Run, arguments: tuple[str, ...]) -> None:
    seen: list[argparse.Namespace] = []
    run(*arguments, seen=seen)
    run("boom", seen=seen)
    assert [args.debug for args in seen] == [True, False]


def test_escape_sequences_and_newlines_of_a_message_never_reach_the_terminal(run: Run) -> None:
    error = CheckpointError("tensor '\x1b]0;owned\x07\x9b31m\nmodel.\r norm'" + "x" * 5000)
    _, _, err = run("boom", outcome=error)
    assert err.startswith("glmlocal: error: tensor '␛]0;owned␇�31m model. norm'xxx")
    assert len(err) < 1100


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (BrokenPipeError(), 141)])
def test_interrupts_and_broken_pipes_are_quiet(run: Run, error: BaseException, code: int) -> None:
    assert run("boom", outcome=error) == (code, "", "")


def test_exit_code_of_a_command_is_passed_on(run: Run) -> None:
    assert run("boom", outcome=7) == (7, "", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bom",), "there is no command 'bom': did you mean boom?; commands are chat, eval, boom"),
        (("--debug", "zzz"), "there is no command 'zzz'; commands are"),
        (("boom", "--levle", "3"), "glmlocal boom does not know '--levle 3': did you mean --level?"),
        (("boom", "--lev", "3"), "did you mean --level?"),
        (("boom", "--level", "x"), "argument --level: invalid int value: 'x'"),
        (("boom", "--level"), "argument --level: expected one argument"),
        (("chat",), "the following arguments are required: MODEL"),
        (("--verion",), "did you mean --version?"),
    ],
)
def test_mistakes_on_the_command_line(run: Run, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert ("Traceback" in err) == ("--debug" in arguments)
    assert err.splitlines()[-1].startswith("glmlocal: error: ")


def test_without_a_command_the_help_is_shown(run: Run) -> None:
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err.startswith("usage: glmlocal")


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"glmlocal {__version__}\n", "")


def test_help_lists_the_commands(run: Run) -> None:
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    for word in ("chat", "eval", "boom", "--debug"):
        assert word in out


def _cpu_s(arguments: list[str]) -> float:
    before = os.times()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    script = """if True:
        import sys
        from glmlocal.cli.main import main
        assert main(["--help"]) == 0 and main(["chat", "--help"]) == 0
        heavy = {"torch", "numpy", "rich", "prompt_toolkit", "tokenizers", "jinja2"} & set(sys.modules)
        assert not heavy, heavy
    """
    _cpu_s(["-c", script])
    bare = ["-c", "import argparse, difflib, shutil, subprocess"]  # in the same minute: neighbours slow it down as well
    rounds = [(_cpu_s(["-m", "glmlocal", "--help"]), _cpu_s(bare)) for _ in range(5)]
    assert min(ours for ours, _ in rounds) < 8 * min(theirs for _, theirs in rounds)


def test_a_command_imports_no_other_command() -> None:
    script = """if True:
        import sys
        from glmlocal.cli.main import COMMANDS, main
        assert main(["plan", "--help"]) == 0
        assert [name for name in COMMANDS if f"glmlocal.cli.{name}" in sys.modules] == ["plan"]
    """
    _cpu_s(["-c", script])


def _process(code: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    script = f"import sys; sys.argv = ['glmlocal', 'chat', '--help']; {code}"
    environment = {**os.environ, **options.pop("env", {})}
    environment.pop("PYTHONUNBUFFERED", None)  # people do not have it, and it would hide what the last flush does
    command = [sys.executable, "-c", script]
    return subprocess.run(command, stderr=subprocess.PIPE, check=False, env=environment, **options)


MAIN = "from glmlocal.cli.main import main; sys.exit(main())"


def test_full_disk_on_stdout_is_an_error_without_a_traceback() -> None:
    with open("/dev/full", "wb") as full:
        done = _process(MAIN, stdout=full)
    assert done.returncode == 2
    assert done.stderr.startswith(b"glmlocal: error: the disk is full")
    assert done.stderr.count(b"\n") == 1


def test_reader_that_went_away_is_quiet() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = _process(MAIN, stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_closed_stdout_is_survived() -> None:
    done = _process(MAIN, preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("locale", ["C", "POSIX", "en_US.ISO-8859-1"])
def test_output_is_utf8_whatever_the_locale(locale: str) -> None:
    code = "from glmlocal.cli.terminal import use_utf8; use_utf8(); print('\\u4e2d \\ud800', flush=True)"
    environment = {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = _process(code, stdout=subprocess.PIPE, env=environment)
    assert (done.returncode, done.stdout) == (0, "中 ?\n".encode())
