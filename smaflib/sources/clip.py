"""CLIP's vision transformer as a source: class maps from pairs of images and texts, without training.

``clip-es`` takes gradients of a class's probability (Lin et al., "CLIP is Also an Efficient Segmenter", CVPR 2023).
The others change the attention of the last block and compare patches with texts: ``maskclip`` (Zhou et al., ECCV 2022),
``sclip`` (Wang et al., ECCV 2024), ``clearclip`` (Lan et al., ECCV 2024), ``naclip`` (Hajimiri et al., WACV 2025).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smaflib.config import AttentionConfig, SourceOptions
from smaflib.data.transforms import renormalization
from smaflib.errors import ConfigError
from smaflib.files import PROJECT_ROOT, expanded
from smaflib.models.weights import fill, read_weights
from smaflib.sources import Attention, AttentionSource, Classes
from smaflib.sources.caa import AFFINITY_BLOCKS

MODEL = "ViT-B-16-quickgelu"  # open_clip's name of OpenAI's ViT-B/16
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
EPSILON = 1e-7
NEIGHBOURHOOD = 5.0  # standard deviation, in patches, of the Gaussian that NACLIP adds to the attention

Weighting = Callable[[Tensor, Tensor, tuple[int, int]], Tensor]
"""Queries and keys, (heads, L, d) each, and the grid (h, w) to attention weights (heads or 1, L, L)."""


def similar(left: Tensor, right: Tensor) -> Tensor:
    """Attention of tokens to tokens, (heads, L, d) each to (heads, L, L)."""
    return (left @ right.mT / math.sqrt(left.shape[-1])).softmax(dim=-1)


def _neighbours(query: Tensor, key: Tensor, grid: tuple[int, int]) -> Tensor:
    rows, cols = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in grid), indexing="ij")
    places = torch.stack([rows.flatten(), cols.flatten()], dim=1)  # (hw, 2)
    bonus = torch.exp(-torch.cdist(places, places).square() / (2 * NEIGHBOURHOOD**2))
    bonus = F.pad(bonus, (1, 0, 1, 0)).to(key.device)  # none for the class token
    return (key @ key.mT / math.sqrt(key.shape[-1]) + bonus).softmax(dim=-1)


METHODS: dict[str, tuple[Weighting, bool, float]] = {
    "maskclip": (lambda q, k, grid: torch.eye(q.shape[1], device=q.device)[None], False, 40.0),
    "sclip": (lambda q, k, grid: similar(q, q) + similar(k, k), True, 65.0),
    "clearclip": (lambda q, k, grid: similar(q, q), False, 50.0),
    "naclip": (_neighbours, False, 40.0),
}
"""Per method the attention of the last block, whether its residual paths stay, and the factor of its cosines.

