"""Settings of a model on a server that speaks OpenAI's chat completions protocol."""

import json
import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from mmkd.recipe.base import Strict
from mmkd.runtime.fields import TEXT

ImageFormat = Literal["png", "jpeg"]

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_CHAT = "/chat/completions"
_SET_ELSEWHERE = {
    "model": "give it as the key 'model' of the server",
    "messages": "the questions are the messages",
    "stream": "answers are read as a whole",
    "n": "give it as 'n' of the sampling settings",
    "seed": "each request has a seed of its own",
    "temperature": "give it in the sampling settings",
    "top_p": "give it in the sampling settings",
    "top_k": "give it in the sampling settings",
    "max_tokens": "give max_new_tokens in the sampling settings",
}


class ServerConfig(Strict):
    """A model on a server that speaks OpenAI's chat completions protocol, such as vLLM's."""

    server: str = Field(
        min_length=1,
        max_length=2000,
        description="address of the API, such as http://host:8000/v1",
    )
    model: str = Field(min_length=1, max_length=500, description="the server's id of the model")
    key: str | None = Field(
        None,
        max_length=200,
        description="name of the environment variable that holds the API key",
    )
    concurrency: int = Field(8, ge=1, le=256, description="most requests at the same time")
    timeout_s: float = Field(
        120.0, gt=0, le=86_400, description="seconds that a request may take, with its answer"
    )
    retries: int = Field(
        6, ge=0, le=100, description="how often a request that has failed is sent again"
    )
    image_format: ImageFormat = Field(
        "png", description="png sends the exact pixels; jpeg is smaller and loses some detail"
    )
    extra: dict[str, Any] = Field(
        {},
        description="further keys of the request's body, such as {chat_template_kwargs: "
        "{enable_thinking: false}}",
    )

    @field_validator("server")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            host, _ = parts.hostname, parts.port
        except ValueError:
            host = None
        if not host or parts.scheme not in ("http", "https") or " " in value:
            raise ValueError(
                "it is no address -- give one that begins with http:// or https://, such as "
                "http://host:8000/v1"
            )
        if parts.username is not None or parts.password is not None:
            raise ValueError(
                "it holds a login -- remove the login; 'key' names an environment variable that "
                "holds an API key"
            )
        if parts.query or parts.fragment:
            raise ValueError("it has a query or a fragment -- remove what comes after ? or #")
        if parts.path.rstrip("/").endswith(_CHAT):
            raise ValueError(f"it is the address of one method -- remove {_CHAT}")
        return value

    @field_validator("key")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        # A key that is pasted in place of a name has other characters, and must not be printed.
        if value is not None and not _VARIABLE.fullmatch(value):
            raise ValueError(
                "it is no name of an environment variable -- give a name of letters A-Z, digits "
                "and _, such as OPENAI_API_KEY; the key itself does not belong in a recipe"
            )
        return value

    @field_validator("extra")
    @classmethod
    def _fits(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, hint in _SET_ELSEWHERE.items():
            if name in value:
                raise ValueError(f"'{name}' is set elsewhere -- remove it; {hint}")
        try:
            size = len(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError, RecursionError):
            raise ValueError("it is no JSON -- give numbers, text, lists and mappings") from None
        if size > TEXT:
            raise ValueError(f"it has {size:,} characters as JSON -- give at most {TEXT:,}")
        return value
