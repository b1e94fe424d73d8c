"""One response of /v1/responses as it grows: its output items, and the events that tell of them.

created, in_progress
  output_item.added, content_part.added, output_text.delta ..., output_text.done, content_part.done, output_item.done
  output_item.added, function_call_arguments.delta ..., function_call_arguments.done, output_item.done
completed | incomplete | failed
"""

import time
import uuid
from collections.abc import AsyncIterator, Sequence

from llama2.serve.answers import Object
from llama2.serve.generation import Generation
from llama2.serve.refusal import refusal
from llama2.serve.response_protocol import ResponsesRequest
from llama2.serve.server import Target
from llama2.serve.stream import named_event
from llama2.serve.tools import Delta, ToolStream
from llama2.serve.worker import Piece

FUNCTION_FIELDS = {"name", "description", "parameters", "strict"}


class ResponseAnswer:
    """One response: its output items as they grow, and the events that tell of it.

    `whole` is what the events add up to, because it runs the same events.
    """

    def __init__(self, asked: ResponsesRequest, target: Target, generation: Generation, tools: ToolStream | None):
        self.asked, self.target, self.generation, self.tools = asked, target, generation, tools
        self.id, self.created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self.output: list[Object] = []
        self.n_events = 0

    async def whole(self, first: Sequence[Piece]) -> Object:
        async for _ in self._told(first):
            pass
        return self._json(self._status())

    async def events(self, first: Sequence[Piece]) -> AsyncIterator[bytes]:
        try:
            async for name, more in self._told(first):
                yield self._event(name, more)
        except Exception as error:
            told = refusal(error)
            failed = {**self._json("failed"), "error": {"code": told.code or "server_error", "message": told.message}}
            yield self._event("response.failed", {"response": failed})

    def _event(self, name: str, more: Object) -> bytes:
        self.n_events += 1
        return named_event(name, {"type": name, "sequence_number": self.n_events - 1, **more})

    async def _told(self, first: Sequence[Piece]) -> AsyncIterator[tuple[str, Object]]:
        """Yield the names and contents of all events."""
        yield "response.created", {"response": self._json("in_progress")}
        yield "response.in_progress", {"response": self._json("in_progress")}
        pieces: Sequence[Piece] | None = first
        while pieces is not None:
            for piece in pieces:
                reason = piece.token.finish_reason
                deltas: list[Delta] = [{"content": piece.text}] if piece.text else []
                if self.tools is not None:
                    deltas = [*self.tools.feed(piece.text), *(self.tools.finish() if reason else [])]
                for delta in deltas:
                    for event in self._grown(delta):
                        yield event
            pieces = await self.generation.next()
        if not self.output:
            for event in self._open_message():
                yield event
        for event in self._closed():
            yield event
        name = "response.completed" if self._status() == "completed" else "response.incomplete"
        yield name, {"response": self._json(self._status())}

    def _grown(self, delta: Delta) -> list[tuple[str, Object]]:
        """Add a delta to the output; return what to tell."""
        events: list[tuple[str, Object]] = []
        if delta.get("content"):
            if not self.output or self.output[-1]["type"] != "message":
                events += [*self._closed(), *self._open_message()]
            item = self.output[-1]
            item["content"][0]["text"] += delta["content"]
            more = {**self._place(), "content_index": 0, "delta": delta["content"], "logprobs": []}
            events.append(("response.output_text.delta", more))
        for call in delta.get("tool_calls", ()):
            function = call["function"]
            if "id" in call:
                item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "call_id": call["id"], "arguments": ""}
                events += [*self._closed(), *self._opened({**item, "name": function["name"], "status": "in_progress"})]
            else:
                self.output[-1]["arguments"] += function["arguments"]
                more = {**self._place(), "delta": function["arguments"]}
                events.append(("response.function_call_arguments.delta", more))
        return events

    def _open_message(self) -> list[tuple[str, Object]]:
        part: Object = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "status": "in_progress"}
        events = self._opened({**item, "content": []})
        self.output[-1]["content"] = [part]
        return [*events, ("response.content_part.added", {**self._place(), "content_index": 0, "part": {**part}})]

    def _opened(self, item: Object) -> list[tuple[str, Object]]:
        self.output.append(item)
        return [("response.output_item.added", {"output_index": len(self.output) - 1, "item": {**item}})]

    def _closed(self) -> list[tuple[str, Object]]:
        """End the item under way, if there is one."""
        if not self.output or self.output[-1]["status"] != "in_progress":
            return []
        item, place = self.output[-1], self._place()
        item["status"] = self._status() if item["type"] == "message" else "completed"
        events: list[tuple[str, Object]] = []
        if item["type"] == "message":
            part = item["content"][0]
            text = {**place, "content_index": 0, "text": part["text"], "logprobs": []}
            events += [
                ("response.output_text.done", text),
                ("response.content_part.done", {**place, "content_index": 0, "part": {**part}}),
            ]
        else:
            done = {**place, "name": item["name"], "arguments": item["arguments"]}
            events.append(("response.function_call_arguments.done", done))
        return [*events, ("response.output_item.done", {"output_index": place["output_index"], "item": {**item}})]

    def _place(self) -> Object:
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}

    def _status(self) -> str:
        return "incomplete" if self.generation.finish_reasons.get(0) == "length" else "completed"

    def _json(self, status: str) -> Object:
        usage, asked = self.generation.usage, self.asked
        done = status in ("completed", "incomplete")
        tools = [{"type": "function", **tool.model_dump(include=FUNCTION_FIELDS)} for tool in asked.tools or ()]
        told = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.total_tokens,
        }
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": self.target.name,
            "output": [{**item} for item in self.output],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "tool_choice": asked.tool_choice if isinstance(asked.tool_choice, str) else "auto",
            "tools": tools,
            "metadata": {},
            "usage": told if done else None,
        }
