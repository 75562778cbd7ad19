from __future__ import annotations

import inspect
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fakes import FakeLLM, Reply, install, stdin_holding
from glmlocal.cli import chat, options, stdin
from glmlocal.cli.main import main
from glmlocal.errors import ConfigError, RequestError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str, stdin: bytes | None = b"", replies: tuple[Reply, ...] = ()) -> tuple[int, str, str]:
        install(monkeypatch, *replies)
        with stdin_holding(stdin):
            code = main(["chat", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def last_call() -> dict[str, Any]:
    return FakeLLM.instances[-1].calls[-1]


def test_fake_has_the_shape_of_the_real_thing() -> None:
    from glmlocal.llm import LLM

    for name in ("__init__", "chat", "generate", "logits", "default_sampling", "close"):
        real, fake = inspect.signature(getattr(LLM, name)), inspect.signature(getattr(FakeLLM, name))
        assert list(fake.parameters) == list(real.parameters), name
        assert [p.kind for p in fake.parameters.values()] == [p.kind for p in real.parameters.values()], name


def test_stdout_is_the_answer_and_one_newline_and_nothing_else(run: Run) -> None:
    reply = Reply("  The capital\nis Paris.\x1b[0m ", "Hm.\nFrance.")
    code, out, err = run("thinker", "-p", "q", "--temp", "0", "--max-tokens", "50", replies=(reply,))
    assert (code, out) == (0, "  The capital\nis Paris.\x1b[0m \n")
    assert err == (
        "Hm.\nFrance.\n\n1 prompt + 6 generated tokens (2 thinking) · 50.0 tok/s · first token 0.12 s "
        "· context 7/4,096\n"
    )


def test_quant_reaches_the_model_and_what_it_leaves_is_said(run: Run) -> None:
    code, out, err = run("talker", "-p", "q", "--quant", "int4", replies=(Reply("a"),))
    assert (code, out, FakeLLM.instances[-1].quant) == (0, "a\n", "int4")
    assert "--quant int4: 2 of 3 linear weights are quantized already" in err
    assert "--quant" not in run("talker", "-p", "q", replies=(Reply("a"),))[2]
    assert FakeLLM.instances[-1].quant == "keep"


def test_an_unknown_quant_is_one_line(run: Run) -> None:
    code, out, err = run("talker", "-p", "q", "--quant", "int3")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "int3" in err
    assert "int8" in err


def test_the_choices_of_options_are_those_of_the_loader() -> None:
    from typing import get_args

    from glmlocal.formats.schemes import Activations
    from glmlocal.models.config import KV_DTYPES
    from glmlocal.models.weights import QUANTS

    assert options.QUANTS == QUANTS
    assert ("auto", *get_args(Activations)) == options.ACTIVATIONS
    assert ("auto", *KV_DTYPES) == options.KV_DTYPES


def test_an_answer_that_ends_in_a_newline_gets_another(run: Run) -> None:
    assert run("talker", "-p", "q", replies=(Reply("a\n"),))[1] == "a\n\n"


def test_options_reach_the_model(run: Run) -> None:
    options = (
        "--temp 0.5 --top-p 0.9 --top-k 40 --min-p 0.1 --repetition-penalty 1.1 --presence-penalty -1 "
        "--frequency-penalty 0.2 --seed 7 --max-tokens 9 --stop a --stop bc --no-think --context 99"
    )
    assert run("thinker", "-p", "q", "--system", "be brief", *shlex.split(options))[0] == 0
    assert last_call() == {
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "q"}],
        "enable_thinking": False,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -1.0,
        "frequency_penalty": 0.2,
        "seed": 7,
        "max_tokens": 9,
        "stop": ("a", "bc"),
    }
    assert FakeLLM.instances[-1].context == 99
    assert FakeLLM.instances[-1].closed


def test_options_that_are_not_given_are_left_to_the_model(run: Run) -> None:
    run("thinker", "-p", "q")
    assert last_call() == {"messages": [{"role": "user", "content": "q"}], "enable_thinking": True}


