"""POST /v1/chat/completions: a conversation in, answers out, whole or as they are written."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llama2.chat import Message, stop_ids
from llama2.llm import SamplingOptions
from llama2.serve import answers
from llama2.serve.answers import Envelope, Object
from llama2.serve.forms import constrain
from llama2.serve.generation import Generation
from llama2.serve.protocol import ChatMessage, ChatRequest, Placed, Tool
from llama2.serve.refusal import Json
from llama2.serve.server import Server, Target
from llama2.serve.stream import DONE, EventStream, data, until_gone
from llama2.serve.texts import rendered
from llama2.serve.tools import ToolStream, conversation
from llama2.serve.worker import Piece


async def chat_completions(server: Server, request: Request) -> Response:
    """Answer a conversation."""
    asked = await server.read(request, ChatRequest)
    target = server.target(asked.model)
    generation = await begin(server, request, target, asked)
    envelope = server.envelope(target, "chat.completion", "chatcmpl")
    try:
        first = await until_gone(request, generation.next())
        if asked.stream:
            events = _events(asked, target, generation, envelope, first or ())
            return EventStream(events, close=generation.close)
        rest = await until_gone(request, generation.collect())
    except BaseException:
        generation.close()
        raise
    for piece in reversed(first or ()):
        rest[piece.choice].insert(0, piece)
    choices = [_choice(asked, target, generation, index, pieces) for index, pieces in enumerate(rest)]
    prompt = generation.requests[0].prompt
    more: Object = {"prompt_token_ids": prompt} if asked.return_token_ids else {}
    if asked.prompt_logprobs is not None:
        more["prompt_logprobs"] = answers.prompt_logprobs(target.llm.tokenizer, prompt, rest[0][0])
    return Json(envelope.wrap(choices, usage=answers.usage_json(generation.usage), **more))


async def begin(server: Server, request: Request, target: Target, asked: ChatRequest) -> Generation:
    """Queue the answers to a conversation."""
    tools = [] if asked.tool_choice == "none" else asked.tools or []
    options = server.options(
        asked,
        max_tokens=asked.max_completion_tokens or asked.max_tokens,
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
    )
    if asked.prompt_logprobs is not None:
        options["prompt_logprobs"] = asked.prompt_logprobs
    constrain(options, asked, tools, asked.tool_choice)
    return await begin_messages(server, request, target, asked.messages, tools, options, place=asked)


async def begin_messages(
    server: Server,
    request: Request,
    target: Target,
    messages: Sequence[ChatMessage],
    tools: Sequence[Tool],
    options: SamplingOptions,
    *,
    place: Placed | None = None,
) -> Generation:
    """Queue the answers to some messages; place: where their prompt ends, if not where an answer begins."""
    llm = target.llm
    turns = conversation(messages, tools, llm)
    prompt: list[Message] | list[int] = turns
    if place is not None and (place.continue_final_message or place.add_generation_prompt is False):
        prompt = await until_gone(request, asyncio.to_thread(rendered, llm, turns, place))
        options["stop_ids"] = (*options.get("stop_ids", ()), *stop_ids(llm.tokenizer, llm.chat_format))
    prepared = await until_gone(request, server.prepare(target, [prompt], options))
    return server.generation(request, target, prepared)


def tool_stream(tools: Sequence[Tool] | None, choice: object, is_parallel: bool | None) -> ToolStream | None:
    """Return what tells calls from words, where tools were offered."""
    names = [tool.function.name for tool in tools or ()]
    if not names or choice == "none":
        return None
    return ToolStream(names, is_parallel is not False, must_call=choice not in (None, "auto"))


def _tools_of(asked: ChatRequest) -> ToolStream | None:
    return tool_stream(asked.tools, asked.tool_choice, asked.parallel_tool_calls)


def _choice(asked: ChatRequest, target: Target, generation: Generation, index: int, pieces: list[Piece]) -> Object:
    text, calls = "".join(piece.text for piece in pieces), _tools_of(asked)
    deltas = [{"content": text}] if calls is None else [*calls.feed(text), *calls.finish()]
    more = {"token_ids": answers.token_ids(pieces)} if asked.return_token_ids else {}
    return {
        "index": index,
        "message": answers.chat_message([{"content": asked.echoed}, *deltas]),
        "logprobs": answers.chat_logprobs(target.llm.tokenizer, pieces) if asked.logprobs else None,
        "finish_reason": answers.chat_finish(generation.finish_reasons[index], calls.n_calls if calls else 0),
        **more,
    }


async def _events(
    asked: ChatRequest, target: Target, generation: Generation, envelope: Envelope, first: Sequence[Piece]
) -> AsyncIterator[bytes]:
    """Yield the chunks of all answers, each marked with its index."""
    calls = {index: _tools_of(asked) for index in range(generation.n_choices)}

    def chunk(index: int, delta: Object, *, finish: str | None = None, **of: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish, **of}
        more = answers.chunk_usage(asked.stream_options, generation.usage)
        if asked.return_token_ids and "role" in delta:
            more["prompt_token_ids"] = generation.requests[0].prompt
        return data(envelope.wrap([choice], kind="chat.completion.chunk", **more))

    for index in range(generation.n_choices):
        yield chunk(index, {"role": "assistant", "content": ""})
        if asked.echoed:
            yield chunk(index, {"content": asked.echoed})
    pieces: Sequence[Piece] | None = first
    while pieces is not None:
        for piece in pieces:
            stream, reason = calls[piece.choice], piece.token.finish_reason
            deltas = [{"content": piece.text}] if piece.text else []
            if stream is not None:
                deltas = [*stream.feed(piece.text), *(stream.finish() if reason else [])]
            of: Object = {}
            if asked.logprobs and piece.token.id is not None:
                of["logprobs"] = answers.chat_logprobs(target.llm.tokenizer, [piece])
            if asked.return_token_ids and piece.token.id is not None:
                of["token_ids"] = [piece.token.id]
            for delta in deltas or ([{"content": ""}] if of else []):
                yield chunk(piece.choice, delta, **of)
                of = {}
            if reason:
                yield chunk(piece.choice, {}, finish=answers.chat_finish(reason, stream.n_calls if stream else 0))
        pieces = await generation.next()
    if asked.stream_options is not None and asked.stream_options.include_usage:
        yield data(envelope.wrap([], kind="chat.completion.chunk", usage=answers.usage_json(generation.usage)))
    yield DONE
