"""Chat completions in OpenAI's format: as one response, or as server-sent events."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from typing import Any

import anyio
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from xfusion.apps.server.answers import data_url, now, usage
from xfusion.apps.server.batches import Job
from xfusion.apps.server.reading import as_refused
from xfusion.apps.server.tickets import Ticket


class Completion:
    """A ticket's answers as a chat completion."""

    def __init__(self, ticket: Ticket, name: str, prompt: int, *, has_usage: bool):
        self.ticket, self.name, self.prompt = ticket, name, prompt
        self.has_usage = has_usage
        """Whether the stream ends with its token usage."""
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": now(), "model": name}

    async def response(self) -> dict[str, Any]:
        """The complete answer."""
        async for _ in self.ticket.follow():
            pass
        choices = []
        for job in self.ticket.jobs:
            words = [segment for segment in job.answer if isinstance(segment, str)]
            content = job.words.sent if job.words.stopped else "".join(words)
            message: dict[str, Any] = {"role": "assistant", "content": content if words else None}
            if pictures := [segment for segment in job.answer if not isinstance(segment, str)]:
                message["images"] = await self._images(job, pictures)
            choices.append(
                {"index": job.index, "message": message, "finish_reason": self._reason(job), "logprobs": None}
            )
        seed = {"seed": self.ticket.jobs[0].seed}
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": self._usage(), **seed}

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        for job in self.ticket.jobs:
            yield self._event(job.index, {"role": "assistant", "content": ""})
        try:
            async for event in self.ticket.follow():
                if event is None:
                    yield ": waiting\n\n"  # a comment, which clients pass over
                    continue
                job, new = event
                if new is None:
                    yield self._event(job.index, {}, self._reason(job))
                else:
                    delta = {"content": new} if isinstance(new, str) else {"images": await self._images(job, [new])}
                    yield self._event(job.index, delta)
        except ClientDisconnect:
            return
        except Exception as error:
            yield f"data: {json.dumps(as_refused(error).body)}\n\n"
            return
        if self.has_usage:
            yield self._chunk(choices=[], usage=self._usage())
        yield "data: [DONE]\n\n"

    def _event(self, index: int, delta: dict[str, Any], reason: str | None = None) -> str:
        return self._chunk(choices=[{"index": index, "delta": delta, "finish_reason": reason}])

    def _chunk(self, **parts: Any) -> str:
        usage = {"usage": None} if self.has_usage else {}  # each chunk but the last has none
        chunk = {**self.head, "object": "chat.completion.chunk", **usage, **parts}
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

    async def _images(self, job: Job, pictures: list[Any]) -> list[dict[str, Any]]:
        """Pictures as blocks of a message, encoded in a thread."""
        facts = self.ticket.service.picture_facts(self.name, job)

        def encode() -> list[dict[str, Any]]:
            return [{"type": "image_url", "image_url": {"url": data_url(picture, facts)}} for picture in pictures]

        return await anyio.to_thread.run_sync(encode)

    def _reason(self, job: Job) -> str:
        reached_limit = len(job.words.ids) >= job.words.max_tokens
        return "length" if reached_limit and not job.words.stopped else "stop"

    def _usage(self) -> dict[str, int]:
        return usage(self.prompt, sum(len(job.words.ids) for job in self.ticket.jobs))


class Events(StreamingResponse):
    """Server-sent events; however the stream ends, the ticket's places in the queue are released."""

    def __init__(self, events: AsyncIterator[str], ticket: Ticket):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.ticket.drop()