The factors are those of the published code: 40 in NACLIP's, 65 in SCLIP's, 50 in ClearCLIP's. MaskCLIP's has none for
this use; its 40 is NACLIP's.
"""


class ClipVision(nn.Module):
    """CLIP's vision transformer, ``visual`` of open_clip's models, block by block, on images of any size."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual.requires_grad_(False)
        self.blocks, self.patch = visual.transformer.resblocks, visual.conv1.kernel_size[0]

    def positions(self, grid: tuple[int, int], mode: str) -> Tensor:
        """Position embeddings, (1 + hw, width), fitted to the grid, the class token's first."""
        embedding = self.visual.positional_embedding
        first, places = embedding.split([1, len(embedding) - 1])
        side = math.isqrt(len(places))
        if grid != (side, side):
            known = places.T.reshape(1, -1, side, side)
            if mode == "bilinear":
                known = F.interpolate(known, size=grid, mode=mode, align_corners=False)
            else:
                factors = [(cells + 0.1) / side for cells in grid]
                known = F.interpolate(known, scale_factor=factors, mode=mode, recompute_scale_factor=False)
            places = known[0].flatten(1).T
        return torch.cat([first, places])

    def embed(self, image: Tensor, mode: str) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (L, width) of an image, (3, H, W), before the first block, the class token first; the grid (h, w).

        ``mode``: how positions are fitted to the grid; ``bicubic`` by a factor of (h + 0.1) / g, as in DINO's code.
        """
        patches = self.visual.conv1(image[None])[0]
        grid = (patches.shape[1], patches.shape[2])
        tokens = torch.cat([self.visual.class_embedding[None], patches.flatten(1).T])
        return self.visual.ln_pre(tokens + self.positions(grid, mode)), grid

    def heads(self, normed: Tensor, block: int) -> Tensor:  # (L, width) -> queries, keys, values (3, heads, L, d)
        attention = self.blocks[block].attn
        joined = F.linear(normed, attention.in_proj_weight, attention.in_proj_bias)
        return joined.view(len(normed), 3, attention.num_heads, -1).permute(1, 2, 0, 3)

    def mix(self, weights: Tensor, values: Tensor, block: int) -> Tensor:  # (heads, L, L), (heads, L, d) -> (L, width)
        mixed: Tensor = self.blocks[block].attn.out_proj((weights @ values).transpose(0, 1).flatten(1))
        return mixed

    def add_mlp(self, tokens: Tensor, block: int) -> Tensor:
        layer = self.blocks[block]
        return tokens + layer.mlp(layer.ln_2(tokens))

    def run(self, tokens: Tensor, block: int, normed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A block: tokens (L, width) to the next ones, and its attention (L, L), the mean over heads.

        ``normed``: what ``ln_1`` made of the tokens, so that gradients with respect to it can be taken.
        """
        query, key, value = self.heads(self.blocks[block].ln_1(tokens) if normed is None else normed, block)
        weights = similar(query, key)
        return self.add_mlp(tokens + self.mix(weights, value, block), block), weights.mean(dim=0)

    def project(self, tokens: Tensor) -> Tensor:  # (L, width) -> (L, embedding)
        projected: Tensor = self.visual.ln_post(tokens) @ self.visual.proj
        return projected


