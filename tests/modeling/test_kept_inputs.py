"""A decoder on some of its tokens equals the whole decoder with the other tokens masked out."""

from dataclasses import replace

import pytest
import torch

from mmkd.errors import CheckpointError, RecipeError
from mmkd.modeling.capture import capture
from mmkd.modeling.capture_request import CaptureRequest
from mmkd.modeling.kept_inputs import FAMILIES, check_kept_inputs
from mmkd.ops import KeptTokens
from mmkd.recipe import MambaConfig
from mmkd.runtime.seeds import set_seed
from mmkd.students import convert
from mmkd_models.mixer import Mamba2Mixer
from mmkd_models.parts import find_parts
from scripts.families.bench import Workbench
from tests.support import families
from tests.support.zoo import ZOO

LENGTHS = [12, 11, 5]
DROPPED = [[0, 2], [], [1]]  # of the image tokens of each row: the first row gets padding


def double(inputs):
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def kept_of(inputs, image_token, dropped):
    keep = inputs["attention_mask"].bool()
    for row, numbers in enumerate(dropped):
        keep[row, (inputs["input_ids"][row] == image_token).nonzero()[numbers, 0]] = False
    return KeptTokens.of(keep), keep


def masked_out(keep):
    """A hook that hides tokens from all attention of a decoder."""

    def hide(mask):
        if isinstance(mask, dict):
            return {kind: hide(one) for kind, one in mask.items()}
        if mask.ndim == 2:
            return mask * keep
        lowest = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return mask.masked_fill(~keep[:, None, None, :], lowest)

    return lambda module, args, kw: (args, {**kw, "attention_mask": hide(kw["attention_mask"])})


def run(model, inputs, request, weights, select):
    """Kept hidden states, and the gradients of a weighted sum of them."""
    model.zero_grad()
    signals = capture(model, inputs, request)
    hidden = select(signals.hidden)
    (hidden * weights).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return hidden.detach(), gradients, signals


def compare(model, inputs, image_token, dropped, *, exact=True):
    model.double()
    kept, keep = kept_of(inputs, image_token, dropped)
    inputs = double(inputs)
    generator = torch.Generator().manual_seed(3)
    width = model.config.get_text_config().hidden_size
    weights = torch.randn(int(keep.sum()), width, generator=generator, dtype=torch.float64)
    layers = [i for i, x in enumerate(find_parts(model).decoder_layers) if hasattr(x, "self_attn")]
    request = CaptureRequest(frozenset(layers[:1]))
    short = run(model, inputs, replace(request, kept=kept), weights, lambda h: h[kept.real])
    hook = find_parts(model).decoder.register_forward_pre_hook(masked_out(keep), with_kwargs=True)
    whole = run(model, inputs, request, weights, lambda h: h[keep])
    hook.remove()
    assert short[2].hidden.shape[1] == kept.columns.shape[1] < keep.shape[1]
    near = {"rtol": 1e-9, "atol": 1e-9} if exact else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(short[0], whole[0], **near)
    assert short[1].keys() == whole[1].keys()
    scale = float(max(g.abs().max() for g in whole[1].values()))
    near_gradients = {"rtol": 1e-7 if exact else 1e-3, "atol": (1e-10 if exact else 1e-5) * scale}
    for name, want in whole[1].items():
        torch.testing.assert_close(short[1][name], want, **near_gradients)
    layer = short[2].layers[layers[0]].block_output[kept.real]
    torch.testing.assert_close(layer, whole[2].layers[layers[0]].block_output[keep], **near)


@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_other_tokens_are_masked_out(name):
    inputs = families.inputs(name, LENGTHS, side="right")
    compare(families.make(name), inputs, families.IMAGE_TOKEN, DROPPED)


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_vl"])
def test_eager_attention_has_masks_of_numbers(name):
    """Its softmax is in float32."""
    model = families.make(name)
    model.set_attn_implementation("eager")
    inputs = families.inputs(name, LENGTHS, side="right")
    compare(model, inputs, families.IMAGE_TOKEN, DROPPED, exact=False)


