from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from glmlocal.errors import CheckpointError, RequestError
from glmlocal.text import template_meter
from glmlocal.text.chat_template import ChatTemplate, chat_template_from_gguf, load_chat_template
from glmlocal.text.template_meter import MAX_VALUE
from glmlocal.text.template_sandbox import MAX_SOURCE_CHARS

HI = [{"role": "user", "content": "hi"}]


def render(source: str, messages: Any = HI, **kwargs: Any) -> str:
    return ChatTemplate(source).render(messages, **kwargs)


def test_a_template_file_comes_before_the_config(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "from config"}))
    assert load_chat_template(tmp_path) == "from config"
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert load_chat_template(tmp_path) == "from file"
    (tmp_path / "chat_template.jinja").write_text(" \n")
    assert load_chat_template(tmp_path) is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("", None),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
    ],
)
def test_forms_of_the_config_entry(value: object, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    assert load_chat_template(tmp_path) == expected
    assert chat_template_from_gguf({"tokenizer.chat_template": value}) == expected


@pytest.mark.parametrize(
    "value", [3, {"default": "x"}, [{"name": "rag", "template": "x"}], [{"name": "default", "template": 3}]]
)
def test_other_forms_are_refused(value: object, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json has .*chat.template"):
        load_chat_template(tmp_path)
    with pytest.raises(CheckpointError, match="the GGUF file has"):
        chat_template_from_gguf({"tokenizer.chat_template": value})


def test_gguf_without_a_template_is_a_base_model() -> None:
    assert chat_template_from_gguf({}) is None


def test_variables_of_a_template() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{{ x }}{{ tools }}{{ documents }}{{ add_generation_prompt }}", {"bos_token": "B"}
    )
    assert template.render(HI, x={"a": [1]}) == "B{'a': [1]}NoneNoneTrue"
    assert template.render(HI, tools=[], add_generation_prompt=False) == "BNoneNoneFalse"
    assert template.render(HI, tools=[{"a": 1}]) == "B[{'a': 1}]NoneTrue"


@pytest.mark.parametrize(
    ("source", "supports", "can_disable"),
    [
        ("{{ messages }}", False, False),
        ("<think>", True, False),
        ("{% if enable_thinking %}{% endif %}", True, True),
    ],
)
def test_what_a_template_knows_of_thinking(source: str, supports: bool, can_disable: bool) -> None:
    template = ChatTemplate(source)
    assert (template.supports_thinking, template.can_disable_thinking) == (supports, can_disable)


def test_a_template_refuses_in_its_own_words() -> None:
    with pytest.raises(
        RequestError, match=r"refuses these messages: roles must \[31m alternate, found user twice$"
    ) as caught:
        render("{{ raise_exception('roles must\n\x1b[31m alternate, found ' ~ messages[0].role ~ ' twice') }}")
    assert "\x1b" not in str(caught.value)
    with pytest.raises(RequestError, match="'dict object' has no attribute 'nope'"):
        render("{{ messages[0].nope.deeper }}")
    with pytest.raises(RequestError, match="refuses these messages"):
        render("{{ messages[0].content.items() }}")


def test_bad_arguments_of_render_are_request_errors() -> None:
    template = ChatTemplate("{{ messages }}")
    with pytest.raises(RequestError, match="tools must be a list"):
        template.render(HI, tools={"a": 1})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="x holds a object"):
        template.render(HI, x=object())
    with pytest.raises(RequestError, match="x holds a NUL"):
        template.render(HI, x="\0")
    with pytest.raises(RequestError, match=f"too large to render: over {MAX_VALUE // 10**6} MB"):
        template.render([{"role": "user", "content": "x" * (MAX_VALUE + 1)}])


def test_a_long_conversation_is_no_attack() -> None:
    """The budget is for templates that multiply, not for users who have much to say."""
    source = (
        "{% for m in messages %}{% if loop.index0 < messages | length - 1 and m.content is string %}"
        "<{{ m.role }}>{{ m.content.strip().replace('a', 'a') + '' }}{{ m.content.split('</think>')[-1] | trim }}"
        "{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "a" * 800}] * 4000
    assert len(render(source, messages)) == 3999 * 1606
    assert render("{{ messages[0].content }}", [{"role": "user", "content": "ü" * 4_000_000}]) == "ü" * 4_000_000


def test_the_budget_grows_with_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_meter, "MAX_WORK", 1000)
    source = "{% for m in messages %}{{ m.content | trim }}{% endfor %}"
    assert render(source, HI * 1000) == "hi" * 1000


def test_templates_render_in_several_threads_at_once() -> None:
    template = ChatTemplate("{% for i in range(2000) %}{{ messages[0].content }}{% endfor %}")
    results: dict[int, str] = {}

    def work(number: int) -> None:
        results[number] = template.render([{"role": "user", "content": str(number)}])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: str(number) * 2000 for number in range(8)}


