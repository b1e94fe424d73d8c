"""The routes, in one table, and the application that they make."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from llama2.serve import chat, completions, embeddings, page, responses, texts
from llama2.serve.guard import Guard
from llama2.serve.openapi import document
from llama2.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    LoadAdapterRequest,
    RenderRequest,
    TemplateRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
    Wire,
)
from llama2.serve.refusal import Json, Refusal, out_of_time, refusal
from llama2.serve.response_protocol import ResponsesRequest
from llama2.serve.server import Server, call_of
from llama2.serve.stream import ClientGone

Handler = Callable[[Server, Request], Awaitable[Response]]


async def health(server: Server, request: Request) -> Response:
    """200 when all models are there and requests are taken, else 503."""
    is_loading = any(worker.llm is None for worker in server.models.workers)
    status = "draining" if server.is_draining else "loading" if is_loading else "ok"
    if status == "ok":
        return Json({"status": status})
    return Json({"status": status}, status_code=503, headers={"retry-after": "1"})


async def metrics(server: Server, request: Request) -> Response:
    """What Prometheus reads."""
    return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")


async def models(server: Server, request: Request) -> Response:
    """List the models and their adapters."""
    return Json({"object": "list", "data": server.models.listing()})


async def model(server: Server, request: Request) -> Response:
    """One model, by its name."""
    name = request.path_params["name"]
    server.models.find(name)
    return Json(next(each for each in server.models.listing() if each["id"] == name))


async def load_adapter(server: Server, request: Request) -> Response:
    """Load a LoRA adapter, if the server was started with --allow-adapter-loading."""
    _check_may_load(server)
    asked = await server.read(request, LoadAdapterRequest)
    server.target(asked.model)
    await server.models.load_adapter(asked.model, asked.lora_name, asked.lora_path)
    return Json({"status": "ok", "message": f"adapter {asked.lora_name!r} is loaded"})


async def unload_adapter(server: Server, request: Request) -> Response:
    """Unload a LoRA adapter, if the server was started with --allow-adapter-loading."""
    _check_may_load(server)
    asked = await server.read(request, UnloadAdapterRequest)
    await server.models.unload_adapter(asked.lora_name)
    return Json({"status": "ok", "message": f"adapter {asked.lora_name!r} is gone"})


def _check_may_load(server: Server) -> None:
    if not server.config.allow_adapter_loading:
        raise Refusal(403, "adapters are loaded at start only; start the server with --allow-adapter-loading")


ROUTES: tuple[tuple[str, str, Handler, type[Wire] | None], ...] = (
    ("POST", "/v1/chat/completions", chat.chat_completions, ChatRequest),
    ("POST", "/v1/completions", completions.completions, CompletionRequest),
    ("POST", "/v1/embeddings", embeddings.embeddings, EmbeddingRequest),
    ("POST", "/v1/responses", responses.responses, ResponsesRequest),
    ("GET", "/v1/models", models, None),
    ("GET", "/v1/models/{name:path}", model, None),
    ("POST", "/v1/load_lora_adapter", load_adapter, LoadAdapterRequest),
    ("POST", "/v1/unload_lora_adapter", unload_adapter, UnloadAdapterRequest),
    ("POST", "/tokenize", texts.tokenize, TokenizeRequest),
    ("POST", "/detokenize", texts.detokenize, DetokenizeRequest),
    ("POST", "/apply-template", texts.apply_template, TemplateRequest),
    ("GET", "/health", health, None),
    ("GET", "/metrics", metrics, None),
    ("POST", "/render", page.rendered, RenderRequest),
    ("GET", "/", page.page, None),
    ("GET", "/page.css", page.style, None),
    ("GET", "/page.js", page.script, None),
)
"""Method, path, what answers, and what it reads."""


def make_app(server: Server, keys: Sequence[str]) -> ASGIApp:
    """Return the application."""
    app = FastAPI(title="llama2", docs_url=None, redoc_url=None, openapi_url=None)
    routes = {"/openapi.json": "/openapi.json"}
    for method, path, handler, _ in ROUTES:
        for alias in {path, path.removeprefix("/v1")}:  # a client's base address often lacks the /v1
            app.add_route(alias, _endpoint(server, path, handler), methods=[method])
            routes[alias] = path
    app.add_route("/openapi.json", _endpoint(server, "/openapi.json", _openapi), methods=["GET"])
    app.add_exception_handler(HTTPException, _wrong_route)
    guarded: ASGIApp = Guard(app, server, keys, routes)
    if server.config.allow_origin:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=list(server.config.allow_origin),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    return guarded


async def _openapi(server: Server, request: Request) -> Response:
    return Json(document([(method, path, handler.__doc__ or "", kind) for method, path, handler, kind in ROUTES]))


def _endpoint(server: Server, path: str, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        call_of(request).path = path
        try:
            async with asyncio.timeout(server.config.request_timeout_s):
                return await handler(server, request)
        except TimeoutError:
            return out_of_time(server.config.request_timeout_s).response()
        except ClientGone:
            return Response(status_code=499)  # nobody reads it; the log does
        except Exception as error:
            return refusal(error).response()

    return endpoint


async def _wrong_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return Refusal(405, f"this route takes {allowed}", headers={"allow": allowed}).response()
    return Refusal(404, "there is no such route; /openapi.json lists them", code="unknown_url").response()
