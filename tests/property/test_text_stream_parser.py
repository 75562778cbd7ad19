from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from glmlocal.text.stream_parser import ContentDelta, ReasoningDelta, ReasoningParser, starts_in_reasoning

TAGS = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "\n",
    "\n\n",
    " ",
    "<",
    "</",
    "<think",
    "nk>",
    "a",
    "bc\n",
]
TEXT = st.lists(st.sampled_from(TAGS), max_size=14).map("".join)


def specification(text: str, starts: bool) -> tuple[str, str]:
    """Reasoning and content of a whole answer, by regular expressions."""
    reasoning, content = "", text
    if starts:
        text = re.sub(r"\A\s*<think>", "", text, count=1)
        end = re.search(r"</think>|(?=<tool_call>)", text)
        reasoning, content = (text[: end.start()], text[end.end() :]) if end else (text, "")
    calls = re.split(r"(<tool_call>.*?(?:</tool_call>|\Z))", content, flags=re.DOTALL)
    content = "".join(part if part.startswith("<tool_call>") else part.replace("</think>", "") for part in calls)
    return reasoning.strip("\n"), content.lstrip("\n")


def parse(chunks: list[str], starts: bool) -> tuple[str, str]:
    parser = ReasoningParser(starts)
    events = [event for chunk in chunks for event in parser.push(chunk)] + parser.finish()
    assert all(event.text for event in events)
    kinds = [type(event) for event in events]
    assert kinds == sorted(kinds, key=lambda kind: kind is ContentDelta), "reasoning comes before content"
    reasoning = "".join(event.text for event in events if isinstance(event, ReasoningDelta))
    return reasoning, "".join(event.text for event in events if isinstance(event, ContentDelta))


def cut(text: str, places: list[int]) -> list[str]:
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


@given(TEXT, st.booleans(), st.lists(st.integers(0, 200), max_size=12))
@example("\n<think>a</think>\nb", True, [1, 5, 9, 10, 14])
@example("</th</think>ink>", False, [3])
def test_chunks_give_what_the_rules_say_of_the_whole(text: str, starts: bool, places: list[int]) -> None:
    assert parse(cut(text, places), starts) == specification(text, starts)


@given(TEXT, st.booleans())
def test_one_character_at_a_time_is_the_same(text: str, starts: bool) -> None:
    assert parse(list(text), starts) == specification(text, starts)


@pytest.mark.parametrize(
    ("text", "starts", "reasoning", "content"),
    [
        ("\n<think>Let me see.</think>\nParis.", True, "Let me see.", "Paris."),  # GLM-4.5 writes the tag itself
        ("Let me see.</think>Paris.", True, "Let me see.", "Paris."),  # GLM-4.7: the prompt opened it
        ("\n<think></think>\nParis.", True, "", "Paris."),
        ("cut off in the mid", True, "cut off in the mid", ""),
        ("cut off </thi", True, "cut off </thi", ""),
        ("I'll call it.\n<tool_call>f\n</tool_call>", True, "I'll call it.", "<tool_call>f\n</tool_call>"),
        ("\nParis.</think> Yes.", False, "", "Paris. Yes."),
        ("a <think>b", True, "a <think>b", ""),  # only the first tag is markup
        ("Paris\n\nFrance\n", False, "", "Paris\n\nFrance\n"),
        ("a\n\nb</think>c", True, "a\n\nb", "c"),
        (" a </think> b", True, " a ", " b"),  # spaces are the model's own
        ("<tool_call>w</think></tool_call></think>x", False, "", "<tool_call>w</think></tool_call>x"),
        ("", True, "", ""),
        (" \n", True, " ", ""),
    ],
)
def test_known_forms(text: str, starts: bool, reasoning: str, content: str) -> None:
    assert parse([text], starts) == (reasoning, content)


def test_text_is_passed_on_as_soon_as_it_is_certain() -> None:
    parser = ReasoningParser(True)
    assert parser.push("\n<thi") == []
    assert parser.push("nk>Hm") == [ReasoningDelta("Hm")]
    assert parser.push(" <") == [ReasoningDelta(" ")]
    assert parser.push("b\n") == [ReasoningDelta("<b")]
    assert parser.push("c</think>\n") == [ReasoningDelta("\nc")]
    assert parser.push("\nParis") == [ContentDelta("Paris")]
    assert parser.push("\n") == [ContentDelta("\n")]
    assert parser.finish() == []


@pytest.mark.parametrize(
    ("tail", "enabled", "expected"),
    [
        ("[gMASK]<sop><|user|>\nHi<|assistant|>", True, True),  # 4.5, 4.6
        ("[gMASK]<sop><|user|>\nHi/nothink<|assistant|>\n<think></think>", False, False),
        ("[gMASK]<sop><|user|>Hi<|assistant|><think>", True, True),  # 4.7, 5
        ("[gMASK]<sop><|user|>Hi<|assistant|></think>", False, False),
        ("[gMASK]<sop><|user|>Hi<|assistant|><think></think>", False, False),  # 5.2
        ("[gMASK]<sop><|user|>Hi<|assistant|>", False, False),
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", True, False),
        ("<|im_start|>assistant\n<think>\n", True, True),
        ("", True, False),
    ],
)
def test_where_a_completion_starts(tail: str, enabled: bool, expected: bool) -> None:
    assert starts_in_reasoning(tail, thinking_enabled=enabled) is expected
