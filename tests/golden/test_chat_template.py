"""Our template environment against transformers': stored renderings, live ones, and GLM's own templates."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from glmlocal.text.chat_template import ChatTemplate

FIXTURES = Path(__file__).parent / "fixtures" / "chat_template"
STORED = json.loads((FIXTURES / "renderings.json").read_text(encoding="utf-8"))
CONVERSATIONS = json.loads((FIXTURES / "conversations.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_renderings", FIXTURES / "make_renderings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _name(case: dict[str, Any]) -> str:
    return f"{case['template']}-{case['conversation']}-{json.dumps(case['kwargs'])}"


@pytest.mark.parametrize("case", STORED, ids=_name)
def test_stored_renderings_are_reproduced(case: dict[str, Any], maker: ModuleType) -> None:
    template = ChatTemplate((FIXTURES / case["template"]).read_text(encoding="utf-8"), maker.SPECIAL_TOKENS)
    conversation = CONVERSATIONS[case["conversation"]]
    rendered = template.render(conversation["messages"], tools=conversation.get("tools"), **case["kwargs"])
    assert rendered == case["text"]


def test_transformers_still_renders_what_is_stored(maker: ModuleType) -> None:
    assert maker.renderings() == STORED


SNIPPETS = [
    "{{ messages[0].content }}\n{% if true %}\n  x\n  {%- endif %}\n   {% set a = 1 %}\nb",
    "{{ {'é': '<&>'} | tojson }}{{ [1.0, 1e300, 10**20] | tojson }}{{ 'ü' | tojson(ensure_ascii=True) }}",
    "{{ {'b': 1, 'a': 2} | tojson(sort_keys=True, separators=(',', ':')) }}{{ [1, [2]] | tojson(indent=4) }}",
    "{{ dict(a=1, **{'b': 2}) }}{{ dict.fromkeys(['x'], 0) }}{{ namespace(q=3).q }}",
    "{% for a, b in {'x': 1, 'y': 2}.items() %}{{ loop.cycle('o', 'e') }}{{ a ~ b ~ none ~ 1.5 }}{% endfor %}",
    "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{{ loop.depth }}{% endfor %}",
    "{% for x in range(5) if x is odd %}{{ x }}{{ loop.length }}{{ loop.revindex }}"
    "{{ loop.changed(x // 3) }}{% endfor %}",
    "{% macro f(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{{ caller() if caller }}{% endmacro %}"
    "{{ f(1) }}{{ f(1, 3, 4, c=5) }}{% call f(7) %}body{% endcall %}",
    "{% set x %} {{ 'a' | upper }} {% endset %}[{{ x }}]{% filter replace('a', 'b') %}banana{% endfilter %}",
    "{{ messages | map(attribute='role') | list }}{{ messages | groupby('role') | map('first') | list }}",
    "{{ 'a,b,c'.split(',') | map('upper') | join('-') }}{{ 'abc'[::-1] }}{{ 'abc'[1:] }}{{ [1, 2, 3][-2:] }}",
    "{{ '%s and %05.2f' % ('x', 3.14159) }}{{ '{0:>5}{name!r}'.format('é', name='n') }}{{ '%s|%s' | format(1, 2) }}",
    "{{ 'hello world' | title | center(20) | wordcount }}{{ 'x' * 3 }}"
    "{{ [0] * 2 + [1] }}{{ 2 ** 10 % 7 }}{{ -3 // 2 }}",
    "{{ 1 < 2 <= 2 != 3 }}{{ 'a' in 'abc' }}{{ 'z' not in ['a'] }}{{ (1, 2) == (1, 2) }}{{ [3, 1] | sort | first }}",
    "{{ missing }}{{ missing is defined }}{{ missing | default('d') }}"
    "{{ messages[0].nope }}{{ messages[9] is undefined }}",
    "{% set ns = namespace(out=[]) %}{% for m in messages %}"
    "{% set ns.out = ns.out + [m.role[0]] %}{% endfor %}{{ ns.out }}",
    "{% generation %}a{% for i in [1, 2, 3] %}{% if i == 3 %}{% break %}{% endif %}"
    "{{ i }}{% endfor %}{% endgeneration %}",
    "{{ 'text' | safe ~ '<b>' | e }}{{ '<i>' | escape }}"
    "{{ messages[0] | items | list | length }}{{ 3.7 | round | int }}",
    "{% raw %}{{ x }}{% endraw %}{# no #}{%+ if true %} y{% endif %}\n\n{% block t %}z{% endblock %}{{ self.t() }}",
    "{{ [1, 2, 3, 4] | batch(2) | list }}{{ [1, 2, 3] | sum }}{{ [5, 2] | max }}{{ ['a', 'A'] | unique | list }}",
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}"
    "{% set j = joiner('; ') %}{{ j() }}1{{ j() }}2",
]


@pytest.mark.parametrize("source", SNIPPETS)
def test_the_environment_is_that_of_transformers(source: str) -> None:
    messages = CONVERSATIONS["turns"]["messages"]
    theirs = _compile_jinja_template(source).render(messages=messages, tools=None, add_generation_prompt=True)
    assert ChatTemplate(source).render(messages) == theirs


_WEATHER = {
    "name": "get_weather",
    "description": "Wetter für eine Stadt",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
_CALLS = [("get_weather", '{"city": "Zürich", "days": 3}'), ("get_time", "{}")]
# What ../shared/scripts/render_templates.py renders; the arguments as OpenAI clients send them.
_SHARED_CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "simple": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    "multi": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "reasoning": "They greet.", "content": "Hello!"},
        {"role": "user", "content": "2+2?"},
    ],
    "tools": [
        {"role": "user", "content": "Weather in Zürich?"},
        {
            "role": "assistant",
            "reasoning_content": "Call it.",
            "content": None,
            "tool_calls": [
                {"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in _CALLS
            ],
        },
        {"role": "tool", "content": '{"temp": 20}'},
        {"role": "tool", "content": "12:00"},
    ],
}


def test_glm_templates_render_as_recorded(shared_directory: Path) -> None:
    templates = shared_directory / "templates"
    if not (templates / "rendered_examples.md").is_file():
        pytest.skip(f"no rendered examples in {templates}")
    recorded = (templates / "rendered_examples.md").read_text(encoding="utf-8")
    form = r"^## (\S+) \| (\w+) \| ([^\n]*)\n\n```text\n(.*?)\n```\n(?=\n## |\Z)"
    cases = re.findall(form, recorded, re.DOTALL | re.MULTILINE)
    assert len(cases) == recorded.count("\n## ")
    by_name = {path.name: ChatTemplate(path.read_text(encoding="utf-8")) for path in templates.glob("*.jinja")}
    num_compared = 0
    for name, conversation, kwargs, expected in cases:
        if name in by_name:
            tools = [{"type": "function", "function": _WEATHER}] if conversation == "tools" else None
            rendered = by_name[name].render(_SHARED_CONVERSATIONS[conversation], tools=tools, **json.loads(kwargs))
            assert rendered == expected, (name, conversation, kwargs)
            num_compared += 1
    assert num_compared >= 56
