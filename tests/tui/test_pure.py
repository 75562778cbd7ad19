"""The app's parts without a screen: cleaning, SSE, Markdown blocks, branches, commands, mentions, settings, export."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmlocal_tui import client, commands, export, mentions, settings, sse, stats
from glmlocal_tui.cleaning import clean, one_line
from glmlocal_tui.conversation import Attachment, Conversation, Message, ToolCall, user_message, with_piece
from glmlocal_tui.inline_thinking import InlineThinking
from glmlocal_tui.markdown_blocks import Block, Blocks
from glmlocal_tui.widgets.bars import bar, fit, sparkline
from tui.scripted_server import stats as stats_json


def test_control_characters_become_visible_or_go() -> None:
    assert clean("a\x1b]0;t\x07b\x9bc\r\nd\te") == "a␛]0;t␇b\ufffdc\nd\te"
    assert clean("\u202eevil\u2066\ud800\x7f") == "\ufffdevil\ufffd\ufffd␡"
    assert clean("one\u2028two\x85three") == "one\ntwo\nthree"
    assert one_line("a\n b\x1b" + "c" * 400, 10) == "a b␛cccccc…"[:9] + "…"
    assert clean("家族👨‍👩‍👧 ok") == "家族👨‍👩‍👧 ok"


@given(st.text(), st.integers(0, 30))
def test_cleaning_does_not_depend_on_chunks(text: str, at: int) -> None:
    assert clean(text[:at]) + clean(text[at:]) == clean(text)
    assert not any(ord(char) < 0x20 and char not in "\n\t" for char in clean(text))


CHUNKS = [
    {"choices": [{"delta": {"reasoning_content": "hm", "reasoning": "hm"}}]},
    {"choices": [], "prefill_progress": {"done_tokens": 5, "total_tokens": 10}},
    {"choices": [{"delta": {"content": "hé\x1b[2J"}}]},
    {"choices": [{"delta": {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{"}}]}}]},
    {"choices": [{"delta": {}, "finish_reason": "stop"}]},
    {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4,
                              "prompt_tokens_details": {"cached_tokens": 2}},
     "timings": {"time_to_first_token_s": 0.5, "decode_tokens_per_s": 9.5}},
]  # fmt: skip
EVENTS = [
    sse.Delta("", "hm"),
    sse.Progress(5, 10),
    sse.Delta("hé␛[2J", ""),
    sse.ToolDelta(0, "c", "f", "{"),
    sse.Finish("stop"),
    sse.Usage(3, 4, 2, None, 0.5, 9.5),
]


@given(st.lists(st.integers(0, 900), max_size=8))
def test_a_stream_is_read_the_same_however_it_is_cut(cuts: list[int]) -> None:
    lines = [": ping", "event: x", *(f"data: {json.dumps(chunk, ensure_ascii=False)}\r" for chunk in CHUNKS)]
    data = ("\n\n".join(lines) + "\n\ndata: [DONE]\n\n").encode()
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    reader = sse.Lines()
    payloads = [line for start, end in itertools.pairwise(bounds) for line in reader.feed(data[start:end])]
    assert [event for payload in payloads for event in sse.events(payload)] == EVENTS
    assert reader.done


def test_lines_end_with_cr_lf_or_both_wherever_they_are_cut() -> None:
    for end in (b"\r", b"\n", b"\r\n"):
        data = end.join([b": ping", b'data: {"a": 1}', b"", b'data: {"b": 2}', b"", b"data: [DONE]", b"", b""])
        for at in range(len(data)):
            reader = sse.Lines()
            assert [*reader.feed(data[:at]), *reader.feed(data[at:])] == ['{"a": 1}', '{"b": 2}'], (end, at)
            assert reader.done


def test_a_very_long_line_costs_no_more_than_its_length() -> None:
    piece, reader = b"x" * 1000, sse.Lines()
    assert list(reader.feed(b"data: ")) == []
    start_s = time.process_time()
    for _ in range(4000):
        assert list(reader.feed(piece)) == []
    assert len(next(reader.feed(b"\n"))) == 4_000_000
    assert time.process_time() - start_s < 0.5  # 8 s where each piece is put to the whole line

    def feed_on() -> None:
        for _ in range(9000):
            assert list(reader.feed(piece)) == []

    with pytest.raises(sse.ProtocolError, match="longer than"):
        feed_on()
    with pytest.raises(sse.ProtocolError, match="longer than"):
        list(sse.Lines().feed(piece * 9000 + b"\n"))


def test_calls_without_an_index_are_told_apart_by_their_ids() -> None:
    pieces = [("a", "f", "{"), ("", "", "}"), ("b", "g", "{"), ("b", "", "}"), ("", "", " ")]
    calls: tuple[ToolCall, ...] = ()
    for id_, name, arguments in pieces:
        call = {"id": id_, "function": {"name": name, "arguments": arguments}}
        (piece,) = sse.events(json.dumps({"choices": [{"delta": {"tool_calls": [call]}}]}))
        assert isinstance(piece, sse.ToolDelta)
        calls = with_piece(calls, piece.index, piece.id, piece.name, piece.arguments)
    assert calls == (ToolCall("a", "f", "{}"), ToolCall("b", "g", "{} "))


@pytest.mark.parametrize("value", ["1" + "0" * 400, "-1" + "0" * 400, "1e999", "NaN"])
def test_numbers_that_nothing_can_be_are_none(value: str) -> None:
    payload = f'{{"usage": {{"prompt_tokens": {value}}}, "timings": {{"decode_tokens_per_s": {value}}}}}'
    assert list(sse.events(payload)) == [sse.Usage(0, 0)]


@pytest.mark.parametrize(("said", "wait_s"), [("2", 2.0), ("-5", None), ("0", None), ("nan", None), ("soon", None)])
def test_a_server_says_when_to_try_again(said: str, wait_s: float | None) -> None:
    assert client._retry_after({"retry-after": said}) == wait_s


@pytest.mark.parametrize("payload", ["{", "[1]", '"text"', "1", "[" * 200_000])
def test_what_is_no_chunk_is_refused(payload: str) -> None:
    with pytest.raises(sse.ProtocolError):
        list(sse.events(payload))


@pytest.mark.parametrize(
    "payload", ["{}", '{"choices": 3}', '{"choices": [7]}', '{"choices": [{"delta": {"content": 5, "tool_calls": 1}}]}']
)
def test_odd_chunks_are_nothing(payload: str) -> None:
    assert list(sse.events(payload)) == []


def test_an_error_in_the_stream_is_told_clean() -> None:
    error = {"error": {"message": "no\x1b[1m", "type": "invalid", "code": "context_length_exceeded"}}
    assert list(sse.events(json.dumps(error))) == [sse.Failure("no␛[1m", "context_length_exceeded")]


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        ("<think>\nhm</think>\n\n42", "42", "hm"),
        ("\n <think>a < b </thin </think>c</think>", "c</think>", "a < b </thin "),
        ("<think></think>\nyes", "yes", ""),
        ("<think>\n\n</think>\n\nyes", "yes", ""),
        ("<think>cut in the </th", "", "cut in the </th"),
        (" <thinker> <think>no</think>", " <thinker> <think>no</think>", ""),
        ("about <think>tags</think>", "about <think>tags</think>", ""),
        ("\n<thi", "\n<thi", ""),
        ("hm, </thin\n</think>\n\n42 is </think>\n", "42 is </think>\n", "hm, </thin\n"),
        ("hm.</think>\n42", "42", "hm."),
        ("</think>\n\n42", "42", ""),
        ("cut after it\n</think>", "", "cut after it\n"),
        ("of a </think> in a line", "of a </think> in a line", ""),
        ("of `</think>\n` in code", "of `</think>\n` in code", ""),
        ("```\n</think>\n```\nin a block", "```\n</think>\n```\nin a block", ""),
        ("```\nx\n```\nwith a block\n</think>\n42", "42", "```\nx\n```\nwith a block\n"),
        ("ends with </think>", "ends with </think>", ""),
        ("a <think> pair\n</think>\n is text", "a <think> pair\n</think>\n is text", ""),
    ],
)
@given(cuts=st.lists(st.integers(0, 40), max_size=6))
def test_inline_thinking_is_found_however_it_is_cut(text: str, content: str, reasoning: str, cuts: list[int]) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    thoughts = InlineThinking()
    found = ["", ""]
    for piece in [*(thoughts.feed(text[start:end]) for start, end in itertools.pairwise(bounds)), thoughts.end()]:
        if piece.retracts:
            found = ["", found[1] + found[0]]
        found = [found[0] + piece.content, found[1] + piece.reasoning]
    assert found == [content, reasoning]


def test_inline_thinking_holds_back_no_more_than_part_of_a_tag() -> None:
    thoughts = InlineThinking()
    assert [thoughts.feed(piece)[:2] for piece in ("<think>", "why </", "b> </think", "> so", " be it")] == [
        ("", ""),
        ("", "why "),
        ("", "</b> "),
        ("so", ""),
        (" be it", ""),
    ]
    thoughts = InlineThinking()
    assert [thoughts.feed(piece) for piece in ("let", " me </", "b> see</think", ">", "\n\n", "42")] == [
        ("let", "", False),
        (" me ", "", False),
        ("</b> see", "", False),
        ("", "", False),
        ("", "", True),
        ("42", "", False),
    ]


MARKDOWN = """# Title

