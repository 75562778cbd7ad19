"""The incremental parsers against a parser of twenty lines that sees the whole text: what GLM writes, well formed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from answers import parse, tool

SCHEMAS: dict[str, dict[str, Any]] = {
    "text": {"type": "string"},
    "count": {"type": "integer"},
    "size": {"type": "number"},
    "really": {"type": "boolean"},
    "items": {"type": "array"},
    "thing": {"type": "object"},
    "maybe": {"type": ["string", "null"]},
    "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
    "named": {"$ref": "#/$defs/name"},
}
TOOLS = [
    tool("get_it", SCHEMAS, **{"$defs": {"name": {"type": "string"}}}),
    tool("mcp__x-y.z", {"text": {"type": "string"}}),
    tool("nothing", {}),
]
NAMES = [each["function"]["name"] for each in TOOLS]


PAIR = r"<arg_key>((?:(?!</arg_key>).)*)</arg_key>\s*<arg_value>((?:(?!</arg_value>).)*)</arg_value>"
CALL = re.compile(rf"<tool_call>\s*([^<]*?)\s*((?:{PAIR}\s*)*)</tool_call>", re.DOTALL)


def reference(text: str, *, reasons: bool) -> tuple[str, str, list[tuple[str, dict[str, Any]]]]:
    """Reasoning, content without white space, calls; by regular expressions over the whole."""
    reasoning = ""
    if reasons:
        body = re.sub(r"\A\s*<think>", "", text)
        ends = [at for tag in ("</think>", "<tool_call>") if (at := body.find(tag)) >= 0]
        reasoning, text = body[: min(ends, default=len(body))], body[min(ends, default=len(body)) :]
    calls = []
    for call in CALL.finditer(text):
        pairs = re.findall(PAIR, call[2], re.DOTALL)
        calls.append((call[1], {key.strip(): typed(key.strip(), value) for key, value in pairs}))
    content = CALL.sub("", text)
    content = content.replace("</think>", "").replace("</tool_call>", "")
    return reasoning.strip("\n"), "".join(content.split()), calls


def typed(key: str, text: str) -> Any:
    """The value for the argument's schema, in the order of vLLM: null, integer, number, boolean, object, array."""
    schema = SCHEMAS.get(key)
    if schema is None:
        return loads(text, (int, float, bool, type(None), dict, list))
    kinds = {"either": ["integer"], "named": []}.get(key) or schema.get("type", [])
    python = {"null": (type(None),), "integer": (int,), "number": (int, float), "boolean": (bool,)}
    python |= {"object": (dict,), "array": (list,), "string": ()}
    return loads(text, tuple(each for kind in ([kinds] if isinstance(kinds, str) else kinds) for each in python[kind]))


def loads(text: str, wanted: tuple[type, ...]) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    if isinstance(value, float) and value.is_integer() and float in wanted:
        value = int(value)
    return value if type(value) in wanted else text


plain = st.text(st.sampled_from("aäß 京🌦\n\t.,;:!?{}[]\"'\\1e-&"), max_size=20)
strings = st.one_of(
    plain,
    st.sampled_from(
        ["", " 7 ", "007", "1_000", "null", "true", '{"a": [1]}', "a < b", "&lt;/arg_value&gt;", "C:\\new"]
    ),
    st.sampled_from(
        [
            "<tool_call>",
            "</tool_call>",
            "<arg_value>",
            "</arg_valu",
            "<arg_key>",
            "</think>",
            "<|user|>",
            "line\n  indented\n",
        ]
    ),
)
values: dict[str, st.SearchStrategy[str]] = {
    "text": strings,
    "named": strings,
    "count": st.integers(-(10**12), 10**12).map(str) | st.sampled_from(["1.5", "many", ""]),
    "size": st.sampled_from(["1.5", "-2", "3.0", "1e3", "-0.25"]),
    "really": st.sampled_from(["true", "false", "1", "yes"]),
    "items": st.lists(st.integers() | plain, max_size=3).map(json.dumps),
    "thing": st.dictionaries(plain, st.none() | plain | st.lists(st.booleans()), max_size=3).map(json.dumps),
    "maybe": st.just("null") | plain.filter(lambda text: text.strip().lower() not in ("null", "none")),
    "either": st.integers(-99, 99).map(str) | st.sampled_from(["abc", "", "1.5x"]),
    "new": st.sampled_from(["12", "true", "word", "[1, 2]", "12abc"]),
}


@st.composite
def answers(draw: st.DrawFn) -> str:
    """What a model writes: in either form, with text and stray ends between calls."""
    space = draw(st.sampled_from(["", "\n"]))
    parts = [draw(plain)]
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(NAMES))
        allowed: Mapping[str, Any] = {"get_it": values, "mcp__x-y.z": {"text": strings}, "nothing": {}}[name]
        keys = draw(st.lists(st.sampled_from(sorted(allowed)), unique=True, max_size=5)) if allowed else []
        pairs = [(key, draw(allowed[key])) for key in keys]
        body = "".join(f"<arg_key>{key}</arg_key>{space}<arg_value>{value}</arg_value>{space}" for key, value in pairs)
        parts += [f"<tool_call>{name}{space}{body}</tool_call>", draw(st.sampled_from(["", "\n", " and ", "</think>"]))]
    return "".join(parts)


@settings(max_examples=300, deadline=None)
@given(answers(), plain, st.sampled_from([None, "\n<think>", ""]), st.integers(1, 7), st.booleans())
def test_what_glm_writes_is_read_alike(
    answer: str, thought: str, opening: str | None, size: int, forgets_to_close: bool
) -> None:
    reasons = opening is not None
    closing = "" if forgets_to_close and answer.lstrip().startswith("<tool_call>") else "</think>\n"
    text = f"{opening}{thought}{closing}{answer}" if reasons else answer
    found = parse([text[start : start + size] for start in range(0, len(text), size)], TOOLS, reasons=reasons)
    reasoning, content, calls = reference(text, reasons=reasons)
    assert (found.reasoning, "".join(found.content.split())) == (reasoning, content)
    assert found.values == calls
