"""Whatever the text and however it is cut, the parsers agree with themselves and invent nothing."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from answers import parse, tool

TAGS = (
    *("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<think>", "</think>"),
    *("f", "g", "x", "s", "1", "true", "null", '"', "\\", "\n", " ", "<", "</", "{", "}", "ü🌦", "[1]"),
)
TOOLS = [
    tool("f", {"s": {"type": "string"}, "x": {"type": "integer"}}),
    tool("g", None, oneOf=[{"properties": {"s": {"const": "1"}}}, {"properties": {"s": {"type": "string"}}}]),
]
texts = st.lists(st.sampled_from(TAGS), max_size=40).map("".join)
values = st.text(st.characters(exclude_categories=("Cs",)), max_size=30).filter(lambda text: "</arg_value>" not in text)


@given(texts, st.lists(st.integers(1, 9), max_size=60), st.booleans(), st.booleans())
def test_any_chunking_of_any_text_gives_the_same(text: str, sizes: list[int], reasons: bool, truncated: bool) -> None:
    chunks, start = [], 0
    for size in sizes:
        chunks.append(text[start : start + size])
        start += size
    chunks.append(text[start:])
    options: dict[str, Any] = {"reasons": reasons, "truncated": truncated}
    assert parse(chunks, TOOLS, **options) == parse([text], TOOLS, **options)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("sty"), values), max_size=4), st.sampled_from(["", "\n"]))
def test_strings_come_out_as_they_went_in(pairs: list[tuple[str, str]], newline: str) -> None:
    strings = [tool("f", {key: {"type": "string"} for key in "sty"})]
    body = "".join(f"<arg_key>{key}</arg_key>{newline}<arg_value>{value}</arg_value>{newline}" for key, value in pairs)
    text = f"<tool_call>f{newline}{body}</tool_call>"
    parsed = parse(text, strings)
    assert parsed.values == [("f", dict(pairs))]
    assert parsed.raw == (text,)


@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**53), 2**53) | values, lambda inner: st.lists(inner)))
def test_json_values_come_out_as_they_went_in(value: Any) -> None:
    text = f"<tool_call>f<arg_key>v</arg_key><arg_value>{json.dumps(value)}</arg_value></tool_call>"
    if "</arg_value>" in json.dumps(value):
        return
    expected = {"v": value}
    assert parse([text], [tool("f")]).values == [("f", expected)]
