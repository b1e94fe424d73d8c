"""Text in, text out: a model, its tokenizer and an engine behind a handful of verbs.

    llm = llama2.load("path/or/hub-name")
    llm.generate("Once upon a time", max_new_tokens=50)
    llm.chat([{"role": "user", "content": "Hi"}])

Tokens become text here and only here; stop strings, which are text, are found here too.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from jaxtyping import Float
from torch import Tensor

from llama2 import chat
from llama2.checkpoint import hub, store
from llama2.errors import ChatError, CheckpointError, RequestError, TokenizerError, TokenizerMissing, did_you_mean
from llama2.infer.engine import Engine, completion
from llama2.infer.request import Completion, Request, SamplingParams, Token
from llama2.model.transformer import Transformer
from llama2.tokenizer.formats import load_tokenizer
from llama2.tokenizer.tokenizer import StreamDecoder, Tokenizer

Messages = Sequence[chat.Message | Mapping[str, str]]
Prompt = str | Messages
"""A text to continue, or a conversation to answer."""


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments of every verb that writes text: the fields of SamplingParams, and stop strings."""

    max_new_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    stop_ids: tuple[int, ...]
    stop: str | Sequence[str]
    seed: int | Sequence[int] | None
    n: int
    logprobs: int | None


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


@dataclass
class _Text:
    """One answer turning into text: holds back what may yet become a stop string or a character."""

    decoder: StreamDecoder
    stops: tuple[str, ...]
    held: str = ""
    is_stopped: bool = False

    def push(self, token_id: int) -> str:
        """Return the text that this token makes certain."""
        return self._release(self.decoder.push(token_id))

    def finish(self) -> str:
        """Return what was held back; nothing more can follow."""
        piece = self._release(self.decoder.flush())
        if not self.is_stopped:
            piece, self.held = piece + self.held, ""
        return piece

    def _release(self, piece: str) -> str:
        if self.is_stopped:
            return ""
        self.held += piece
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            return self.held[: min(found)]
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        safe, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return safe


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of text could be the beginning of stop."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


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
    ):
        """`tokenizer` may be the error that explains its absence: it is raised when text is first asked for.

        generation: sampling defaults, as a generation_config.json holds them. max_batch: how many answers to
        write at once. batch_invariant: see `infer.engine.Engine`. chat_format: one of `chat.FORMATS`; by the
        tokenizer's chat template if not given.
        """
        self.model = model
        self.config = model.config
        self.max_batch = max_batch
        self.batch_invariant = batch_invariant
        self.chat_format = chat_format
        self._tokenizer = tokenizer
        self.defaults = sampling_defaults(generation or {})
        self._eos_ids = _listed(generation or {}, "eos_token_id")

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
            self._request(str(i), each, own)
            for i, (each, own) in enumerate(zip(prompts, _own(options, len(prompts)), strict=True))
        ]
        events: dict[tuple[str, int], list[tuple[Token, str]]] = {}
        for token, piece in self._events(prompts, requests, options):
            events.setdefault((token.request_id, token.index), []).append((token, piece))
        answers = [
            [_text_completion(request, index, events[request.id, index]) for index in range(request.params.n)]
            for request in requests
        ]
        results = [each if len(each) > 1 else each[0] for each in answers]
        return results[0] if is_single else results

    def stream(self, prompt: Prompt, **options: Unpack[SamplingOptions]) -> Iterator[str]:
        """Yield the answer to a text or a conversation piece by piece, never half a character; n must be 1."""
        request = self._request("0", prompt, options)
        if request.params.n != 1:
            raise RequestError("stream gives one answer; use generate or complete for n > 1")
        return (piece for _, piece in self._events([prompt], [request], options) if piece)

    def continue_ids(self, prompt: Sequence[int], **options: Unpack[SamplingOptions]) -> list[list[int]]:
        """Continue token ids as they are; return n lists of ids, prompt included."""
        if "stop" in options:
            raise RequestError("continue_ids works on ids, and stop is text; use stop_ids")
        if not all(isinstance(token_id, int) for token_id in prompt):
            raise RequestError("continue_ids takes token ids, whole numbers; generate takes text")
        params = self._params(options)
        params = replace(params, stop_ids=tuple(sorted({*self.stop_ids, *params.stop_ids})))
        completions = self._engine().generate([Request("0", tuple(prompt), params)])[0]
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
        hidden = self.model.hidden(self._tensor(self._fitting([start, *tokens[:-1]])))[0]
        logprobs: list[float] = []
        for at in range(0, len(tokens), 512):  # the logits of a long text never exist whole
            rows = self.model.project(hidden[at : at + 512]).log_softmax(dim=-1)
            wanted = torch.tensor(tokens[at : at + 512], device=rows.device)
            logprobs += rows.gather(1, wanted[:, None])[:, 0].tolist()
        return Score(tuple(tokens), tuple(logprobs))

    @torch.no_grad()
    def embed(self, texts: str | Sequence[str], *, pooling: Literal["mean", "last"] = "mean") -> Float[Tensor, "*N D"]:
        """Return one vector per text, from the final hidden states: their mean, or the last token's; not normalised."""
        if isinstance(texts, str):
            return self.embed([texts], pooling=pooling)[0]
        if not all(isinstance(text, str) for text in _as_list(texts)[0]):
            raise RequestError("embed takes a text or a list of texts")
        if pooling not in ("mean", "last"):
            raise RequestError(f"pooling={pooling!r} must be 'mean' or 'last'")
        vectors = []
        for text in texts:
            hidden = self.model.hidden(self._tensor(self._fitting(self.prompt_ids(text))))[0].float()
            vectors.append(hidden.mean(dim=0) if pooling == "mean" else hidden[-1])
        return torch.stack(vectors) if vectors else torch.empty(0, self.config.dim)

    def _events(
        self, prompts: Sequence[Prompt], requests: Sequence[Request], options: SamplingOptions
    ) -> Iterator[tuple[Token, str]]:
        """Yield each token event with the text that it made certain, until all answers are finished."""
        stops = _stop_strings(options)
        texts: dict[tuple[str, int], _Text] = {}
        engine = self._engine()
        for token in engine.stream(requests):
            key = (token.request_id, token.index)
            if key not in texts:
                # A text is continued where it stood; an answer in a conversation begins a text of its own.
                which = int(token.request_id)
                context = requests[which].prompt if isinstance(prompts[which], str) else ()
                texts[key] = _Text(StreamDecoder(self.tokenizer, context), stops)
            text = texts[key]
            piece = text.push(token.id) if token.id is not None else ""
            if token.finish_reason:
                piece += text.finish()
            if text.is_stopped:
                engine.abort(token.request_id, token.index)
                token = replace(token, finish_reason="stop")
            yield token, piece

    def _engine(self) -> Engine:
        return Engine(self.model, max_batch=self.max_batch, batch_invariant=self.batch_invariant)

    def _request(self, request_id: str, prompt: Prompt, options: SamplingOptions) -> Request:
        params = self._params(options)
        stop_ids = {*self.stop_ids, *params.stop_ids}
        if not isinstance(prompt, str):
            stop_ids |= {*chat.stop_ids(self.tokenizer, self.chat_format)}
        return Request(request_id, tuple(self.prompt_ids(prompt)), replace(params, stop_ids=tuple(sorted(stop_ids))))

    def _params(self, options: SamplingOptions) -> SamplingParams:
        """Return this call's options over the checkpoint's defaults."""
        known = SamplingOptions.__annotations__
        for name in options:
            if name not in known:
                raise RequestError(f"{name!r} is not a sampling option{did_you_mean(name, known)}")
        return replace(self.defaults, **{name: value for name, value in options.items() if name != "stop"})

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return the ids that the model reads for a text or a conversation, the beginning of sequence included."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=self.tokenizer.bos_id is not None)
        return chat.render(prompt, self.tokenizer, format=self.chat_format, add_generation_prompt=True).tokens

    def _fitting(self, tokens: list[int]) -> list[int]:
        """Return the tokens, if there are any and the context holds them."""
        if not 0 < len(tokens) <= self.config.context_length:
            raise RequestError(
                f"the text has {len(tokens)} tokens; the model's context holds 1 to {self.config.context_length}"
            )
        return tokens

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
) -> LLM:
    """Load a Llama from a folder, a file or a hub name, in any of the formats of `checkpoint.store`.

    An adapter's folder gives its base with the adapter upon it, and its own tokenizer before the base's.

    dtype: float32, bfloat16, float16; the stored one if not given (quantised files: float32 below a billion
    parameters, bfloat16 above). device: the accelerator if there is one, else the CPU. tokenizer: a file or
    folder; looked for beside the checkpoint if not given, and without one `model`, but no text, can be used.
    revision: branch, tag or commit of a hub repository. max_batch: how many answers to write at once.
    batch_invariant: an answer is the same, bit for bit, alone and among others; on by default in float32.
    chat_format: llama2, llama3 or template; by the checkpoint's own template if not given.
    """
    path = hub.resolve(model, revision=revision)
    checkpoint, n_rows = store.read(store.layers(path)[0]), store.read_config(path).vocab_size
    try:
        vocabulary = tokenizer_of(path) if tokenizer is None else load_tokenizer(Path(tokenizer))
    except TokenizerMissing as error:
        if tokenizer is not None:
            raise
        vocabulary = error
    if isinstance(vocabulary, Tokenizer) and vocabulary.n_vocab > n_rows:
        raise TokenizerError(
            f"the tokenizer of {path} has ids up to {vocabulary.n_vocab - 1}, the model only "
            f"{n_rows} rows: they do not belong together; name the right one with --tokenizer"
        )
    name = str(dtype).removeprefix("torch.") if dtype is not None else None
    transformer = store.load(path, dtype=name, device=_usable_device(device)).eval()
    return LLM(
        transformer,
        vocabulary,
        generation=checkpoint.generation,
        max_batch=max_batch,
        batch_invariant=batch_invariant,
        chat_format=chat_format,
    )


