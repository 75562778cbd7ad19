"""Fields of other servers' and newer APIs that are refused: ignored, they would give an answer to another question."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glmlocal.server.errors import bad_request

_SCHEMA_INSTEAD = "send response_format with a json_schema"
CHAT: Mapping[str, str] = {
    "functions": "is the old name of tools; send those, and tool_choice",
    **dict.fromkeys(
        ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"),
        f"is not supported; {_SCHEMA_INSTEAD}",
    ),
    "continue_final_message": "is not supported; send the text to be continued to /v1/completions",
    "audio": "is not supported; answers are text",
    "web_search_options": "is not supported; nothing is searched here: send a tool that does",
}
RESPONSES: Mapping[str, str] = {
    "conversation": "is not supported; send previous_response_id or the whole conversation as input",
    "prompt": "is not supported; no prompts are kept here: send its text as instructions and input",
}


def refuse(body: Any, fields: Mapping[str, str]) -> Any:
    """The body as it came. Raises ApiError for a field that is given and means something."""
    if isinstance(body, dict):
        for field, why in fields.items():
            if body.get(field):
                raise bad_request(f"{field} {why}", field)
        modalities = body.get("modalities")
        if isinstance(modalities, list) and any(kind != "text" for kind in modalities):
            raise bad_request("modalities may only be text; answers are text", "modalities")
    return body