A paragraph of *two*
lines.

- one

  more of one
- two
1. other list

```python
def f():

    return "```"
```
text right after

> quote
> goes on

| a | b |
|---|---|
| 1 | 2 |

    indented code

last
==="""


@given(st.lists(st.integers(0, len(MARKDOWN)), max_size=12))
def test_blocks_do_not_depend_on_chunks(cuts: list[int]) -> None:
    whole, pieces = Blocks(), Blocks()
    whole.append(MARKDOWN)
    bounds = [0, *sorted(cuts), len(MARKDOWN)]
    for start, end in itertools.pairwise(bounds):
        pieces.append(MARKDOWN[start:end])
    assert pieces.all() == whole.all()
    assert "".join(block.source for block in pieces.all()) == MARKDOWN


def test_code_blocks_have_their_code_and_language() -> None:
    blocks = Blocks()
    blocks.append(MARKDOWN)
    code = [block for block in blocks.all() if block.code is not None]
    assert code == [
        Block('```python\ndef f():\n\n    return "```"\n```\n', 'def f():\n\n    return "```"\n', "python"),
        Block("    indented code\n\n", "indented code\n", ""),
    ]


def test_only_the_last_block_is_parsed_again() -> None:
    blocks = Blocks()
    for number in range(500):
        blocks.append(f"paragraph {number}\n\n")
    assert len(blocks.closed) == 499
    assert len(blocks.source) - blocks._tail_start < 20