def tokenizer_of(path: Path) -> Tokenizer:
    """Return the tokenizer of a checkpoint, or of an adapter: its own before its base's. Raises TokenizerMissing."""
    base, *adapters = store.layers(path)
    *others, last = [*reversed(adapters), base] if adapters else [path]
    for place in others:
        try:
            return load_tokenizer(place)
        except TokenizerMissing:
            continue
    return load_tokenizer(last)


def default_device() -> torch.device:
    """Return the accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _usable_device(device: str | torch.device | None) -> str:
    """Return the device's name; raise RequestError if there is no such device here."""
    name = str(device or default_device())
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RequestError(f"device {name!r} cannot be used here ({reason}); cpu always can") from None
    return name


def sampling_defaults(generation: Mapping[str, object]) -> SamplingParams:
    """Return the sampling that a checkpoint's generation_config asks for, else Meta's (0.6, 0.9).

    A file that names any of the numbers means 1.0 (no filter) for those it leaves out; `do_sample: false`
    without numbers means greedy.
    """
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = {name: generation[name] for name in names if generation.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise CheckpointError(f"generation_config.json: {name}={value!r} must be a number")
    rest = {"temperature": 1.0, "top_p": 1.0} if given else {}
    greedy = {"temperature": 0.0} if generation.get("do_sample") is False else {}
    try:
        return SamplingParams(**{**rest, **given, **greedy})
    except RequestError as error:
        raise CheckpointError(f"generation_config.json: {error}") from None


def _listed(generation: Mapping[str, object], name: str) -> list[int]:
    """Return a field that may be absent, one id or a list of ids."""
    value = generation.get(name)
    values: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(each, int) for each in values):
        raise CheckpointError(f"generation_config.json: {name}={value!r} must be a token id or a list of them")
    return values


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


def _own(options: SamplingOptions, n_prompts: int) -> Iterator[SamplingOptions]:
    """Yield the options of each prompt: they differ in nothing but the seed, where there is one for each."""
    seeds = options.get("seed")
    if not isinstance(seeds, Sequence):
        yield from [options] * n_prompts
        return
    if len(seeds) != n_prompts:
        raise RequestError(f"{len(seeds)} seeds for {n_prompts} prompts; give one for each, or a single one")
    for seed in seeds:
        yield {**options, "seed": seed}


def _stop_strings(options: SamplingOptions) -> tuple[str, ...]:
    stop = options.get("stop", ())
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(each, str) and each for each in stops):
        raise RequestError(f"stop={stop!r} must be a text or a list of texts, none of them empty")
    return stops


def _texts(completions: Any) -> Any:
    return [_texts(each) for each in completions] if isinstance(completions, list) else completions.text


def _text_completion(request: Request, index: int, events: list[tuple[Token, str]]) -> TextCompletion:
    ids = completion(request, index, [token for token, _ in events])
    return TextCompletion(**vars(ids), text="".join(piece for _, piece in events))
