"""`tokenizer`: a model with the tokens of another processor."""

import copy
import json
import shutil
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, Idefics3Config, LlamaConfig

import mmkd
from mmkd.cli import main
from mmkd.data.chat import render_chat
from mmkd.data.processing import Processing
from mmkd.data.token_text import decoder, token_bytes
from mmkd.errors import RecipeError
from mmkd.modeling.conversation import Conversation
from mmkd.modeling.loading import load_pretrained, load_pretrained_processor
from mmkd.recipe import load_recipe, load_student
from mmkd.runs import pipeline
from mmkd.students import convert, write_converted
from mmkd.students.token_map import Roles, map_tokens
from scripts.scenes_bytes import byte_processor
from tests.support.places import CONFIGS
from tests.support.processors import OTHER_WORDS, gemma3, llava, smolvlm
from tests.support.recipes import tiny_recipe
from tests.support.zoo import ZOO

QUESTION = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many cats?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "three cats"}]},
]


@pytest.fixture(scope="module")
def byte_dir(tmp_path_factory):
    """A byte-level processor with ChatML; the scenes' own has metaspaces."""
    out = tmp_path_factory.mktemp("bytes") / "processor"
    byte_processor(400).save_pretrained(out)
    return out


def transferred(model, processor, out, **settings):
    """The folder of a model with the tokens of a processor."""
    conversion = {"kind": "tokenizer", "processor": str(processor), **settings}
    config = load_student({"model": str(model), "convert": [conversion]})
    return out, write_converted(config, out, seed=0)


def logits(folder, text="Is there a cat?"):
    model, processor = load_pretrained(str(folder)), load_pretrained_processor(str(folder))
    image = Image.new("RGB", (64, 64), (200, 30, 60))
    rendered = render_chat(processor, QUESTION).text
    inputs = processor(text=[rendered], images=[[image]], return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("special_tokens", ["new", "keep"])
def test_the_models_own_tokenizer_changes_nothing(tiny_model_dir, tmp_path, special_tokens):
    out, report = transferred(
        tiny_model_dir, tiny_model_dir, tmp_path / "out", special_tokens=special_tokens
    )
    assert report.before == report.after
    assert torch.equal(logits(out), logits(tiny_model_dir))
    config, before = (json.loads((f / "config.json").read_text()) for f in (out, tiny_model_dir))
    config["text_config"].pop("bos_token_id"), before["text_config"].pop("bos_token_id")
    assert config["image_token_index"] == before["image_token_index"]
    assert config["text_config"]["vocab_size"] == before["text_config"]["vocab_size"]


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "idefics3", "gemma3", "llava_onevision"])
def test_a_familys_own_tokenizer_changes_no_weight(family, tmp_path):
    member = ZOO[family]
    if member.needs:
        pytest.importorskip("torchvision")
    processor, model = member.processor(), member.make()
    processor.save_pretrained(tmp_path / "processor")
    before = {n: w.clone() for n, w in model.state_dict().items()}
    ids = {n: v for n, v in vars(model.config).items() if n.endswith(("_token_id", "_index"))}
    config = load_student(
        {
            "model": "x",
            "convert": [{"kind": "tokenizer", "processor": str(tmp_path / "processor")}],
        }
    )
    report = convert(model, config.convert, processor)
    assert "0 are means of others" in report.lines[0]
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
    own = {n: v for n, v in ids.items() if not n.startswith(("bos", "eos", "pad"))}
    assert own == {n: getattr(model.config, n) for n in own}


def test_rows_are_copies_and_means(tiny_model_dir, byte_dir, tmp_path):
    """Against a naive computation for tokens of each sort."""
    out, _ = transferred(tiny_model_dir, byte_dir, tmp_path / "out")
    old, new = load_pretrained(str(tiny_model_dir)), load_pretrained(str(out))
    mine = load_pretrained_processor(str(tiny_model_dir)).tokenizer
    theirs = load_pretrained_processor(str(out)).tokenizer
    for table in ("get_input_embeddings", "get_output_embeddings"):
        was, now = (getattr(m, table)().weight.detach() for m in (old, new))
        assert now.shape[0] == len(theirs) == new.config.text_config.vocab_size

        def same(token, *others, was=was, now=now):
            rows = [was[mine.convert_tokens_to_ids(o)].double() for o in others]
            mean = sum(rows) / len(rows)
            got = now[theirs.convert_tokens_to_ids(token)].double()
            torch.testing.assert_close(got, mean, rtol=0, atol=1e-7)
            if len(others) == 1:
                assert torch.equal(got, rows[0])

        same("\u0120is", "\u2581is")  # " is" in both
        same("s", "s")
        same("!", "<0x21>")  # the old tokenizer has no text for it
        same("\u00c3", "<0xC3>")  # half of a character
        same("<|im_end|>", "<|end|>")  # the end of turn
        same("<|image_pad|>", "<image>")
        same("<|pad|>", "<pad>")
        start = mine.tokenize("<|im_start|>")
        assert len(start) > 3
        same("<|im_start|>", *start)