class ClipSource(AttentionSource):
    """Class maps of CLIP by one of its methods.

    Args:
        classes: (K, D) text embeddings of the classes, each of length 1.
        background: (M, D) those of the background words.
        logit_scale: factor of cosines in CLIP's softmax, near 100.
        method: ``clip-es`` or one of :data:`METHODS`.
    """

    supervision = "image-text pairs"
    needs_classes = True
    texts: Tensor
    background: Tensor

    def __init__(
        self, vision: ClipVision, classes: Tensor, background: Tensor, logit_scale: float, method: str = "clip-es"
    ) -> None:
        super().__init__()
        self.vision, self.logit_scale, self.method, self.patch = vision, logit_scale, method, vision.patch
        self.needs_gradients = method == "clip-es"
        self.register_buffer("texts", classes.float())
        self.register_buffer("background", background.float())
        self._renormalization = renormalization(MEAN, STD)

    def attend(self, images: Tensor, classes: Classes) -> Attention:
        scale, shift = (each.to(images.device) for each in self._renormalization)
        maps = images.new_zeros(len(images), len(self.texts), *(side // self.patch for side in images.shape[2:]))
        maps_of, affinities = self.gradient_maps if self.method == "clip-es" else self.patch_maps, []
        for image, numbers, whole in zip(images * scale + shift, classes, maps, strict=True):
            whole[[*numbers]], affinity = maps_of(image, [*numbers])
            affinities.append(affinity)
        return Attention(maps, torch.stack(affinities))

    @torch.no_grad()
    def before_last(self, image: Tensor, mode: str) -> tuple[Tensor, list[Tensor], tuple[int, int]]:
        """Tokens (L, width) that enter the last block, the attention (L, L) of each block before it, the grid."""
        tokens, grid = self.vision.embed(image, mode)
        attentions = []
        for block in range(len(self.vision.blocks) - 1):
            tokens, attention = self.vision.run(tokens, block)
            attentions.append(attention)
        return tokens, attentions, grid

    def gradient_maps(self, image: Tensor, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """Grad-CAM of the probabilities of k classes: (3, H, W) to (k, h, w) in [0, 1], and the affinity (hw, hw)."""
        probabilities, normed, affinity, grid = self.class_probabilities(image, numbers)
        maps = image.new_zeros(len(numbers), *grid)
        for row in range(len(numbers)):
            (gradient,) = torch.autograd.grad(probabilities[row], normed, retain_graph=True)
            raw = (normed[1:] @ gradient[1:].mean(dim=0)).relu().detach()
            maps[row] = stretch(stretch(raw)).view(grid)  # twice, as the original does
        return maps, affinity

    def class_probabilities(self, image: Tensor, numbers: list[int]) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        """Probabilities (k + M,), the normalised tokens (L, width) that they depend on, affinity (hw, hw), grid."""
        tokens, attentions, grid = self.before_last(image, "bilinear")
        normed = self.vision.blocks[-1].ln_1(tokens).requires_grad_()
        with torch.enable_grad():
            tokens, attention = self.vision.run(tokens, -1, normed)
            feature = self.vision.project(tokens[1:]).mean(dim=0)
            texts = torch.cat([self.texts[numbers], self.background])
            probabilities = (self.logit_scale * texts @ F.normalize(feature, dim=0)).softmax(dim=0)
        return probabilities, normed, _affinity([*attentions, attention.detach()]), grid

    def patch_maps(self, image: Tensor, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """Probability of each class at each patch, among the classes of the image and the background words."""
        logits, affinity = self.patch_logits(image)
        words = [*numbers, *range(len(self.texts), logits.shape[-1])]
        shares = (METHODS[self.method][2] * logits[..., words]).softmax(dim=-1)
        return shares[..., : len(numbers)].permute(2, 0, 1), affinity

    @torch.no_grad()
    def patch_logits(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines (h, w, K + M) of patches and words under the method's attention; the affinity (hw, hw)."""
        weighting, whole, _ = METHODS[self.method]
        entering, attentions, grid = self.before_last(image, "bicubic")
        query, key, value = self.vision.heads(self.vision.blocks[-1].ln_1(entering), -1)
        tokens = self.vision.mix(weighting(query, key, grid), value, -1)
        if whole:
            tokens = self.vision.add_mlp(entering + tokens, -1)
        features = F.normalize(self.vision.project(tokens)[1:], dim=-1)
        logits = features @ torch.cat([self.texts, self.background]).T
        return logits.view(*grid, -1), _affinity([*attentions, similar(query, key).mean(dim=0)])


def stretch(values: Tensor) -> Tensor:
    """Bring the values of a map to the range from 0 to 1; a map of zeros stays zero."""
    values = values - values.amin()
    return values / (values.amax() + EPSILON)


def _affinity(attentions: list[Tensor]) -> Tensor:
    """The mean of the last blocks' attention, L x L each, without the class token: (hw, hw)."""
    return torch.stack(attentions[-AFFINITY_BLOCKS:]).mean(dim=0)[1:, 1:]


def make(attention: AttentionConfig, class_names: Sequence[str], network: nn.Module | None) -> ClipSource:
    """Build a source with open_clip: its vision transformer, and texts of classes and background words."""
    options = attention.options
    model, tokenize = _open_clip(options)
    words = [options.class_words.get(name, name.replace("_", " ")) for name in class_names]
    with torch.no_grad():
        classes, background = (_texts(model, tokenize, each, options) for each in (words, options.background_words))
        factor = float(model.logit_scale.exp())
    return ClipSource(ClipVision(model.visual), classes, background, factor, attention.source)


def _open_clip(options: SourceOptions) -> tuple[Any, Any]:
    """open_clip's model with its weights, and its tokenizer."""
    try:
        import open_clip
    except ImportError:
        raise ConfigError("CLIP needs the package open_clip; run: pip install 'smaflib[clip]'") from None
    name, weights = options.model or MODEL, options.weights or "openai"
    names = {tag for model, tag in open_clip.list_pretrained() if model == name}
    if weights in names:
        model = open_clip.create_model(name, pretrained=weights)
    else:
        model = open_clip.create_model(name)
        fill(model, read_weights(PROJECT_ROOT / expanded(weights)), weights, name)
    return model.eval(), open_clip.get_tokenizer(name)


def _texts(model: Any, tokenize: Any, words: Sequence[str], options: SourceOptions) -> Tensor:
    """A text embedding of each word, (N, D) of length 1: the mean over prompts."""
    rows = []
    for word in words:
        embeddings = model.encode_text(tokenize([prompt.format(word) for prompt in options.prompts]), normalize=True)
        rows.append(F.normalize(embeddings.mean(dim=0), dim=0))
    return torch.stack(rows) if rows else torch.zeros(0, model.text_projection.shape[1])
