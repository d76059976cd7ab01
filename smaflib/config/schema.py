"""Every constant of the method: one frozen model per stage, checked before anything starts.

The defaults are the paper's setting on PASCAL VOC 2012 (source: the reference implementation, unless a comment says
otherwise). A YAML file in ``configs/`` overrides them for a data set, ``--set key=value`` for one run.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from smaflib.config.presets import CRF_PRESETS
from smaflib.config.variants import Variant
from smaflib.files import absolute
from smaflib.plugins import BACKBONE, DATA, FUSION, REFINEMENT, SOURCE, Kind, is_custom

Split = Literal["train", "val"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BgScore = Annotated[float, Field(gt=0.0, le=1.0)]  # with 0, reactivation divides pixels without any class by 0
Positive = Annotated[int, Field(gt=0, le=2**31 - 1)]
BatchSize = Annotated[int, Field(gt=0, le=65536)]
Side = Annotated[int, Field(ge=4, le=16384)]  # in pixels
Scale = Annotated[float, Field(ge=0.05, le=8)]  # of an image's size
Channels = Annotated[int, Field(ge=0, le=65536)]
Processes = Annotated[int, Field(ge=0, le=1024)]
Multiplier = Annotated[float, Field(ge=0, le=10_000)]
Reach = Annotated[float, Field(ge=0.05, le=1e5)]  # of a kernel: narrower ones leave the range of the lattice's keys
Compat = Annotated[float, Field(ge=0, le=1e5)]
Jitter = Annotated[float, Field(ge=0, le=10)]
ColorJitter = tuple[Jitter, Jitter, Jitter, Annotated[float, Field(ge=0, le=0.5)]]
"""Of brightness, contrast, saturation, hue."""
Dilation = Annotated[int, Field(gt=0, le=1000)]


# Names of the library, or code of somebody's own (smaflib/plugins.py): these types only look at how a name is written.
FusionRule = Annotated[str, AfterValidator(FUSION.check)]
MapSource = Annotated[str, AfterValidator(SOURCE.check)]
DataKind = Annotated[str, AfterValidator(DATA.check)]
RefinementName = Annotated[str, AfterValidator(REFINEMENT.check)]

NAMED_WEIGHTS = ("torchvision", "pretrained", "wheel")
"""Values of ``model.weights`` that are no file."""


FREE_SETTINGS = ("processes",)
"""Settings that decide how long a result takes and not what it is: a run may go on with other ones.

``compile``, ``tf32`` and ``deterministic`` are none of them: they change last bits, as ``precision`` changes digits.
"""


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("must be (smaller, larger)")
    return pair


Sides = Annotated[tuple[Side, Side], AfterValidator(_ordered)]
Fractions = Annotated[tuple[Fraction, Fraction], AfterValidator(_ordered)]


class StageConfig(BaseModel):
    """Base of all settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class DataConfig(StageConfig):
    """Where images and image labels come from. Masks are for evaluation only (see ``label_source``)."""

    kind: DataKind = "voc"  # mini, voc, coco, folder, or package.module:attribute
    # voc: the folder that holds JPEGImages; coco: that holds annotations/ and train2014/; mini: None makes the set in
    # the run folder
    root: Path | None = None
    images: Path | None = None  # folder: the folder of images
    labels: Path | None = None  # CSV with the columns image,labels (labels joined by ;)
    # auto: VOC's Annotations where they are, else labels.csv in data.root; masks: breaks the image-level setting, and
    # the run says so
    label_source: Literal["auto", "csv", "xml", "masks"] = "xml"
    class_names: tuple[str, ...] = ()  # () : VOC's 20, COCO's 80, the CSV's names in alphabetical order (folder)
    # voc: ImageSets/Segmentation/<name>.txt, or the path of a list that ends in .txt; coco: train2014
    train_split: str = "train"
    val_split: str = "val"
    saliency: Path | None = None  # folder of grey PNGs named like the images; needed by EPS
    masks: Path | None = None  # palette PNGs, for evaluation; None: SegmentationClass (voc), no evaluation (folder)
    max_images: Positive | None = None  # only the first so many of each split, for a quick trial
    cache: bool = False  # keep decoded images in memory; for small sets
    num_workers: Processes = 0  # loader processes
    num_train: Positive = 400  # mini: images to make
    num_val: Positive = 200
    image_size: Annotated[int, Field(ge=64, le=4096)] = 128  # mini: side in pixels

    def split_list(self, split: Split) -> Path:
        """voc: the list of a split: of the data set by its name, or any by its path, relative to the checkout."""
        name = self.train_split if split == "train" else self.val_split
        if name.endswith(".txt"):
            return absolute(name)
        assert self.root is not None  # Config has checked it
        return self.root / "ImageSets" / "Segmentation" / f"{name}.txt"


