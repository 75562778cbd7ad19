"""What a chat template may use up, and what each filter, test, method and operator costs.

Every step that can repeat or enlarge something is paid for from a budget of *work* (about a microsecond each) and one
of *characters*; when one is used up, TemplateOverrun ends the rendering. Counting instead of timing gives the same
verdict on every machine, in any thread. ``template_sandbox`` says why that is enough.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, Sized, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2.exceptions import SecurityError

MAX_VALUE = 32_000_000  # what one value may weigh
MAX_CHARS = 64_000_000  # characters that one rendering may produce, intermediate results included
MAX_WORK = 2_000_000  # GLM's templates take about 100 per message
_NODE = 32  # weight of an item of a container: what it takes to visit it, in characters read
_CHARS_PER_WORK = 256
_MAX_BITS = 8192  # of an integer


class TemplateOverrun(Exception):
    """A template used up what it may use. The message says which limit it was."""


class Meter:
    """What one rendering may still use. ``allowance`` is the weight of its input: long conversations may cost more."""

    def __init__(self, allowance: int = 0) -> None:
        self._work = MAX_WORK + allowance
        self._chars = MAX_CHARS + 16 * allowance
        # Containers cannot change in the sandbox, so a weight stays true; holding the object keeps its id unique.
        self._weights: dict[int, tuple[object, int]] = {}

    def work(self, amount: int) -> None:
        self._work -= amount
        if self._work < 0:
            raise TemplateOverrun("it does not come to an end")

    def chars(self, amount: int) -> None:
        """Pay for text; before it is made, where that can be told."""
        self._chars -= amount
        if amount > MAX_VALUE or self._chars < 0:
            raise TemplateOverrun("it makes too much text")
        self.work(amount // _CHARS_PER_WORK)

    def weight(self, value: object) -> int:
        """``value`` written out in full: its characters, and ``_NODE`` for each item, however often it is shared."""
        if isinstance(value, str):
            return len(value)
        if isinstance(value, range):
            return _NODE * len(value)
        if not isinstance(value, list | tuple | Mapping):
            return value.bit_length() // 3 + 1 if isinstance(value, int) else 1
        known = self._weights.get(id(value))
        if known is not None:
            return known[1]
        self.work(len(value))
        total = _NODE * (1 + len(value))
        for item in value:
            total += self.weight(item)
            if isinstance(value, Mapping):
                total += self.weight(value[item])
            if total > MAX_VALUE:
                raise TemplateOverrun("it makes a value that is too large")
        self._weights[id(value)] = (value, total)
        return total

    def look(self, *values: object) -> None:
        """Pay for reading all of the values."""
        for value in values:
            self.work(1 + self.weight(value) // _CHARS_PER_WORK)

    def made(self, value: Any) -> Any:
        """Pay for a result whose size was bounded by what went in. Iterators become lists, which can be weighed."""
        if isinstance(value, str):
            self.chars(len(value))
        elif isinstance(value, list | tuple | Mapping):
            self.work(16)  # bounds how many there can be at once
            self.chars(8 * len(value))
        elif isinstance(value, Iterator | KeysView | ValuesView | ItemsView):
            return self.made(list(value))
        elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise TemplateOverrun("it makes a number that is too large")
        return value


_METER: ContextVar[Meter] = ContextVar("template_meter")


def meter() -> Meter:
    """The meter of the rendering, or compilation, under way in this thread."""
    return _METER.get()


def input_weight(value: object) -> int:
    """What the input of a rendering weighs. Raises TemplateOverrun if it is more than a value may."""
    return Meter(MAX_VALUE).weight(value)


@contextmanager
def metered(allowance: int = 0) -> Iterator[None]:
    """What templates do inside is paid from a fresh budget."""
    token = _METER.set(Meter(allowance))
    try:
        yield
    finally:
        _METER.reset(token)


# What may make more than the sum of its inputs, and how much it can come to.


def _widened_size(value: object, args: Iterable[object]) -> int:
    """Widths, indents, precisions, counts: each character of ``value`` may bring all of the arguments with it."""
    weight = meter().weight
    return (1 + weight(value)) * (1 + sum(abs(arg) if isinstance(arg, int) else weight(arg) for arg in args))


def _replaced_size(value: object, old: object, new: object) -> int:
    text = str(value)
    return len(text) + (text.count(str(old)) + 1) * len(str(new))


def _joined_size(separator: object, items: object) -> int:
    weight = meter().weight
    return weight(items) + weight(separator) * (len(items) if isinstance(items, Sized) else 1)


_WIDTH = re.compile(r"[0-9]{4}|\*|:[^}]*\{")  # 1000 and more, or taken from an argument


def formatted_size(pattern: str, args: Iterable[object]) -> int:
    """Of ``%``, ``str.format`` and ``strftime``. Raises TemplateOverrun for a width of 1000 or more."""
    if _WIDTH.search(pattern):
        raise TemplateOverrun("it formats with a width that is too large")
    fields = pattern.count("%") + pattern.count("{")
    return len(pattern) + fields * (1000 + sum(meter().weight(arg) for arg in args))


def pay_operator(operator: str, left: Any, right: Any) -> None:
    """Before ``left operator right`` is computed."""
    meter().work(2)
    if operator == "*":
        for value, count in ((left, right), (right, left)):
            if isinstance(value, str | list | tuple) and isinstance(count, int):
                meter().chars(8 * len(value) * max(count, 0))
    elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
        meter().chars(len(left) + len(right))
    elif operator == "%" and isinstance(left, str):
        meter().chars(formatted_size(left, [right]))
    elif (
        operator == "**"
        and isinstance(left, int)
        and isinstance(right, int)
        and left.bit_length() * abs(right) > _MAX_BITS
    ):
        raise TemplateOverrun("it makes a number that is too large")


# Filters, tests and methods.

_WITHHELD_FILTERS = {"pprint", "striptags", "urlize", "wordwrap", "xmlattr"}  # worse than linear; no use in a prompt
_CONSTANT_FILTERS = {"attr", "count", "d", "default", "first", "last", "length", "random"}
_SHALLOW_FILTERS = {"batch", "items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr", "slice"}
_SORTING_FILTERS = {"dictsort", "groupby", "max", "min", "sort", "unique"}
_WIDENING_FILTERS = {"batch", "center", "indent", "round", "slice", "sum", "tojson", "truncate"}
_SHALLOW_TESTS = {
    *("boolean", "callable", "defined", "escaped", "false", "filter", "float", "integer", "iterable", "mapping"),
    *("none", "number", "sameas", "sequence", "string", "test", "true", "undefined"),
}
_METHODS: dict[type, set[str]] = {
    str: {
        *("capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal"),
        *("isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "lower", "lstrip", "partition"),
        *("removeprefix", "removesuffix", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines"),
        *("startswith", "strip", "swapcase", "title", "upper"),
        *("center", "expandtabs", "join", "ljust", "replace", "rjust", "zfill"),
    },
    list: {"copy", "count", "index"},
    tuple: {"count", "index"},
    dict: {"copy", "get", "items", "keys", "values"},
}
_WIDENING_METHODS = {"center", "expandtabs", "ljust", "rjust", "zfill"}


def guard_filters(filters: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The filters that are offered, each paying its way."""
    return {name: _guarded_filter(name, f) for name, f in filters.items() if name not in _WITHHELD_FILTERS}


