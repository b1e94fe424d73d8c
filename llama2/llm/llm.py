"""Text in, text out: a model, its tokenizer and an engine behind a handful of verbs.

    llm = llama2.load("path/or/hub-name")
    llm.generate("Once upon a time", max_new_tokens=50)
    llm.chat([{"role": "user", "content": "Hi"}])

Tokens become text in `text.py`, for these verbs and for the server alike.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeGuard, Unpack, overload

import torch
from jaxtyping import Float
from torch import Tensor

from llama2 import chat
from llama2.errors import ChatError, RequestError, TokenizerMissing
from llama2.infer.completion import best, completion, unless_failed
from llama2.infer.engine import Engine
from llama2.infer.request import Completion, Grammar, Request, Token
from llama2.infer.speculative import Drafter, DraftModel, PromptLookup, check_draft
from llama2.llm.grammar import Kind, TextGrammar
from llama2.llm.loading import read_parts
from llama2.llm.options import SamplingOptions, end_ids, form_of, over, own_options, sampling_defaults, stop_strings
from llama2.llm.text import AnswerTexts
from llama2.model.transformer import Transformer
from llama2.tokenizer.tokenizer import Tokenizer

Messages = Sequence[chat.Message | Mapping[str, str]]
Prompt = str | Messages
"""A text to continue, or a conversation to answer."""
Ids = Sequence[int]
"""A text to continue, as token ids."""


@dataclass(frozen=True)
class TextCompletion(Completion):
    """A finished answer with its text; a stop string, and what came after it, is not part of the text."""

    text: str = ""


@dataclass(frozen=True)
class Score:
    """How likely the model finds a text."""

    tokens: tuple[int, ...]
    """The text's token ids, without the beginning-of-sequence token that they were conditioned on."""
    logprobs: tuple[float, ...]
    """ln p(token | everything before it), one for each token."""

    @property
    def total(self) -> float:
        """ln p(text)."""
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp(-total / number of tokens), per token of this model's vocabulary."""
        return math.exp(-self.total / len(self.logprobs))


