"""Requests and answers as JSON."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from mmkd.making.base import Answer, Request
from mmkd.making.chat_format import AnswerFormatError, completion_of, request_body
from mmkd.recipe import SamplingConfig
from mmkd.recipe.servers import ServerConfig

TEXT, IMAGE = {"type": "text", "text": "a"}, {"type": "image"}


def body_of(messages, images=(), sampling=None, **settings):
    config = ServerConfig(server="http://host/v1", model="m", **settings)
    request = Request("0", messages, lambda: list(images), 7)
    return json.loads(request_body(request, config, sampling or SamplingConfig()))


def noise(seed, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def decoded(part):
    data = part["image_url"]["url"].partition(";base64,")[2]
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_sampling_settings_and_further_keys():
    sampling = SamplingConfig(temperature=0.5, top_p=0.9, max_new_tokens=3)
    body = body_of([{"role": "user", "content": [TEXT]}], sampling=sampling)
    assert body == {
        "model": "m", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3,
        "temperature": 0.5, "top_p": 0.9, "seed": 7,
    }  # fmt: skip
    sampling = SamplingConfig(top_k=4)
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    more = body_of([], sampling=sampling, extra=extra)
    assert more["top_k"] == 4
    assert more["chat_template_kwargs"] == {"enable_thinking": False}


def test_images_keep_their_pixels_and_their_order():
    images = [noise(0), noise(1, "RGBA"), noise(2, "L")]
    messages = [
        {"role": "system", "content": [TEXT, TEXT]},
        {"role": "user", "content": [IMAGE, TEXT, TEXT, IMAGE]},
        {"role": "assistant", "content": [TEXT]},
        {"role": "user", "content": [TEXT, IMAGE]},
    ]
    system, first, answer, second = body_of(messages, images)["messages"]
    assert system == {"role": "system", "content": "aa"}
    assert answer == {"role": "assistant", "content": "a"}
    kinds = [p["type"] for p in first["content"]]
    assert kinds == ["image_url", "text", "image_url"]
    assert first["content"][1]["text"] == "aa"
    shown = [first["content"][0], first["content"][2], second["content"][1]]
    for part, image in zip(shown, images, strict=True):
        found = decoded(part)
        assert found.format == "PNG"
        assert np.array_equal(np.asarray(found), np.asarray(image.convert("RGB")))
    jpeg = body_of(messages, images, image_format="jpeg")["messages"][3]["content"][1]
    assert jpeg["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert decoded(jpeg).format == "JPEG"


@pytest.mark.parametrize("count", [0, 2])
def test_each_image_part_has_an_image(count):
    with pytest.raises(ValueError, match=f"1 image parts, {count} images"):
        body_of([{"role": "user", "content": [IMAGE]}], [noise(0)] * count)


def said(message, reason="stop", **more):
    return {"choices": [{"message": message, "finish_reason": reason}], **more}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (said({"content": " hello\n"}), Answer("hello", True)),
        (said({"content": "hel"}, "length"), Answer("hel", False)),
        (said({"content": "hel"}, "content_filter"), Answer("hel", False)),
        (said({"content": None, "reasoning_content": "hmm"}, "length"), Answer("", False)),
        (said({"content": "yes", "reasoning_content": "hmm"}, None), Answer("yes", True)),
        (said({"role": "assistant"}), Answer("", True)),
        (said({"content": [{"type": "thinking", "thinking": "hmm"}, {"type": "text", "text": "y"},
                           {"type": "text", "text": "es"}, {"type": "text"}, 3]}),
         Answer("yes", True)),
    ],
)  # fmt: skip
def test_answers(answer, expected):
    assert completion_of(answer).answer == expected


@pytest.mark.parametrize(
    "answer",
    [None, [], {}, {"choices": {}}, {"choices": [3]}, {"choices": [{"message": "a"}]},
     said({"content": 3}), said({"content": "a"}, "abort"), said({"content": "a"}, "error")],
)  # fmt: skip
def test_what_is_no_answer(answer):
    with pytest.raises(AnswerFormatError, match="an answer"):
        completion_of(answer)


@pytest.mark.parametrize(
    ("usage", "count"), [({"prompt_tokens": 5}, 5), ({"prompt_tokens": "5"}, None), (None, None)]
)
def test_prompt_tokens(usage, count):
    assert completion_of(said({"content": "a"}, usage=usage)).prompt_tokens == count