def conversation() -> Conversation:
    talk = Conversation(system="be kind")
    question = user_message(None, "why?", [Attachment("file", "a.txt", "AAA"), Attachment("paste", "[paste 1]", "PPP")])
    talk.add(question)
    talk.add(Message("a1", question.id, "assistant", "first", "thought", ending="stop"))
    talk.add(Message("a2", question.id, "assistant", "second", ending="stop"))
    follow = user_message("a1", "and [paste 1]?", [Attachment("paste", "[paste 1]", "PPP")])
    talk.add(follow)
    talk.add(Message("a3", follow.id, "assistant", "", tool_calls=(ToolCall("c", "f", "{}"),), ending="tool_calls"))
    return talk


def test_branches_are_kept_and_walked() -> None:
    talk = conversation()
    assert talk.title == "why?"
    assert [message.content for message in talk.path()] == ["why?", "first", "and [paste 1]?", ""]
    assert talk.siblings("a1") == ["a1", "a2"]
    assert talk.switch("a1", 1)
    assert [message.content for message in talk.path()] == ["why?", "second"]
    assert not talk.switch("a2", 1)
    assert talk.switch("a2", -1)
    assert talk.leaf == "a3"  # the newest below the other answer
    talk.show("a2")
    assert talk.leaf == "a2"


def test_a_request_has_the_branch_with_files_and_pastes_and_no_thinking() -> None:
    talk = conversation()
    assert talk.request("a3") == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": 'why?\n\n<file path="a.txt">\nAAA\n</file>'},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "and PPP?"},
        {"role": "assistant", "content": None,
         "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
    ]  # fmt: skip


def test_commands_are_understood() -> None:
    call = commands.parse("/rename  a title ")
    assert isinstance(call, commands.Call)
    assert (call.command.name, call.words) == ("rename", "a title")
    for message in ("hello", "//literal", "/etc/hosts is a file", "/a\nb"):
        assert commands.parse(message) is None
    assert commands.parse("/serch x") == "there is no command /serch: did you mean /search?"
    assert commands.parse("/quit now") == "/quit takes no words; // at the start sends a message that begins with /"
    assert str(commands.parse("/temp")).startswith("/temp wants NUMBER")
    assert [command.name for command in commands.complete("/th")] == ["think", "theme"]
    assert commands.complete("/think ") == []


def test_mentions_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("héllo")
    (tmp_path / "my notes.md").write_text("n")
    (tmp_path / "big.log").write_bytes(b"x" * (mentions.MAX_FILE_BYTES + 1))
    (tmp_path / "bin").write_bytes(b"\xff\xfe")
    (tmp_path / "nul").write_bytes(b"a\0b")
    text = 'see @a.txt, (@"my notes.md") me@example.com @nobody @a.txt @big.log and @"gone.txt"'
    found = mentions.find(text, tmp_path)
    assert [(item.token, item.problem) for item in found] == [
        ("@a.txt", ""),
        ('@"my notes.md"', ""),
        ("@big.log", "larger than 256 KiB"),
        ('@"gone.txt"', "not found"),
    ]
    assert mentions.read(found[0], tmp_path) == Attachment("file", "a.txt", "héllo")
    for name, problem in (("big.log", "larger"), ("bin", "UTF-8"), ("nul", "not a text"), ("gone", "No such file")):
        with pytest.raises(ValueError, match=problem):
            mentions.read(mentions.Mention(f"@{name}", name, 0, ""), tmp_path)


