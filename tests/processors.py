"""Real processors of three families around small tokenizers: no hub, no torchvision.

The chat templates are written after the families' documented formats: LLaVA-1.5 (no closing token),
Qwen2.5-VL (ChatML, a newline after each turn) and SmolVLM (a generation prompt without space).
"""

from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Idefics3Processor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

LLAVA = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOLVLM = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{% if m['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
WORDS = ("system You help . user assistant USER ASSISTANT : Assistant User two cats and a dog ?",)
OTHER_WORDS = ("What is that? There is a red book left of the black cat, and a green cup. "
               "Is there a tree? Yes. No. How many are there? ä ö ü é 🎉 🎉🎉",)  # fmt: skip
"""For a tokenizer that cuts words, umlauts and emoji elsewhere."""


def _tokenizer(
    eos: str, specials: list[str], words: tuple[str, ...] = WORDS, **named: str
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", *specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token=eos, extra_special_tokens=named
    )


@lru_cache
def llava(words: tuple[str, ...] = WORDS) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"height": 32, "width": 32}, do_center_crop=False
        ),
        tokenizer=_tokenizer("</s>", ["</s>", "<image>"], words, image_token="<image>"),
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=LLAVA,
    )


class QwenWithoutVideo(Qwen2_5_VLProcessor):
    """The real processor; only the check that wants torchvision's video processor is left out."""

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument is not None:
            super().check_argument_for_proper_class(argument_name, argument)


@lru_cache
def qwen() -> Qwen2_5_VLProcessor:
    names = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
             "<|video_pad|>"]  # fmt: skip
    return QwenWithoutVideo(
        image_processor=Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 4096}
        ),
        tokenizer=_tokenizer(
            "<|im_end|>",
            names,
            image_token="<|image_pad|>",
            video_token="<|video_pad|>",
            vision_start_token="<|vision_start|>",
            vision_end_token="<|vision_end|>",
        ),
        chat_template=QWEN,
    )


@lru_cache
def smolvlm() -> Idefics3Processor:
    names = ["<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>",
             "<global-img>"]  # fmt: skip
    return Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
        ),
        tokenizer=_tokenizer(
            "<end_of_utterance>",
            names,
            image_token="<image>",
            fake_image_token="<fake_token_around_image>",
            global_image_token="<global-img>",
            end_of_utterance_token="<end_of_utterance>",
        ),
        image_seq_len=4,
        chat_template=SMOLVLM,
    )


FAMILIES = {"llava": llava, "qwen": qwen, "smolvlm": smolvlm}
END = {"llava": "</s>", "qwen": "<|im_end|>", "smolvlm": "<end_of_utterance>"}