def guard_tests(tests: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The tests, each paying its way."""
    return {name: _guarded_test(name, f) for name, f in tests.items()}


def _guarded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    num_hidden = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)  # keeps the mark that asks jinja2 for the context
    def guarded(*args: Any, **kwargs: Any) -> Any:
        value, *rest = args[num_hidden:]
        rest += kwargs.values()
        _pay_filter(name, value, rest)
        return meter().made(function(*args, **kwargs))

    return guarded


def _pay_filter(name: str, value: Any, args: Sequence[Any]) -> None:
    meter().work(4)
    if name in _SHALLOW_FILTERS:
        meter().work(2 * len(value) if isinstance(value, list | tuple | Mapping | range) else 1)
    elif name not in _CONSTANT_FILTERS:
        for _ in range(8 if name in _SORTING_FILTERS else 1):
            meter().look(value, *args)
    if name == "join":
        meter().chars(_joined_size(args[0] if args else "", value))
    elif name == "replace" and len(args) >= 2:
        meter().chars(_replaced_size(value, args[0], args[1]))
    elif name == "format":
        meter().chars(formatted_size(str(value), args))
    elif name in _WIDENING_FILTERS and args:
        meter().chars(_widened_size(value, args))


def _guarded_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    num_hidden = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def guarded(*args: Any) -> Any:
        meter().work(2)
        if name not in _SHALLOW_TESTS:
            meter().look(*args[num_hidden:])
        return function(*args)

    return guarded


def pay_method(method: types.BuiltinMethodType, args: Sequence[Any]) -> None:
    """Before a method of a built-in type is called. Raises SecurityError for one that is not listed."""
    owner, name = method.__self__, method.__name__
    kind = str if isinstance(owner, str) else type(owner)
    if name not in _METHODS.get(kind, ()):
        raise SecurityError(f"{kind.__name__}.{name} is not available to chat templates")
    if kind is str or name in ("count", "index"):
        meter().look(owner)
    elif isinstance(owner, dict):
        meter().work(len(owner) // 8)  # copies of references
    meter().look(*args)
    if name == "join" and args:
        meter().chars(_joined_size(owner, args[0]))
    elif name == "replace" and len(args) >= 2:
        meter().chars(_replaced_size(owner, args[0], args[1]))
    elif name in _WIDENING_METHODS:
        meter().chars(_widened_size(owner, args))