def test_a_word_of_the_new_tokenizer_is_the_mean_of_its_pieces(byte_dir):
    """Byte-level and metaspace tokenizers in both directions."""
    scenes, byte = load_pretrained_processor(str(byte_dir)), llava(OTHER_WORDS)
    for old, new in ((scenes, byte), (byte, scenes)):
        found = map_tokens(old, new)
        text_old, text_new = decoder(old.tokenizer), decoder(new.tokenizer)
        specials = Roles(new).specials
        for token, number in new.tokenizer.get_vocab().items():
            if token in specials:
                continue
            pieces = old.tokenizer.convert_ids_to_tokens(found.sources[number])
            made = b"".join(token_bytes(p, text_old(p)) for p in pieces)
            assert made == token_bytes(token, text_new(token)), token
        assert found.unknown == 0
        assert found.composed > 0


def test_a_metaspace_tokenizer_gives_and_takes(tiny_model_dir, byte_dir):
    meta, byte = (load_pretrained_processor(str(f)) for f in (tiny_model_dir, byte_dir))
    forth, back = map_tokens(meta, byte), map_tokens(byte, meta)
    vocabulary = meta.tokenizer.get_vocab()
    cats = back.sources[vocabulary["\u2581cats"]]
    assert byte.tokenizer.decode(cats) == " cats"
    assert len(cats) > 1
    byte_number = back.sources[vocabulary["<0xC3>"]]
    assert byte.tokenizer.convert_ids_to_tokens(byte_number) == ["\u00c3"]
    assert forth.unknown == back.unknown == 0
    assert forth.by_role == 3  # pad, end of turn, image


def test_random_rows_are_drawn_for_new_texts_only(tiny_model_dir, byte_dir, tmp_path):
    mean, random, again = (
        load_pretrained(str(transferred(tiny_model_dir, byte_dir, tmp_path / n, init=i)[0]))
        for n, i in (("mean", "mean"), ("random", "random"), ("again", "random"))
    )
    rows = [m.get_input_embeddings().weight for m in (mean, random, again)]
    assert torch.equal(rows[1], rows[2])
    found = map_tokens(*(load_pretrained_processor(str(f)) for f in (tiny_model_dir, byte_dir)))
    equal = torch.tensor([len(s) == 1 for s in found.sources])
    assert torch.equal(rows[0][equal], rows[1][equal])
    assert not (rows[0] == rows[1]).all(1)[~equal].any()


def test_images_take_the_same_tokens_and_pixels(tiny_model_dir, byte_dir, tmp_path):
    out, _ = transferred(tiny_model_dir, byte_dir, tmp_path / "out")
    image = Image.new("RGB", (80, 50), (10, 200, 90))
    inputs = []
    for folder in (tiny_model_dir, out):
        processor = load_pretrained_processor(str(folder))
        text = render_chat(processor, QUESTION).text
        processing = Processing(processor)
        encoded = processing([text], [[image]])
        inputs.append(encoded["pixel_values"])
        assert (encoded["input_ids"] == processing.image_token_id).sum() == 64
        assert load_pretrained(str(folder)).config.image_token_id == processing.image_token_id
    assert torch.equal(*inputs)


