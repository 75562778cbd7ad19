"""Whatever our own OpenAPI document allows, and what it does not: never a 5xx, and afterwards a known answer."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

import agent_script
import malformed
from serving import Running, running

EXAMPLES = int(os.environ.get("GLMLOCAL_FUZZ_EXAMPLES", "6"))  # of each operation; 300 take some minutes
CHECKS = [
    not_a_server_error,
    checks.allow_header_conformance,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(agent_script.answer) as server:
        yield server


def test_no_request_of_the_document_is_a_server_error(server: Running) -> None:
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) >= 11
    for operation in operations:  # without schemathesis' pytest plugin, which follows pytest's insides

        @hypothesis.settings(
            max_examples=EXAMPLES,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            database=None,
            derandomize=True,
        )
        @hypothesis.given(case=operation.as_strategy())
        def check(case: Any) -> None:
            case.call_and_validate(checks=CHECKS)

        check()


def test_the_document_lists_the_endpoints(server: Running) -> None:
    paths = server.http.get("/openapi.json").json()["paths"]
    assert {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
    } < set(paths)
    assert "HTTPValidationError" not in server.http.get("/openapi.json").text
    assert {"/v1/models", "/tokenize", "/detokenize", "/health", "/metrics", "/v1/stats"} < set(paths)


def test_after_a_thousand_malformed_requests_a_known_question_is_answered(server: Running) -> None:
    chaos = random.Random(7)
    statuses = {malformed.send(server.http, chaos) for _ in range(1000)}
    assert max(statuses) < 500
    assert 400 in statuses
    assert server.chat("say «still here»")["choices"][0]["message"]["content"] == "still here"
    server.wait(lambda: server.client.num_running == server.client.num_waiting == 0)
