from __future__ import annotations

import json
import random
from typing import Any

import pytest

import scripted
from answers import parse, tool
from glmlocal.engine.grammar import GrammarCompiler
from glmlocal.engine.request import Grammar
from glmlocal.server.errors import ApiError
from glmlocal.server.generation import ToolUse
from glmlocal.server.raw_calls import RawCalls, unmark, with_marks
from glmlocal.server.tool_grammar import answer_grammar

TOOLS = [
    tool(
        "get_weather",
        {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"enum": ["C", "F"]},
            "where": {"$ref": "#/$defs/place"},
        },
        required=["city", "days", "where"],
        **{"$defs": {"place": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}}},
    ),
    tool("now", {}),
    tool("free"),
]
PLACE_IS_CLOSED = {"additionalProperties": False}
TOOLS[0]["function"]["parameters"]["$defs"]["place"] |= PLACE_IS_CLOSED


def generated(grammar: Grammar, seed: int) -> str | None:
    """What a model without a will writes under the grammar; None where it found no end."""
    tokenizer = scripted.tokenizer()
    eos = tokenizer.token_to_id("<|user|>")
    assert eos is not None
    constraint = GrammarCompiler(tokenizer, tokenizer.vocab_size, [eos]).compile(grammar)
    likely = {tokenizer.token_to_id(tag) for tag in ("</arg_value>", "</arg_key>", "</tool_call>")} | {eos}
    likely |= {tokenizer.token_to_id(char) for char in '"}ae1'}
    dice, ids = random.Random(seed), []
    for _ in range(600):
        mask = constraint.allowed()
        assert mask is not None
        allowed = [int(id_) for id_ in mask.nonzero()[0]]
        favoured = [id_ for id_ in allowed if id_ in likely]
        token = dice.choice(favoured if favoured and dice.random() < 0.8 else allowed)
        if token == eos:
            return tokenizer.decode(ids)
        ids.append(token)
        if constraint.accept(token):
            return tokenizer.decode(ids)
    return None


def texts(grammar: Grammar, count: int = 8) -> list[str]:
    found = [text for seed in range(count) if (text := generated(grammar, seed)) is not None]
    assert len(found) > count // 2
    return found


def test_required_calls_are_calls_of_the_tools_with_their_types() -> None:
    grammar = answer_grammar(None, ToolUse(TOOLS, "required"), scripted.tokenizer())
    assert grammar is not None
    names = set()
    for text in texts(grammar, 16):
        parsed = parse([text], TOOLS)
        assert parsed.calls
        assert parsed.content == ""
        for name, arguments in parsed.values:
            names.add(name)
            if name == "get_weather":
                assert {"city", "days", "where"} <= set(arguments) <= {"city", "days", "where", "unit"}
                assert isinstance(arguments["days"], int)
                assert isinstance(arguments["where"]["a"], bool)
                assert arguments.get("unit", "C") in ("C", "F")
            if name == "now":
                assert arguments == {}
    assert len(names) > 1


def test_a_named_function_is_called_once() -> None:
    grammar = answer_grammar(None, ToolUse(TOOLS, "required", "now"), scripted.tokenizer())
    assert grammar is not None
    assert [parse([text], TOOLS).calls for text in texts(grammar)] == [(("now", "{}"),)] * len(texts(grammar))


def test_a_format_beside_tools_is_kept_or_a_call_is_made() -> None:
    schema = {"type": "object", "properties": {"k": {"enum": [1]}}, "required": ["k"], "additionalProperties": False}
    grammar = answer_grammar(Grammar("json_schema", json.dumps(schema)), ToolUse(TOOLS), scripted.tokenizer())
    assert grammar is not None
    kinds = set()
    for text in texts(grammar, 16):
        parsed = parse([text], TOOLS)
        kinds.add(bool(parsed.calls))
        if not parsed.calls:
            assert json.loads(text) == {"k": 1}
    assert kinds == {True, False}


def test_without_tokens_for_calls_none_can_be_required() -> None:
    import tokenizers

    import tiny_text
    from glmlocal.text.tokenizer import Tokenizer

    plain = Tokenizer(tokenizers.Tokenizer.from_str(tiny_text.tokenizer_json("glm4")), vocab_size=900)
    with pytest.raises(ApiError, match="no tokens"):
        answer_grammar(None, ToolUse(TOOLS, "required"), plain)
    assert answer_grammar(None, ToolUse(TOOLS, "auto"), plain) is None


def test_so_many_tools_that_only_their_names_are_a_grammar() -> None:
    wide = [tool(f"f{n}", {f"p{k}": {"type": "object", "title": "x" * 200} for k in range(20)}) for n in range(60)]
    grammar = answer_grammar(None, ToolUse(wide, "required"), scripted.tokenizer())
    assert grammar is not None
    assert "any_pair*" in grammar.source
    assert '"f59"' in grammar.source


def message(call_id: str, name: str, arguments: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": call_id, "function": {"name": name, "arguments": arguments}}],
    }


def test_raw_calls_are_bounded_and_belong_to_their_arguments() -> None:
    calls = RawCalls(max_calls=3, max_chars=100)
    for number in range(5):
        calls.keep(f"c{number}", "f", f'{{"x": {number}}}', f"raw {number}")
    assert [calls.raw(f"c{number}", "f", {"x": number}) for number in range(5)] == [
        None,
        None,
        "raw 2",
        "raw 3",
        "raw 4",
    ]
    assert calls.raw("c4", "g", {"x": 4}) is None
    assert calls.raw("c4", "f", {"x": 5}) is None
    assert calls.raw(None, "f", {"x": 4}) is None
    calls.keep("long", "f", "{}", "y" * 95)
    assert len(calls) == 2  # the oldest went until 100 characters were enough
    calls.keep("longer", "f", "{}", "y" * 101)
    assert len(calls) == 0


def test_marks_are_replaced_only_where_the_template_put_them() -> None:
    calls = RawCalls()
    calls.keep("a", "f", '{"x": 1}', "<tool_call>f RAW A</tool_call>")
    calls.keep("b", "f", '{"x": 2}', "<tool_call>f RAW B</tool_call>")
    given = [message("a", "f", {"x": 1}), message("z", "f", {"x": 9}), message("b", "f", {"x": 2})]
    marked, raw = with_marks(given, calls)
    assert len(raw) == 2
    assert given[0]["tool_calls"][0]["function"]["name"] == "f"  # the caller's is untouched
    template = scripted.model_text("a").chat_template
    assert template is not None
    prompt = unmark(template.render([{"role": "user", "content": "q"}, *marked]), raw)
    assert prompt is not None
    assert prompt.index("RAW A") < prompt.index("<arg_value>9</arg_value>") < prompt.index("RAW B")
    for hostile in (f"<tool_call>{next(iter(raw))}</tool_call>", next(iter(raw))):
        text = template.render([{"role": "user", "content": hostile}, *marked])
        assert unmark(text, raw) is None, "a user's text that looks like a mark is not one"
