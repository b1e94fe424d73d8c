"""POST /v1/completions: texts, or token ids, in; what follows out. With echo and logprobs, a judge of given texts."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llama2.infer.completion import best
from llama2.llm import LLM
from llama2.llm.options import form_of
from llama2.serve import answers
from llama2.serve.answers import CompletionLogprobs, Envelope, Object
from llama2.serve.forms import constrain
from llama2.serve.generation import Generation, Prepared
from llama2.serve.protocol import CompletionRequest
from llama2.serve.refusal import Json
from llama2.serve.server import Server, Target
from llama2.serve.stream import DONE, EventStream, data, until_gone
from llama2.serve.worker import Piece
from llama2.tokenizer.tokenizer import StreamDecoder

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, for this route."""


async def completions(server: Server, request: Request) -> Response:
    """Continue one or more texts."""
    asked = await server.read(request, CompletionRequest)
    target = server.target(asked.model)
    prepared = await until_gone(request, _prepared(server, target, asked))
    choices = [_Choice(asked, target.llm, each) for each in prepared]
    envelope = server.envelope(target, "text_completion", "cmpl")
    generation = server.generation(request, target, prepared)
    try:
        if asked.stream:
            first = await until_gone(request, generation.next()) or ()
            return EventStream(_events(asked, choices, generation, envelope, first), close=generation.close)
        found = await until_gone(request, generation.collect())
    except BaseException:
        generation.close()
        raise
    made = []
    for number, choice in enumerate(choices):
        written = found[number * choice.n_written : (number + 1) * choice.n_written]
        for which in best(choice.request, [[piece.token for piece in pieces] for pieces in written]):
            made.append({"index": len(made), **choice.whole(written[which], written[0])})
    return Json(envelope.wrap(made, usage=answers.usage_json(generation.usage)))


async def _prepared(server: Server, target: Target, asked: CompletionRequest) -> list[Prepared]:
    max_tokens = DEFAULT_MAX_TOKENS if asked.max_tokens is None else max(asked.max_tokens, 1)
    options = server.options(asked, max_tokens=max_tokens, logprobs=asked.logprobs)
    if asked.best_of is not None:
        options["best_of"] = asked.best_of
    if asked.prompt_logprobs is not None:
        options["prompt_logprobs"] = asked.prompt_logprobs
    constrain(options, asked)
    if asked.echo and asked.logprobs is not None:
        options["prompt_logprobs"] = max(asked.logprobs, asked.prompt_logprobs or 0)
        if (
            max_tokens == 1 and form_of(options) is None
        ):  # judges of texts (lm-eval) count on an entry for this token, be it an end token
            options["ignore_eos"] = True
    return await server.prepare(target, asked.prompts, options)


class _Choice:
    """Makes the JSON of the answers to one prompt."""

    def __init__(self, asked: CompletionRequest, llm: LLM, prepared: Prepared):
        self.asked, self.tokenizer, self.request = asked, llm.tokenizer, prepared.request
        self.n_written = prepared.request.params.n_written
        self.echo = ""
        if asked.echo:
            given, ids = prepared.prompt, prepared.request.prompt
            self.echo = given if isinstance(given, str) else llm.tokenizer.decode(ids)

    def counter(self) -> CompletionLogprobs:
        """Return what counts the tokens of an answer, or of the echoed prompt and an answer."""
        context = () if self.asked.echo else self.request.prompt
        return CompletionLogprobs(self.tokenizer, StreamDecoder(self.tokenizer, context))

    def prompt_logprobs(self, counter: CompletionLogprobs, first: Piece) -> Object | None:
        """Return the entries of the echoed prompt, which come with the first event of its first answer."""
        found, n_top = first.token.prompt_logprobs, self.asked.logprobs
        if found is None or not self.asked.echo or n_top is None:
            return None
        return counter.prompt(self.request.prompt, [(logprob, top[:n_top]) for logprob, top in found])

    def part(self, counter: CompletionLogprobs, pieces: Sequence[Piece]) -> tuple[str, Object | None]:
        if self.asked.max_tokens == 0:  # one was written, because the engine writes at least one
            return "", None
        logprobs = None if self.asked.logprobs is None else counter.answer(pieces)
        return "".join(piece.text for piece in pieces), logprobs

    def whole(self, pieces: Sequence[Piece], first: Sequence[Piece]) -> Object:
        """Return an answer; first: the pieces of this prompt's first one."""
        counter = self.counter()
        before = self.prompt_logprobs(counter, first[0])
        text, logprobs = self.part(counter, pieces)
        reason = pieces[-1].token.finish_reason
        more = self.prompt_ids() | self.ids(pieces)
        if self.asked.prompt_logprobs is not None:
            more["prompt_logprobs"] = answers.prompt_logprobs(self.tokenizer, self.request.prompt, first[0])
        return {"text": self.echo + text, "logprobs": answers.joined(before, logprobs), "finish_reason": reason, **more}

    def prompt_ids(self) -> Object:
        return {"prompt_token_ids": self.request.prompt} if self.asked.return_token_ids else {}

    def ids(self, pieces: Sequence[Piece]) -> Object:
        known = () if self.asked.max_tokens == 0 else pieces
        return {"token_ids": answers.token_ids(known)} if self.asked.return_token_ids else {}


async def _events(
    asked: CompletionRequest,
    choices: Sequence[_Choice],
    generation: Generation,
    envelope: Envelope,
    first: Sequence[Piece],
) -> AsyncIterator[bytes]:
    def chunk(index: int, text: str, logprobs: Object | None, finish: str | None = None, **of: Any) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish, **of}
        return data(envelope.wrap([choice], **answers.chunk_usage(asked.stream_options, generation.usage)))

    makers = [choice for choice in choices for _ in range(choice.n_written)]
    counters = [maker.counter() for maker in makers]
    begun: dict[int, Object | None] = {}
    pieces: Sequence[Piece] | None = first
    while pieces is not None:
        for piece in sorted(pieces, key=lambda each: each.choice):  # a prompt's first answer knows about the prompt
            index, maker = piece.choice, makers[piece.choice]
            if index not in begun:
                known = next((each for i, each in begun.items() if makers[i] is maker), None)
                begun[index] = maker.prompt_logprobs(counters[index], piece) or known
                if asked.echo or asked.return_token_ids:
                    yield chunk(index, maker.echo, begun[index], **maker.prompt_ids())
            text, logprobs = maker.part(counters[index], [piece])
            if text or logprobs or piece.token.finish_reason or asked.return_token_ids:
                yield chunk(index, text, logprobs, piece.token.finish_reason, **maker.ids([piece]))
        pieces = await generation.next()
    if asked.stream_options is not None and asked.stream_options.include_usage:
        yield data(envelope.wrap([], usage=answers.usage_json(generation.usage)))
    yield DONE
