"""The processor of models trained on scenes: a LLaVA processor with a small BPE tokenizer.

It is built from the question templates alone, so every seed of the data set gives the same one.
Words become single tokens ("cat" at the start of an answer and inside a sentence is one and the
same token); bytes are the fallback for everything else.
"""

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmkd.data.scenes import questions
from mmkd.data.scenes.scene import CANVAS, SPLITS, sample_scene, scene_rng
from mmkd.data.scenes.vocabulary import CLASSES

PAD, END, USER, ASSISTANT, IMAGE = "<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<image>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCAB_SIZE = 1024
CORPUS_SCENES = 3000


def corpus() -> list[str]:
    """Texts of the question templates, from which tokenizers are trained."""
    split = SPLITS["train"]
    scenes = [sample_scene(scene_rng(0, split, i), split) for i in range(CORPUS_SCENES)]
    statistics = questions.Statistics.count(scenes)
    lines = [f"{c.name} {c.plural} {c.group}" for c in CLASSES] * 8
    for i, scene in enumerate(scenes):
        rng = np.random.default_rng((1, i))
        lines += [t for q in questions.ask_all(rng, scene, statistics) for t in (q.text, q.answer)]
    return lines


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer on the templates' own words."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]
    )
    special = [PAD, END, USER, ASSISTANT, IMAGE]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special + [f"<0x{b:02X}>" for b in range(256)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens={
            "image_token": IMAGE,
            "user_token": USER,
            "assistant_token": ASSISTANT,
        },
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def build_processor(patch_size: int = 8, image_size: int = CANVAS) -> LlavaProcessor:
    """The processor for `image_size` pixels: (image_size / patch_size)^2 visual tokens."""
    size = {"height": image_size, "width": image_size}
    image_processor = CLIPImageProcessorPil(
        size=size,
        do_resize=True,
        do_center_crop=False,
        do_rescale=True,
        do_normalize=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=patch_size,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )
