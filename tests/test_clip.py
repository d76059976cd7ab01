"""CLIP's class maps and CAA: the same numbers as the authors' code.

``data/clip_parity.npz`` holds what their code gave for a tiny network whose weights follow from a rule. The environment
variable ``SMAF_CLIP_PARITY`` names another file of the same form.
"""

from __future__ import annotations

import math
import os
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn

from smaflib.cams import class_attention
from smaflib.config import AttentionConfig, SourceOptions
from smaflib.data.views import views_of
from smaflib.errors import ConfigError
from smaflib.sources import make_source
from smaflib.sources.caa import boxes, refine_by_affinity, transition
from smaflib.sources.clip import METHODS, ClipSource, ClipVision, stretch

PARITY = Path(os.environ.get("SMAF_CLIP_PARITY") or Path(__file__).parent / "data" / "clip_parity.npz")
IMAGES = ("i0", "i1")
NUM_CLASSES = 5


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in np.load(PARITY).items() if array.dtype.kind != "U"}


def tiny_weights() -> dict[str, Tensor]:
    """The rule by which both sides of the comparison make the same weights: key, shape and factor."""
    salt = str(np.load(PARITY)["salt"])

    def draw(key: str, *shape: int, kind: str = "randn") -> Tensor:
        source = torch.Generator().manual_seed(zlib.crc32(f"{salt}:{key}".encode()))
        drawn: Tensor = getattr(torch, kind)(shape, generator=source)
        return drawn

    width, embedding, blocks = 128, 32, range(12)
    factors: dict[str, tuple[tuple[int, ...], float]] = {
        "visual.class_embedding": ((width,), 0.5),
        "visual.positional_embedding": ((37, width), 0.5),
        "visual.conv1.weight": ((width, 3, 16, 16), 768**-0.5),
        "visual.proj": ((width, embedding), width**-0.5),
    }
    norms = ["visual.ln_pre", "visual.ln_post"]
    for block in (f"visual.transformer.resblocks.{number}" for number in blocks):
        norms += [f"{block}.ln_1", f"{block}.ln_2"]
        factors |= {
            f"{block}.attn.in_proj_weight": ((3 * width, width), 0.75 * width**-0.5),
            f"{block}.attn.out_proj.weight": ((width, width), 0.5 * width**-0.5),
            f"{block}.mlp.c_fc.weight": ((4 * width, width), width**-0.5),
            f"{block}.mlp.c_proj.weight": ((width, 4 * width), 0.5 * (4 * width) ** -0.5),
        }
        biases = {"attn.in_proj_bias": 3, "attn.out_proj.bias": 1, "mlp.c_fc.bias": 4, "mlp.c_proj.bias": 1}
        factors |= {f"{block}.{name}": ((size * width,), 0.1) for name, size in biases.items()}
    state = {key: draw(key, *shape) * factor for key, (shape, factor) in factors.items()}
    for name in state:
        if name.endswith("in_proj_weight"):
            state[name][width : 2 * width] += state[name][:width]
    for norm in norms:
        state[f"{norm}.weight"] = draw(f"{norm}.weight", width, kind="rand") * 0.5 + 0.75
        state[f"{norm}.bias"] = draw(f"{norm}.bias", width) * 0.1
    texts = {"text.classes": NUM_CLASSES, "text.background": 6}
    return state | {key: F.normalize(draw(key, rows, embedding), dim=1) for key, rows in texts.items()}


def tiny_visual() -> nn.Module:
    visual = VisionTransformer(96, 16, width=128, layers=12, heads=2, mlp_ratio=4, output_dim=32, act_layer=QuickGELU)
    weights = {name[7:]: value for name, value in tiny_weights().items() if name.startswith("visual.")}
    visual.load_state_dict(weights)
    return visual.eval()


def tiny_source(method: str = "clip-es", vision: type[ClipVision] = ClipVision) -> ClipSource:
    state = tiny_weights()
    return ClipSource(
        vision(tiny_visual()), state["text.classes"], state["text.background"], math.exp(1.5), method
    ).eval()


def as_clip_sees(source: ClipSource, image: Tensor) -> Tensor:  # (H, W, 3) -> (3, 16 h, 16 w)
    (view,) = views_of(image.permute(2, 0, 1), [1.0], source.patch)
    scale, shift = source._renormalization
    return view * scale + shift


def error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())


@pytest.mark.parametrize("name", IMAGES)
def test_clip_es_and_caa_give_the_authors_numbers(reference: dict[str, Tensor], name: str) -> None:
    source, picture = tiny_source(), reference[f"{name}_image"]
    image, numbers = as_clip_sees(source, picture), reference[f"{name}_classes"].tolist()
    size = (picture.shape[0], picture.shape[1])
    tokens, attentions, _ = source.before_last(image, "bilinear")
    assert error(source.vision.embed(image, "bilinear")[0], reference[f"{name}_x0"]) < 1e-5
    assert error(tokens, reference[f"{name}_x11"]) < 1e-5
    assert error(torch.stack(attentions[-7:]), reference[f"{name}_attn"][:-1]) < 1e-5
    probabilities = source.class_probabilities(image, numbers)[0].detach()
    assert error(probabilities, reference[f"{name}_prob"]) < 1e-5

    maps, affinity = source(picture.permute(2, 0, 1), numbers)
    assert affinity is not None
    assert error(maps, reference[f"{name}_cam"]) < 1e-5
    enlarged = F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
    assert error(enlarged, reference[f"{name}_cam_up"]) < 1e-5
    assert error(transition(affinity), reference[f"{name}_trans"]) < 1e-5
    for threshold in (0.4, 0.7):
        inside = torch.stack([boxes(cam, threshold) for cam in maps])
        assert torch.equal(inside, reference[f"{name}_boxes_{threshold}"].bool())
        refined = refine_by_affinity(maps, affinity, threshold)
        assert error(refined, reference[f"{name}_refined_{threshold}"]) < 1e-5


