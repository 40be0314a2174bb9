"""Where answers end, and which settings decide their tokens."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from mmkd.data.answers import sample_answers
from mmkd.data.encoder import Encoder
from mmkd.data.generation import TAKEN_OVER, end_tokens, neutral_settings, set_ends, turn_ends
from mmkd.data.schema import Record
from mmkd.errors import MmkdError
from mmkd.evaluation.adapter import MmkdModel
from mmkd.evaluation.options import generate_options, stop_strings
from mmkd.modeling.loading import load_model, load_processor
from mmkd.recipe import DataConfig, ModelConfig, SamplingConfig, StudentConfig
from mmkd.students.write import write_converted, write_student
from tests.support.processors import END, FAMILIES, gemma3, llava, llava_next, llava_onevision
from tests.support.recipes import tiny_recipe
from tests.support.zoo import ZOO

CPU = torch.device("cpu")
ENDS = END | {"llava_next": "</s>", "llava_onevision": "<|im_end|>"}
MADE = FAMILIES | {"llava_next": llava_next, "llava_onevision": llava_onevision}
LEAKS = {
    "do_sample": True,
    "temperature": 9.0,
    "top_k": 3,
    "top_p": 0.5,
    "typical_p": 0.5,
    "min_p": 0.3,
    "num_beams": 3,
    "num_return_sequences": 2,
    "repetition_penalty": 9.0,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 5,
    "suppress_tokens": list(range(50, 200)),
    "begin_suppress_tokens": list(range(200, 300)),
    "bad_words_ids": [[300], [301]],
    "forced_eos_token_id": 5,
    "stop_strings": ["a"],
    "return_dict_in_generate": True,
}


def question(text="Two cats?"):
    return Record("q", [{"role": "user", "content": [{"type": "text", "text": text}]}])


class Asking(Encoder):
    """An encoder of questions without images, which needs no data."""

    def __init__(self, processor):
        records = SimpleNamespace(pictures=lambda record: [], where=lambda index: "here")
        super().__init__(records, processor, DataConfig(train="questions.json"))


def adapter_of(model, processor):
    adapter = MmkdModel(model=model, processor=processor)
    adapter.task_dict = {"task": {"test": [{"question": "Two cats?"}]}}
    return adapter


def scored(adapter, **settings):
    """The adapter's answer to the question."""
    asked = question().messages
    wanted = {"max_new_tokens": 6, "temperature": 0, **settings}
    request = SimpleNamespace(args=("Two cats?", lambda doc: asked, wanted, 0, "task", "test"))
    return adapter.generate_until([request])[0]


def likeliest(model, processor, count=6):
    """The tokens that the model's logits alone make."""
    inputs = Asking(processor).prompts([question()])
    ids = inputs["input_ids"]
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def ending(model, token, after=2):
    """Make a model say `token` behind so many others."""
    calls = []

    def push(module, inputs, logits):
        calls.append(1)
        logits = logits.clone()
        logits[..., token] = 1e4 if len(calls) > after else -1e4
        return logits

    return model.get_output_embeddings().register_forward_hook(push)


@pytest.mark.parametrize("family", MADE)
def test_the_end_of_turn_is_the_one_that_the_template_writes(family):
    processor = MADE[family]()
    ids = processor.tokenizer.convert_tokens_to_ids
    wanted = {ids(ENDS[family])} if family != "llava" else set()  # it closes no turn: eos does
    assert turn_ends(processor) in (wanted, {processor.tokenizer.eos_token_id})
    assert end_tokens(processor, 7) == sorted(
        {7, ids(ENDS[family]), ids(processor.tokenizer.eos_token)}
    )


def test_a_base_checkpoint_with_a_chatml_template():
    """Its tokenizer ends documents with a token that ends no turn."""
    processor = llava_onevision()
    tokenizer, eos = processor.tokenizer, processor.tokenizer.eos_token
    try:
        tokenizer.eos_token = "<pad>"
        assert end_tokens(processor) == sorted(
            {tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.pad_token_id}
        )
    finally:
        tokenizer.eos_token = eos


def test_a_student_stops_at_its_end_of_turn(tmp_path):
    """In sampling, in evaluation, and in transformers alone once it is written; the text carries
    no token of it."""
    processor, model = gemma3(), ZOO["gemma3"].make()
    end = processor.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert model.generation_config.eos_token_id != end
    settings = SamplingConfig(max_new_tokens=8, temperature=0)

    def generate(inputs, **options):
        return model.generate(**inputs, **options)

    hook = ending(model, end)
    (said,) = sample_answers(
        generate, Asking(processor), [question()], settings, seed=0, device=CPU
    )
    hook.remove()
    assert said.finished
    assert "<" not in said.text
    hook = ending(model, end)
    answer = scored(adapter_of(model, processor))
    hook.remove()
    assert answer.token_counts.output_tokens == 3
    assert answer.text.strip() == said.text

    write_student(model, processor, tmp_path / "student")
    alone = AutoModelForImageTextToText.from_pretrained(tmp_path / "student").eval()
    assert end in alone.generation_config.eos_token_id
    ending(alone, end)
    inputs = AutoProcessor.from_pretrained(tmp_path / "student")(text="Two", return_tensors="pt")
    out = alone.generate(**inputs, max_new_tokens=8)
    assert out.shape[1] - inputs["input_ids"].shape[1] == 3