class LLM:
    """A loaded Llama. `model` is the bare Transformer: `llm.model(tokens)` gives logits [B T V]."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | TokenizerMissing,
        *,
        generation: Mapping[str, object] | None = None,
        max_batch: int = 32,
        batch_invariant: bool | None = None,
        chat_format: str | None = None,
        draft: Transformer | Literal["lookup"] | None = None,
    ):
        """`tokenizer` may be the error that explains its absence: it is raised when text is first asked for.

        generation: sampling defaults, as a generation_config.json holds them. max_batch: how many answers to
        write at once. batch_invariant: see `infer.engine.Engine`. chat_format: one of `chat.FORMATS`; by the
        tokenizer's chat template if not given. draft: what guesses tokens ahead (`infer.speculative`): a smaller model
        of the same vocabulary, or "lookup" in the text so far; no text changes by it.
        """
        if isinstance(draft, Transformer):
            check_draft(model, draft)
        self.model, self.draft = model, draft
        self.config = model.config
        self.max_batch = max_batch
        self.batch_invariant = batch_invariant
        self.chat_format = chat_format
        self._tokenizer = tokenizer
        self.defaults = sampling_defaults(generation or {})
        self._eos_ids = end_ids(generation or {})

    @property
    def tokenizer(self) -> Tokenizer:
        if isinstance(self._tokenizer, TokenizerMissing):
            raise self._tokenizer
        return self._tokenizer

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end any text: the checkpoint's end tokens, and the one that begins a new document."""
        ends: set[int | None] = {*self._eos_ids}
        if isinstance(self._tokenizer, Tokenizer):
            ends |= {self._tokenizer.eos_id, self._tokenizer.bos_id, *self._tokenizer.vocabulary.stop_ids}
        return frozenset(token_id for token_id in ends if token_id is not None)

    @overload
    def generate(self, prompt: str, **options: Unpack[SamplingOptions]) -> str: ...
    @overload
    def generate(self, prompt: list[str], **options: Unpack[SamplingOptions]) -> list[str]: ...
    def generate(self, prompt: str | list[str], **options: Unpack[SamplingOptions]) -> Any:
        """Continue a text and return only what is new; a list for a list of texts.

        With n > 1 a list of n stands where the text would (which the annotations cannot say).
        """
        return _texts(self.complete(prompt, **options))

    def chat(self, messages: Messages, **options: Unpack[SamplingOptions]) -> str:
        """Answer a conversation, e.g. `[{"role": "user", "content": "Hi"}]`; with n > 1 a list of n answers."""
        if isinstance(messages, str):
            raise ChatError('chat takes messages, e.g. [{"role": "user", "content": "Hi"}]; generate continues a text')
        return _texts(self.complete(chat.conversation(messages), **options))

    def complete(self, prompt: Prompt | Sequence[Prompt], **options: Unpack[SamplingOptions]) -> Any:
        """Return the TextCompletion of a text or a conversation: text, tokens, log-probabilities, finish reason.

        A list of prompts gives a list, answered together; with n > 1 a list of n stands for each answer. A seed
        draws the same numbers for every prompt, so that an answer does not depend on its company; for independent
        samples give a list of seeds, one for each prompt.
        """
        prompts, is_single = _as_list(prompt)
        requests = [
            self.request(str(i), each, **own)
            for i, (each, own) in enumerate(zip(prompts, own_options(options, len(prompts)), strict=True))
        ]
        events: dict[tuple[str, int], list[tuple[Token, str]]] = {}
        for token, piece in self._events(prompts, requests, options):
            events.setdefault((token.request_id, token.index), []).append((token, piece))
        answers = [
            _answers(request, [events[request.id, index] for index in range(request.params.n_written)])
            for request in requests
        ]
        results = [each if len(each) > 1 else each[0] for each in answers]
        return results[0] if is_single else results

    def stream(self, prompt: Prompt, **options: Unpack[SamplingOptions]) -> Iterator[str]:
        """Yield the answer to a text or a conversation piece by piece, never half a character; n must be 1."""
        request = self.request("0", prompt, **options)
        if request.params.n_written != 1:
            raise RequestError("stream gives one answer; use generate or complete for n > 1 and best_of")
        return (piece for _, piece in self._events([prompt], [request], options) if piece)

    def continue_ids(self, prompt: Sequence[int], **options: Unpack[SamplingOptions]) -> list[list[int]]:
        """Continue token ids as they are; return n lists of ids, prompt included."""
        if "stop" in options:
            raise RequestError("continue_ids works on ids, and stop is text; use stop_ids")
        if not all(isinstance(token_id, int) for token_id in prompt):
            raise RequestError("continue_ids takes token ids, whole numbers; generate takes text")
        completions = self.engine().generate([self.request("0", tuple(prompt), **options)])[0]
        return [[*prompt, *each.tokens] for each in completions]

    @torch.no_grad()
    def score(self, text: str) -> Score:
        """Return the log-probability of every token of a text, the first one given the beginning of sequence."""
        tokens = self.tokenizer.encode(text)
        start = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eos_id
        if start is None:
            raise RequestError("score needs a token to begin with, and this vocabulary has neither bos nor eos")
        if not tokens:
            raise RequestError("score needs a text of at least one token")
        self._check_fits(tokens)
        hidden = self.model.hidden(self._tensor([start, *tokens[:-1]]))[0]
        logprobs: list[float] = []
        for at in range(0, len(tokens), 512):  # the logits of a long text never exist whole
            rows = self.model.project(hidden[at : at + 512]).log_softmax(dim=-1)
            wanted = torch.tensor(tokens[at : at + 512], device=rows.device)
            logprobs += rows.gather(1, wanted[:, None])[:, 0].tolist()
        return Score(tuple(tokens), tuple(logprobs))

    def embed(self, texts: str | Sequence[str], *, pooling: Literal["mean", "last"] = "mean") -> Float[Tensor, "*N D"]:
        """Return one vector per text, from the final hidden states: their mean, or the last token's; not normalised."""
        if isinstance(texts, str):
            return self.embed([texts], pooling=pooling)[0]
        if not all(isinstance(text, str) for text in _as_list(texts)[0]):
            raise RequestError("embed takes a text or a list of texts")
        vectors = [self.embed_ids(self.prompt_ids(text), pooling=pooling) for text in texts]
        return torch.stack(vectors) if vectors else torch.empty(0, self.config.dim)

    @torch.no_grad()
    def embed_ids(self, ids: Sequence[int], *, pooling: Literal["mean", "last"] = "mean") -> Float[Tensor, " D"]:
        """Return the vector of token ids as they are."""
        if pooling not in ("mean", "last"):
            raise RequestError(f"pooling={pooling!r} must be 'mean' or 'last'")
        self._check_fits(ids)
        hidden = self.model.hidden(self._tensor(ids))[0].float()
        return hidden.mean(dim=0) if pooling == "mean" else hidden[-1]

    # What the verbs are made of; the server is made of the same.

    def engine(self, **settings: Any) -> Engine:
        """Return a new engine for this model; settings are those of `infer.engine.Engine`."""
        usual = dict(max_batch=self.max_batch, batch_invariant=self.batch_invariant, drafter=self._drafter())
        return Engine(self.model, **{**usual, **settings})

    def _drafter(self) -> Drafter | None:
        if self.draft is None:
            return None
        return DraftModel(self.draft) if isinstance(self.draft, Transformer) else PromptLookup()

    def request(self, request_id: str, prompt: Prompt | Ids, **options: Unpack[SamplingOptions]) -> Request:
        """Return what the engine is asked for: the prompt as ids, the options over the checkpoint's defaults.

        Ids that end any answer, and in a conversation those that end a turn, are added to `stop_ids`; `stop` is for
        `texts`.
        """
        params, is_new = over(self.defaults, options), _is_conversation(prompt)
        stop_ids = {*self.stop_ids, *params.stop_ids}
        if is_new:
            stop_ids |= {*chat.stop_ids(self.tokenizer, self.chat_format)}
        params = replace(params, stop_ids=tuple(sorted(stop_ids)))
        if (form := form_of(options)) is not None:
            params = replace(params, grammar=self.grammar(*form, stop_ids=params.stop_ids, at_start=is_new))
        return Request(request_id, tuple(self.prompt_ids(prompt)), params)

    def grammar(self, kind: Kind, value: Any, *, stop_ids: Sequence[int], at_start: bool) -> Grammar:
        """Return what an answer must look like (`llm.grammar.TextGrammar`); a Grammar stays as it is."""
        if isinstance(value, Grammar):
            return value
        n_vocab = self.config.vocab_size
        return TextGrammar(self.tokenizer, kind, value, n_vocab=n_vocab, stop_ids=stop_ids, at_start=at_start)

    def texts(
        self, request: Request, prompt: Prompt | Ids, *, stops: Sequence[str] = (), keeps_stop: bool = False
    ) -> AnswerTexts:
        """Return what turns the events of a request into text.

        A text is continued where it stood; an answer in a conversation begins a text of its own.
        """
        context = () if _is_conversation(prompt) else request.prompt
        return AnswerTexts(self.tokenizer, context=context, stops=stops, keeps_stop=keeps_stop)

    def _events(
        self, prompts: Sequence[Prompt], requests: Sequence[Request], options: SamplingOptions
    ) -> Iterator[tuple[Token, str]]:
        """Yield each token event with the text that it made certain, until all answers are finished."""
        stops, engine = stop_strings(options), self.engine()
        texts = {
            request.id: self.texts(request, prompt, stops=stops, keeps_stop=options.get("include_stop", False))
            for request, prompt in zip(requests, prompts, strict=True)
        }
        for event in engine.stream(requests):
            if (found := texts[event.request_id].push(unless_failed(event))) is None:
                continue
            token, piece = found
            if token.finish_reason != event.finish_reason:
                engine.abort(token.request_id, token.index)
            yield token, piece

    def prompt_ids(self, prompt: Prompt | Ids) -> list[int]:
        """Return the ids that the model reads for a text or a conversation, the beginning of sequence included.

        Ids stay as they are.
        """
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=self.tokenizer.bos_id is not None)
        if _is_conversation(prompt):
            return chat.render(prompt, self.tokenizer, format=self.chat_format, add_generation_prompt=True).tokens
        return [token_id for token_id in prompt if isinstance(token_id, int)]

    def _check_fits(self, tokens: Sequence[int]) -> None:
        if not 0 < len(tokens) <= self.config.context_length:
            raise RequestError(
                f"the text has {len(tokens)} tokens; the model's context holds 1 to {self.config.context_length}"
            )

    def _tensor(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([tokens], device=self.model.tok_embeddings.weight.device)


def load(
    model: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    max_batch: int = 32,
    batch_invariant: bool | None = None,
    chat_format: str | None = None,
    draft: str | Path | None = None,
    split: bool = False,
) -> LLM:
    """Load a Llama from a folder, a file or a hub name, in any of the formats of `checkpoint.store`.

    An adapter's folder gives its base with the adapter upon it, and its own tokenizer before the base's.

    dtype: float32, bfloat16, float16; the stored one if not given (quantised files: float32 below a billion
    parameters, bfloat16 above). device: the accelerator if there is one, else the CPU. tokenizer: a file or
    folder; looked for beside the checkpoint if not given, and without one `model`, but no text, can be used.
    revision: branch, tag or commit of a hub repository. max_batch: how many answers to write at once.
    batch_invariant: an answer is the same, bit for bit, alone and among others; on by default in float32.
    chat_format: llama2, llama3 or template; by the checkpoint's own template if not given.
    draft: a smaller model that guesses tokens ahead, or "lookup"; answers come sooner where it guesses well.
    split: over all processes that torchrun started, for a model that one device cannot hold; returns in the first.
    """
    parts = read_parts(model, dtype=dtype, device=device, tokenizer=tokenizer, revision=revision, split=split)
    guesser: Transformer | Literal["lookup"] | None = "lookup" if draft == "lookup" else None
    if draft not in (None, "lookup"):
        guesser = read_parts(draft, dtype=dtype, device=device, tokenizer=None, revision=None).model
    return LLM(
        parts.model,
        parts.tokenizer,
        generation=parts.generation,
        max_batch=max_batch,
        batch_invariant=batch_invariant,
        chat_format=chat_format,
        draft=guesser,
    )


def _as_list(prompt: Any) -> tuple[list[Prompt], bool]:
    """Return the prompts as a list, and whether there was a single one: a text, or a list of messages."""
    if isinstance(prompt, str):
        return [prompt], True
    wanted = "wanted a text, messages, or a list of those"
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise RequestError(f"prompt is a {type(prompt).__name__}; {wanted}")
    if prompt and isinstance(prompt[0], chat.Message | Mapping):
        return [prompt], True
    for each in prompt:
        if not isinstance(each, Sequence) or isinstance(each, bytes):
            raise RequestError(f"one of the prompts is a {type(each).__name__}; {wanted}")
    return list(prompt), False


def _is_conversation(prompt: Prompt | Ids) -> TypeGuard[Messages]:
    return bool(prompt) and not isinstance(prompt, str) and not isinstance(prompt[0], int)


def _texts(completions: Any) -> Any:
    return [_texts(each) for each in completions] if isinstance(completions, list) else completions.text


def _answers(request: Request, written: list[list[tuple[Token, str]]]) -> list[TextCompletion]:
    """Return the answers that are kept, in order, each put together."""
    kept = best(request, [[token for token, _ in events] for events in written])
    return [_text_completion(request, index, written[which], written[0]) for index, which in enumerate(kept)]


def _text_completion(
    request: Request, index: int, events: list[tuple[Token, str]], first: list[tuple[Token, str]]
) -> TextCompletion:
    ids = completion(request, index, [token for token, _ in events], first=[token for token, _ in first])
    return TextCompletion(**vars(ids), text="".join(piece for _, piece in events))
