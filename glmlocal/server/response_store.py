"""Answers of ``/v1/responses``, kept in memory for clients that send only what is new (``previous_response_id``).

Each is kept with its own input and the name of the one before it, so that a long conversation is here once. Ids are
secrets of 96 bits: whoever knows one may read it. Nothing outlives the process.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from glmlocal.server.errors import ApiError

MAX_RESPONSES, MAX_STORED_BYTES = 4_096, 64 << 20

Item = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Stored:
    data: bytes  # JSON of [response, input items]: a fraction of what they take as objects, and a size that is known
    previous_id: str | None


class ResponseStore:
    """Those used least recently go first when there are too many, the later ones of a conversation before its first."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_STORED_BYTES) -> None:
        self._max_responses, self._max_bytes = max_responses, max_bytes
        self._stored: OrderedDict[str, _Stored] = OrderedDict()
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    def keep(self, response: Mapping[str, Any], input_items: Sequence[Item]) -> None:
        """Remember what was answered to what. One that is larger than all that may be kept is not kept."""
        data = json.dumps([response, list(input_items)], ensure_ascii=False).encode()
        previous_id = response["previous_response_id"]
        self._stored[response["id"]] = _Stored(data, previous_id)
        self._num_bytes += len(data)
        if previous_id is not None:
            with suppress(ApiError):  # deleted while this one was being answered
                self._chain(previous_id)
        while len(self._stored) > self._max_responses or self._num_bytes > self._max_bytes:
            self._forget(next(iter(self._stored)))

    def get(self, response_id: str) -> dict[str, Any]:
        """What was answered. Raises ApiError (404)."""
        if response_id not in self._stored:
            raise _not_found(response_id, None)
        response: dict[str, Any] = json.loads(self._stored[response_id].data)[0]
        return response

    def delete(self, response_id: str) -> None:
        """Raises ApiError (404)."""
        self.get(response_id)
        self._forget(response_id)

    def history(self, response_id: str) -> list[Item]:
        """Inputs and outputs up to and with that response, oldest first. Raises ApiError (404)."""
        items: list[Item] = []
        for stored in reversed(self._chain(response_id)):
            response, input_items = json.loads(stored.data)
            items += [*input_items, *response["output"]]
        return items

    def _chain(self, response_id: str) -> list[_Stored]:
        """A response and those before it, which are used with it: newest first. Raises ApiError (404)."""
        chain: list[_Stored] = []
        wanted: str | None = response_id
        while wanted is not None:
            if wanted not in self._stored:
                raise _not_found(response_id, wanted)
            self._stored.move_to_end(wanted)  # the first one last: it is needed longest
            chain.append(self._stored[wanted])
            wanted = chain[-1].previous_id
        return chain

    def _forget(self, response_id: str) -> None:
        self._num_bytes -= len(self._stored.pop(response_id).data)


def _not_found(response_id: str, missing: str | None) -> ApiError:
    name = f"{response_id[:80]!r}"
    why = "" if missing in (None, response_id) else f" with all that came before it: {missing!r} is gone"
    return ApiError(
        404,
        f"there is no response {name}{why}; answers are kept in memory, unless `store` is false, until there are too "
        "many or the server ends; send the whole conversation as input",
        "response_id" if missing is None else "previous_response_id",
        "response_not_found" if missing is None else "previous_response_not_found",
    )
