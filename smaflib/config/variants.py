"""What is evaluated, by name: the rows of every table of results, and what ``evaluation.paper_results`` may name."""

from __future__ import annotations

from enum import StrEnum


class Variant(StrEnum):
    """A kind of map or mask. The value is what files hold and never changes; the label is what people read."""

    label: str

    def __new__(cls, value: str, label: str) -> Variant:
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
    UNREFINED_MASKS = "unrefined_masks", "student, fused, before the CRF"
    PSEUDO_MASKS = "pseudo_masks", "pseudo masks (student, fused + CRF)"
    CONTROL_FUSED_REFINED = "control_fused_refined", "control student, fused + CRF"
    SEGMENTATION = "segmentation", "segmentation network"
    FULL_SUPERVISION = "full_supervision", "segmentation network, full supervision"


def variant_label(name: str, fusion: str | None = None) -> str:
    """What people read: a variant's label, with the fusion rule in brackets where there is one."""
    known = {variant.value: variant.label for variant in Variant}
    return known.get(name, name) + (f" ({fusion})" if fusion else "")
