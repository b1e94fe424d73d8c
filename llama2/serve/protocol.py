"""What a client may ask for, field by field. Wrong types are refused; unknown fields are let be, and named.

    Wire
     |- Sampled              how to choose tokens, shared
     |   `- Detailed
     |       |- ChatRequest          POST /v1/chat/completions
     |       `- CompletionRequest    POST /v1/completions
     |- EmbeddingRequest     POST /v1/embeddings
     `- ...                  /tokenize and its relatives; /v1/responses is in `responses.py`

Field names and ranges are OpenAI's; those marked "extra" are vLLM's and llama.cpp's.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

MAX_INPUTS, MAX_STOPS = 2048, 64
Item = TypeVar("Item")
Many = Annotated[list[Item], Field(fail_fast=True)]
"""A list of which the first mistake is told: all those of a million items would fill the memory."""
Ids = Many[Annotated[int, Field(ge=0, lt=2**31)]]


def _kind_of_texts(given: Any) -> str | None:
    """Tell by its first item what a prompt is, so that a long one is not tried in four ways."""
    if not isinstance(given, list):
        return "text" if isinstance(given, str) else None
    first = given[0] if given else ""
    return "texts" if isinstance(first, str) else "lists" if isinstance(first, list) else "ids"


Texts = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[Many[str], Tag("texts")]
    | Annotated[Ids, Tag("ids")]
    | Annotated[Many[Ids], Tag("lists")],
    Discriminator(
        _kind_of_texts,
        custom_error_type="texts",
        custom_error_message="must be a text, a list of texts, token ids, or a list of those",
    ),
]
"""One text or several, as text or as token ids."""


class Wire(BaseModel):
    """JSON from a client."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


def ignored(value: Any, where: str = "") -> Iterator[str]:
    """Yield the names of all fields that nobody asked for, e.g. `messages[0].audio`."""
    if isinstance(value, Wire):
        yield from (f"{where}{name}" for name in value.model_extra or {})
        for name in type(value).model_fields:
            yield from ignored(getattr(value, name), f"{where}{name}.")
    elif isinstance(value, list):
        for i, each in enumerate(value):
            yield from ignored(each, f"{where.removesuffix('.')}[{i}].")


class StreamOptions(Wire):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """extra; with include_usage every chunk says what it has been so far."""


class JsonSchema(Wire):
    name: str | None = Field(default=None, pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    """extra; with type json_object."""

    @model_validator(mode="after")
    def _check(self) -> "ResponseFormat":
        if self.schema_ is not None and self.type != "json_object":
            raise ValueError("the field schema goes with type json_object")
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("type json_schema and the field json_schema go together")
        return self


class StructuredOutputs(Wire):
    """What an answer must look like, as vLLM has it: one of these."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = Field(default=None, min_length=1)
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = Field(default=None, min_length=1)


class Sampled(Wire):
    """How to choose tokens; what is not given comes from the checkpoint."""

    model: str | None = None
    """The first model of the server if not given."""
    max_tokens: int | None = Field(default=None, ge=0, validation_alias=AliasChoices("max_tokens", "n_predict"))
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int | None = Field(default=None, ge=1, le=128)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    top_k: int | None = Field(default=None, ge=-1)
    """extra; 0 and -1 keep all."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """extra"""
    typical_p: float | None = Field(default=None, gt=0, le=1)
    """extra"""
    repetition_penalty: float | None = Field(
        default=None, gt=0, le=100, validation_alias=AliasChoices("repetition_penalty", "repeat_penalty")
    )
    """extra"""
    dry_multiplier: float | None = Field(default=None, ge=0)
    """extra"""
    dry_base: float | None = Field(default=None, ge=1)
    """extra"""
    dry_allowed_length: int | None = Field(default=None, ge=1)
    """extra"""
    min_tokens: int | None = Field(default=None, ge=0)
    """extra"""
    beam_width: int | None = Field(default=None, ge=1, le=64)
    """extra; beam search instead of sampling."""
    use_beam_search: bool | None = None
    """extra; a beam_width of n."""
    length_penalty: float | None = Field(default=None, ge=-10, le=10)
    """extra; with beam_width."""
    ignore_eos: bool | None = None
    """extra; end tokens do not end the answer."""
    stop_token_ids: Ids | None = None
    """extra"""
    include_stop_str_in_output: bool | None = None
    """extra; the stop text that was found belongs to the answer."""
    structured_outputs: StructuredOutputs | None = None
    """extra"""
    guided_json: dict[str, Any] | str | None = None
    """extra; a JSON schema, as vLLM has it."""
    guided_regex: str | None = Field(default=None, min_length=1)
    """extra"""
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None
    """extra"""
    guided_grammar: str | None = Field(default=None, min_length=1)
    """extra; Lark or llama.cpp's GBNF."""
    json_schema: dict[str, Any] | None = None
    """extra; guided_json, as llama.cpp has it."""
    grammar: str | None = Field(default=None, min_length=1)
    """extra; guided_grammar, as llama.cpp has it."""

    @model_validator(mode="after")
    def _check_sampled(self) -> "Sampled":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed when stream is true")
        if self.stop is not None and "" in ([self.stop] if isinstance(self.stop, str) else self.stop):
            raise ValueError("stop: a stop text must not be empty")
        wrong = [name for name in self.logit_bias or {} if not (name.isdecimal() and name.isascii() and len(name) < 10)]
        if wrong:
            shown = ", ".join(repr(name[:20]) for name in wrong[:5])
            raise ValueError(f"logit_bias: its keys must be token ids, and {shown} are none")
        return self


class Detailed(Sampled):
    """What else is to be told of prompt and answer."""

    return_token_ids: bool | None = None
    """extra"""
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)
    """extra; each token of the prompt, with this many of the likeliest in its place."""

    @model_validator(mode="after")
    def _check_detailed(self) -> "Detailed":
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs: only told with whole answers; leave stream out")
        return self


