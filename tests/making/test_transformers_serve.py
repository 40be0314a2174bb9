"""Answers of the shipped teacher in `transformers serve`, in another process, and a text model
there, which passes over images without a word."""

import json
import shutil

import httpx2
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mmkd.data.answers import answers_of, asked, generate_of, sample_answers
from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.errors import ServerError
from mmkd.making.base import Answer, Request
from mmkd.making.server import ServerMaker
from mmkd.modeling.loading import load_model, load_processor
from mmkd.recipe import DataConfig, ModelConfig, SamplingConfig
from mmkd.recipe.servers import ServerConfig
from tests.support.places import ROOT
from tests.support.transformers_serve import serving

for package in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(package)

TEACHER = ROOT / "assets" / "scenes_teacher"
TEACHER_CONFIG = ModelConfig(model=str(TEACHER))
GREEDY = SamplingConfig(temperature=0, max_new_tokens=64)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """A folder with a small random Llama and the teacher's tokenizer."""
    out = tmp_path_factory.mktemp("models") / "text"
    config = LlamaConfig(vocab_size=719, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, eos_token_id=1, pad_token_id=0)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(out)
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(TEACHER / name, out)
    tokenizer = json.loads((TEACHER / "tokenizer_config.json").read_text())
    del tokenizer["processor_class"]  # it has no processor of images
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return out


@pytest.fixture(scope="module")
def address(text_model):
    """Its list has models that are loaded, which a question does. It would compute in the dtype of
    the checkpoint, which is bfloat16."""
    with serving("--dtype", "float32") as address:
        for model in (TEACHER, text_model):
            body = {"model": str(model), "max_tokens": 1,
                    "messages": [{"role": "user", "content": "What do you see?"}]}  # fmt: skip
            url = f"{address}/chat/completions"
            httpx2.post(url, json=body, timeout=100).raise_for_status()
        yield address


@pytest.fixture(scope="module")
def prompts(scenes_dir):
    """The records, and prompts of one turn and of several."""
    config = DataConfig(train=str(scenes_dir / "validation.parquet"))
    records, found = Records(config), []
    for record in (records[i] for i in range(3)):
        places = answers_of(record)
        found += [asked(record, places[0]), asked(record, places[-1])]
    return Encoder(records, load_processor(TEACHER_CONFIG), config), found


def requests_of(encoder, prompts):
    records = encoder.records
    return [
        Request(f"{i:064x}", prompt.messages, lambda p=prompt: records.pictures(p), i)
        for i, prompt in enumerate(prompts)
    ]


def made(maker, requests, sampling):
    answers = {}
    maker.answer(requests, sampling, lambda request, answer: answers.update({request.seed: answer}))
    return [answers[i] for i in range(len(requests))]


def test_greedy_answers_equal_those_in_this_process(address, prompts, capsys):
    encoder, questions = prompts
    maker = ServerMaker(ServerConfig(server=address, model=str(TEACHER), concurrency=3))
    found = made(maker, requests_of(encoder, questions), GREEDY)
    assert f"{address}: {TEACHER} takes images: a question has" in capsys.readouterr().out

    model = load_model(TEACHER_CONFIG)
    expected = sample_answers(
        generate_of(model), encoder, questions, GREEDY, seed=0, device=torch.device("cpu")
    )
    assert found == [Answer(answer.text, answer.finished) for answer in expected]
    assert len({answer.text for answer in found}) > 3

    cut = made(
        maker, requests_of(encoder, questions), SamplingConfig(temperature=0, max_new_tokens=1)
    )
    assert [answer.finished for answer in cut] == [False] * len(cut)


def test_it_decodes_greedily_at_every_temperature_and_this_is_named(address, prompts, capsys):
    encoder, questions = prompts
    maker = ServerMaker(ServerConfig(server=address, model=str(TEACHER)))
    made(maker, requests_of(encoder, questions[:1]), SamplingConfig(max_new_tokens=4))
    assert "gives equal answers to 3 seeds at temperature 1" in capsys.readouterr().out


def test_answers_that_are_sampled_depend_on_seeds_alone(address, prompts, capsys):
    """One request at a time: concurrent ones share this server's random state."""
    encoder, questions = prompts
    settings = {"do_sample": True, "eos_token_id": 1, "pad_token_id": 0}
    extra = {"generation_config": json.dumps(settings)}
    config = ServerConfig(server=address, model=str(TEACHER), concurrency=1, extra=extra)
    same = requests_of(encoder, questions[1:2] * 3)
    sampling = SamplingConfig(temperature=2, max_new_tokens=16)
    found = made(ServerMaker(config), same, sampling)
    assert "equal answers" not in capsys.readouterr().out
    assert len({answer.text for answer in found}) > 1
    assert made(ServerMaker(config), same[::-1], sampling) == found


def test_a_text_model_passes_over_images(address, text_model, prompts):
    encoder, questions = prompts
    maker = ServerMaker(ServerConfig(server=address, model=str(text_model)))
    said = "it passes over images: a question has 16 tokens with an image and 16 without"
    with pytest.raises(ServerError, match=said):
        made(maker, requests_of(encoder, questions[:1]), GREEDY)
    text = [Request("0", [{"role": "user", "content": [{"type": "text", "text": "A cat?"}]}],
                    list, 0)]  # fmt: skip
    assert len(made(maker, text, SamplingConfig(temperature=0, max_new_tokens=4))) == 1


def test_what_it_does_not_know_is_refused(address, prompts):
    encoder, questions = prompts
    requests = requests_of(encoder, questions[:1])
    maker = ServerMaker(ServerConfig(server=address, model=str(TEACHER)))
    with pytest.raises(ServerError, match=r"status 422.*Unexpected fields.*top_k"):
        made(maker, requests, GREEDY.model_copy(update={"top_k": 3}))
    other = ServerMaker(ServerConfig(server=address, model=f"{TEACHER}s"))
    with pytest.raises(ServerError, match=f"it has no model .*did you mean '{TEACHER}'"):
        made(other, requests, GREEDY)
