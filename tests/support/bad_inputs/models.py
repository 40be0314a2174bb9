"""Models, runs and caches that cannot be used."""

import json
import os
import pickle
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.support.bad_inputs.table import RUN, World, case, change_json, overridden

KIND = "model"
WEIGHTS = "model/model.safetensors"
NEW_CODE = "from pathlib import Path\n\nPath('hacked').touch()\n"

overridden(
    KIND,
    "no_model_folder",
    "student.model=models/nowhere/here",
    "models/nowhere/here: no",
    "give a folder with config.json",
)
overridden(
    KIND,
    "image_size_of_one_size",
    "student.image_size.max_pixels=401408",
    "image_size of model: ",
    "has no setting for max_pixels -- leave image_size out",
)
overridden(
    KIND,
    "image_size_that_is_a_number",
    "student.image_size=448",
    "student.image_size: ",
)
overridden(KIND, "hub_model_offline", "student.model=me/student", "me/student: ", "HF_HUB_OFFLINE")


@case(
    KIND, "`stages.0.engine.device=cuda` without a GPU", "device: torch sees no GPU", "auto or cpu"
)
def no_gpu(world: World) -> list[str]:
    world.patch.setattr(torch.cuda, "is_available", lambda: False)
    return [*RUN, "stages.0.engine.device=cuda"]


@case(
    KIND,
    "`student.attn_implementation=flash_attention_2` without the package",
    "model: cannot load the model (FlashAttention2",
    "set attn_implementation to sdpa",
)
def attention_that_is_not_installed(world: World) -> list[str]:
    if find_spec("flash_attn"):
        pytest.skip("flash-attn is installed")
    return [*RUN, "student.attn_implementation=flash_attention_2"]


@case(KIND, "gave an empty folder", "model: the folder holds no", "give a folder with config.json")
def empty_folder(world: World) -> None:
    shutil.rmtree("model")
    Path("model").mkdir()


@case(
    KIND,
    "deleted config.json",
    "model: the folder holds no model",
    "give a folder with config.json",
)
def no_config(world: World) -> None:
    os.remove("model/config.json")


@case(KIND, "damaged config.json", "model/config.json: it is damaged", "copy or download it again")
def broken_config(world: World) -> None:
    Path("model/config.json").write_text("{")


@case(KIND, "gave a model of an unknown kind", "model: cannot load the model", "lava")
def unknown_model_type(world: World) -> None:
    change_json("model/config.json", lambda config: config.update(model_type="lava"))


@case(
    KIND,
    "gave a model that brings its own code",
    "model: cannot load the model",
    "add --trust-remote-code model",
)
def code_that_is_not_trusted(world: World) -> None:
    def bring(config: dict[str, Any]) -> None:
        classes = {"AutoConfig": "own.OwnConfig", "AutoModelForImageTextToText": "own.OwnModel"}
        config.update(model_type="own", auto_map=classes)

    change_json("model/config.json", bring)
    Path("model/own.py").write_text(NEW_CODE)


@case(KIND, "gave a model that reads no images", "model: ", "AutoModelForImageTextToText")
def text_model(world: World) -> None:
    config = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 719}
    Path("model/config.json").write_text(json.dumps(config))


@case(
    KIND,
    "gave a model whose logits are capped",
    "student: LlavaForConditionalGeneration changes",
    "choose a model without it",
)
def logits_behind_the_head(world: World) -> None:
    def cap(config: Any) -> None:
        config["text_config"]["final_logit_softcapping"] = 30.0

    change_json("model/config.json", cap)


@case(KIND, "gave weights that were cut", "model: cannot load the model", "copy")
def cut_weights(world: World) -> None:
    os.truncate(WEIGHTS, 2000)


@case(KIND, "converted a model whose weights were cut", "model: cannot load the model", "copy")
def cut_weights_to_convert(world: World) -> None:
    world.raw["student"]["convert"] = [{"kind": "mamba", "layers": [1]}]
    os.truncate(WEIGHTS, 2000)


@case(
    KIND,
    "gave weights that lack a tensor",
    "model: 1 weights are missing",
    "mlp.down_proj",
    "use the config that",
)
def lost_tensor(world: World) -> None:
    tensors = load_file(WEIGHTS)
    tensors.pop(next(n for n in tensors if n.endswith("mlp.down_proj.weight")))
    save_file(tensors, WEIGHTS, metadata={"format": "pt"})


@case(
    KIND,
    "gave weights of another width",
    "model: 6 weights are missing, unexpected or of another",
    "use the config that",
)
def tensor_of_another_shape(world: World) -> None:
    change_json("model/config.json", lambda c: c["text_config"].update(intermediate_size=48))


@case(KIND, "gave pickled weights only", "model: its weights are pickled", "save_pretrained")
def pickled_weights(world: World) -> None:
    class Touch:
        def __reduce__(self) -> Any:
            return Path.touch, (Path("hacked"),)

    os.remove(WEIGHTS)
    with open("model/pytorch_model.bin", "wb") as file:
        pickle.dump(Touch(), file)


