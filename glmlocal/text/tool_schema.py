"""What a tool's JSON schema says about an argument, and the text that a model wrote → a value of that type.

A model writes arguments as bare text between tags: ``123`` may be the number or the string. The schema decides:

* Only a string is allowed: the text, byte for byte, even if it looks like JSON.
* Other types: the first that the text is, of null, integer, number, boolean, object, array, string. Objects and arrays
  may be written as Python literals too, as vLLM takes them.
* No schema: JSON if it parses, else a string. Whatever does not convert is a string.

Schemas come from the network: references are followed within the schema only, cycles end, and the work is bounded.
"""

from __future__ import annotations

import ast
import itertools
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NoReturn

Schema = Mapping[str, Any]
_MAX_DEPTH, _MAX_BRANCHES, _MAX_STEPS = 32, 64, 1_000
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
_MAX_LITERAL = 100_000  # characters of a Python literal
_MAX_INTEGRAL = 2.0**53  # above, a float is not certain of its last digit


class ArgumentTypes:
    """The parameters of one function. Immutable."""

    def __init__(self, parameters: object) -> None:
        """``parameters``: the tool's schema of an object; anything else says nothing about any argument."""
        self._root: Schema = parameters if isinstance(parameters, Mapping) else {}
        self._branches = _branches(self._root, _Walk(self._root), 0)

    @property
    def is_union(self) -> bool:
        """Does the meaning of one argument depend on the others (``anyOf`` at the root)?"""
        return len(self._branches) > 1

    def streams(self, key: str) -> bool:
        """Is the argument a string and nothing else, so that it can be passed on while it is written?"""
        return not self.is_union and _types(self._schema(key, self._branches), _Walk(self._root), 0) == frozenset(
            ("string",)
        )

    def json_schema(self, key: str) -> Schema | None:
        """The schema of an argument that is written as JSON, complete in itself; None: it is written as text."""
        schema = self._schema(key, self._branches)
        types = _types(schema, _Walk(self._root), 0)
        if types is None or "string" in types:
            return None
        shared = {name: self._root[name] for name in ("$defs", "definitions") if name in self._root}
        return {**shared, **schema}

    def value(self, key: str, text: str, siblings: Sequence[tuple[str, str]] = ()) -> object:
        """The argument as a JSON value. ``siblings``: all arguments of the call, which choose the branch of a union."""
        branches = self._branches
        if self.is_union:
            chosen = [branch for branch in branches if self._is_possible(branch, siblings)]
            branches = chosen or branches
        return _value(text, self._schema(key, branches), self._root)

    def _schema(self, key: str, branches: Sequence[Sequence[Schema]]) -> Schema:
        """The argument's schema; of several branches the ``anyOf`` of theirs."""
        found: list[Any] = []
        for branch in branches:
            named = [node["properties"][key] for node in branch if key in _mapping(node.get("properties"))]
            found += named or [node["additionalProperties"] for node in branch if "additionalProperties" in node]
        schemas = [schema for schema in found if isinstance(schema, Mapping)]
        if not schemas:
            return {}
        return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}

    def _is_possible(self, branch: Sequence[Schema], siblings: Sequence[tuple[str, str]]) -> bool:
        for key, text in siblings:
            for node in branch:
                literals = _literals(_mapping(_mapping(node.get("properties")).get(key)), _Walk(self._root), 0)
                if literals is not None and _literal(text, literals) is _MISSING:
                    return False
        return True


def argument_types(tools: Sequence[Mapping[str, Any]]) -> dict[str, ArgumentTypes]:
    """Function name → its parameters, of tools in OpenAI's form (``function`` around name and parameters, or not)."""
    functions = [tool.get("function", tool) for tool in tools]
    return {
        function["name"]: ArgumentTypes(function.get("parameters"))
        for function in functions
        if isinstance(function, Mapping) and isinstance(function.get("name"), str)
    }


_MISSING: Final = object()


class _Walk:
    """One look through a schema: it ends, however the schema refers to itself or branches."""

    def __init__(self, root: Schema) -> None:
        self.root = root
        self._num_steps = 0

    def is_over(self, depth: int) -> bool:
        self._num_steps += 1
        return depth >= _MAX_DEPTH or self._num_steps > _MAX_STEPS


def _mapping(value: object) -> Schema:
    return value if isinstance(value, Mapping) else {}


def _target(schema: Schema, root: Schema) -> Schema | None:
    """What ``$ref`` points to inside the schema: ``#/$defs/a~1b``."""
    reference = schema.get("$ref")
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    node: object = root
    for part in reference[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping):
            node = node.get(name)
        elif isinstance(node, list) and name.isdigit() and int(name) < len(node):
            node = node[int(name)]
        else:
            return None
    return node if isinstance(node, Mapping) else None


def _alternatives(schema: Schema) -> Iterator[list[Schema]]:
    for word in ("anyOf", "oneOf"):
        options = schema.get(word)
        if isinstance(options, list) and options:
            yield [_mapping(option) for option in options]


def _parts(schema: Schema, walk: _Walk) -> list[Schema]:
    """Schemas that hold together with this one."""
    target = _target(schema, walk.root)
    all_of = schema.get("allOf")
    parts = [_mapping(part) for part in all_of] if isinstance(all_of, list) else []
    return parts if target is None else [target, *parts]


