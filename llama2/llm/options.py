"""How a caller says what to sample, and what the checkpoint says where the caller does not."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

from llama2.errors import CheckpointError, RequestError, did_you_mean
from llama2.infer.request import Grammar, SamplingParams
from llama2.llm.grammar import FORMS, Kind


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments of every verb that writes text: the fields of SamplingParams, and what is said in text.

    That is stop strings (with include_stop the one that was found belongs to the text), and what the answer must look
    like (one of them): grammar, in Lark or GBNF; json_object; json_schema, a dict, its text or a pydantic model; regex;
    choice, a list of texts.
    """

    max_new_tokens: int | None
    temperature: float
    top_p: float
    typical_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_breaker_ids: tuple[int, ...]
    logit_bias: Mapping[int, float]
    stop_ids: tuple[int, ...]
    stop: str | Sequence[str] | None
    include_stop: bool
    ignore_eos: bool
    min_tokens: int
    grammar: Grammar | str | None
    json_object: bool
    json_schema: Any
    regex: str | None
    choice: Sequence[str] | None
    seed: int | Sequence[int] | None
    n: int
    best_of: int | None
    beam_width: int
    length_penalty: float
    logprobs: int | None
    prompt_logprobs: int | None


def over(defaults: SamplingParams, options: SamplingOptions) -> SamplingParams:
    """Return a call's options over the defaults. Raises RequestError for a name that is none."""
    known = SamplingOptions.__annotations__
    for name in options:
        if name not in known:
            raise RequestError(f"{name!r} is not a sampling option{did_you_mean(name, known)}")
    fields = {name: value for name, value in options.items() if name not in (*FORMS, "stop", "include_stop")}
    return replace(defaults, **fields)


def form_of(options: SamplingOptions) -> tuple[Kind, Any] | None:
    """Return what the answer must look like, if anything is asked for. Raises RequestError for more than one form."""
    given: list[tuple[Kind, Any]] = [(name, value) for name in FORMS if (value := options.get(name)) is not None]
    if not isinstance(wants_object := options.get("json_object") or False, bool):
        raise RequestError(f"json_object={wants_object!r} must be True or False; a schema is given as json_schema")
    given = [(name, value) for name, value in given if name != "json_object" or value]
    if len(given) > 1:
        raise RequestError(f"{' and '.join(name for name, _ in given)} do not go together; ask for one form")
    return given[0] if given else None


def stop_strings(options: SamplingOptions) -> tuple[str, ...]:
    """Return the texts that end an answer."""
    stop = options.get("stop")
    stop = () if stop is None else stop
    stops = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else (stop,)
    if not all(isinstance(each, str) and each for each in stops):
        raise RequestError(f"stop={stop!r} must be a text or a list of texts, none of them empty")
    return stops


def own_options(options: SamplingOptions, n_prompts: int) -> Iterator[SamplingOptions]:
    """Yield the options of each prompt: they differ in nothing but the seed, where there is one for each."""
    seeds = options.get("seed")
    if not isinstance(seeds, Sequence):
        yield from [options] * n_prompts
        return
    if len(seeds) != n_prompts:
        raise RequestError(f"{len(seeds)} seeds for {n_prompts} prompts; give one for each, or a single one")
    for seed in seeds:
        yield {**options, "seed": seed}


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


def end_ids(generation: Mapping[str, object]) -> list[int]:
    """Return the end tokens that a generation_config names: none, one id or a list of ids."""
    value = generation.get("eos_token_id")
    values: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(each, int) for each in values):
        raise CheckpointError(f"generation_config.json: eos_token_id={value!r} must be a token id or a list of them")
    return values
