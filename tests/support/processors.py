"""Real processors of the families with one small tokenizer, without the Hub.

They work without torchvision but for those whose classes cannot be imported then (ImportError).
"""

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3Processor,
    Idefics3Processor,
    InternVLProcessor,
    Lfm3VlProcessor,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    SmolVLMProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.utils import is_torchvision_available

from tests.support.templates import (
    GEMMA,
    INTERNVL,
    LFM,
    LLAVA,
    LLAVA_NEXT,
    ONEVISION,
    PIXTRAL,
    QWEN,
    SMOLVLM,
)

WORDS = ("system You help . user assistant USER ASSISTANT : Assistant User two cats and a dog ?",)
OTHER_WORDS = ("What is that? There is a red book left of the black cat, and a green cup. "
               "Is there a tree? Yes. No. How many are there? ä ö ü é 🎉 🎉🎉",)  # fmt: skip
"""For a tokenizer that cuts words, umlauts and emoji elsewhere."""
SIDE = 32  # pixels of an image, where a family has one size
SQUARE = {"height": SIDE, "width": SIDE}
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
CHATML = ["<|im_start|>", "<|im_end|>"]


def _tokenizer(
    eos: str,
    specials: list[str],
    words: tuple[str, ...] = WORDS,
    bos: str | None = None,
    **named: str,
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
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token=eos,
        bos_token=bos,
        extra_special_tokens=named,
    )


def _with_video(family: Any, video: str, **settings: Any) -> Any:
    """A processor that reads videos too; mmkd does not, and where torchvision is missing this part
    is left out."""
    if is_torchvision_available():
        return family(video_processor=getattr(transformers, video)(), **settings)

    def get_attributes(cls: Any) -> list[str]:
        return [name for name in family.get_attributes() if name != "video_processor"]

    rest = type(family.__name__, (family,), {"get_attributes": classmethod(get_attributes)})
    return rest(**settings)


@lru_cache
def llava(words: tuple[str, ...] = WORDS) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=SQUARE, do_center_crop=False),
        tokenizer=_tokenizer("</s>", ["</s>", "<image>"], words, image_token="<image>"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA,
    )


@lru_cache
def llava_next() -> LlavaNextProcessor:
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=_tokenizer("</s>", ["<s>", "</s>", "<image>"], bos="<s>", image_token="<image>"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_NEXT,
    )


@lru_cache
def llava_onevision() -> LlavaOnevisionProcessor:
    return _with_video(
        LlavaOnevisionProcessor,
        "LlavaOnevisionVideoProcessor",
        image_processor=LlavaOnevisionImageProcessorPil(
            size=SQUARE, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=_tokenizer(
            "<|im_end|>",
            [*CHATML, "<image>", "<video>"],
            image_token="<image>",
            video_token="<video>",
        ),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=ONEVISION,
    )


def _qwen_like(family: Any, video: str, template: str, bos: str | None = None) -> Any:
    names = [*CHATML, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    return _with_video(
        family,
        video,
        image_processor=Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 4096}
        ),
        tokenizer=_tokenizer(
            "<|im_end|>",
            [*names, *([bos] if bos else [])],
            bos=bos,
            image_token="<|image_pad|>",
            video_token="<|video_pad|>",
            vision_start_token="<|vision_start|>",
            vision_end_token="<|vision_end|>",
        ),
        chat_template=template,
    )


@lru_cache
def qwen2() -> Qwen2VLProcessor:
    return _qwen_like(Qwen2VLProcessor, "Qwen2VLVideoProcessor", QWEN)


@lru_cache
def qwen() -> Qwen2_5_VLProcessor:
    return _qwen_like(Qwen2_5_VLProcessor, "Qwen2VLVideoProcessor", QWEN)


@lru_cache
def qwen3() -> Qwen3VLProcessor:
    return _qwen_like(Qwen3VLProcessor, "Qwen3VLVideoProcessor", QWEN)


@lru_cache
def lfm3() -> Lfm3VlProcessor:
    return _qwen_like(Lfm3VlProcessor, "Qwen3VLVideoProcessor", LFM, "<|startoftext|>")


