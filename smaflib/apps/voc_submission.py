"""Predictions for VOC's evaluation server, which alone knows the masks of the test images."""

from __future__ import annotations

import functools
import io
import zipfile
from pathlib import Path

from PIL import Image

from smaflib.data.masks import VOC_PALETTE
from smaflib.data.sample import SampleFiles, Samples
from smaflib.data.voc import read_sample
from smaflib.errors import ConfigError, DataError
from smaflib.files import display_path, is_plain_name, replacing
from smaflib.runs import Run
from smaflib.segmentation import segment_many

SERVER_FOLDER = "results/VOC2012/Segmentation/{competition}_test_cls"
"""What the server reads. comp6: methods that have learned from anything but the test images, such as ImageNet."""


def write_submission(run: Run, image_ids: list[str], images: Path, target: Path, competition: str = "comp6") -> int:
    """Segment images that have no labels into the zip that VOC's server takes.

    Args:
        run: a finished run on VOC.
        image_ids: names without ending, as in ``ImageSets/Segmentation/test.txt``.
        images: the folder of ``<image_id>.jpg``.
        target: the zip, written all or nothing.
        competition: ``comp6``, or ``comp5`` for methods that have learned from VOC's own images only.

    Returns:
        The number of masks.

    Raises:
        ConfigError: if the run has no segmentation network.
        DataError: if an image is missing or damaged.
    """
    if odd := [image_id for image_id in image_ids if not is_plain_name(image_id)]:
        raise DataError(
            f"the list of images holds {odd[0][:100]!r}, which is no plain file name; name images without folder"
        )
    missing = [image_id for image_id in image_ids if not (images / f"{image_id}.jpg").is_file()]
    if missing or not image_ids:
        first = f", the first is {missing[0]}.jpg" if missing else ": the list of images is empty"
        raise DataError(f"{len(missing)} images are missing in {images}{first}; unpack VOC 2012's test archive there")
    if not run.checkpoint("segmenter").is_file():
        raise ConfigError(f"the run {display_path(run.folder)} has no segmentation network; run it to stage 07")
    runtime = run.make_runtime()
    network = run.segmenter()
    listed = tuple(SampleFiles(image_id, images / f"{image_id}.jpg", ()) for image_id in image_ids)
    samples = Samples(listed, run.samples().class_names, "test", functools.partial(read_sample, oriented=False))
    folder = SERVER_FOLDER.format(competition=competition)
    with replacing(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        masks = segment_many(network, samples, run.config.segmentation, runtime, desc="segment the test images")
        for image_id, mask in zip(image_ids, masks, strict=True):
            picture = Image.fromarray(mask.numpy())
            picture.putpalette(VOC_PALETTE.tobytes())
            buffer = io.BytesIO()
            picture.save(buffer, "png")
            archive.writestr(f"{folder}/{image_id}.png", buffer.getvalue())
    return len(image_ids)