def test_json_is_one_object_and_the_rest_is_silent(run: Run) -> None:
    code, out, err = run("thinker", "-p", "q", "--json", replies=(Reply("4 \x9b31m\x7f\ud800 中", "2+2"),))
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    assert "\x9b" not in out
    assert "中" in out
    assert json.loads(out) == {
        "model": "thinker",
        "text": "4 \x9b31m\x7f\ud800 中",
        "reasoning": "2+2",
        "finish_reason": "stop",
        "usage": {
            "prompt_tokens": 1,
            "completion_tokens": 4,
            "reasoning_tokens": 1,
            "cached_tokens": 0,
            "total_tokens": 5,
        },
        "timings": {
            "load_s": 0.25,
            "time_to_first_token_s": 0.125,
            "prefill_tokens_per_s": 8.0,
            "decode_tokens_per_s": 50.0,
            "total_s": 0.5,
        },
    }


@pytest.mark.parametrize(
    ("arguments", "data", "prompt"),
    [
        ((), b"from a pipe\n", "from a pipe"),
        ((), b"two\r\nlines\r\n", "two\r\nlines"),
        ((), b"\xef\xbb\xbfbom\n\n", "bom\n"),
        (("-p", "-"), b"dash\n", "dash"),
        (("-p", "Sum up:"), b"the notes\n", "Sum up:\n\nthe notes"),
        (("-p", "alone"), b"", "alone"),
        (("-p", ""), b"only stdin", "only stdin"),
    ],
)
def test_prompt_comes_from_p_and_stdin(run: Run, arguments: tuple[str, ...], data: bytes, prompt: str) -> None:
    assert run("talker", *arguments, stdin=data)[0] == 0
    assert last_call()["messages"] == [{"role": "user", "content": prompt}]


