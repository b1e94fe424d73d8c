"""What a client may ask of /v1/responses, field by field."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llama2.serve.protocol import Function, Many, NamedFunction, Part, Sampled, Wire


class MessageItem(Wire):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Many[Part]


class CallItem(Wire):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class CallOutputItem(Wire):
    type: Literal["function_call_output"]
    call_id: str
    output: str


class TextForm(Wire):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = Field(default=None, pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")

    @model_validator(mode="after")
    def _check(self) -> "TextForm":
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("type json_schema and the field schema go together")
        return self


class TextSettings(Wire):
    format: TextForm | None = None


class FlatTool(Function):
    type: Literal["function"]


class FlatNamedTool(NamedFunction):
    type: Literal["function"]


class ResponsesRequest(Sampled):
    """A text or items of a conversation to answer."""

    input: str | Annotated[Many[MessageItem | CallItem | CallOutputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    text: TextSettings | None = None
    tools: Annotated[list[FlatTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatNamedTool | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    """Let be: nothing is stored."""
    background: bool | None = None

    @model_validator(mode="after")
    def _check_responses(self) -> "ResponsesRequest":
        if self.previous_response_id is not None:
            raise ValueError("previous_response_id: nothing is stored here; send the whole conversation as input")
        if self.background:
            raise ValueError("background: answers are not kept here; ask for a stream")
        if self.n not in (None, 1):
            raise ValueError("n: this route gives one answer")
        names = [tool.name for tool in self.tools or []]
        chosen = self.tool_choice
        if isinstance(chosen, FlatNamedTool) and chosen.name not in names:
            raise ValueError("tool_choice: names no tool of this request")
        if chosen == "required" and not names:
            raise ValueError("tool_choice: there are no tools to choose from")
        return self