def _branches(schema: Schema, walk: _Walk, depth: int) -> list[list[Schema]]:
    """Every way to satisfy an object's schema, each as the schemas that then hold together."""
    if walk.is_over(depth):
        return [[schema]]
    groups = [_branches(part, walk, depth + 1) for part in _parts(schema, walk)]
    for options in _alternatives(schema):
        groups.append([branch for option in options for branch in _branches(option, walk, depth + 1)])
    ways = itertools.islice(itertools.product(*(group[:_MAX_BRANCHES] for group in groups)), _MAX_BRANCHES)
    return [[schema, *itertools.chain.from_iterable(way)] for way in ways]


def _types(schema: Schema, walk: _Walk, depth: int) -> frozenset[str] | None:
    """The JSON types that are allowed; None: any."""
    if walk.is_over(depth):
        return None
    allowed = [_own_types(schema), *(_types(part, walk, depth + 1) for part in _parts(schema, walk))]
    for options in _alternatives(schema):
        each = [_types(option, walk, depth + 1) for option in options]
        known = [types for types in each if types is not None]
        allowed.append(frozenset().union(*known) if len(known) == len(each) else None)
    result: frozenset[str] | None = None
    for types in allowed:
        if types is not None:
            result = types if result is None else result & types
    if result is not None and schema.get("nullable") is True:
        result |= {"null"}
    return result


def _own_types(schema: Schema) -> frozenset[str] | None:
    named = schema.get("type")
    if isinstance(named, str):
        return frozenset((named,))
    if isinstance(named, list) and named:
        return frozenset(str(name) for name in named)
    literals = _own_literals(schema)
    if literals is not None:
        return frozenset(_type_of(value) for value in literals)
    return frozenset(("object",)) if "properties" in schema else None


def _own_literals(schema: Schema) -> list[object] | None:
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return list(values) if isinstance(values, list) and values else None


def _literals(schema: Schema, walk: _Walk, depth: int) -> list[object] | None:
    """The values that are allowed, where the schema lists them; None where others are."""
    own = _own_literals(schema)
    if own is not None or walk.is_over(depth):
        return own
    for part in _parts(schema, walk):
        found = _literals(part, walk, depth + 1)
        if found is not None:
            return found
    for options in _alternatives(schema):
        each = [_literals(option, walk, depth + 1) for option in options]
        known = [values for values in each if values is not None]
        if len(known) == len(each):
            return list(itertools.chain.from_iterable(known))
    return None


def _type_of(value: object) -> str:
    if value is None:
        return "null"
    kinds = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (Mapping, "object"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "array")


def _value(text: str, schema: Schema, root: Schema) -> object:
    literals = _literals(schema, _Walk(root), 0)
    if literals is not None:
        found = _literal(text, literals)
        if found is not _MISSING:
            return found
    types = _types(schema, _Walk(root), 0)
    if types is None:
        found = _json(text)
        return text if found is _MISSING else found
    for name, convert in _CONVERSIONS:
        if name in types:
            found = convert(text)
            if found is not _MISSING:
                return found
    return text


def _literal(text: str, literals: Sequence[object]) -> object:
    """The one of the allowed values that the text is."""
    if text in literals:
        return text
    parsed = _json(text)
    return next((value for value in literals if value == parsed and type(value) is type(parsed)), _MISSING)


def _json(text: str) -> object:
    """The text as strict JSON; integral floats as ints."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _MISSING
    return _integral(value) if isinstance(value, float) else value


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _integral(value: float) -> object:
    if not math.isfinite(value):  # 1e999
        return _MISSING
    return int(value) if value.is_integer() and abs(value) <= _MAX_INTEGRAL else value


def _null(text: str) -> object:
    return None if text.strip().lower() in ("null", "none") else _MISSING


def _integer(text: str) -> object:
    text = text.strip()
    if _INTEGER.fullmatch(text) and len(text) < 1000:
        return int(text)
    value = _number(text)
    return value if isinstance(value, int) else _MISSING


def _number(text: str) -> object:
    text = text.strip()
    if not _NUMBER.fullmatch(text):
        return _MISSING
    if _INTEGER.fullmatch(text) and len(text) < 1000:
        return int(text)
    return _integral(float(text))


def _boolean(text: str) -> object:
    return {"true": True, "false": False}.get(text.strip().lower(), _MISSING)


def _container(kind: type) -> Callable[[str], object]:
    def convert(text: str) -> object:
        for form in _forms(text):
            value = _json(form)
            if isinstance(value, str):  # JSON inside a JSON string
                value = _json(value)
            if isinstance(value, kind):
                return value
        value = _python(text)
        return value if isinstance(value, kind) else _MISSING

    return convert


def _python(text: str) -> object:
    """The JSON value that the text is as a Python literal: some models write ``{'a': True}``. Nothing is run."""
    text = text.strip()
    if text[:1] not in ("{", "[") or len(text) > _MAX_LITERAL:
        return _MISSING
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in strings
            value = ast.literal_eval(text)
        return json.loads(json.dumps(value, allow_nan=False))  # sets, bytes and infinities are no JSON
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return _MISSING


def _forms(text: str) -> Iterator[str]:
    """The text, and the text with its escapes undone: some models write ``[{\\"id\\": 1}]``."""
    yield text
    if '\\"' in text:
        undone = _json(f'"{text.strip()}"')
        if isinstance(undone, str):
            yield undone


_CONVERSIONS: Final[tuple[tuple[str, Callable[[str], object]], ...]] = (
    ("null", _null),
    ("integer", _integer),
    ("number", _number),
    ("boolean", _boolean),
    ("object", _container(dict)),
    ("array", _container(list)),
)
