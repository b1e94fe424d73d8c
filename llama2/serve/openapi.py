"""The description of all routes that /openapi.json gives, made from the protocol."""

from collections.abc import Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from llama2 import __version__
from llama2.serve.protocol import Wire

_REF = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


def document(routes: Sequence[tuple[str, str, str, type[Wire] | None]]) -> dict[str, Any]:
    """Return an OpenAPI 3.1 document; routes are method, path, one sentence, and what is read."""
    kinds = [kind for *_, kind in routes if kind is not None]
    _, schemas = models_json_schema([(kind, "validation") for kind in kinds], ref_template=_REF)
    paths: dict[str, Any] = {}
    for method, path, summary, kind in routes:
        operation: dict[str, Any] = {
            "summary": summary,
            "operationId": path.strip("/").replace("/", "_").replace(":path", "") or "page",
            "responses": {"200": {"description": "The answer."}, "default": _refusals()},
        }
        if kind is not None:
            schema = {"$ref": _REF.format(model=kind.__name__)}
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        if "{" in path:
            operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
        paths.setdefault(path.replace(":path", ""), {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "llama2", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {**schemas["$defs"], "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _refusals() -> dict[str, Any]:
    schema = {"$ref": _REF.format(model="Error")}
    return {"description": "Why it is not answered.", "content": {"application/json": {"schema": schema}}}