def test_an_answer_that_was_cut_off_is_told_apart():
    processor = gemma3()
    words = processor.tokenizer("two cats and a dog")["input_ids"]
    end = processor.tokenizer.convert_tokens_to_ids("<end_of_turn>")

    def generate(inputs, **options):
        assert end in options["eos_token_id"]
        rows = torch.tensor([[*words, end, 0, 0], [*words, *words[:3]]])
        return torch.cat([inputs["input_ids"], rows], 1)

    both = [question(), question()]
    done, cut = sample_answers(
        generate, Asking(processor), both, SamplingConfig(), seed=0, device=CPU
    )
    assert (done.text, done.finished) == ("two cats and a dog", True)
    assert not cut.finished
    assert cut.text.startswith("two cats and a dog")


def test_a_from_scratch_student_does_not_end_with_a_word(tmp_path):
    """Llama's default end token is 2, which this tokenizer may use for anything."""
    processor = llava()
    processor.save_pretrained(tmp_path / "processor")
    settings = ZOO["llava"].settings(processor)
    settings["text_config"]["eos_token_id"] = 150
    config = StudentConfig(
        config={"model_type": "llava", **settings}, processor=str(tmp_path / "processor")
    )
    assert not processor.tokenizer.added_tokens_decoder.get(150)
    write_converted(config, tmp_path / "student", seed=0)
    written = json.loads((tmp_path / "student" / "generation_config.json").read_text())
    assert written["eos_token_id"] == processor.tokenizer.eos_token_id


def test_the_scene_student_ends_as_before(tiny_model_dir):
    processor = load_processor(ModelConfig(model=str(tiny_model_dir)))
    for from_config in (False, True):
        settings = GenerationConfig(eos_token_id=2)
        set_ends(settings, processor, from_config=from_config)
        assert settings.eos_token_id == [1, 2]


@pytest.mark.parametrize(
    "brought",
    [
        {"temperature": 0.9, "top_p": 0.6},
        {"early_stopping": True},
        {"pad_token_id": -1},
        {"cache_implementation": "unheard_of"},
    ],
)
def test_settings_that_transformers_refuses_to_save_do_not_lose_a_student(
    brought, tiny_model_dir, tmp_path
):
    """As Vicuna's: a temperature without `do_sample`."""
    source = ModelConfig(model=str(tiny_model_dir))
    model, processor = load_model(source), load_processor(source)
    model.generation_config = GenerationConfig(eos_token_id=2)
    for name, value in brought.items():
        setattr(model.generation_config, name, value)
    write_student(model, processor, tmp_path / "student")
    written = GenerationConfig.from_pretrained(tmp_path / "student")
    assert written.eos_token_id == [1, 2]


def test_every_setting_of_generate_is_known():
    settings = neutral_settings()
    fields = {n for n in vars(GenerationConfig()) if not n.startswith("_")}
    assert fields - settings.keys() == {*TAKEN_OVER, "transformers_version"}
    assert set(LEAKS) <= settings.keys()


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_temperature_zero_is_the_likeliest_token(family):
    """Whatever the checkpoint's own settings are."""
    processor, model = MADE[family](), ZOO[family].make()
    want = likeliest(model, processor)
    text = processor.tokenizer.decode(want, skip_special_tokens=True)
    settings = SamplingConfig(max_new_tokens=6, temperature=0)

    def generate(inputs, **options):
        ids = model.generate(**inputs, **options)
        found.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
        return ids

    for leak in [LEAKS, {"repetition_penalty": 9.0, "min_new_tokens": 5}]:
        found = []
        model.generation_config = GenerationConfig(pad_token_id=0, **leak)
        sample_answers(generate, Asking(processor), [question()], settings, seed=0, device=CPU)
        assert found == [want], leak
        assert scored(adapter_of(model, processor)).text == text, leak


def test_sampling_uses_what_is_asked_for_alone():
    processor, model = llava(), ZOO["llava"].make()
    settings = SamplingConfig(max_new_tokens=6, temperature=1.0)

    def answers():
        def generate(inputs, **options):
            return model.generate(**inputs, **options)

        found = sample_answers(
            generate, Asking(processor), [question()], settings, seed=0, device=CPU, count=8
        )
        return [a.text for a in found]

    plain = answers()
    assert len(set(plain)) > 1
    model.generation_config = GenerationConfig(pad_token_id=0, top_k=1, repetition_penalty=9.0)
    assert answers() == plain


def test_what_a_task_asks_for_is_honoured_or_refused_by_name():
    processor, model = llava(), ZOO["llava"].make()
    adapter = adapter_of(model, processor)
    plain = scored(adapter, max_new_tokens=8)
    assert scored(adapter, max_new_tokens=8, suppress_tokens=likeliest(model, processor)) != plain
    options = generate_options({"repetition_penalty": 1.2, "min_new_tokens": 3}, "task x")
    assert (options["repetition_penalty"], options["min_new_tokens"]) == (1.2, 3)
    assert generate_options({"temperature": 0, "top_p": 0.1, "do_sample": True}, "task x") == (
        neutral_settings() | {"max_new_tokens": 256}
    )
    sampled = generate_options({"temperature": 0.5, "top_p": 0.9}, "task x")
    assert (sampled["do_sample"], sampled["temperature"], sampled["top_p"]) == (True, 0.5, 0.9)
    assert stop_strings({"until": "\n", "stop_sequences": ["Q:"]}) == ["\n", "Q:"]
    with pytest.raises(MmkdError, match=r"task x: .*'max_new_token'.* did you mean 'max_new_tok"):
        generate_options({"max_new_token": 3}, "task x")


def test_the_students_of_a_run_name_their_ends(scenes_dir, tiny_model_dir, tmp_path):
    from mmkd.recipe import load_recipe
    from mmkd.runs import pipeline

    raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, stage={"steps": 1})
    folder = pipeline.run(load_recipe(raw))
    written = json.loads((folder / "01-mimic/student/generation_config.json").read_text())
    assert written["eos_token_id"] == [1, 2]
