"""The stages of the chain, a notebook each: what each depends on and what it makes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from smaflib.errors import RunError

EVERYTHING = "*"

ABLATION = "ablation/ablation.json"  # the result of smaf ablate inside a run folder


@dataclass(frozen=True)
class Stage:
    """One notebook of the chain.

    A stage declares the settings and modules that it is the first to depend on. They count for it and for all later
    stages. What no stage declares counts from the start, so a forgotten name costs time and never a result.
    """

    name: str  # the notebook's file name without its ending
    question: str  # what it answers
    depends_on: tuple[str, ...] = ()  # the stages whose artifacts it reads
    outputs: tuple[str, ...] = ()  # globs of its artifacts in the run folder; folder/** is everything below
    required_outputs: tuple[str, ...] = ()  # those that every config makes; without them the stage has failed
    extra_inputs: tuple[str, ...] = ()  # files of other commands; when one changes, the stage runs again
    settings: tuple[str, ...] = ()  # such as attention or attention.fusion; the longest name that fits decides
    settings_of_masks: tuple[str, ...] = ()  # these count, too, if self_training.refine asks for masks
    code: tuple[str, ...] = ()  # modules of the library, such as maps, or whole packages; EVERYTHING for all


STAGES: tuple[Stage, ...] = (
    Stage(
        "00_one_image_end_to_end",
        "What happens to one image on its way from a label to a mask?",
        outputs=("example/**", "figures/00_*.png"),
        code=(EVERYTHING,),
    ),
    Stage(
        "01_data",
        "What do we learn from: which images, which labels, and how large are the objects?",
        outputs=("data.json", "data/**", "figures/01_*.png"),
        required_outputs=("data.json",),
        settings=("data", "evaluation.size_limits"),
    ),
    Stage(
        "02_classifier",
        "Can a network tell what is in an image, and where is its attention?",
        depends_on=("01_data",),
        outputs=("checkpoints/teacher*.safetensors", "figures/02_*.png"),
        required_outputs=("checkpoints/teacher.safetensors",),
        settings=(
            "model",
            "classifier",
            *(f"attention.{name}" for name in "scales flip source options caa correlation".split()),
        ),
        code=("models", "processes", "training", "classifier", "cams", "sources", "reactivation"),
    ),
    Stage(
        "03_multi_scale_attention",
        "What do small and large scales find, and what does their fusion gain?",
        depends_on=("01_data", "02_classifier"),
        outputs=("cams/teacher*/**", "bg_scores/teacher.json", "figures/03_*.png"),
        required_outputs=("cams/teacher/**",),
        settings=("attention", "evaluation.thresholds"),
        code=("maps", "evaluation", "thresholds"),
    ),
    Stage(
        "04_denoise_and_reactivate",
        "What do denoising and reactivation repair?",
        depends_on=("01_data", "03_multi_scale_attention"),
        outputs=("figures/04_*.png",),
    ),
    Stage(
        "05_self_training",
        "Does a student of the fused maps find more than its teacher?",
        depends_on=("01_data", "02_classifier", "03_multi_scale_attention"),
        outputs=("checkpoints/student*.safetensors", "cams/student*/**", "figures/05_*.png"),
        required_outputs=("checkpoints/student*.safetensors", "cams/student*/**"),
        settings=("self_training",),
        settings_of_masks=tuple(f"pseudo_masks.{name}" for name in ("crf", "par", "backend", "min_part")),
        code=("self_training", "pseudo_masks", "refinement"),
    ),
    Stage(
        "06_pseudo_masks",
        "How good are the masks, and what does the dense CRF add?",
        depends_on=("01_data", "03_multi_scale_attention", "05_self_training"),
        outputs=tuple(
            "masks/** masks_compared/** bg_scores/student*.json bg_scores/teacher_masks.json figures/06_*.png".split()
        ),
        required_outputs=("masks/**",),
        settings=("pseudo_masks",),
    ),
    Stage(
        "07_segmentation",
        "Does a segmentation network trained on the pseudo masks work on new images?",
        depends_on=("01_data", "05_self_training", "06_pseudo_masks"),
        outputs=("checkpoints/segmenter*.safetensors", "masks_segmenter/**", "figures/07_*.png"),
        settings=("segmentation",),
        code=("segmentation",),
    ),
    Stage(
        "08_results",
        "What did each stage gain, for which objects?",
        depends_on=tuple(
            "01_data 02_classifier 03_multi_scale_attention 04_denoise_and_reactivate 05_self_training "
            "06_pseudo_masks 07_segmentation".split()
        ),
        outputs=("figures/08_*.png", "explorer.html"),
        extra_inputs=(ABLATION,),
        settings=("evaluation.paper_results",),
        code=("models.pretrained",),
    ),
)


def counts(kind: Literal["settings", "code"], name: str, stage: Stage, stages: Sequence[Stage] = STAGES) -> bool:
    """Whether a setting, or a module such as ``models.networks``, counts for a stage: no later stage declares it."""
    if EVERYTHING in getattr(stage, kind):
        return True
    declared = [
        (len(prefix), -number)
        for number, each in enumerate(stages)
        for prefix in getattr(each, kind)
        if f"{name}.".startswith(f"{prefix}.")
    ]
    _, first = max(declared, default=(0, 0))
    return -first <= stages.index(stage)


def stage_named(name: str, stages: Sequence[Stage] = STAGES) -> Stage:
    """Find a stage by number (``2``, ``02``), by word (``classifier``) or by its full name; RunError if none fits."""
    for stage in stages:
        number, _, word = stage.name.partition("_")
        if name.strip().lower() in (stage.name, number, number.lstrip("0") or "0", word):
            return stage
    raise RunError(f"there is no stage {name!r}; the stages are {', '.join(stage.name for stage in stages)}")