@pytest.mark.parametrize("name", IMAGES)
def test_masks_of_the_refined_maps_are_the_authors(reference: dict[str, Tensor], name: str) -> None:
    picture, numbers = reference[f"{name}_image"].permute(2, 0, 1), reference[f"{name}_classes"].tolist()
    maps, affinity = tiny_source()(picture, numbers)
    assert affinity is not None
    refined = torch.stack([stretch(each) for each in refine_by_affinity(maps, affinity, 0.4)])
    refined = F.interpolate(refined[None], list(picture.shape[1:]), mode="bilinear", align_corners=False)[0]
    assert error(refined, reference[f"{name}_refined_up_0.4"]) < 1e-5
    for power in (1, 2):  # the authors' background score, in 16 bits
        background = (1 - refined.half().amax(dim=0, keepdim=True)) ** power
        winner = torch.cat([background, refined.half()]).float().argmax(dim=0)
        labels = torch.tensor([0, *(number + 1 for number in numbers)])[winner]
        assert (labels != reference[f"{name}_labels_{power}"]).float().mean() <= 1e-3


class HalfPositions(ClipVision):
    """The original rounds fitted positions to 16 bits."""

    def positions(self, grid: tuple[int, int], mode: str) -> Tensor:
        return super().positions(grid, mode).half().float()


@pytest.mark.parametrize("name", IMAGES)
def test_with_rounded_positions_the_numbers_are_those_of_the_original(reference: dict[str, Tensor], name: str) -> None:
    source, numbers = tiny_source(vision=HalfPositions), reference[f"{name}_classes"].tolist()
    picture = reference[f"{name}_image"].permute(2, 0, 1)
    image = as_clip_sees(source, reference[f"{name}_image"])
    assert error(source.before_last(image, "bilinear")[0], reference[f"{name}_half_x11"]) < 1e-4
    maps, affinity = source(picture, numbers)
    assert affinity is not None
    assert error(refine_by_affinity(maps, affinity, 0.4), reference[f"{name}_half_refined_0.4"]) < 1e-4


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("method", METHODS)
def test_patch_logits_of_each_attention_are_the_authors(reference: dict[str, Tensor], name: str, method: str) -> None:
    source = tiny_source(method)
    image = as_clip_sees(source, reference[f"{name}_image"])
    assert error(source.before_last(image, "bicubic")[0], reference[f"{name}_e_x11"]) < 1e-5
    assert error(source.patch_logits(image)[0], reference[f"{name}_{method}"]) < 1e-5


def test_caa_of_made_up_maps_is_the_authors(reference: dict[str, Tensor]) -> None:
    maps, attention = reference["caa_cam"], reference["caa_attn"]
    assert torch.equal(torch.stack([boxes(cam, 0.4) for cam in maps]), reference["caa_boxes"].bool())
    assert error(refine_by_affinity(maps, attention, 0.4), reference["caa_refined"]) < 1e-5


def test_maps_of_a_batch_are_those_of_its_images_and_of_the_classes_asked_for() -> None:
    for method in ("clip-es", "naclip"):
        source, images = tiny_source(method), torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
        maps = class_attention(source, images, [[1, 3], []], flip=True, caa=0.4)
        assert maps.shape == (2, NUM_CLASSES, 4, 6)
        assert maps[0, [1, 3]].amax() > 0
        assert (maps[0, [0, 2, 4]] == 0).all()
        assert (maps[1] == 0).all()
        alone = class_attention(source, images[:1], [[1, 3]], flip=True, caa=0.4)
        torch.testing.assert_close(maps[:1], alone)


def test_without_open_clip_the_source_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ConfigError, match=r"pip install 'smaflib\[clip\]'"):
        make_source(AttentionConfig(source="clip-es"), ["cat"], None)


def test_open_clips_model_gives_weights_and_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for open_clip: the tiny network, and texts that tell which words were asked for."""
    asked = list[str]()

    def encode(texts: list[str], normalize: bool) -> Tensor:
        asked.extend(texts)
        return F.normalize(torch.stack([torch.full((32,), float(len(text))) for text in texts]), dim=1)

    model: Any = SimpleNamespace(visual=tiny_visual(), encode_text=encode, logit_scale=torch.tensor(4.6))
    model.eval = lambda: model
    stand_in = SimpleNamespace(
        list_pretrained=lambda: [("tiny", "openai")],
        create_model=lambda name, pretrained=None: model,
        get_tokenizer=lambda name: lambda texts: texts,
    )
    monkeypatch.setitem(sys.modules, "open_clip", stand_in)  # type: ignore[arg-type]
    options = SourceOptions(model="tiny", prompts=("a {}.", "the {}."), background_words=("grass",))
    source = make_source(AttentionConfig(source="clip-es", options=options), ["bird", "hot_dog"], None)
    assert asked == ["a bird avian.", "the bird avian.", "a hot dog.", "the hot dog.", "a grass.", "the grass."]
    assert source.supervision == "image-text pairs"
    assert source(torch.zeros(3, 64, 64, dtype=torch.uint8), [1]).maps.shape == (1, 4, 4)
