"""A jinja2 environment for templates that nobody has vouched for: immutable, sandboxed, and metered.

It renders as transformers' chat-template environment does. jinja2's sandbox keeps a template away from Python, but
lets it run for ever or ask for a terabyte; ``template_meter`` counts what it uses. Why that bounds it: all a template
can do is

1. repeat: loops pay per turn, calls and macros per call;
2. make values: results of operators, filters, methods and literals are paid for by size, and what can exceed the sum
   of its inputs (``*``, ``**``, ``%``, ``replace``, ``join``, widths) is sized *before* it runs;
3. look at values: comparisons, tests and filters pay for all that is reachable. A list that holds a list twice that
   holds a list twice … is weighed as what it would print, and refused.

Whatever is not known to be one of these is not offered: a few filters, and the methods of built-in types except those
that are listed.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from glmlocal.text.template_meter import (
    TemplateOverrun,
    formatted_size,
    guard_filters,
    guard_tests,
    meter,
    pay_method,
    pay_operator,
)

MAX_SOURCE_CHARS = 256 * 1024  # the largest chat template in use is about 30 KB


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Compile and render inside ``metered()``."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=_finalize,
            optimized=False,  # the optimizer would run filters and operators at compile time
        )
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        self.filters = guard_filters({**self.filters, "tojson": _tojson})
        self.filters |= {_TURN: _turn, _LOOK: _look, _MADE: _made, _CONCAT: _concat}
        self.tests.update(guard_tests(self.tests))  # type: ignore[arg-type]  # jinja2 types them without arguments

    def load(self, source: str) -> jinja2.Template:
        """Compile ``source``. Raises whatever jinja2 raises, and TemplateOverrun."""
        tree = self.parse(source)
        for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
            raise jinja2.TemplateSyntaxError("a chat template cannot load another template", node.lineno)
        tree = _Rewriter().visit(tree)
        return self.template_class.from_code(self, self.compile(tree), self.make_globals(None))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter().work(6)
        if isinstance(__obj, types.BuiltinMethodType):
            pay_method(__obj, [*args, *kwargs.values()])
        elif not isinstance(__obj, Macro):  # a macro only binds its arguments
            meter().look(*args, *kwargs.values())
        return meter().made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        pay_operator(operator, left, right)
        return meter().made(super().call_binop(context, operator, left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        meter().work(4)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        meter().work(2)
        if not isinstance(argument, str | int):
            meter().look(argument)  # hashing a tuple reads all of it
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        function = super().wrap_str_format(value)
        if function is None:
            return None

        def guarded(*args: Any, **kwargs: Any) -> str:
            meter().chars(formatted_size(value.__self__, [*args, *kwargs.values()]))
            return function(*args, **kwargs)

        return guarded


# Filters that the rewritten syntax tree uses. A template cannot name them: there is a space in the names.
_TURN, _LOOK, _MADE, _CONCAT = "loop turn", "look at", "made literal", "concat all"


class _Rewriter(NodeTransformer):
    """Adds the payments for what jinja2 has no hook for."""

    def _apply(self, name: str, node: nodes.Expr) -> nodes.Expr:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        num_chars = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        turn = self._apply(_TURN, nodes.Const(num_chars, lineno=node.lineno))
        node.body.insert(0, nodes.ExprStmt(turn, lineno=node.lineno))
        if node.test is not None:  # items that fail it never reach the body
            node.test = nodes.And(turn, node.test, lineno=node.lineno)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self._apply(_LOOK, node.expr)
        for operand in node.ops:
            operand.expr = self._apply(_LOOK, operand.expr)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._apply(_CONCAT, nodes.Tuple(node.nodes, "load", lineno=node.lineno))

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return self._apply(_MADE, node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return self._apply(_MADE, node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return self._apply(_MADE, node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._apply(_MADE, node) if isinstance(node.arg, nodes.Slice) else node


@jinja2.pass_context  # what asks for the context is never run at compile time
def _turn(_: Context, num_literal_chars: int) -> bool:
    meter().work(1)
    meter().chars(num_literal_chars)
    return True


@jinja2.pass_context
def _look(_: Context, value: Any) -> Any:
    meter().look(value)
    return value


@jinja2.pass_context
def _made(_: Context, value: Any) -> Any:
    if isinstance(value, dict):
        meter().look(value)  # its keys have been hashed
    return meter().made(value)


@jinja2.pass_context
def _concat(_: Context, values: tuple[Any, ...]) -> str:
    return "".join([_text(value) for value in values])


@jinja2.pass_context
def _finalize(_: Context, value: Any) -> str:
    return _text(value)


def _text(value: Any) -> str:
    """``str(value)``, paid for before it is made."""
    meter().work(2)
    meter().chars(meter().weight(value))
    return value if isinstance(value, str) else str(value)


class _Namespace(Namespace):
    """As in transformers: no underscores. And no contents when printed: they could refer to each other without end."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args  # so that ``self`` may be an attribute
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template cannot store {name!r} on a namespace")


class _Dict:
    """The global ``dict`` without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Generation(Extension):
    """``{% generation %}…{% endgeneration %}`` marks the assistant's tokens for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(lineno)

    def _body(self, caller: Macro) -> str:
        return caller()


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    if formatted_size(pattern, ()) > 200_000:
        raise TemplateOverrun("it formats the time at too great a length")
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without jinja2's HTML escaping."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
