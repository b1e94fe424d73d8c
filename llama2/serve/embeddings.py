"""POST /v1/embeddings: texts in, vectors out."""

import asyncio
import base64
import struct

import torch
from starlette.requests import Request
from starlette.responses import Response

from llama2.llm import LLM
from llama2.serve.generation import check_could_fit
from llama2.serve.protocol import EmbeddingRequest, as_list
from llama2.serve.refusal import Json, Refusal
from llama2.serve.server import Server, call_of
from llama2.serve.stream import until_gone


async def embeddings(server: Server, request: Request) -> Response:
    """Return a vector for each text."""
    asked = await server.read(request, EmbeddingRequest)
    target = server.target(asked.model)
    width = target.llm.config.dim
    if asked.dimensions not in (None, width):
        raise Refusal(
            400, f"dimensions={asked.dimensions}: this model's vectors have {width}; leave it out", param="dimensions"
        )
    texts = as_list(asked.input)
    prompts = await asyncio.to_thread(lambda: [_ids(target.llm, text) for text in texts])
    n_tokens = sum(map(len, prompts))
    call = call_of(request)
    server.limits.tokens(call.who, n_tokens)
    call.usage.prompt_tokens = n_tokens
    vectors = []
    for ids in prompts:  # one by one, so that answers under way go on between them
        embed = target.served.worker.call(lambda llm, ids=ids: _vector(llm, ids, asked))
        vectors.append(await until_gone(request, embed))
    found = [
        {"object": "embedding", "index": i, "embedding": _coded(vector, asked.encoding_format)}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return Json({"object": "list", "data": found, "model": target.name, "usage": usage})


def _ids(llm: LLM, text: str | list[int]) -> list[int]:
    check_could_fit(llm, text)
    return llm.prompt_ids(text)


def _vector(llm: LLM, ids: list[int], asked: EmbeddingRequest) -> list[float]:
    vector = llm.embed_ids(ids, pooling=asked.pooling or "mean")
    return (torch.nn.functional.normalize(vector, dim=0) if asked.normalize is not False else vector).tolist()


def _coded(vector: list[float], form: str | None) -> list[float] | str:
    """Return a vector as it is, or as base64 of little-endian float32."""
    return vector if form != "base64" else base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
