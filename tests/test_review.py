"""Masks of `smaf masks` in the explorer: a person's decisions go into the tables, and the next call applies them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from helpers import mask_at

from smaflib.apps.corrections import Correction, read_corrections, write_correction
from smaflib.apps.masks import make_masks, open_masks
from smaflib.apps.review import Review
from smaflib.config import load_config
from smaflib.data.masks import read_mask

TABLE = "image,labels\n0.png,red\n1.png,blue\n2.png,red\n3.png,blue\n4.png,red\n5.png,blue\n"


@pytest.fixture
def out(masks_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Finished masks as a person finds them."""
    monkeypatch.setattr("smaflib.explorer.widget.REST_SECONDS", 0)
    return masks_folder / "out"


def by_doubt(out: Path) -> list[str]:
    return list(dict.fromkeys(Path(name).stem for name in pd.read_csv(out / "masks.csv")["image"]))


def shown(review: Review) -> str:
    return str(review.gallery.samples[review.board.index].image_id)


def ids(review: Review) -> list[str]:
    return [sample.image_id for sample in review.gallery.samples]


def test_photos_come_by_doubt_and_reviewed_ones_last(out: Path) -> None:
    order, number = by_doubt(out), 2
    assert ids(Review(out)) == order
    write_correction(out, order[0])
    write_correction(out, order[number], bg_score=0.31)
    review = Review(out)
    assert ids(review) == [name for name in order if name not in (order[0], order[number])] + [order[0], order[number]]
    review._go(5)
    assert review.settings.bg_score == 0.31


def test_shown_mask_is_the_one_that_was_made(out: Path) -> None:
    review = Review(out)
    for index, name in enumerate(ids(review)):
        review._go(index)
        assert review.exploration.mask.tolist() == read_mask(out / "masks" / f"{name}.png").tolist()
    review._reset()
    assert review.controls["crf"].value


def test_photo_is_accepted_as_it_is_or_with_another_threshold(out: Path) -> None:
    review, (first, second, *_) = Review(out), by_doubt(out)
    usual = review.settings.bg_score
    review.decide("Enter")
    assert shown(review) == second and review.board.status["text"] == f"{first}: accepted; 1 of 6 reviewed"
    assert (out / "corrections.csv").read_text() == f"image,bg_score,leave_out\n{first},,\n"
    assert review.settings.bg_score == usual
    review.controls["bg_score"].value = 0.9
    review.decide("Enter")
    assert read_corrections(out) == {first: Correction(), second: Correction(bg_score=0.9)}
    assert (out.parent / "labels.csv").read_text() == TABLE
    review._go(1)  # a correction is shown again, and can be taken back
    assert review.settings.bg_score == 0.9
    review.controls["bg_score"].value = usual
    review.decide("Enter")
    assert read_corrections(out)[second] == Correction()


def test_key_counts_for_the_photo_that_was_shown_when_it_was_pressed(out: Path) -> None:
    review, (first, *_) = Review(out), by_doubt(out)
    for _ in range(2):  # the second before the next photo was there
        review.board._handle_custom_msg(["Enter", 0], [])
    assert [*read_corrections(out)] == [first] and review.board.index == 1


def test_changed_label_is_written_into_its_row_alone(out: Path) -> None:
    review = Review(out)
    review._go(ids(review).index("3"))
    review.controls["image_label"].value = ["red", "blue"]
    assert float(review.gallery.explore(review.board.index, "student", review.settings).denoised[1].max()) > 0
    review.decide("Enter")
    assert (out.parent / "labels.csv").read_text() == TABLE.replace("3.png,blue", "3.png,blue;red")
    review._go(ids(review).index("3"))
    assert review.settings.image_label == (0, 1)
    review.controls["image_label"].value = ["red"]
    review.decide("Delete")  # what is left out needs no label
    assert "3.png,blue;red\n" in (out.parent / "labels.csv").read_text()


def test_new_name_becomes_a_label_without_a_mask_until_the_networks_learn_it(out: Path) -> None:
    review = Review(out)
    review._go(ids(review).index("3"))
    chips = review.controls["image_label"]
    chips.value = ["blue", "a;b"]
    review.board._handle_custom_msg(["Enter", review.board.index], [])
    assert review.board.status["kind"] == "error" and "'a;b' is unusable" in review.board.status["text"]
    chips.value = ["blue", "amber"]  # sorted it would be the first: the numbers of the others stay
    review.decide("Enter")
    assert review.board.status["text"].endswith("a new class (amber) needs make_masks(..., retrain=True)")
    assert (out.parent / "labels.csv").read_text() == TABLE.replace("3.png,blue", "3.png,blue;amber")
    for again in (review, Review(out)):
        again._go(ids(again).index("3"))
        assert again.controls["image_label"].value == ["blue", "amber"] and again.settings.image_label == (0, 2)
        assert again.exploration.mask.tolist() == read_mask(out / "masks" / "3.png").tolist()
        assert "amber" in again.board.view["class_names"] and again.controls["image_label"].allowed_tags == []


def test_next_call_applies_all_decisions(out: Path) -> None:
    review = Review(out)

    def decide(name: str, key: str, **values: object) -> None:
        review._go(ids(review).index(name))
        for control, value in values.items():
            review.controls[control].value = value
        review.decide(key)

    before = {path.stem: read_mask(path) for path in (out / "masks").glob("*.png")}
    decide("1", "Enter", image_label=["red"])
    decide("2", "Enter", bg_score=0.95)
    decide("4", "Delete")
    decide("0", "Enter")
    make_masks(load_config(out / "config.yaml"), out)
    after = {path.stem: read_mask(path) for path in (out / "masks").glob("*.png")}
    assert after.keys() == before.keys() - {"4"}
    assert {name for name, mask in after.items() if mask.tolist() != before[name].tolist()} == {"1", "2"}
    assert set(after["1"].unique().tolist()) <= {0, 2}  # red
    assert after["2"].tolist() == mask_at(open_masks(out), "2", 0.95).tolist()
    again = Review(out)
    assert set(ids(again)) == {"0", "1", "2", "3", "5"} and set(ids(again)[:2]) == {"3", "5"}
    again.decide("Enter")
    assert again.board.status["text"].endswith("accepted; 4 of 5 reviewed")


def test_table_that_cannot_be_written_is_reported_and_the_photo_stays(out: Path) -> None:
    review = Review(out)
    (out / "corrections.csv").write_text("image\n")
    review.board._handle_custom_msg(["Enter", 0], [])
    assert review.board.status["kind"] == "error" and "the first line must name" in review.board.status["text"]
    assert review.board.index == 0
