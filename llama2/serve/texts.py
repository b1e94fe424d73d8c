"""Text to ids, back, and what a conversation looks like to the model: /tokenize, /detokenize, /apply-template."""

import asyncio
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from llama2.llm import LLM
from llama2.serve.answers import spelled
from llama2.serve.generation import check_could_fit
from llama2.serve.protocol import ChatMessage, DetokenizeRequest, TemplateRequest, TokenizeRequest
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
            return _rendered(llm, asked.messages)
        text = asked.prompt if asked.prompt is not None else asked.content or ""
        return llm.prompt_ids(text) if bos else llm.tokenizer.encode(text)

    tokens: list[object] = [*await asyncio.to_thread(ids)]
    n_tokens = len(tokens)
    if asked.with_pieces:
        tokens = [{"id": each, "piece": spelled(llm.tokenizer, each)} for each in tokens if isinstance(each, int)]
    return Json({"tokens": tokens, "count": n_tokens, "max_model_len": llm.config.context_length})


def _rendered(llm: LLM, messages: Sequence[ChatMessage]) -> list[int]:
    turns = conversation(messages, [], llm)
    check_could_fit(llm, turns)
    return llm.prompt_ids(turns)


async def detokenize(server: Server, request: Request) -> Response:
    """Return the text of ids."""
    asked = await server.read(request, DetokenizeRequest)
    llm = server.target(asked.model).llm
    text = await asyncio.to_thread(lambda: llm.tokenizer.decode(asked.tokens))
    return Json({"prompt": text, "content": text})


async def apply_template(server: Server, request: Request) -> Response:
    """Return a conversation as the model reads it, up to where its answer begins."""
    asked = await server.read(request, TemplateRequest)
    llm = server.target(asked.model).llm
    tokens = await asyncio.to_thread(_rendered, llm, asked.messages)
    return Json({"prompt": llm.tokenizer.decode(tokens, special=True), "tokens": tokens})
