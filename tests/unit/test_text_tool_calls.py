"""The groups of edge cases of GLM's tool calls (numbers: docs' list of what other parsers got wrong). Every text is
parsed whole, character by character and in pieces of every size up to twelve."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from answers import Parsed, parse, pieces, tool

STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
WEATHER = tool("get_weather", {"city": STRING, "days": INTEGER})
NOW = tool("get_time", {})


def every_way(text: str, tools: list[dict[str, Any]], **options: Any) -> Parsed:
    whole = parse([text], tools, **options)
    for size in range(1, 13):
        assert parse(pieces(text, size), tools, **options) == whole, f"pieces of {size}"
    return whole


def call(name: str, *pairs: tuple[str, str], form: str = "b") -> str:
    newline = "\n" if form == "a" else ""
    body = "".join(f"<arg_key>{key}</arg_key>{newline}<arg_value>{value}</arg_value>{newline}" for key, value in pairs)
    return f"<tool_call>{name}{newline}{body}</tool_call>"


def one_value(value: str, schema: Any, **root: Any) -> Any:
    found = every_way(call("f", ("x", value)), [tool("f", {"x": schema}, **root)])
    [(_, arguments)] = found.values
    return arguments["x"]


@pytest.mark.parametrize("text", ["plain", "  spaces kept \n", "a < b > c", "<tool", "<tool_call", "x<", "\n \n"])
def test_1_content_without_calls_is_untouched(text: str) -> None:
    whole = every_way(text, [WEATHER])
    assert (whole.content, whole.calls) == (text.lstrip("\n"), ())  # the format's own newlines go with the reasoning


@pytest.mark.parametrize("text", ["<tool_call>get_time</tool_call>", "<tool_call>get_time\n</tool_call>"])
def test_2_a_call_without_arguments_is_an_empty_object_once(text: str) -> None:
    assert every_way(text, [NOW]).calls == (("get_time", "{}"),)


@pytest.mark.parametrize("form", ["a", "b"])
def test_3_one_call_in_either_form(form: str) -> None:
    whole = every_way(call("get_weather", ("city", "Beijing"), ("days", "3"), form=form), [WEATHER])
    assert whole.calls == (("get_weather", '{"city": "Beijing", "days": 3}'),)


def test_3_newlines_may_be_mixed() -> None:
    text = "<tool_call>get_weather<arg_key>city</arg_key>\n\n <arg_value>X</arg_value><arg_key>days</arg_key>\n"
    assert every_way(text + "<arg_value>1</arg_value>\n\n</tool_call>", [WEATHER]).values == [
        ("get_weather", {"city": "X", "days": 1})
    ]


@pytest.mark.parametrize("between", ["", "\n", "\n\n  "])
def test_4_two_calls_in_a_row(between: str) -> None:
    text = call("get_weather", ("city", "A")) + between + call("get_weather", ("city", "B"))
    whole = every_way(text, [WEATHER])
    assert whole.values == [("get_weather", {"city": "A"}), ("get_weather", {"city": "B"})]
    assert whole.content == ""


def test_5_text_around_calls_is_content_and_white_space_is_not() -> None:
    assert every_way("Sure.\n\n" + call("get_time") + "\n", [NOW]).content == "Sure."
    assert every_way(" \n" + call("get_time"), [NOW]).content == ""
    assert every_way(call("get_time") + "\n\nafter", [NOW]).content == "after"
    whole = every_way("one " + call("get_time") + " two " + call("get_time") + "\nthree", [NOW])
    assert (whole.content, len(whole.calls)) == ("one two\nthree", 2)


def test_6_white_space_in_values_is_kept() -> None:
    value = "  indented\n\tmore \n"
    assert one_value(value, STRING) == value


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("5", "integer", 5),
        ("-7", "integer", -7),
        ("5.0", "integer", 5),
        ("3.25", "number", 3.25),
        ("1e3", "number", 1000),
        ("-2.5e-1", "number", -0.25),
        ("4.0", "number", 4),
        ("true", "boolean", True),
        ("False", "boolean", False),
        ("null", "null", None),
        ("[1, 2]", "array", [1, 2]),
        ('{"a": {"b": [1]}}', "object", {"a": {"b": [1]}}),
        ("", "string", ""),
        ("", "number", ""),
        ("inf", "number", "inf"),
        ("NaN", "number", "NaN"),
        ("1e999", "number", "1e999"),
        ("abc", "integer", "abc"),
        ("{broken", "object", "{broken"),
    ],
)
def test_7_types(text: str, kind: str, value: Any) -> None:
    found = one_value(text, {"type": kind})
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["123", "123_456", "007", "true", '{"a":1}', "null", '"quoted"', "1.0"])
def test_8_a_declared_string_stays_what_it_is(text: str) -> None:
    assert one_value(text, STRING) == text


def test_8_underscores_and_leading_zeros_are_no_surprise() -> None:
    assert one_value("123_456", INTEGER) == "123_456"
    assert one_value("007", INTEGER) == 7
    assert one_value("null", {"type": ["string", "null"]}) is None
    assert one_value('"null"', {"type": ["string", "null"]}) == '"null"'


@pytest.mark.parametrize(
    ("text", "value"), [("123", 123), ("1.5", 1.5), ("true", True), ("hello", "hello"), ("123abc", "123abc")]
)
def test_9_without_a_schema_json_if_it_is_json(text: str, value: Any) -> None:
    for tools in ([tool("f")], [tool("f", {})], [tool("other")], [{"type": "function", "function": {"name": "f"}}]):
        found = every_way(call("f", ("x", text)), tools)
        assert found.values == [("f", {"x": value})]


def test_10_escaped_json_and_backslashes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert one_value('[{\\"id\\": \\"1\\"}]', {"type": "array"}) == [{"id": "1"}]
        assert one_value('"[1, 2]"', {"type": "array"}) == [1, 2]
        assert one_value("C:\\new\\table\\d", STRING) == "C:\\new\\table\\d"
        assert one_value("a\\nb", STRING) == "a\\nb"
        assert one_value("\\d+\\.", {}) == "\\d+\\."


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("{'a': 1, 'b': True, 'c': None}", {"type": "object"}, {"a": 1, "b": True, "c": None}),
        ("\n['it\\'s', \"x\", (1, 2)] ", {"type": "array"}, ["it's", "x", [1, 2]]),
        ("{1: 'a'}", {"type": "object"}, {"1": "a"}),
        ("['\\d']", {"type": ["array", "null"]}, ["\\d"]),
        ("{'a': 1}", {"type": ["object", "string"]}, {"a": 1}),
    ],
)
def test_10_python_literals_are_objects_and_arrays(text: str, schema: Any, value: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert one_value(text, schema) == value


@pytest.mark.parametrize(
    ("text", "schema"),
    [
        ("{'a': 1}", {"type": "array"}),
        ("['a']", {"type": "object"}),
        ("{'a': 1}", {"type": "string"}),
        ("{'a': 1}", {}),
        ("{'a', 'b'}", {"type": "object"}),
        ("[b'x']", {"type": "array"}),
        ("['a', 1e999]", {"type": "array"}),
        ("[open('x')]", {"type": "array"}),
        ("[" * 5_000, {"type": "array"}),
        ("[" + "-" * 5_000 + "1]", {"type": "array"}),
        ("['" + "x" * 200_000 + "']", {"type": "array"}),
    ],
)
def test_10_what_is_no_such_literal_stays_text(text: str, schema: Any) -> None:
    found = parse([call("f", ("x", text))], [tool("f", {"x": schema})])
    assert found.values == [("f", {"x": text})]


def test_11_unicode_is_not_escaped() -> None:
    found = every_way(call("get_weather", ("city", "北京 Zürich 🌦️")), [WEATHER])
    assert found.calls == (("get_weather", '{"city": "北京 Zürich 🌦️"}'),)


def test_12_html_entities_stay() -> None:
    assert one_value("a &lt;/arg_value&gt; &amp; b", STRING) == "a &lt;/arg_value&gt; &amp; b"


@pytest.mark.parametrize(
    "value",
    [
        '<b class="x">&\n',
        "<tool_call>g</tool_call>",
        "</arg_valu",
        "</tool_call></think>x",
        "</think> <think>",
        "<arg_key>k</arg_key>",
    ],
)
def test_13_markup_in_values(value: str) -> None:
    assert one_value(value, STRING) == value
    assert every_way(
        "<think>hm</think>" + call("f", ("x", value)), [tool("f", {"x": STRING})], reasons=True
    ).values == [("f", {"x": value})]


def test_14_a_lone_bracket_is_released() -> None:
    assert every_way("if a < b and b <tool> c", [NOW]).content == "if a < b and b <tool> c"
    parsed = parse(["a <", " b"], [NOW])
    assert parsed.content == "a < b"


def test_15_and_16_strings_stream_and_numbers_wait() -> None:
    from glmlocal.text.tool_calls import ToolCallDelta, ToolCallParser, ToolCallStart

    parser = ToolCallParser([WEATHER])
    assert parser.push("<tool_call>get_weather<arg_key>city</arg_key>") == [ToolCallStart(0, "get_weather")]
    assert parser.push("<arg_value>Zü") == [ToolCallDelta(0, '{"city": "'), ToolCallDelta(0, "Zü")]
    assert parser.push('ri"ch') == [ToolCallDelta(0, 'ri\\"ch')]
    assert parser.push("</arg_value><arg_key>days</arg_key><arg_value>1") == [ToolCallDelta(0, '"')]
    assert parser.push("2") == []
    assert parser.push("</arg_value>") == [ToolCallDelta(0, ', "days": 12')]


CUT = call("get_weather", ("city", "Beijing"), ("days", "3"))


@pytest.mark.parametrize("length", range(len("<tool_call>get"), len(CUT)))
def test_17_a_cut_off_call_is_never_a_whole_one(length: int) -> None:
    whole = every_way(CUT[:length], [WEATHER], truncated=True)
    assert whole.raw == ()
    assert whole.content == ""


def test_17_a_model_that_ends_its_turn_in_a_call_meant_it() -> None:
    for missing, expected in [
        ("</tool_call>", {"city": "Beijing", "days": 3}),
        ("</arg_value></tool_call>", {"city": "Beijing", "days": 3}),
        ("<arg_value>3</arg_value></tool_call>", {"city": "Beijing"}),
        ("<arg_key>days</arg_key><arg_value>3</arg_value></tool_call>", {"city": "Beijing"}),
    ]:
        assert every_way(CUT.removesuffix(missing), [WEATHER]).values == [("get_weather", expected)], missing
    assert every_way("<tool_call>get_time", [NOW]).calls == (("get_time", "{}"),)


def test_18_an_unknown_function_is_called_and_no_name_is_content() -> None:
    assert every_way(call("nope", ("x", "1")), [WEATHER]).values == [("nope", {"x": 1})]
    for text in ("<tool_call></tool_call>", "<tool_call>two words</tool_call>", '<tool_call>{"name": "f"}</tool_call>'):
        whole = every_way(text, [WEATHER])
        assert (whole.calls, whole.content) == ((), text)


def test_19_a_key_without_a_value_is_dropped() -> None:
    text = (
        "<tool_call>f<arg_key>a</arg_key><arg_key>b</arg_key><arg_value>2</arg_value><arg_key>c</arg_key></tool_call>"
    )
    assert every_way(text, [tool("f")]).values == [("f", {"b": 2})]
    assert every_way("<tool_call>f<arg_key> k <arg_value>1</arg_value></tool_call>", [tool("f")]).values == [
        ("f", {"k": 1})
    ]


def test_20_suppressed_calls_leave_nothing() -> None:
    whole = every_way("before" + call("get_time") + " after", [NOW], suppress=True)
    assert (whole.calls, whole.content) == ((), "before after")


def test_21_of_duplicate_keys_the_last_wins() -> None:
    found = every_way(call("f", ("x", "1"), ("x", "2")), [tool("f", {"x": INTEGER})])
    assert found.values == [("f", {"x": 2})]


def test_22_a_stray_end_is_removed() -> None:
    assert every_way("a</tool_call>b", [NOW]).content == "ab"


def test_23_nothing_carries_over_to_the_next_call() -> None:
    text = call("f", ("x", "1"), ("y", "a")) + call("f") + call("f", ("y", "b"))
    assert [value for _, value in every_way(text, [tool("f")]).values] == [{"x": 1, "y": "a"}, {}, {"y": "b"}]


def test_24_a_call_inside_the_reasoning_ends_it() -> None:
    whole = every_way("<think>I look" + call("get_time"), [NOW], reasons=True)
    assert (whole.reasoning, whole.content, whole.calls) == ("I look", "", (("get_time", "{}"),))


def test_25_one_chunk_with_the_end_of_a_call_and_the_beginning_of_the_next() -> None:
    text = call("get_weather", ("city", "A")) + call("get_weather", ("city", "B"))
    middle = text.index("</arg_value>")
    parsed = parse([text[:middle], text[middle:]], [WEATHER])
    assert parsed.values == [("get_weather", {"city": "A"}), ("get_weather", {"city": "B"})]


def test_25_a_call_that_was_not_closed_ends_with_the_next() -> None:
    text = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>A</arg_value><tool_call>get_time</tool_call>"
    assert every_way(text, [WEATHER, NOW]).values == [("get_weather", {"city": "A"}), ("get_time", {})]


@pytest.mark.parametrize("name", ["browser.search", "mcp__x__y", "kebab-case", "ns:tool", "a/b"])
def test_26_names_with_dots_and_dashes(name: str) -> None:
    assert every_way(call(name, form="a"), [tool(name)]).calls == ((name, "{}"),)


DEFS = {"$defs": {"num": INTEGER, "a/b~c": {"type": "boolean"}, "loop": {"$ref": "#/$defs/loop"}}}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"anyOf": [INTEGER, STRING]}, "5", 5),
        ({"anyOf": [INTEGER, STRING]}, "five", "five"),
        ({"oneOf": [{"type": "null"}, STRING]}, "null", None),
        ({"oneOf": [{"type": "array"}, {"type": "null"}]}, "[1]", [1]),
        ({"allOf": [INTEGER, {"minimum": 1}]}, "5", 5),
        ({"$ref": "#/$defs/num"}, "5", 5),
        ({"$ref": "#/$defs/a~1b~0c"}, "true", True),
        ({"$ref": "#/$defs/loop"}, "5", 5),
        ({"$ref": "#/nowhere"}, "5", 5),
        ({"$ref": "https://elsewhere/x"}, "5", 5),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2, "auto"]}, "2", 2),
        ({"enum": [1, 2, "auto"]}, "auto", "auto"),
        ({"const": True}, "true", True),
        ({"const": "true"}, "true", "true"),
        ({"type": ["integer", "string"]}, "12", 12),
        ({"type": "string", "nullable": True}, "null", None),
        ({"properties": {"k": STRING}}, '{"k": "v"}', {"k": "v"}),
        ({"type": "array", "items": {"$ref": "#/$defs/num"}}, "[1]", [1]),
    ],
)
def test_27_schemas(schema: Any, text: str, value: Any) -> None:
    found = one_value(text, schema, **DEFS)
    assert found == value
    assert type(found) is type(value)


def test_27_the_discriminator_of_a_union_may_come_after_the_value() -> None:
    branches = [
        {"properties": {"kind": {"const": "text"}, "value": STRING}},
        {"properties": {"kind": {"const": "count"}, "value": INTEGER}},
    ]
    union = [tool("f", None, oneOf=branches)]
    for kind, value in (("text", "5"), ("count", 5)):
        for pairs in ((("value", "5"), ("kind", kind)), (("kind", kind), ("value", "5"))):
            [(_, found)] = every_way(call("f", *pairs), union).values
            assert found == {"kind": kind, "value": value}


def test_27_additional_properties_and_nested_tools() -> None:
    assert every_way(call("f", ("anything", "5")), [tool("f", {}, additionalProperties=STRING)]).values == [
        ("f", {"anything": "5"})
    ]
    bare = {"name": "f", "parameters": {"properties": {"x": STRING}}}  # without "function" around it
    assert every_way(call("f", ("x", "5")), [bare]).values == [("f", {"x": "5"})]


def test_a_hostile_schema_is_read_in_no_time() -> None:
    wide: dict[str, Any] = {"type": "object"}
    for _ in range(40):
        wide = {"anyOf": [wide, wide], "allOf": [wide, wide]}
    found = parse([call("f", ("x", "1"))], [{"name": "f", "parameters": wide}])
    assert found.values == [("f", {"x": 1})]


def test_what_a_call_was_is_reported_as_it_was() -> None:
    text = '<tool_call>f\n<arg_key> a</arg_key><arg_value>{ "b":1 }</arg_value>\n\n</tool_call>'
    assert every_way("x" + text, [tool("f")]).raw == (text,)


# Where to look for a group of section 6 of the GLM reference: the tests' names begin with its number; the group that
# has no test of its own is what every test of this module does.
GROUPS = {number: f"test_{number}_" for number in range(1, 28)} | {16: "test_15_and_16_"}


def test_every_group_has_its_test() -> None:
    assert [number for number, name in GROUPS.items() if not any(test.startswith(name) for test in globals())] == []