def test_configs_name_the_new_tokens(tiny_model_dir, byte_dir, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    settings = json.loads((model / "generation_config.json").read_text())
    settings |= {"eos_token_id": 1, "pad_token_id": 0, "suppress_tokens": [300]}
    (model / "generation_config.json").write_text(json.dumps(settings))
    config = json.loads((model / "config.json").read_text())
    config["text_config"] |= {"eos_token_id": 1, "pad_token_id": 0}
    (model / "config.json").write_text(json.dumps(config))
    out, _ = transferred(model, byte_dir, tmp_path / "out")
    tokenizer = load_pretrained_processor(str(out)).tokenizer
    pad, end, image = tokenizer.convert_tokens_to_ids(["<|pad|>", "<|im_end|>", "<|image_pad|>"])
    config = json.loads((out / "config.json").read_text())
    assert config["image_token_index"] == image
    text = config["text_config"]
    assert (text["eos_token_id"], text["pad_token_id"]) == (end, pad)
    assert text["vocab_size"] == 400
    settings = json.loads((out / "generation_config.json").read_text())
    assert (settings["eos_token_id"], settings["pad_token_id"]) == (end, pad)
    assert "suppress_tokens" not in settings


def test_kept_special_tokens_are_added(tiny_model_dir, byte_dir, tmp_path):
    out, report = transferred(tiny_model_dir, byte_dir, tmp_path / "out", special_tokens="keep")
    old, new = (load_pretrained_processor(str(f)) for f in (tiny_model_dir, out))
    assert "405 tokens" in report.lines[0]
    assert new.chat_template == old.chat_template
    assert render_chat(new, QUESTION) == render_chat(old, QUESTION)
    assert new.tokenizer.special_tokens_map == old.tokenizer.special_tokens_map
    rows = [load_pretrained(str(f)).get_input_embeddings().weight for f in (tiny_model_dir, out)]
    for token in ("<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<image>"):
        numbers = (p.tokenizer.convert_tokens_to_ids(token) for p in (old, new))
        assert torch.equal(*(r[n] for r, n in zip(rows, numbers, strict=True)))


def test_another_family_takes_a_tokenizer_with_its_own_special_tokens(tmp_path):
    """A SmolVLM-like model writes further tokens around its image tokens."""
    processor, other = smolvlm(), llava(OTHER_WORDS)
    other.save_pretrained(tmp_path / "other")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = Idefics3Config(
        text_config=LlamaConfig(
            **small, num_attention_heads=2, vocab_size=len(processor.tokenizer) + 7, pad_token_id=0
        ),
        vision_config={**small, "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
        image_token_id=processor.tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    model = AutoModelForImageTextToText.from_config(config)
    conversion = {"kind": "tokenizer", "processor": str(tmp_path / "other")}
    keep = load_student({"model": "x", "convert": [{**conversion, "special_tokens": "keep"}]})
    report = convert(model, keep.convert, processor)
    made = report.processor
    assert type(made) is type(processor)
    assert made.image_token == "<image>"
    assert model.get_output_embeddings().weight.shape[0] == len(made.tokenizer)
    assert model.config.image_token_id == made.tokenizer.convert_tokens_to_ids("<image>")
    image = Image.new("RGB", (40, 40))
    counts = [Processing(p).image_tokens([image.size], of=1) for p in (processor, made)]
    assert counts[0] == counts[1] > 4


def recipe_of(scenes, model, byte_dir, out, **stage):
    conversion = {"kind": "tokenizer", "processor": str(byte_dir)}
    return tiny_recipe(
        scenes,
        model,
        out,
        student={"model": str(model), "convert": [conversion]},
        teacher={"model": str(model)},
        stage={"objectives": [{"kind": "alm"}], **stage},
    )


def test_a_transferred_student_trains_by_alm_and_answers(
    scenes_dir, tiny_model_dir, byte_dir, tmp_path
):
    stage = {"steps": 30, "optimizer": {"lr": 3e-3}, "train": ["language_model"]}
    recipe = load_recipe(recipe_of(scenes_dir, tiny_model_dir, byte_dir, tmp_path, **stage))
    folder = pipeline.run(recipe)
    lines = (folder / "01-mimic" / "metrics.jsonl").read_text().splitlines()
    losses = torch.tensor([json.loads(line)["alm"] for line in lines])
    assert losses[-5:].mean() < 0.8 * losses[:5].mean(), losses
    noted = json.loads((folder / "00-start" / "inputs.json").read_text())["files"]
    assert str(byte_dir / "tokenizer.json") in noted
    assert "400 tokens" in json.loads((folder / "00-start" / "done.json").read_text())["changes"][0]
    student = folder / "01-mimic" / "student"
    model, processor = load_pretrained(str(student)), load_pretrained_processor(str(student))
    assert "im_start" in processor.chat_template
    reply = Conversation(model, processor).ask("How many?", [Image.new("RGB", (64, 64))])
    assert isinstance(reply.text, str)
    assert pipeline.run(recipe) == folder  # nothing is left to do


def test_convert_command(tiny_model_dir, byte_dir, tmp_path, monkeypatch, capsys):
    conversion = f"{{kind: tokenizer, processor: {byte_dir}}}"
    words = ["convert", str(tiny_model_dir), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["mmkd", *words, "--conversion", conversion])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    assert "tokenizer: 400 tokens, " in capsys.readouterr().out
    assert len(load_pretrained_processor(str(tmp_path / "out")).tokenizer) == 400


def test_python(tiny_model_dir, byte_dir, tmp_path):
    conversions = [{"kind": "tokenizer", "processor": str(byte_dir)}]
    mmkd.convert(tiny_model_dir, conversions, out=tmp_path / "out")
    assert len(load_pretrained_processor(str(tmp_path / "out")).tokenizer) == 400
    with pytest.raises(RecipeError, match="the model is given without one"):
        mmkd.convert(load_pretrained(str(tiny_model_dir)), conversions)


def refused(model, processor, tmp_path, message, **settings):
    with pytest.raises(RecipeError, match=message) as caught:
        transferred(model, processor, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    return caught.value


def test_a_template_that_writes_no_image_is_refused(tiny_model_dir, byte_dir, tmp_path):
    processor = load_pretrained_processor(str(byte_dir))
    processor.chat_template = processor.chat_template.replace("<|image_pad|>", "")
    processor.save_pretrained(tmp_path / "text")
    found = refused(
        tiny_model_dir,
        tmp_path / "text",
        tmp_path,
        r"does not work with the tokenizer of .*text: the chat template .*no <\|image_pad\|>",
    )
    assert "special_tokens: keep" in found.hint
    transferred(tiny_model_dir, tmp_path / "text", tmp_path / "out", special_tokens="keep")


def test_a_tokenizer_without_an_image_token_is_refused(tiny_model_dir, tmp_path):
    processor = copy.deepcopy(gemma3())
    processor.tokenizer.save_pretrained(tmp_path / "text")
    for name in ("config", "template"):
        path = tmp_path / "text" / f"tokenizer_{name}.json"
        if path.is_file():
            held = json.loads(path.read_text())
            held.pop("model_specific_special_tokens", None)
            held = {k: v for k, v in held.items() if not k.startswith(("image", "boi", "eoi"))}
            path.write_text(json.dumps(held))
    (tmp_path / "text" / "chat_template.jinja").write_text(processor.chat_template)
    refused(tiny_model_dir, tmp_path / "text", tmp_path, "it has no token '<image>' for an image")


def test_an_answer_without_an_end_is_refused(tiny_model_dir, byte_dir, tmp_path):
    processor = load_pretrained_processor(str(byte_dir))
    processor.chat_template = processor.chat_template.replace("<|im_end|>", "")
    processor.tokenizer.eos_token = None
    processor.save_pretrained(tmp_path / "endless")
    message = "neither the chat template nor the tokenizer ends an answer"
    refused(tiny_model_dir, tmp_path / "endless", tmp_path, message)


def test_a_token_of_the_config_that_is_gone_is_refused(byte_dir):
    """LLaVA-OneVision's config names a token for videos."""
    member = ZOO["llava_onevision"]
    if member.needs:
        pytest.importorskip("torchvision")
    conversion = {"kind": "tokenizer", "processor": str(byte_dir)}
    config = load_student({"model": "x", "convert": [conversion]})
    with pytest.raises(RecipeError, match=r"video_token_index is \d+ \(<video>\), and the tok"):
        convert(member.make(), config.convert, member.processor())


def test_it_is_for_the_student_before_its_stages(tiny_model_dir, byte_dir, scenes_dir, tmp_path):
    conversion = {"kind": "tokenizer", "processor": str(byte_dir)}
    raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, stage={"convert": [conversion]})
    with pytest.raises(RecipeError, match="'tokenizer' changes the processor") as caught:
        load_recipe(raw)
    assert "put it into student.convert" in caught.value.hint


def test_objectives_that_compare_tokens_are_refused(tiny_model_dir, byte_dir, scenes_dir, tmp_path):
    raw = recipe_of(scenes_dir, tiny_model_dir, byte_dir, tmp_path, objectives=[{"kind": "kl"}])
    with pytest.raises(RecipeError, match=r"the vocabularies differ.*use alm or uld"):
        pipeline.run(load_recipe(raw))
    assert not (tmp_path / "tiny").exists()


def test_the_recipe_of_real_models_runs_on_tiny_ones(
    tiny_model_dir, byte_dir, scenes_dir, tmp_path
):
    raw = load_recipe(CONFIGS / "tokenizer_transfer.yaml").model_dump(mode="json")
    (conversion,) = raw["student"]["convert"]
    assert raw["teacher"]["model"] == raw["student"]["model"]
    small = {"steps": 2, "precision": "float32", "batch": {"size": 2}}
    model = {"model": str(tiny_model_dir)}
    raw |= {
        "output_dir": str(tmp_path),
        "teacher": model,
        "student": {**model, "convert": [{**conversion, "processor": str(byte_dir)}]},
        "data": {"train": str(scenes_dir / "train.parquet")},
        "stages": [{**stage, **small} for stage in raw["stages"]],
        "evaluate": None,
    }
    folder = pipeline.run(load_recipe(raw))
    assert load_pretrained(str(folder / "01-transfer" / "student"))
