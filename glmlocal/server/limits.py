"""Bodies of requests: bytes → JSON that is really JSON, within limits. All else is a 400 that names the field."""

from __future__ import annotations

import json
from typing import Any, Final, NoReturn

from glmlocal.server.errors import ApiError, bad_request

MAX_BODY_BYTES: Final = 64 << 20
MAX_DEPTH: Final = 100  # of the JSON; tools' schemas and arguments are the deepest
MAX_MESSAGES, MAX_TOOLS, MAX_STOPS, MAX_LOGIT_BIAS, MAX_N, MAX_TOP_LOGPROBS = 10_000, 1_024, 32, 4_096, 16, 20
MAX_TOKENS: Final = 2**31 - 1


def parse_body(data: bytes) -> Any:
    """The body as JSON. Raises ApiError: not UTF-8, not JSON, NaN or infinities, too deep, lone surrogates, NUL."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise bad_request(f"the body nests more than {MAX_DEPTH} deep") from None
    except ValueError as error:  # also numbers of thousands of digits
        raise bad_request(f"the body is not valid JSON: {str(error)[:200]}") from None
    _check(value)
    return value


def _refuse(name: str) -> NoReturn:
    raise ApiError(400, f"the body holds {name}, which JSON does not have")


def _check(root: Any) -> None:
    """Every string and number of the value, without recursion."""
    stack: list[tuple[Any, str, int]] = [(root, "", 0)]
    while stack:
        value, where, depth = stack.pop()
        if isinstance(value, str):
            _check_text(value, where)
        elif isinstance(value, float):
            if value in (float("inf"), float("-inf")):  # 1e999
                raise bad_request(f"{where or 'the body'} is not a finite number", where or None)
        elif isinstance(value, dict | list):
            if depth == MAX_DEPTH:
                raise bad_request(f"{where[:200]} nests more than {MAX_DEPTH} deep", where[:200])
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                if isinstance(key, str):
                    _check_text(key, f"a key of {where or 'the body'}")
                stack.append((item, f"{where}.{key}" if where else str(key), depth + 1))


def _check_text(text: str, where: str) -> None:
    if "\0" in text:
        raise bad_request(f"{where[:200]} holds a NUL character", where[:200])
    try:
        text.encode()
    except UnicodeEncodeError:
        raise bad_request(
            f"{where[:200].encode('utf-8', 'replace').decode()} holds half a surrogate pair and is not valid Unicode"
        ) from None