@pytest.fixture
def bench(tmp_path):
    def make(name):
        try:
            return Workbench(ZOO[name].make, ZOO[name].processor(), tmp_path)
        except ImportError as error:
            pytest.skip(" ".join(str(error).split())[:80])

    return make


@pytest.mark.parametrize("name", ["llava_next", "qwen2_vl"])
def test_further_families(name, bench):
    found = bench(name)
    encoder = found.encoder("one", "several")
    inputs = encoder.encode([0, 1]).inputs
    compare(found.make(1), inputs, encoder.processing.image_token_id, [[0, 2], [1]])


def hybrid():
    model = families.make("qwen3_vl")
    set_seed(1)  # of the mixer's new weights
    convert(model, [MambaConfig(kind="mamba", layers=[1])])
    return model


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl", "lfm3_vl", "hybrid"])
def test_recurrent_layers_see_a_shorter_sequence(name, bench):
    """As if the decoder got each row's kept tokens alone, without padding."""
    if name == "hybrid":
        model, token = hybrid().double(), families.IMAGE_TOKEN
        inputs, dropped = families.inputs("qwen3_vl", LENGTHS, side="right"), DROPPED
    else:
        found = bench(name)
        encoder = found.encoder("one", "several", "none")
        inputs, dropped = encoder.encode([0, 1, 2]).inputs, [[0, 2], [1], []]
        model, token = found.make(1).double(), encoder.processing.image_token_id
    inputs = double(inputs)
    kept, keep = kept_of(inputs, token, dropped)
    decoder, seen = find_parts(model).decoder, {}
    hook = decoder.register_forward_pre_hook(
        lambda module, args, kw: seen.update(kw), with_kwargs=True
    )
    with torch.no_grad():
        capture(model, inputs)
        hook.remove()
        short = capture(model, inputs, CaptureRequest(kept=kept)).hidden
        for mixer in (m for m in model.modules() if isinstance(m, Mamba2Mixer)):
            mixer.context.real = None
        for row in range(len(keep)):
            alone = {"inputs_embeds": seen["inputs_embeds"][row, keep[row]][None]}
            positions = seen.get("position_ids")
            if positions is None:
                positions = torch.arange(keep.shape[1]).expand(len(keep), -1)
            alone["position_ids"] = positions[..., row : row + 1, :][..., keep[row]]
            alone["attention_mask"] = torch.ones(1, int(keep[row].sum()), dtype=torch.long)
            if "visual_pos_masks" in seen:
                images = seen["visual_pos_masks"]
                alone["visual_pos_masks"] = images[row, keep[row]][None]
                here = images.nonzero()[:, 0] == row
                alone["deepstack_visual_embeds"] = [
                    x[here & keep[images]] for x in seen["deepstack_visual_embeds"]
                ]
            want = decoder(**alone, use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(short[row, kept.real[row]], want, rtol=1e-6, atol=1e-6)


def test_families_that_are_not_known_are_refused():
    model = families.make("llava")
    model.config.base_model_type = "paligemma"
    with pytest.raises(RecipeError, match="left out of models of the family paligemma"):
        check_kept_inputs(model, "student")
    assert {m.model_type for m in ZOO.values()} - {*FAMILIES} == {"paligemma", "nemotron_h_omni"}


def test_sliding_windows_are_refused():
    check_kept_inputs(families.make("gemma3"), "student")
    check_kept_inputs(families.make("mistral3"), "student")
    with pytest.raises(RecipeError, match=r"student: .* sliding-window attention"):
        check_kept_inputs(families.make("mistral3", sliding_window=8), "student")


def test_unknown_inputs_of_a_decoder_are_refused():
    model, inputs = families.make("llava"), families.inputs("llava", LENGTHS, side="right")
    kept, _ = kept_of(inputs, families.IMAGE_TOKEN, DROPPED)
    find_parts(model).decoder.register_forward_pre_hook(
        lambda module, args, kw: (args, {**kw, "depths": torch.zeros(3, 16)}), with_kwargs=True
    )
    with pytest.raises(CheckpointError, match="an input 'depths', which cannot be shortened"):
        capture(model, inputs, CaptureRequest(kept=kept))