def test_p_does_not_wait_for_an_open_but_silent_stdin(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SILENCE_S", 0.05)
    code, out, err = run("talker", "-p", "alone", stdin=None)
    assert (code, out) == (0, "alone\n")
    assert "stdin is open but silent" in err


@pytest.mark.parametrize(
    ("arguments", "data", "message"),
    [
        ((), b"", "stdin is empty"),
        ((), b" \n", "stdin is empty"),
        (("-p", "-"), b"", "stdin is empty"),
        (("-p", ""), b"", "the prompt is empty"),
        ((), b"a\xffb", "stdin is not UTF-8 text: byte 0xff at offset 1"),
        (("-p", "q", "--temp", "nan"), b"", "temperature is nan"),
        (("-p", "q", "--top-p", "0"), b"", "top_p is 0.0"),
        (("-p", "q", "--max-tokens", "-1"), b"", "max_tokens is -1"),
        (("-p", "q", "--stop", ""), b"", "stop is 1 entries"),
        (
            ("-p", "q", "--context", "0"),
            b"",
            "argument --context: wanted a whole number of at least 1, as 32768, 32K or 1M, found '0'",
        ),
        (("-p", "q", "--threads", "x"), b"", "argument --threads: wanted a whole number"),
        (("-p", "q", "--raw", "--system", "s"), b"", "--system has no place in a raw completion"),
        (("-p", "caf\udce9"), b"", "-p is not UTF-8 text: byte 0xe9"),
    ],
)
def test_bad_input_is_refused_before_the_model_answers(
    run: Run, arguments: tuple[str, ...], data: bytes, message: str
) -> None:
    code, out, err = run("talker", *arguments, stdin=data)
    assert (code, out) == (2, "")
    assert err.startswith("glmlocal: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not any(llm.calls for llm in FakeLLM.instances)


def test_json_needs_a_prompt(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "stdin_is_screen", lambda: True)
    code, out, err = run("talker", "--json")
    assert (code, out) == (2, "")
    assert "--json prints one answer" in err


def test_missing_model(run: Run) -> None:
    code, out, err = run("missing", "-p", "q")
    assert (code, out) == (2, "")
    assert err == "glmlocal: error: 'missing' is not there; give a directory, a .gguf file or demo\n"


def test_base_model_completes_raw_text_and_says_so(run: Run) -> None:
    code, out, err = run("base", "-p", "Once upon", replies=(Reply(" a time"),))
    assert (code, out) == (0, " a time\n")
    assert err.startswith("base is a base model: without a chat template it continues the text as it stands\n")
    assert last_call() == {"prompt": "Once upon"}
    assert "takes no --system" in run("base", "-p", "Once", "--system", "s")[2]


def test_raw_forces_completion_on_a_chat_model(run: Run) -> None:
    _, out, err = run("thinker", "-p", "Once", "--raw")
    assert out == "Once\n"
    assert "base model" not in err
    assert last_call() == {"prompt": "Once"}


@pytest.mark.parametrize(
    ("arguments", "reply", "message"),
    [
        (("--max-tokens", "2"), Reply("a b c d"), "cut off after 2 tokens (--max-tokens)"),
        (("--max-tokens", "2"), Reply("a", "b c d"), "cut off while thinking: a larger --max-tokens or --no-think"),
        (("--context", "3"), Reply("a b c d"), "the context is full: 3 of 3 tokens are used"),
    ],
)
def test_a_cut_answer_says_why(run: Run, arguments: tuple[str, ...], reply: Reply, message: str) -> None:
    code, _, err = run("thinker", "-p", "q", *arguments, replies=(reply,))
    assert code == 0
    assert message in err


def test_too_long_a_prompt_is_one_error_line(run: Run) -> None:
    code, out, err = run("talker", "-p", "a b c", "--context", "3")
    assert (code, out) == (2, "")
    assert err == "glmlocal: error: the prompt has 3 tokens, the context holds 3; shorten it\n"


def test_a_failure_in_the_middle_keeps_what_was_said_and_fails(run: Run) -> None:
    code, out, err = run("talker", "-p", "q", replies=(Reply("half an", error=RequestError("went away")),))
    assert (code, out) == (2, "half an")
    assert err.endswith("glmlocal: error: went away\n")


def start(*arguments: str, delay_s: float = 0.0, **options: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "FAKE_TOKEN_DELAY_S": str(delay_s), "PYTHONPATH": str(Path(__file__).parents[1])}
    environment.pop("PYTHONUNBUFFERED", None)  # people do not have it, and it would hide a missing flush
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", "import sys, fakes; sys.exit(fakes.main())", "chat", *arguments]
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, **options)


def test_answers_are_streamed_and_ctrl_c_ends_with_130() -> None:
    process = start("talker", "-p", "word " * 500, delay_s=0.02, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.read(5) == b"word "  # long before the 10 s of the whole answer
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert out == b"word " * (len(out) // 5) + b"\n"
    assert len(out) < 2000
    assert b"stopped" in err
    assert b"Traceback" not in err


def test_a_reader_that_has_enough_ends_the_answer_quietly() -> None:
    process = start("talker", "-p", "word " * 500, delay_s=0.002, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(5)
    process.stdout.close()
    assert process.wait(timeout=10) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        with suppress(OSError):
            os.close(end)


def test_a_writer_that_began_is_read_to_its_end(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.write(writing, b"begun ")

    def finish() -> None:
        os.write(writing, b"and done\n")
        os.close(writing)

    timer = threading.Timer(0.2, finish)
    timer.start()
    assert stdin.read_ready_stdin(0.0, reading) == "begun and done"
    timer.join()


def test_silent_stdin_is_given_up_and_an_ended_one_is_empty(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    assert stdin.read_ready_stdin(0.01, reading) is None
    os.close(writing)
    assert stdin.read_ready_stdin(-1.0, reading) == ""


def test_a_file_is_read_from_its_start_only(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_bytes(b"first\nsecond\n")
    with path.open("rb") as file:
        assert stdin.read_ready_stdin(0.0, file.fileno()) == "first\nsecond"
        os.lseek(file.fileno(), 6, os.SEEK_SET)  # as inside `while read line; do … done < list`
        assert stdin.read_ready_stdin(0.0, file.fileno()) == ""


def test_closed_stdin_is_empty() -> None:
    fd = os.dup(0)
    os.close(fd)
    assert stdin.read_stdin(fd) == ""
    assert stdin.read_ready_stdin(1.0, fd) == ""
    assert not stdin.stdin_is_screen(fd)


def test_endless_stdin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdin, "MAX_STDIN_BYTES", 1 << 21)
    with open("/dev/zero", "rb") as zero, pytest.raises(ConfigError, match="stdin holds more than 2 MiB"):
        stdin.read_stdin(zero.fileno())