class ModelConfig(StageConfig):
    """The network that turns an image into class logit maps."""

    # "slim" (for CPUs), "resnet38", the name of a torchvision classification model, or timm/ and that of a
    # convolutional model of timm, such as timm/tf_efficientnet_lite2 or timm/resnet50.a1_in1k; or
    # package.module:attribute
    backbone: str = "resnet50"
    # None: random; "pretrained": ImageNet weights that torchvision ("torchvision" says the same) or timm downloads;
    # "wheel": those inside an installed package, for timm/tf_efficientnet_lite0 and _lite2; else a .safetensors, .pth
    # or MXNet .params file
    weights: str | None = None
    # Weights that were trained on pixel masks (of COCO, as in many DeepLab recipes) are no image-level supervision and
    # are refused unless this is true.
    allow_mask_weights: bool = False
    output_stride: Literal[8, 16, 32] = 8  # pixels per cell of the logit maps, where the backbone allows it
    head_channels: Channels = 0  # width of an extra 1x1 conv + BatchNorm + ReLU; SMAF uses 128
    freeze_backbone: bool = False  # train the head only, on standardised features: for a few dozen photos
    freeze_early: bool = False  # the first layers; resnet38: conv1a, b2, b2_1, b2_2, as in the reference
    freeze_batch_norm: bool = True  # statistics and affine parameters; pointless without pretrained weights


class TrainingConfig(StageConfig):
    """One optimisation: what is drawn, how far each step goes, for how long."""

    iterations: Positive = 20_000
    batch_size: BatchSize = 8
    crop_size: Side = 448  # side of the square crop, in pixels
    resize_range: Sides = (256, 512)  # the long side is drawn from this range, in pixels
    # True: no crops; the whole image, squashed to a square whose side is drawn from resize_range for each batch. For a
    # few dozen photos: a crop without the only object of its class is a wrong label, which a large set would forgive.
    whole_images: bool = False
    flip: bool = True
    color_jitter: ColorJitter = (0.3, 0.3, 0.3, 0.1)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Annotated[float, Field(gt=0, le=100)] = 0.01
    head_multiplier: Multiplier = 10.0  # learning rate of newly initialised layers
    bias_multiplier: Multiplier = 2.0  # learning rate of biases, which get no weight decay
    # The reference passes its weight decay in SGD's momentum slot, so its momentum is 5e-4 and not 0.9.
    momentum: Fraction = 5e-4
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 5e-4
    schedule: Literal["poly", "onecycle"] = "poly"
    poly_power: Annotated[float, Field(gt=0, le=100)] = 0.9
    # Share of the weights that the training started from in the ones that it ends with: what a short training on few
    # images gains, without all that it forgets (Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022).
    # For a network that starts as one that works: a student, a segmentation network with initial_weights: student.
    start_share: Fraction = 0.0
    checkpoint_every: Positive = 500  # iterations between two points from which a killed run resumes


