"""Responses to clients: errors and pictures in the formats of OpenAI's API."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from xfusion.data.pictures import png_facts

if TYPE_CHECKING:
    from PIL.Image import Image


class Refused(Exception):
    """A request that is answered with an error: its status, and one line."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(" ".join(message.split()))  # a message may quote the request
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's format."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def base64_png(picture: Image, facts: Mapping[str, Any]) -> str:
    """A picture as a base64 PNG that stores how it was drawn."""
    file = io.BytesIO()
    picture.save(file, format="PNG", pnginfo=png_facts(facts))
    return base64.b64encode(file.getvalue()).decode("ascii")


def data_url(picture: Image, facts: Mapping[str, Any]) -> str:
    """The same PNG as a data URL."""
    return f"data:image/png;base64,{base64_png(picture, facts)}"


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Token counts."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def now() -> int:
    """Seconds since 1970, as OpenAI's ``created``."""
    return int(time.time())
