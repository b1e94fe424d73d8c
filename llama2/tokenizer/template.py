"""A checkpoint's own chat template: a Jinja program by a stranger, run where it can do no harm.

It gets plain values and gives text; it can reach nothing outside, and every loop is counted. What the
text means in tokens is said in `chat.py`. The functions and filters are those that Hugging Face
templates expect (transformers, chat_template_utils.py).
"""

import datetime
import json
import re
from functools import reduce
from typing import Any

from llama2.errors import ChatError

MAX_STEPS = 200_000
MAX_CHARS = 10_000_000

_MISTAKES = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


class Template:
    """A compiled chat template. Raises ChatError where it cannot be compiled."""

    def __init__(self, source: str):
        import jinja2

        self._steps = 0
        self._errors = (jinja2.TemplateError, *_MISTAKES)
        try:
            self._template = _sandbox(self._step).from_string(source)
        except self._errors as error:
            raise ChatError(f"the chat_template cannot be compiled: {error}; mend it, or choose a format") from None

    def render(self, **values: object) -> str:
        """Return the text. Raises ChatError where the template fails, refuses, or does not come to an end."""
        self._steps = 0
        try:
            text = self._template.render(**values)
        except self._errors as error:
            raise ChatError(f"the chat_template refuses this conversation: {error}") from None
        _check_chars(len(text))
        return text

    def _step(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise ChatError(f"it took more than {MAX_STEPS} steps; mend the template, or choose another format")


def _sandbox(on_step: Any) -> Any:
    """Make the Jinja environment, with a call of `on_step` in every loop and macro."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    class Generation(Extension):
        """`{% generation %}` marks answers for other programs; here it only holds its body."""

        def __init__(self, environment: Any):
            super().__init__(environment)
            self.tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class Bounds(NodeTransformer):
        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            return nodes.Call(nodes.EnvironmentAttribute("joined"), node.nodes, [], None, None)

    class Sandbox(ImmutableSandboxedEnvironment):
        step = staticmethod(on_step)
        joined = staticmethod(_joined)
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def _parse(self, source: str, name: Any, filename: Any) -> Any:
            tree = Bounds().visit(super()._parse(source, name, filename))
            for loop in list(tree.find_all((nodes.For, nodes.Macro))):
                loop.body.insert(0, nodes.ExprStmt(nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)))
            return tree

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_size(operator, left, right)
            return super().call_binop(context, operator, left, right)

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    sandbox.filters["tojson"] = _to_json
    sandbox.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return sandbox


def _raise_exception(message: str) -> None:
    raise ChatError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter writes for HTML and would turn < into an escape
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _joined(*parts: Any) -> str:
    return reduce(_join_two, parts, "")


def _join_two(left: str, right: Any) -> str:
    text = str(right)
    _check_chars(len(left) + len(text))
    return left + text


def _check_chars(n_chars: int) -> None:
    if n_chars > MAX_CHARS:
        raise ChatError(f"the chat_template made {n_chars} characters; at most {MAX_CHARS} are taken")


def _check_size(operator: str, left: Any, right: Any) -> None:
    """Refuse sums, products and powers that no prompt needs and no memory holds."""
    sizes = [len(side) if isinstance(side, str | list | tuple) else side for side in (left, right)]
    a, b = [size if isinstance(size, int) else 0 for size in sizes]
    _check_chars(a * b if operator == "*" else a + b)
    if operator == "**" and b > 64:
        raise ChatError(f"the chat_template computes {left!r} ** {right!r}; exponents end at 64")
    if operator == "%" and isinstance(left, str) and re.search(r"\d{5}|\*", left):
        raise ChatError(f"the chat_template pads text by {left!r}; at most 9999 characters are padded")
