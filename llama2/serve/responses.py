"""POST /v1/responses: OpenAI's newer route, over the same conversation as /v1/chat/completions. Nothing is stored."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llama2.serve.chat import begin_messages, tool_stream
from llama2.serve.forms import constrain
from llama2.serve.protocol import (
    CalledFunction,
    ChatMessage,
    Function,
    JsonSchema,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    Tool,
    ToolCall,
)
from llama2.serve.refusal import Json
from llama2.serve.response_events import FUNCTION_FIELDS, ResponseAnswer
from llama2.serve.response_protocol import CallItem, FlatNamedTool, MessageItem, ResponsesRequest
from llama2.serve.server import Server
from llama2.serve.stream import EventStream, until_gone


async def responses(server: Server, request: Request) -> Response:
    """Answer a text or the items of a conversation."""
    asked = await server.read(request, ResponsesRequest)
    target = server.target(asked.model)
    tools = [
        Tool(type="function", function=Function(**tool.model_dump(include=FUNCTION_FIELDS)))
        for tool in asked.tools or ()
    ]
    choice: Any = asked.tool_choice
    if isinstance(choice, FlatNamedTool):
        choice = NamedTool(type="function", function=NamedFunction(name=choice.name))
    options = server.options(asked, max_tokens=asked.max_output_tokens or asked.max_tokens, logprobs=None)
    constrain(options, asked.model_copy(update={"response_format": _response_format(asked)}), tools, choice)
    offered = [] if choice == "none" else tools
    generation = await begin_messages(server, request, target, _messages(asked), offered, options)
    answer = ResponseAnswer(asked, target, generation, tool_stream(tools, choice, asked.parallel_tool_calls))
    try:
        first = await until_gone(request, generation.next()) or ()
        if asked.stream:
            return EventStream(answer.events(first), close=generation.close)
        return Json(await until_gone(request, answer.whole(first)))
    except BaseException:
        generation.close()
        raise


def _response_format(asked: ResponsesRequest) -> ResponseFormat | None:
    form = asked.text.format if asked.text else None
    if form is None or form.type == "text":
        return asked.response_format
    schema = None if form.schema_ is None else JsonSchema(name=form.name or "answer", schema=form.schema_)
    return ResponseFormat(type=form.type, json_schema=schema)


def _messages(asked: ResponsesRequest) -> list[ChatMessage]:
    messages = [ChatMessage(role="system", content=asked.instructions)] if asked.instructions else []
    items = [MessageItem(role="user", content=asked.input)] if isinstance(asked.input, str) else asked.input
    for item in items:
        if isinstance(item, MessageItem):
            messages.append(ChatMessage(role=item.role, content=item.content))
        elif isinstance(item, CallItem):
            call = ToolCall(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))
            messages.append(ChatMessage(role="assistant", tool_calls=[call]))
        else:
            messages.append(ChatMessage(role="tool", content=item.output, tool_call_id=item.call_id))
    return messages
