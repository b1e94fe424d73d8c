"""Text to ids, back, and what a conversation looks like to the model: /tokenize, /detokenize, /apply-template."""

import asyncio
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from llama2.chat import Message, render
from llama2.llm import LLM
from llama2.serve.answers import Object, spelled
from llama2.serve.generation import check_could_fit
from llama2.serve.protocol import DetokenizeRequest, Placed, TemplateRequest, TokenizeRequest
from llama2.serve.refusal import Json
from llama2.serve.server import Server
from llama2.serve.tools import conversation


async def tokenize(server: Server, request: Request) -> Response:
    """Return the ids of a text, begun as a prompt is, or of a conversation."""
    asked = await server.read(request, TokenizeRequest)
    llm = server.target(asked.model).llm
    # llama.cpp's `content` comes without a beginning of sequence, vLLM's `prompt` with one, unless they are told
    begins = [asked.add_special_tokens, asked.add_special, asked.content is None]
    bos = next(flag for flag in begins if flag is not None)

    def ids() -> list[int]:
        if asked.messages is not None:
            return rendered(llm, conversation(asked.messages, asked.tools or (), llm), asked)
        text = asked.prompt if asked.prompt is not None else asked.content or ""
        return llm.prompt_ids(text) if bos else llm.tokenizer.encode(text)

    tokens = await asyncio.to_thread(ids)
    found: Object = {"tokens": tokens, "count": len(tokens), "max_model_len": llm.config.context_length}
    pieces = [spelled(llm.tokenizer, each) for each in tokens] if asked.with_pieces or asked.return_token_strs else []
    if asked.with_pieces:
        found["tokens"] = [{"id": each, "piece": piece} for each, piece in zip(tokens, pieces, strict=True)]
    if asked.return_token_strs:
        found["token_strs"] = pieces
    return Json(found)


def rendered(llm: LLM, turns: Sequence[Message], place: Placed) -> list[int]:
    """Return a conversation as ids, up to where the client wants the prompt to end. Raises Llama2Error."""
    check_could_fit(llm, turns)
    goes_on = place.continue_final_message is True
    return render(
        turns,
        llm.tokenizer,
        format=llm.chat_format,
        add_generation_prompt=not goes_on and place.add_generation_prompt is not False,
        continue_final_message=goes_on,
    ).tokens


async def detokenize(server: Server, request: Request) -> Response:
    """Return the text of ids."""
    asked = await server.read(request, DetokenizeRequest)
    llm = server.target(asked.model).llm
    text = await asyncio.to_thread(lambda: llm.tokenizer.decode(asked.tokens))
    return Json({"prompt": text, "content": text})


async def apply_template(server: Server, request: Request) -> Response:
    """Return a conversation as the model reads it, up to where its answer begins, or goes on."""
    asked = await server.read(request, TemplateRequest)
    llm = server.target(asked.model).llm
    turns = conversation(asked.messages, asked.tools or (), llm)
    tokens = await asyncio.to_thread(rendered, llm, turns, asked)
    return Json({"prompt": llm.tokenizer.decode(tokens, special=True), "tokens": tokens})