def test_text_needs_neither_torch_nor_transformers() -> None:
    modules = ("chat_template", "detokenizer", "generation_config", "messages", "stop", "stream_parser", "tokenizer")
    imports = ", ".join(f"glmlocal.text.{module}" for module in modules)
    code = f"import sys, {imports}; sys.exit(bool({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


NESTED = "{% for a in range(100000) %}{% for b in range(100000) %}", "{% endfor %}{% endfor %}"
DOUBLED = (
    "{% set ns = namespace(s='0123456789abcdef') %}{% for i in range(18) %}{% set ns.s = ns.s + ns.s %}{% endfor %}"
)
TWINS = (  # two equal lists of 2^18 items each, made of 17 lists of two
    "{% set ns = namespace(a=[1], b=[1], t=(1,)) %}{% for i in range(17) %}{% set ns.a = [ns.a, ns.a] %}"
    "{% set ns.b = [ns.b, ns.b] %}{% set ns.t = (ns.t, ns.t) %}{% endfor %}"
)
EACH = "{% for i in range(100000) %}", "{% endfor %}"

ENDLESS = {
    "loops": NESTED[0] + NESTED[1],
    "filtered loops": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
    "calls": "{% macro f() %}{{ caller() }}{% endmacro %}{% call f() %}" + NESTED[0] + NESTED[1] + "{% endcall %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "blocks": "{% block a %}{{ self.a() }}{% endblock %}",
    "loop calls": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "comparisons": f"{TWINS}{EACH[0]}{{% if ns.a == ns.b %}}{{% endif %}}{EACH[1]}",
    "membership": f"{TWINS}{EACH[0]}{{% if ns.a in [ns.b] %}}{{% endif %}}{EACH[1]}",
    "tests": f"{TWINS}{EACH[0]}{{% if ns.a is eq(ns.b) %}}{{% endif %}}{EACH[1]}",
    "hashes": f"{TWINS}{EACH[0]}{{{{ messages[0][ns.t] }}}}{EACH[1]}",
    "hashed keys": f"{TWINS}{EACH[0]}{{% set d = {{ns.t: 1}} %}}{EACH[1]}",
    "hashed arguments": f"{TWINS}{EACH[0]}{{{{ messages[0].get(ns.t) }}}}{EACH[1]}",
    "changes": f"{TWINS}{EACH[0]}{{{{ loop.changed(ns.a if i % 2 else ns.b) }}}}{EACH[1]}",
    "sorting": f"{{% set x = range(30000) | list %}}{EACH[0]}{{% set y = x | sort %}}{EACH[1]}",
    "extremes": f"{{% set x = range(30000) | list %}}{EACH[0]}{{% set y = x | max %}}{EACH[1]}",
    "json": f"{TWINS}{EACH[0]}{{% set x = ns.a | tojson %}}{EACH[1]}",
    "search": f"{DOUBLED}{EACH[0]}{{% set x = ns.s.find('z') %}}{EACH[1]}",
    "substrings": f"{DOUBLED}{EACH[0]}{{% if 'zz' in ns.s %}}{{% endif %}}{EACH[1]}",
    "maps": f"{EACH[0]}{{% set x = range(100000) | map('string') | list %}}{EACH[1]}",
    "growing lists": "{% set ns = namespace(x=[]) %}" + NESTED[0] + "{% set ns.x = ns.x + [a] %}" + NESTED[1],
    "cyclers": "{% set c = cycler(1, 2) %}" + NESTED[0] + "{% set x = c.next() %}" + NESTED[1],
    "ranges": "{% for i in range(10000000000) %}{% endfor %}",
}
HUGE = {
    "doubling": "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "joining": "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "product": "{{ 'a' * 1000000000 }}",
    "left product": "{{ 1000000000 * 'a' }}",
    "list product": "{{ [1] * 1000000000 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "squaring": "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "center": "{{ 'a' | center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "star width": "{{ '%*d' % (1000000000, 1) }}",
    "format width": "{{ '{:1000000000}'.format(1) }}",
    "nested width": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format_map": "{{ '{0:>1000000000}'.format_map({}) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "many fields": DOUBLED + "{{ ('{0}' * 90000).format(ns.s) }}",
    "time": "{{ strftime_now('%1000000d') }}",
    "replace": DOUBLED + "{{ ns.s.replace('a', ns.s) }}",
    "replace nothing": DOUBLED + "{{ ns.s.replace('', ns.s) }}",
    "replace filter": DOUBLED + "{{ ns.s | replace('a', ns.s) }}",
    "join": DOUBLED + "{{ ns.s.join(ns.s) }}",
    "join filter": DOUBLED + "{{ range(100000) | join(ns.s) }}",
    "indent": DOUBLED + "{{ ('\n' * 1000000) | indent(1000000) }}",
    "round": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "sum": "{% set x = [[1] * 1000] * 1000 %}{{ x | sum(start=[]) }}",
    "shared lists": "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}"
    "{{ ns.a }}",
    "shared json": "{% set ns = namespace(a=1) %}{% for i in range(60) %}{% set ns.a = {1: ns.a, 2: ns.a} %}"
    "{% endfor %}"
    "{{ ns.a | tojson }}",
    "literal text": "{% macro m() %}" + NESTED[0] + "x" * 9999 + NESTED[1] + "{% endmacro %}{{ m() }}",
    "set block": "{% set x %}" + NESTED[0] + "x" * 9999 + NESTED[1] + "{% endset %}",
    "output": "{% set x = 'x' * 999999 %}{% macro m() %}"
    + NESTED[0]
    + "{{ x }}"
    + NESTED[1]
    + "{% endmacro %}{{ m() }}",
    "hoard": DOUBLED + EACH[0] + "{% set ns.l = [ns.l, ns.s.upper()] %}" + EACH[1],
}


@pytest.fixture
def small_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests want to see where templates are stopped, not how long the whole budget lasts."""
    monkeypatch.setattr(template_meter, "MAX_WORK", template_meter.MAX_WORK // 20)


@pytest.mark.usefixtures("small_budget")
@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_an_endless_template_is_stopped(source: str) -> None:
    start_s = time.process_time()
    with pytest.raises(CheckpointError, match=r"stopped: (it does not come to an end|max.*recursion|Range)") as caught:
        render(source)
    assert time.process_time() - start_s < 3  # 0.1 s
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", HUGE.values(), ids=HUGE)
def test_a_template_that_wants_the_memory_is_stopped(source: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"stopped: (it makes|it formats)") as caught:
            render(source)
        assert tracemalloc.get_traced_memory()[1] < 400e6
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["[" + "i, " * 200 + "]", "(" + "i, " * 200 + ")", "big[1:]", "big + big"])
def test_what_is_hoarded_is_paid_for(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_meter, "MAX_CHARS", 3_000_000)
    source = "{% set ns = namespace(l=0) %}{% set big = range(200) | list %}"
    with pytest.raises(CheckpointError, match="it makes too much text"):
        render(source + EACH[0] + "{% set ns.l = [ns.l, " + value + "] %}" + EACH[1])


@pytest.mark.parametrize("name", ["loops", "macros", "json"])
def test_the_whole_budget_is_seconds(name: str) -> None:
    start_s = time.process_time()
    with pytest.raises(CheckpointError, match="the chat template was stopped: "):
        render(ENDLESS[name])
    assert time.process_time() - start_s < 10  # about 1 s


def test_a_template_is_stopped_in_any_thread() -> None:
    caught: list[BaseException] = []

    def work() -> None:
        try:
            render(ENDLESS["recursion"])
        except CheckpointError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=60)
    assert len(caught) == 1


@pytest.mark.parametrize(
    "source", ["{% set x = 'a' | center(1000000000) %}", "{% autoescape 'a'.ljust(10 ** 9) %}{% endautoescape %}"]
)
def test_nothing_runs_at_compile_time(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"stopped|compiled"):
        ChatTemplate(source).render(HI)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{{ (5).to_bytes(1000000000, 'big') }}",
        "{{ 'a'.encode() }}",
        "{{ namespace(_x=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    ],
)
def test_forbidden_things_are_the_templates_fault(source: str) -> None:
    with pytest.raises(CheckpointError, match="does what it must not"):
        render(source)


@pytest.mark.parametrize(
    "source", ["{{ raise_exception.__globals__ }}", "{{ '' | attr('__class__') }}", "{{ '{0.__class__}'.format('') }}"]
)
def test_the_way_out_of_the_sandbox_is_undefined(source: str) -> None:
    assert render(source) == ""


def test_what_has_no_place_in_a_prompt_is_missing() -> None:
    assert render("{{ lipsum is defined }}") == "False"


def test_a_namespace_does_not_print_its_contents() -> None:
    assert render("{{ namespace(a=1) }}") == "<Namespace>"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "cannot be read: line 1"),
        ("\n{{ 'a' | urlize }}", "cannot be read: line 2: No filter named 'urlize'"),
        ("{% include '/etc/passwd' %}", "cannot load another template"),
        ("{% import 'x' as x %}", "cannot load another template"),
        ("{% extends 'x' %}", "cannot load another template"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "cannot be compiled"),
        ("{{ " + "9" * 5000 + " }}", "cannot be compiled"),
        ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "cannot be compiled"),
        ("x" * (MAX_SOURCE_CHARS + 1), f"at most {MAX_SOURCE_CHARS} are run"),
    ],
)
def test_unusable_sources_are_one_line(source: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        ChatTemplate(source)
    assert "\n" not in str(caught.value)
