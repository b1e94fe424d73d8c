"""What an answer must look like: where a client says so, and how the model is told."""

from collections.abc import Sequence

from llama2.llm import SamplingOptions
from llama2.serve.protocol import Sampled, Tool
from llama2.serve.refusal import Refusal
from llama2.serve.tools import call_schema

_EXTRA = {
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json_schema",
    "grammar": "grammar",
}
_STRUCTURED = {
    "json_": "json_schema",
    "json_object": "json_object",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}


def constrain(options: SamplingOptions, asked: Sampled, tools: Sequence[Tool] = (), choice: object = None) -> None:
    """Put the form that a request demands into its options. Raises Refusal where it demands two."""
    wanted = asked.response_format
    forms: dict[str, dict[str, object]] = {}
    if wanted is not None and wanted.type != "text":
        schema = wanted.schema_ if wanted.json_schema is None else wanted.json_schema.schema_
        forms["response_format"] = {"json_object": True} if schema is None else {"json_schema": schema}
    if (schema := call_schema(tools, choice)) is not None:
        forms["tool_choice"] = {"json_schema": schema}
    for field, name in _EXTRA.items():
        if (value := getattr(asked, field)) is not None:
            forms[field] = {name: value}
    for field, name in _STRUCTURED.items():
        if (value := getattr(asked.structured_outputs, field, None)) not in (None, False):
            forms[f"structured_outputs.{field.strip('_')}"] = {name: value}
    if len(forms) > 1:
        raise Refusal(400, f"{' and '.join(forms)} do not go together: an answer has one form", param=[*forms][-1])
    for form in forms.values():
        options.update(form)  # pyright: ignore[reportCallIssue, reportArgumentType]