class HeadSolverConfig(StageConfig):
    """The last layer computed instead of trained: a logistic regression on a frozen backbone's features."""

    # L-BFGS steps at most; it is usually done after half of them
    iterations: Annotated[int, Field(gt=0, le=1_000_000)] = 100
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.001  # penalty on the squared weights, per class

    @model_validator(mode="before")
    @classmethod
    def _is_a_group(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("it is a group of settings now: {iterations: 100, weight_decay: 0.001}, or null for none")
        return value


class ClassifierConfig(TrainingConfig):
    """Stage 1. ``eps`` adds the saliency loss of EPS (Lee et al., CVPR 2021) to the classification loss."""

    pretraining: Literal["plain", "eps"] = "plain"
    # A finished teacher, trained here, by the reference code or by EPS's: stage 1 then only loads it.
    checkpoint: Path | None = None
    # With model.freeze_backbone, plain: compute the last layer from whole images at attention.scales instead of
    # training it. For small sets: certain, and done in seconds.
    solve_head: HeadSolverConfig | None = None
    eps_tau: Fraction = 0.4  # overlap with saliency above which a labelled class counts as foreground
    eps_lambda: Fraction = 0.5  # weight of the foreground estimate against the background's


class AttentionConfig(StageConfig):
    """Stages 2 and 3: multi-scale attention, fusion, denoising, reactivation."""

    scales: tuple[Scale, ...] = Field((0.5, 1.0, 1.5, 2.0), min_length=1)
    flip: bool = True
    # How maps come from teacher and student. network: their own class logit maps; or package.module:attribute
    source: MapSource = "network"
    fusion: FusionRule = "sum"  # sum, mean, max, size_adaptive, or package.module:attribute
    # A pixel whose every class stays below this is background. auto: chosen from the teacher's maps, without any
    # ground truth (smaflib/thresholds.py).
    bg_score: BgScore | Literal["auto"] = 0.2

    @property
    def single_scale(self) -> float:
        """The scale nearest to the original size: what fusion is compared with."""
        return min(self.scales, key=lambda scale: abs(math.log(scale)))


class SelfTrainingConfig(TrainingConfig):
    """Stage 4: the student learns the frozen teacher's reactivated targets."""

    color_jitter: ColorJitter = (0.0, 0.0, 0.0, 0.0)
    rounds: Positive = 1  # in each further round the student of the last one is the teacher
    # Three steps of the targets, for ablations; the paper takes all of them.
    fused: bool = True  # targets from maps fused over all scales; false: from the single scale nearest to 1
    denoise: bool = True  # set the maps of classes without image label to zero
    reactivate: bool = True  # divide each pixel by its strongest score; false: the target is the scores themselves
    loss_weight: Annotated[float, Field(gt=0, le=1e6)] = 100.0  # L_mac = loss_weight * mean squared error
    # What makes masks of the fused maps, for the student to learn: crf, par, or package.module:attribute, with the
    # settings of pseudo_masks. none: the student learns the maps themselves, as in the paper.
    refine: RefinementName = "none"
    # soft: the reactivated maps, as in the paper; hard: 1 for the strongest class of a pixel or the background, 0 for
    # all others. What a refinement makes is a mask, and soft leaves the background its score on objects.
    targets: Literal["soft", "hard"] = "soft"
    # Share of the saliency maps in the targets, with classifier.pretraining: eps; the paper's rule is 0.
    saliency_weight: Fraction = 0.0
    fresh_head: bool = False  # the student's last layer starts from zero, not from the teacher's
    control: bool = False  # also train a student on single-scale targets, the control of the paper's claim


class CrfConfig(StageConfig):
    """Dense CRF with Gaussian edge potentials (Kraehenbuehl and Koltun, NIPS 2011)."""

    iterations: Annotated[int, Field(ge=0, le=10_000)] = 10
    # The unary term, from the pixel alone. labels: the strongest class, with gt_prob. scores: every class in proportion
    # to its score; the kernels of the reference then erase much of an object, since attention is weak on its body.
    unary: Literal["labels", "scores"] = "labels"
    gt_prob: Annotated[float, Field(gt=0, lt=1)] = 0.7  # how sure a hard label is
    sharpness: Annotated[float, Field(gt=0, le=100)] = 1.0  # scores are raised to this power
    # all: choose among all K+1 labels, as the reference; present: among background and those that the mask holds, which
    # is faster and smooths more, because what gt_prob leaves is not spread over classes that are not there.
    labels: Literal["all", "present"] = "all"
    gaussian_sxy: Reach = 3.0  # reach of the smoothness kernel, in pixels
    gaussian_compat: Compat = 3.0
    bilateral_sxy: Reach = 50.0  # reach of the appearance kernel, in pixels
    bilateral_srgb: Reach = 5.0  # and in 8-bit colour steps
    bilateral_compat: Compat = 10.0

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if not isinstance(value, str | dict):
            return value
        settings = {"preset": value} if isinstance(value, str) else dict(value)
        name = settings.pop("preset", "reference")
        if name not in CRF_PRESETS:
            raise ValueError(f"there is no CRF preset {name!r}; there are {', '.join(CRF_PRESETS)}")
        return CRF_PRESETS[name] | settings


class OwnRefinement(StageConfig):
    """Somebody's own refinement; it has no settings here.

    Attributes:
        name: ``package.module:attribute``, or of an entry point.
    """

    name: str


class ParConfig(StageConfig):
    """Pixel-adaptive refinement (Ru et al., "Learning Affinity from Attention", CVPR 2022; constants of its code).

    Each pixel's scores become a mean of its neighbours', by likeness of colour. It keeps soft scores soft; cheap on a
    GPU, several times as slow as a CRF on a CPU.
    """

    iterations: Annotated[int, Field(ge=0, le=10_000)] = 10
    dilations: tuple[Dilation, ...] = Field((1, 2, 4, 8, 12, 24), min_length=1)  # rings of eight neighbours, in pixels
    bandwidth: Annotated[float, Field(ge=1e-3, le=1e3)] = 0.3  # of likeness, in standard deviations of the neighbours
    position_weight: Annotated[float, Field(ge=0, le=1e3)] = 0.01  # of nearness, against likeness


CrfBackend = Literal["auto", "pydensecrf", "torch"]


class PseudoMaskConfig(StageConfig):
    """Stage 5: argmax over background and fused maps, then the CRF."""

    bg_score: BgScore | Literal["auto"] | None = None  # None: as for attention; auto: chosen from the student's maps
    # Share of the saliency maps in the masks, with classifier.pretraining: eps; the paper's rule is 0.
    saliency_weight: Fraction = 0.0
    refine: RefinementName = "crf"  # crf, par, none, or package.module:attribute
    crf: CrfConfig = CrfConfig()  # or the name of a preset: reference, irn, deeplab, mini, soft
    par: ParConfig = ParConfig()
    # Both give the same masks. auto: torch on a CUDA GPU; on the CPU pydensecrf, or torch where that is not installed.
    backend: CrfBackend = "auto"
    num_workers: Processes = 0  # processes on the CPU; 0: one per core

    @property
    def refinement(self) -> CrfConfig | ParConfig | OwnRefinement | None:
        """The settings of the refinement that ``refine`` names; None: no refinement."""
        if REFINEMENT.is_own(self.refine):
            return OwnRefinement(name=self.refine)
        return {"crf": self.crf, "par": self.par, "none": None}[self.refine]


class SegmentationConfig(TrainingConfig):
    """Stage 6: a segmentation network learns the pseudo masks."""

    enabled: bool = True
    crop_size: Side = 321
    resize_range: Sides = (250, 750)
    color_jitter: ColorJitter = (0.0, 0.0, 0.0, 0.0)
    learning_rate: Annotated[float, Field(gt=0, le=100)] = 2.5e-4
    momentum: Fraction = 0.9
    batch_size: BatchSize = 10
    model: ModelConfig | None = None  # its own backbone and weights; None: the ones of the classifier (model)
    architecture: Literal["deeplabv2", "deeplabv3"] = "deeplabv2"  # deeplabv3: torchvision's head
    # DeepLab-V2 as published learns at (0.5, 0.75, 1.0) and from the maximum of the three.
    loss_scales: tuple[Scale, ...] = Field((1.0,), min_length=1)
    # ground_truth: the upper bound, not image-level
    supervision: Literal["pseudo_masks", "ground_truth"] = "pseudo_masks"
    initial_weights: Literal["backbone", "student"] = "backbone"  # model.weights, or the student's own
    aspp_dilations: tuple[Dilation, ...] = Field((6, 12, 18, 24), min_length=1)
    skip_channels: Channels = 0  # width of a skip from stride 4, for small objects; 0: none
    test_scales: tuple[Scale, ...] = Field((1.0,), min_length=1)
    test_flip: bool = True
    test_crf: CrfConfig | None = None
    test_crf_backend: CrfBackend = "auto"
    test_crf_workers: Processes = 0  # processes on the CPU; 0: one per core


class EvaluationConfig(StageConfig):
    """Stage 7. Object sizes: a class's share of an image's area."""

    size_limits: Fractions = (0.04, 0.12)  # small below the first, large from the second on
    # What a stage should reach: mIoU in percent by variant, such as {pseudo_masks: 73.9}; notebook 08 compares.
    paper_results: dict[Variant, Annotated[float, Field(ge=0, le=100)]] = {}
    # background scores swept
    thresholds: tuple[Fraction, ...] = Field(tuple(round(0.05 * step, 2) for step in range(1, 17)), min_length=1)


class Config(StageConfig):
    """A whole run."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    # bf16: inside convolutions and matrix products (autocast), weights stay float32; auto: bf16 where the device has
    # circuits for it, else float32. The manifest says which it was.
    precision: Literal["auto", "float32", "bf16"] = "float32"
    # TF32 in the float32 convolutions of a CUDA GPU, torch's own default: factors are rounded to 10 bits, sums stay
    # float32. false: full float32, slower. Other numbers, from the fourth digit on; no effect on other devices.
    tf32: bool = True
    # Kernels that add up in the same order in every run (torch.use_deterministic_algorithms). On a CPU all are so
    # already: the same bytes. On a GPU some gradients, such as those of a bilinear resize, are sums in any order
    # otherwise, and a training ends with other last bits in each run; slower. cuDNN's are deterministic either way.
    deterministic: bool = False
    # Networks through torch.compile: minutes at the start of a stage, many for a training on a CPU, then less time per
    # image. Sums in another order, so other last bits. Weights are stored as without it. Needs a C++ compiler, on a GPU
    # triton and a C compiler.
    compile: bool = False
    num_threads: Annotated[int, Field(ge=0, le=4096)] = 0  # torch's CPU threads; 0: one per core
    # Processes that share the work of a stage on this machine; auto: one per GPU, and one where there is none. Each
    # holds in memory what one alone would hold.
    processes: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = "auto"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    attention: AttentionConfig = AttentionConfig()
    self_training: SelfTrainingConfig = SelfTrainingConfig()
    pseudo_masks: PseudoMaskConfig = PseudoMaskConfig()
    segmentation: SegmentationConfig = SegmentationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def target_saliency_weight(self) -> float:
        """Share of the saliency maps in the targets; 0 where the teacher is to learn from image labels alone."""
        return self._where_saliency_is_known(self.self_training.saliency_weight)

    @property
    def mask_saliency_weight(self) -> float:
        """Share of the saliency maps in the pseudo masks; 0 where the teacher is to learn from image labels alone."""
        return self._where_saliency_is_known(self.pseudo_masks.saliency_weight)

    def _where_saliency_is_known(self, weight: float) -> float:
        return weight if weight and self.classifier.pretraining == "eps" else 0.0

    @property
    def mask_bg_score(self) -> float | Literal["auto"]:
        """The background's score in the pseudo masks: their own, or where that is null, that of attention."""
        own = self.pseudo_masks.bg_score
        return self.attention.bg_score if own is None else own

    @property
    def custom_code(self) -> dict[str, str]:
        """The settings that name custom code: ``{"attention.fusion": "my_rules:softmax_sum"}``."""
        student = self.segmentation.model
        named = {
            "data.kind": self.data.kind,
            "model.backbone": self.model.backbone,
            "segmentation.model.backbone": student.backbone if student else "",
            "attention.source": self.attention.source,
            "attention.fusion": self.attention.fusion,
            "self_training.refine": self.self_training.refine,
            "pseudo_masks.refine": self.pseudo_masks.refine,
        }
        return {setting: name for setting, name in named.items() if is_custom(name)}

    @property
    def plugins(self) -> dict[str, tuple[Kind, str]]:
        """The settings that name code of somebody's own, with its kind, as that setting's, and its name."""
        models = {"model.backbone": self.model, "segmentation.model.backbone": self.segmentation.model}
        named = {setting: (BACKBONE, model.backbone) for setting, model in models.items() if model}
        named |= {
            FUSION.setting: (FUSION, self.attention.fusion),
            SOURCE.setting: (SOURCE, self.attention.source),
            DATA.setting: (DATA, self.data.kind),
            REFINEMENT.setting: (REFINEMENT, self.pseudo_masks.refine),
            "self_training.refine": (REFINEMENT, self.self_training.refine),
        }
        own = {setting: (kind, name) for setting, (kind, name) in named.items() if kind.is_own(name)}
        return {setting: (replace(kind, setting=setting), name) for setting, (kind, name) in own.items()}

    @model_validator(mode="after")
    def _stages_fit_together(self) -> Config:
        if self.classifier.solve_head is not None and not (
            self.model.freeze_backbone and self.classifier.pretraining == "plain" and not self.model.head_channels
        ):
            raise ValueError(
                "classifier.solve_head computes one linear layer from image labels: it needs "
                "model.freeze_backbone=true, model.head_channels=0 and classifier.pretraining=plain"
            )
        if self.segmentation.initial_weights == "student" and self.segmentation.model is not None:
            raise ValueError(
                "segmentation.initial_weights is 'student', but segmentation.model names a backbone of its own, which "
                "the student's weights do not fit; set one of the two"
            )
        if self.segmentation.architecture == "deeplabv3" and self.segmentation.skip_channels:
            raise ValueError("segmentation.skip_channels is for deeplabv2; set 0")
        brings_own = self.data.kind == "mini" or DATA.is_own(self.data.kind)
        if self.classifier.pretraining == "eps" and not brings_own and self.data.saliency is None:
            raise ValueError(
                "classifier.pretraining is 'eps', which learns from saliency maps, but data.saliency is not set; "
                "give the folder of saliency maps or set classifier.pretraining=plain"
            )
        if self.data.kind == "voc" and self.data.root is None:
            raise ValueError("data.root is not set; give the folder that holds JPEGImages (VOCdevkit/VOC2012)")
        if self.data.kind == "coco" and self.data.root is None:
            raise ValueError("data.root is not set; give the folder that holds annotations/ and the folders of images")
        if self.data.kind == "folder" and (self.data.images is None or self.data.labels is None):
            raise ValueError("data.images and data.labels must be set: a folder of images and a CSV image,labels")
        if self.data.label_source == "csv" and self.data.kind == "voc" and self.data.labels is None:
            raise ValueError("data.label_source is 'csv' but data.labels is not set; give the CSV image,labels")
        return self
