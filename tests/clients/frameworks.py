"""Agent frameworks against a server with the scripted model: a tool call, its result, a final answer; JSON by schema.

    python tests/clients/frameworks.py NAME URL

Run by ``test_frameworks.py`` with a Python that has them; prints what the model said last. No glmlocal in here.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from pydantic import BaseModel

ASK = "What is the weather?"
SAY = 'say «{"city": "Rom", "days": 2}»'
CALL = 'call %s {"city": "Rom", "days": 2}\n'


class Stay(BaseModel):
    """Where, and how long."""

    city: str
    days: int


def get_weather(city: str, days: int) -> str:
    """The weather."""
    assert (city, days) == ("Zürich", 3)
    return "sunny"


SCHEMA: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
FUNCTION = {"name": "get_weather", "description": "The weather.", "parameters": SCHEMA}


def litellm(url: str) -> str:
    import litellm

    messages: list[Any] = [{"role": "user", "content": ASK}]
    options: dict[str, Any] = {"model": "openai/glm", "api_base": f"{url}/v1"}
    options["tools"] = [{"type": "function", "function": FUNCTION}]
    chunks = list(litellm.completion(messages=messages, stream=True, stream_options={"include_usage": True}, **options))
    message = litellm.stream_chunk_builder(chunks, messages=messages).choices[0].message
    assert message.reasoning_content == "Let me see."
    messages += [message.model_dump(), {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}]
    claude = litellm.completion(
        "anthropic/claude-x", messages[:1], api_base=url, tools=options["tools"], max_tokens=999
    )
    assert claude.choices[0].message.tool_calls[0].function.name == "get_weather"
    return str(litellm.completion(messages=messages, **options).choices[0].message.content)


def langchain_openai(url: str) -> str:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model="glm", base_url=f"{url}/v1")
    for method, ask in {"json_schema": SAY, "function_calling": CALL % "Stay", "json_mode": SAY}.items():
        assert model.with_structured_output(Stay, method=method).invoke(ask) == Stay(city="Rom", days=2)
    said = None
    for chunk in model.bind_tools([get_weather]).stream([HumanMessage(ASK)]):
        said = chunk if said is None else said + chunk
    result = ToolMessage(get_weather(**said.tool_calls[0]["args"]), tool_call_id=said.tool_calls[0]["id"])
    return str(model.bind_tools([get_weather]).invoke([HumanMessage(ASK), said, result]).content)


def langchain_anthropic(url: str) -> str:
    from langchain_anthropic import ChatAnthropic
    from langchain_core.messages import HumanMessage, ToolMessage

    thinking = {"type": "enabled", "budget_tokens": 1024}
    model = ChatAnthropic(model="claude-x", base_url=url, thinking=thinking, max_tokens=4000).bind_tools([get_weather])
    said = None
    for chunk in model.stream([HumanMessage(ASK)]):
        said = chunk if said is None else said + chunk
    result = ToolMessage(get_weather(**said.tool_calls[0]["args"]), tool_call_id=said.tool_calls[0]["id"])
    content = model.invoke([HumanMessage(ASK), said, result]).content
    return str(content[-1]["text"])


def pydantic_ai(url: str) -> str:
    from pydantic_ai import Agent, NativeOutput, ToolOutput
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{url}/v1", api_key="x")
    chat, responses = OpenAIChatModel("glm", provider=provider), OpenAIResponsesModel("glm", provider=provider)
    for kind, ask in ((NativeOutput(Stay), SAY), (ToolOutput(Stay), CALL % "final_result")):
        assert Agent(chat, output_type=kind).run_sync(ask).output == Stay(city="Rom", days=2)
    outputs = {Agent(model, tools=[get_weather]).run_sync(ASK).output for model in (chat, responses)}
    assert len(outputs) == 1
    return outputs.pop()


def openai_agents(url: str) -> str:
    from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool
    from openai import AsyncOpenAI

    async def ask(model: Any) -> list[str]:
        agent = Agent(name="a", model=model, tools=[function_tool(get_weather)])
        streamed = Runner.run_streamed(agent, ASK)
        async for _ in streamed.stream_events():
            pass
        return [(await Runner.run(agent, ASK)).final_output, streamed.final_output]

    async def both() -> set[str]:
        client = AsyncOpenAI(base_url=f"{url}/v1", api_key="x")
        kinds = (OpenAIChatCompletionsModel, OpenAIResponsesModel)
        return {said for kind in kinds for said in await ask(kind(model="glm", openai_client=client))}

    (said,) = asyncio.run(both())
    return said


def instructor(url: str) -> str:
    import instructor
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="x")
    for mode, ask in ((instructor.Mode.TOOLS, CALL % "Stay"), (instructor.Mode.JSON_SCHEMA, SAY)):
        create = instructor.from_openai(client, mode=mode).chat.completions.create
        messages = [{"role": "user", "content": ask}]
        found = create(model="glm", response_model=Stay, max_retries=0, messages=messages)
        assert found == Stay(city="Rom", days=2)
    return "The tool said so: all done."  # it makes objects, not conversations


def main() -> None:
    name, url = sys.argv[1:]
    os.environ.update(OPENAI_API_KEY="x", ANTHROPIC_API_KEY="x", OPENAI_AGENTS_DISABLE_TRACING="1")
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    print(globals()[name](url))


if __name__ == "__main__":
    main()
