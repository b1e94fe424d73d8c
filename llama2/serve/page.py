"""GET /: a page to chat on. It asks nobody but this server, and runs no code but its own."""

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

from llama2.serve.markdown import colours, render
from llama2.serve.protocol import RenderRequest
from llama2.serve.refusal import Json
from llama2.serve.server import Server

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What a browser lets the page do, whatever should get into it: no foreign code, no foreign address."""

KINDS = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}


def _file(name: str, more: str = "") -> Response:
    text = files("llama2.serve").joinpath("web", name).read_text(encoding="utf-8") + more
    headers = {
        "content-security-policy": POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return Response(text, media_type=f"{KINDS[name]}; charset=utf-8", headers=headers)


async def page(server: Server, request: Request) -> Response:
    """The page for people."""
    return _file("page.html")


async def style(server: Server, request: Request) -> Response:
    """How the page looks."""
    return _file("page.css", colours())


async def script(server: Server, request: Request) -> Response:
    """What the page does."""
    return _file("page.js")


async def rendered(server: Server, request: Request) -> Response:
    """Return a text in Markdown as HTML that is safe to show."""
    asked = await server.read(request, RenderRequest)
    return Json({"html": [render(text) for text in asked.texts]})