def test_completion_of_mentions(tmp_path: Path) -> None:
    for name in ("src/main.py", "src/deep/Main_test.py", "readme.md", ".hidden", "node_modules/main.js"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert mentions.complete("", tmp_path) == ["node_modules/", "readme.md", "src/"]
    assert mentions.complete("src/ma", tmp_path) == ["src/main.py", "src/deep/Main_test.py"]
    assert mentions.complete("main", tmp_path) == ["src/main.py", "src/deep/Main_test.py"]
    assert mentions.complete(".h", tmp_path) == [".hidden"]
    assert mentions.token_before("look at @src/m") == "src/m"
    assert mentions.token_before('look at @"my no') == "my no"
    assert mentions.token_before("mail me@here") is None
    assert mentions.token_before("@done next") is None


def test_settings_survive_and_bad_ones_are_told(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "chat.json"
    assert settings.load(path) == settings.Loaded(settings.Settings(), "")
    changed = settings.Settings(theme="nord", temperature=0.5, max_tokens=99)
    settings.save(path, changed)
    assert settings.load(path) == settings.Loaded(changed, "")
    path.write_text('{"theme": 5, "temperature": 9, "thinking": false, "later": 1}')
    loaded = settings.load(path)
    assert loaded.settings == settings.Settings(thinking=False)
    assert "temperature, theme" in loaded.problem
    path.write_text("{")
    assert "cannot be read" in settings.load(path).problem
    assert settings.parse_number("temperature", " 0.7 ") == 0.7
    assert settings.parse_number("max_tokens", "default") is None
    for bad in ("hot", "2.5", "nan", "-1"):
        with pytest.raises(ValueError, match="0 to 2"):
            settings.parse_number("temperature", bad)


def test_export_to_markdown_and_json(tmp_path: Path) -> None:
    talk = conversation()
    talk.switch("a1", 1)
    path = export.write(talk, "talk.md", tmp_path)
    assert path.read_text() == (
        "# why?\n\n## System\n\nbe kind\n\n"
        '## You\n\nwhy?\n\n<file path="a.txt">\nAAA\n</file>\n\n## Assistant\n\nsecond\n'
    )
    data = json.loads(export.write(talk, "talk.json", tmp_path).read_text())
    assert [message["content"] for message in data["messages"]] == ["why?", "first", "second", "and [paste 1]?", ""]
    assert data["leaf"] == "a2"
    with pytest.raises(ValueError, match="exists"):
        export.write(talk, "talk.md", tmp_path)
    with pytest.raises(ValueError, match=r"\.md or \.json"):
        export.write(talk, "talk.txt", tmp_path)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["talk.json", "talk.md"]


def test_stats_are_read_and_odd_ones_do_no_harm() -> None:
    found = stats.parse(
        stats_json("loading", loading={"done_bytes": 5, "total_bytes": 10, "eta_s": None, "tier": "ram"})
    )
    assert found is not None
    assert found.loading == stats.Loading(5, 10, None, "ram")
    assert found.tiers[0] == stats.Tier("gpu", 100, 0.71)
    assert found.devices[1].lines == (("experts", 47 << 30),)
    assert found.mtp == stats.Mtp(1200, 0.75)
    odd = stats.parse(
        {"state": "ready", "model": 3, "tiers": {}, "plan": {"devices": [None]}, "kv": {"used_tokens": "x"}}
    )
    assert odd is not None
    assert (odd.model.name, odd.devices, odd.kv_used_tokens, odd.mtp) == ("", (), 0, None)
    assert stats.parse({"state": "odd"}) is None
    assert stats.parse([1]) is None
    assert [stats.size(value) for value in (0, 999, 1536, 21 << 30, 150 << 40)] == [
        "0 B", "999 B", "1.5 KiB", "21.0 GiB", "150 TiB",
    ]  # fmt: skip


def test_bars_fill_their_width() -> None:
    assert bar(0.5, 4) == "██░░"
    assert bar(0.53, 4) == "██▏░"
    assert (bar(-1, 3), bar(2, 3)) == ("░░░", "███")
    assert sparkline([0, 5, 10], 5) == "  ▁▅█"
    assert fit("你好世界", 5) == "你好…"
    assert fit("你好世界", 6) == "你好… "
    assert fit("ab", 4) == "ab  "