class Part(Wire):
    """A piece of a message's content."""

    type: Literal["text", "refusal", "input_text", "output_text"]
    text: str | None = None
    refusal: str | None = None


class CalledFunction(Wire):
    name: str
    arguments: str


class ToolCall(Wire):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Wire):
    role: Literal["developer", "system", "user", "assistant", "tool", "ipython"]
    content: str | Many[Part] | None = None
    name: str | None = None
    tool_calls: Many[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "ChatMessage":
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing")
        return self

    @property
    def text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text or part.refusal or "" for part in self.content)


class Function(Wire):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Wire):
    type: Literal["function"]
    function: Function


class NamedFunction(Wire):
    name: str


class NamedTool(Wire):
    type: Literal["function"]
    function: NamedFunction


class Placed(Wire):
    """What a conversation is rendered with, and where its prompt ends."""

    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    add_generation_prompt: bool | None = None
    """extra; false ends the prompt before the assistant's turn."""
    continue_final_message: bool | None = None
    """extra; the last message is the beginning of the answer."""

    @model_validator(mode="after")
    def _check_place(self) -> "Placed":
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message: does not go with add_generation_prompt")
        return self


class ChatRequest(Detailed, Placed):
    """A conversation to answer."""

    messages: Many[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = None
    """extra; the answer repeats the message that it continues."""
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only allowed when logprobs is true")
        if self.echo and not self.continue_final_message:
            raise ValueError("echo: only allowed when continue_final_message is true")
        if self.max_tokens == 0:
            raise ValueError("max_tokens: must be at least 1")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice: there are no tools to choose from")
        if isinstance(self.tool_choice, NamedTool):
            names = [tool.function.name for tool in self.tools or []]
            if self.tool_choice.function.name not in names:
                raise ValueError("tool_choice: names no tool of this request")
        return self

    @property
    def echoed(self) -> str:
        """What an answer repeats."""
        return self.messages[-1].text if self.echo else ""


class CompletionRequest(Detailed):
    """One or more texts to continue."""

    prompt: Texts
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: int | None = Field(default=None, ge=1, le=128)
    suffix: str | None = None

    @model_validator(mode="after")
    def _check_completion(self) -> "CompletionRequest":
        if self.suffix:
            raise ValueError("suffix: these models only write forwards; leave it out")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError("best_of: must be at least n")
        if self.best_of is not None and self.best_of > (self.n or 1) and self.stream:
            raise ValueError("best_of: the best answer is known only at the end, so it cannot be streamed")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: must be at least 1, or 0 with echo")
        if not 0 < len(self.prompts) <= MAX_INPUTS:
            raise ValueError(f"prompt: must be 1 to {MAX_INPUTS} texts")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        return as_list(self.prompt)


class EmbeddingRequest(Wire):
    """One or more texts to turn into vectors."""

    model: str | None = None
    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1)
    pooling: Literal["mean", "last"] | None = None
    """extra"""
    normalize: bool | None = None
    """extra; false leaves vectors as they are, else they have the length 1, as OpenAI's."""

    @model_validator(mode="after")
    def _check(self) -> "EmbeddingRequest":
        if not 0 < len(as_list(self.input)) <= MAX_INPUTS:
            raise ValueError(f"input: must be 1 to {MAX_INPUTS} texts")
        return self


def as_list(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """Return each text or list of ids; one of them may stand for itself."""
    if isinstance(given, str):
        return [given]
    ids = [each for each in given if isinstance(each, int)]
    return [ids] if ids else [each for each in given if not isinstance(each, int)]


class RenderRequest(Wire):
    """Texts in Markdown that the page wants to show."""

    texts: list[str]


class TokenizeRequest(Placed):
    """A text or a conversation to turn into ids; llama.cpp's names are understood too."""

    model: str | None = None
    prompt: str | None = Field(default=None, max_length=1_000_000)
    content: str | None = Field(default=None, max_length=1_000_000)
    messages: Many[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    with_pieces: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> "TokenizeRequest":
        if sum(each is not None for each in (self.prompt, self.content, self.messages)) != 1:
            raise ValueError("give one of prompt, content and messages")
        return self


class DetokenizeRequest(Wire):
    model: str | None = None
    tokens: Ids


class TemplateRequest(Placed):
    model: str | None = None
    messages: Many[ChatMessage] = Field(min_length=1)


class LoadAdapterRequest(Wire):
    lora_name: str = Field(min_length=1, max_length=64)
    lora_path: str = Field(min_length=1)
    model: str | None = None
    """extra; the first model of the server if not given."""


class UnloadAdapterRequest(Wire):
    lora_name: str
    model: str | None = None
    """extra"""
