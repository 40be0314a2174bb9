"""A processor for scenes with another tokenizer: byte-level BPE and ChatML.

python -m scripts.scenes_bytes data/scenes_bytes

`configs/scenes/tokenizer_transfer.yaml` transfers the shipped teacher to its tokens. A part of the
words are several tokens.
"""

import argparse
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from mmkd.data.scenes.processor import build_processor, corpus
from mmkd.runtime.files import write_folder
from mmkd.runtime.progress import console

PAD, START, END, IMAGE = "<|pad|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image_pad|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB_SIZE = 560  # with the 256 bytes


def byte_processor(vocab_size: int = VOCAB_SIZE) -> LlavaProcessor:
    """The scenes' processor with a byte-level tokenizer trained on the question templates."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    scenes = build_processor()
    return LlavaProcessor(
        image_processor=scenes.image_processor,
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token=PAD,
            eos_token=END,
            extra_special_tokens={"image_token": IMAGE},
            clean_up_tokenization_spaces=False,
        ),
        patch_size=scenes.patch_size,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
        image_token=IMAGE,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    processor = byte_processor()
    write_folder(out, lambda folder: processor.save_pretrained(folder))
    console.print(f"wrote {out}: {len(processor.tokenizer)} tokens", highlight=False)
