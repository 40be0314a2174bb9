"""Requests and answers as JSON of OpenAI's chat completions protocol."""

import base64
import io
import json
from dataclasses import dataclass
from typing import Any

from PIL import Image

from mmkd.making.base import Answer, Request
from mmkd.recipe import SamplingConfig
from mmkd.recipe.servers import ImageFormat, ServerConfig

JPEG_QUALITY = 95
INCOMPLETE = ("length", "content_filter")
"""Reasons for which an answer ended before the model has ended it."""
BROKEN_OFF = ("abort", "error")
"""Reasons with which vLLM and SGLang name an answer that they have given up."""


class AnswerFormatError(ValueError):
    """A server's answer is no chat completion. Its message is one line."""


@dataclass(frozen=True)
class Completion:
    """A chat completion.

    Attributes:
        answer: of the model.
        prompt_tokens: number of tokens of the prompt, with those of its images; None if the server
            does not count them.
    """

    answer: Answer
    prompt_tokens: int | None


def request_body(request: Request, config: ServerConfig, sampling: SamplingConfig) -> bytes:
    """The body of an HTTP request for an answer.

    Images are sent as data URLs. vLLM and SGLang know `top_k`, which OpenAI's protocol does not
    have, so it is left out where it is 0.
    """
    body = {
        "model": config.model,
        "messages": _messages(request, config.image_format),
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": request.seed,
    }
    if sampling.top_k > 0:
        body["top_k"] = sampling.top_k
    return json.dumps(body | config.extra).encode()


def completion_of(answer: Any) -> Completion:
    """The completion in a server's JSON.

    Content that is null is an empty answer: a model that reasons may be cut before it answers.
    `reasoning_content` is no part of the answer; reasoning that a server leaves in `content` is.

    Raises:
        AnswerFormatError: it is no chat completion, or the server has given it up.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices:
        raise AnswerFormatError("an answer without 'choices'")
    choice = choices[0]
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise AnswerFormatError("an answer without 'message'")
    reason = choice.get("finish_reason")
    if reason in BROKEN_OFF:
        raise AnswerFormatError(f"an answer that the server has given up ('{reason}')")
    text = _text(message.get("content")).strip()
    return Completion(Answer(text, reason not in INCOMPLETE), _prompt_tokens(answer))


def _messages(request: Request, image_format: ImageFormat) -> list[dict[str, Any]]:
    images = request.images()
    parts = [p for m in request.messages for p in m["content"]]
    places = sum(part["type"] == "image" for part in parts)
    if places != len(images):
        raise ValueError(f"request {request.key}: {places} image parts, {len(images)} images")
    left = iter(images)
    return [
        {"role": m["role"], "content": _content(m["content"], left, image_format)}
        for m in request.messages
    ]


def _content(parts: list[dict[str, Any]], images: Any, image_format: ImageFormat) -> Any:
    """The parts of a message. Text alone is sent as a string, which all servers read; neighbouring
    texts are joined, because some servers put line breaks between them."""
    content: list[dict[str, Any]] = []
    for part in parts:
        if part["type"] == "image":
            url = data_url(next(images), image_format)
            content.append({"type": "image_url", "image_url": {"url": url}})
        elif content and content[-1]["type"] == "text":
            content[-1]["text"] += part["text"]
        else:
            content.append({"type": "text", "text": part["text"]})
    if len(content) == 1 and content[0]["type"] == "text":
        return content[0]["text"]
    return content


def data_url(image: Image.Image, image_format: ImageFormat) -> str:
    """An image as a data URL, converted to RGB."""
    file = io.BytesIO()
    image.convert("RGB").save(file, image_format, quality=JPEG_QUALITY)
    return f"data:image/{image_format};base64,{base64.b64encode(file.getvalue()).decode()}"


def _text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise AnswerFormatError("an answer whose 'content' is no text")
    parts = [p.get("text") for p in content if isinstance(p, dict) and p.get("type") == "text"]
    return "".join(text for text in parts if isinstance(text, str))


def _prompt_tokens(answer: dict[str, Any]) -> int | None:
    usage = answer.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if type(count) is int else None
