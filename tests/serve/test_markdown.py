"""Whatever a model writes, the HTML of it can do nothing."""

import html.parser

import pytest
from hypothesis import given, settings, strategies as st

from llama2.serve.markdown import render

ALLOWED = {
    *("p", "em", "strong", "s", "code", "pre", "span", "a", "ul", "ol", "li", "blockquote", "br", "hr"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td"),
}
ATTRIBUTES = {"href", "title", "target", "rel", "class", "start", "style"}
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![x](http://example.com/leak.png)",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "[x](vbscript:x)",
    '[x](http://example.com "\\" onmouseover=alert(1)")',
    '<http://example.com/"onclick=alert(1)>',
    "```html\n</code></pre><script>alert(1)</script>\n```",
    '```"><script>alert(1)</script>\nx\n```',
    "|a|b|\n|-|-|\n|<svg onload=alert(1)>|x|",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "[" * 3000 + "]" * 3000,
    ">" * 3000 + "x",
    "*" * 5000,
    "\x00<b>\ufffe",
]


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def tags(text: str):
    parser = Tags()
    parser.feed(render(text))
    return parser.found


def check(text: str) -> None:
    for tag, attributes in tags(text):
        assert tag in ALLOWED, (tag, text)
        assert set(attributes) <= ATTRIBUTES, (attributes, text)
        assert attributes.get("style", "") in ("", "text-align:left", "text-align:right", "text-align:center")
        href = (attributes.get("href") or "").strip().lower()
        assert not href.startswith(("javascript:", "data:", "vbscript:", "file:")), href


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_and_not_run(text):
    check(text)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from([*HOSTILE[:12], "<", ">", '"', "'", "`", "```", "\n", "(", ")", "[", "]", "!", " a ", "&", "|"])
    )
)
def test_no_mixture_of_hostile_pieces_runs_either(pieces):
    check("".join(pieces))


def test_what_is_meant_well_is_shown_well():
    html = render(
        "# A\n\n**b** and `c`\n\n```python\nprint('x')\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n[l](https://example.com)"
    )
    for wanted in (
        "<h1>A</h1>",
        "<strong>b</strong>",
        "<code>c</code>",
        'class="language-python"',
        '<span class="nb">print',
    ):
        assert wanted in html
    assert '<a href="https://example.com" target="_blank" rel="noopener noreferrer nofollow">' in html
    assert "<td>2</td>" in html