def _idefics_settings(image_processor: Any) -> dict[str, Any]:
    names = ["<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>",
             "<global-img>", "<video>"]  # fmt: skip
    return {
        "image_processor": image_processor(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
        ),
        "tokenizer": _tokenizer(
            "<end_of_utterance>",
            names,
            image_token="<image>",
            fake_image_token="<fake_token_around_image>",
            global_image_token="<global-img>",
            end_of_utterance_token="<end_of_utterance>",
        ),
        "image_seq_len": 4,
        "chat_template": SMOLVLM,
    }


@lru_cache
def smolvlm() -> Idefics3Processor:
    return Idefics3Processor(**_idefics_settings(Idefics3ImageProcessorPil))


@lru_cache
def smolvlm2() -> SmolVLMProcessor | Idefics3Processor:
    """Where torchvision or num2words is missing Idefics3's, which makes the same tokens."""
    settings = _idefics_settings(SmolVLMImageProcessorPil)
    if is_torchvision_available() and find_spec("num2words"):
        return _with_video(SmolVLMProcessor, "SmolVLMVideoProcessor", **settings)
    return Idefics3Processor(**settings)


@lru_cache
def internvl() -> InternVLProcessor:
    return _with_video(
        InternVLProcessor,
        "InternVLVideoProcessor",
        image_processor=GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=4),
        tokenizer=_tokenizer(
            "<|im_end|>",
            [*CHATML, "<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>",
            video_token="<video>",
        ),
        image_seq_length=4,
        chat_template=INTERNVL,
    )


@lru_cache
def gemma3() -> Gemma3Processor:
    return Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size=SQUARE),
        tokenizer=_tokenizer(
            "<eos>",
            ["<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>",
             "<image_soft_token>", "<end_of_image>"],
            bos="<bos>",
            boi_token="<start_of_image>",
            image_token="<image_soft_token>",
            eoi_token="<end_of_image>",
        ),
        image_seq_length=4,
        chat_template=GEMMA,
    )  # fmt: skip


@lru_cache
def paligemma() -> PaliGemmaProcessor:
    pictures = SiglipImageProcessorPil(size=SQUARE)
    pictures.image_seq_length = 16
    return PaliGemmaProcessor(
        image_processor=pictures,
        tokenizer=_tokenizer(
            "<eos>", ["<eos>", "<bos>", "<image>"], bos="<bos>", image_token="<image>"
        ),
    )


def _pixtral(merge: int) -> Any:
    """Its module reads torchvision."""
    from transformers import PixtralProcessor
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    return PixtralProcessor(
        image_processor=PixtralImageProcessorPil(
            size={"longest_edge": SIDE}, patch_size={"height": 8, "width": 8}
        ),
        tokenizer=_tokenizer(
            "</s>", ["<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"],
            bos="<s>",
        ),
        patch_size=8,
        spatial_merge_size=merge,
        chat_template=PIXTRAL,
    )  # fmt: skip


@lru_cache
def pixtral() -> Any:
    return _pixtral(1)


@lru_cache
def mistral3() -> Any:
    return _pixtral(2)


@lru_cache
def lfm2() -> Any:
    """Its images' processor is torchvision's."""
    from transformers import Lfm2VlImageProcessor, Lfm2VlProcessor

    names = ["<|startoftext|>", *CHATML, "<image>", "<|image_start|>", "<|image_end|>",
             "<|img_thumbnail|>"]  # fmt: skip
    cells = [f"<|img_row_{row}_col_{column}|>" for row in (1, 2) for column in (1, 2)]
    return Lfm2VlProcessor(
        image_processor=Lfm2VlImageProcessor(
            encoder_patch_size=8,
            tile_size=32,
            min_tiles=2,
            max_tiles=4,
            min_image_tokens=1,
            max_image_tokens=4,
        ),
        tokenizer=_tokenizer(
            "<|im_end|>", [*names, *cells], bos="<|startoftext|>", image_token="<image>"
        ),
        chat_template=LFM.replace("<|image_pad|>", "<image>"),
    )


FAMILIES = {"llava": llava, "qwen": qwen, "smolvlm": smolvlm, "gemma3": gemma3}
END = {
    "llava": "</s>",
    "qwen": "<|im_end|>",
    "smolvlm": "<end_of_utterance>",
    "gemma3": "<end_of_turn>",  # a token that its tokenizer has no name for
}