@case(KIND, "deleted one of several weight files", "model: cannot load the model", "00002-of-00002")
def lost_shard(world: World) -> None:
    tensors = load_file(WEIGHTS)
    names = {"00001": list(tensors)[:10], "00002": list(tensors)[10:]}
    files = {n: f"model-{part}-of-00002.safetensors" for part, some in names.items() for n in some}
    index = {"metadata": {}, "weight_map": files}
    Path("model/model.safetensors.index.json").write_text(json.dumps(index))
    some = {n: tensors[n] for n in names["00001"]}
    save_file(some, "model/model-00001-of-00002.safetensors", metadata={"format": "pt"})
    os.remove(WEIGHTS)


@case(KIND, "gave a model without its processor", "model: ", "processor", "save the processor into")
def no_processor(world: World) -> None:
    for path in Path("model").glob("*"):
        if path.name not in ("config.json", "model.safetensors", "generation_config.json"):
            path.unlink()


@case(
    KIND,
    "gave a processor without a chat template",
    "model: the processor has no chat template",
    "add chat_template.jinja",
)
def no_chat_template(world: World) -> None:
    os.remove("model/chat_template.jinja")


# Vocabularies


@case(
    "vocabulary",
    "gave a teacher of another tokenizer",
    "the vocabularies differ",
    "<|user|>",
    "<|human|>",
    "models of the same tokenizer family",
)
def another_vocabulary(world: World) -> None:
    world.teach()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = Path("teacher") / name
        path.write_text(path.read_text().replace("<|user|>", "<|human|>"))


@case(
    "vocabulary",
    "gave the student the processor of another model",
    "student: the processor has other tokens than the model: id ",
    "<|human|>",
    "in the model's own tokenizer",
    "whose embeddings belong to this tokenizer",
)
def processor_of_another_model(world: World) -> None:
    shutil.copytree("model", "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = Path("other") / name
        path.write_text(path.read_text().replace("<|user|>", "<|human|>"))
    world.raw["student"]["processor"] = "other"


@case(
    "vocabulary",
    "added tokens to the tokenizers, not to the models",
    "student: the tokenizer has ",
    " tokens, and the model's head has ",
    "resize_token_embeddings",
)
def more_tokens_than_rows(world: World) -> None:
    world.teach()
    for folder in ("model", "teacher"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(["<more>"])
        tokenizer.save_pretrained(folder)


@case(
    "vocabulary",
    "added tokens to the student's tokenizer alone, without a teacher",
    "student: the tokenizer has ",
    " tokens, and the model's head has ",
    "resize_token_embeddings",
)
def more_tokens_than_rows_without_a_teacher(world: World) -> None:
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained("model")


@case(
    "vocabulary",
    "gave a tokenizer without special tokens",
    "model: the tokenizer has no pad token",
    "set pad_token",
)
def no_token_to_pad_with(world: World) -> None:
    def strip(settings: dict[str, Any]) -> None:
        for name in ("pad_token", "eos_token", "unk_token", "bos_token"):
            settings.pop(name, None)

    change_json("model/tokenizer_config.json", strip)


@case(
    KIND,
    "gave a chat template that reads other keys",
    "model: the chat template takes content neither as a list of parts nor as text",
    "published with",
)
def template_of_other_keys(world: World) -> None:
    Path("model/chat_template.jinja").write_text("{% for m in messages %}{{ m.value }}{% endfor %}")


@case(
    KIND,
    "gave a chat template for text alone",
    "model: the chat template writes no <image> for an image",
    "published with",
)
def template_without_images(world: World) -> None:
    Path("model/chat_template.jinja").write_text(
        "{% for m in messages %}{% for part in m.content if part.type == 'text' %}{{ part.text }}"
        "{% endfor %}{% endfor %}"
    )


@case(
    "vocabulary",
    "gave a teacher without a tokenizer",
    "teacher: ",
    "processor",
    "save the processor",
)
def teacher_without_a_tokenizer(world: World) -> None:
    world.teach()
    for path in Path("teacher").glob("tokenizer*"):
        path.unlink()


@case(
    "vocabulary",
    "compared all tokens with a teacher of another processor",
    "objective kl: teacher and student have different processors",
    "use region response",
)
def teacher_of_another_processor(world: World) -> None:
    world.teach({"kind": "kl", "region": "all"})
    for path in Path("teacher").glob("*processor*.json"):
        path.write_text(path.read_text().replace("64", "32"))


@case(
    "vocabulary",
    "left image tokens out, with a teacher of another processor",
    "stage mimic: image_tokens: teacher and student have different processors",
    "use models with the same processor",
)
def image_tokens_of_another_processor(world: World) -> None:
    world.teach({"kind": "kl"})
    world.stage(image_tokens={"keep": 0.5})
    for path in Path("teacher").glob("*processor*.json"):
        path.write_text(path.read_text().replace("64", "32"))
