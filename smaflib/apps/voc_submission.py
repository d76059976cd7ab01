"""Predictions for VOC's evaluation server, which alone knows the masks of the test images."""

import functools
import zipfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from smaflib.data.masks import VOC_PALETTE
from smaflib.data.sample import SampleFiles, Samples
from smaflib.data.voc import read_sample, require_all
from smaflib.files import replacing
from smaflib.runs import Run
from smaflib.segmentation import segment_many

SERVER_FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"
"""The folder that the server reads; comp6 allows other training images than VOC's, such as ImageNet."""


def write_submission(run: Run, image_ids: Sequence[str], images: Path, target: Path) -> None:
    """Segment VOC's test images, ``<image_id>.jpg``, into the zip that its evaluation server takes.

    A ConfigError if the run has no segmentation network, a DataError if an image is missing or damaged.
    """
    there = {path.stem for path in images.glob("*.jpg")}
    require_all(image_ids, there, f"image in {images}", "unpack VOC 2012's test archive there")
    listed = tuple(SampleFiles(image_id, images / f"{image_id}.jpg", ()) for image_id in image_ids)
    samples = Samples(listed, run.samples().class_names, "test", functools.partial(read_sample, oriented=False))
    masks = segment_many(run.segmenter(), samples, run.config.segmentation, run.make_runtime(), desc="test images")
    with replacing(target) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for image_id, mask in zip(image_ids, masks, strict=True):
            picture = Image.fromarray(mask.numpy())
            picture.putpalette(VOC_PALETTE.tobytes())
            with archive.open(f"{SERVER_FOLDER}/{image_id}.png", "w") as file:
                picture.save(file, "png")
