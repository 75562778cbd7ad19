"""What is kept of a conversation, and what goes first when there is too much."""

from __future__ import annotations

import json
from typing import Any

import pytest

from glmlocal.server.errors import ApiError
from glmlocal.server.response_store import ResponseStore


def response(name: str, previous: str | None = None, text: str = "") -> dict[str, Any]:
    return {"id": name, "previous_response_id": previous, "output": [{"answer": name, "text": text}]}


def keep(store: ResponseStore, name: str, previous: str | None = None, text: str = "") -> None:
    store.keep(response(name, previous, text), [{"question": name}])


def is_kept(store: ResponseStore, name: str) -> bool:
    try:
        return store.get(name)["id"] == name
    except ApiError:
        return False


def test_history_is_oldest_first_and_each_item_once() -> None:
    store = ResponseStore()
    keep(store, "a")
    keep(store, "b", "a")
    keep(store, "other", "a")
    keep(store, "c", "b")
    items = [json.dumps(item, sort_keys=True) for item in store.history("c")]
    expected = [each for name in "abc" for each in ({"question": name}, {"answer": name, "text": ""})]
    assert items == [json.dumps(each, sort_keys=True) for each in expected]


def test_the_least_recently_used_goes_first() -> None:
    store = ResponseStore(max_responses=3)
    for name in "abc":
        keep(store, name)
    store.history("a")
    keep(store, "d")
    assert [name for name in "abcd" if is_kept(store, name)] == ["a", "c", "d"]
    assert len(store) == 3


def test_reading_an_answer_alone_does_not_make_it_used() -> None:
    store = ResponseStore(max_responses=2)
    keep(store, "a")
    keep(store, "b")
    store.get("a")
    keep(store, "c")
    assert not is_kept(store, "a")


def test_going_on_keeps_the_beginning() -> None:
    store = ResponseStore(max_responses=4)
    keep(store, "a")
    keep(store, "b", "a")
    for name in "xyz":
        keep(store, name)
        store.history("b")
    assert is_kept(store, "a")
    keep(store, "c", "b")
    for name in "uv":
        keep(store, name)
    assert [item.get("question") for item in store.history("b")][::2] == ["a", "b"]
    assert not is_kept(store, "c")  # the last before the first: of the rest something can still be made


def test_bytes_are_counted_and_given_back() -> None:
    one = len(json.dumps([response("a", text="é" * 1000), [{"question": "a"}]], ensure_ascii=False).encode())
    store = ResponseStore(max_bytes=2 * one)
    for name in "abc":
        keep(store, name, text="é" * 1000)
    assert [name for name in "abc" if is_kept(store, name)] == ["b", "c"]
    store.delete("b")
    keep(store, "d", text="é" * 1000)
    assert [name for name in "abcd" if is_kept(store, name)] == ["c", "d"]
    keep(store, "e", text="é" * 3000)  # larger than everything
    assert not is_kept(store, "e")
    assert len(store) == 0


def test_what_came_before_may_go_while_the_next_is_answered() -> None:
    store = ResponseStore()
    keep(store, "a")
    store.delete("a")
    keep(store, "b", "a")
    assert is_kept(store, "b")
    with pytest.raises(ApiError, match="'a' is gone") as error:
        store.history("b")
    assert (error.value.status, error.value.code) == (404, "previous_response_not_found")
