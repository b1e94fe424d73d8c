"""What a model wrote, as HTML that can do nothing: CommonMark with tables, code in colours.

Raw HTML is shown as text, links go only where a link may go, and images are not fetched: an address in an answer must
not tell anybody that it was read.
"""

from functools import cache

from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

MAX_CHARACTERS = 200_000
MAX_COLOURED = 20_000
"""Longer code is shown without colours."""


def render(text: str) -> str:
    """Return HTML; of a very long text the beginning, and the rest as it is."""
    head, rest = text[:MAX_CHARACTERS], text[MAX_CHARACTERS:]
    return _parser().render(head) + _plain(rest)


def _plain(text: str) -> str:
    return f"<pre>{_escape(text)}</pre>" if text else ""


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


@cache
def _parser() -> MarkdownIt:
    settings = {"html": False, "linkify": False, "highlight": _coloured, "maxNesting": 40}
    parser = MarkdownIt("commonmark", settings).enable(["table", "strikethrough"]).disable("image")
    parser.add_render_rule("link_open", _link)
    return parser


def _link(renderer, tokens, index, options, env) -> str:
    """A link opens in a window of its own, which learns nothing of this one."""
    tokens[index].attrSet("target", "_blank")
    tokens[index].attrSet("rel", "noopener noreferrer nofollow")
    return renderer.renderToken(tokens, index, options, env)


def _coloured(code: str, language: str, _: str) -> str:
    if not language or len(code) > MAX_COLOURED:
        return ""
    try:
        lexer = get_lexer_by_name(language, stripnl=False)
    except ClassNotFound:
        return ""
    return highlight(code, lexer, HtmlFormatter(nowrap=True))


@cache
def colours() -> str:
    """Return the style sheet of coloured code, for light and for dark."""
    light = HtmlFormatter(style="default").get_style_defs(".md code")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".md code")
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n.md code {{ background: none }}\n"
