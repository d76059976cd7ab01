"""Custom images: a folder of images and a CSV that says what each one shows."""

from __future__ import annotations

import functools
from pathlib import Path

from smaflib.config import DataConfig, Split
from smaflib.data.labels import (
    IMAGE_ENDINGS,
    LabelRow,
    check_class_names,
    class_numbers,
    nearest,
    read_label_rows,
)
from smaflib.data.sample import SampleFiles, Samples
from smaflib.data.voc import list_files, list_pngs, read_sample, require_saliency
from smaflib.errors import DataError


def load_folder(data: DataConfig, split: Split) -> Samples:
    """The images that ``data.labels`` names, in its order, nothing decoded yet; images it does not name are left out.

    All of them are the training split; ``val`` is empty. Without ``data.class_names`` the classes are the CSV's names
    in alphabetical order. Images are turned as their EXIF orientation says; a mask or a saliency map must fit the
    turned image. Once ``data.masks`` or ``data.saliency`` is set, each image needs its PNG there.

    Raises:
        DataError: naming file, line and cure, if a folder, image, mask or saliency map is missing, or the CSV does not
            fit (see :func:`smaflib.data.labels.read_label_rows`).
    """
    if data.images is None or data.labels is None:
        raise DataError("data.images and data.labels must be set: a folder of images and a CSV image,labels")
    if data.label_source == "masks":
        raise DataError(
            "data.label_source is 'masks', but data.kind 'folder' takes its labels from the CSV; use kind voc"
        )
    if data.masks and not data.class_names:
        raise DataError(
            "data.masks is set but data.class_names is empty: the values of the masks need the order of the classes; "
            "list them in data.class_names, mask value 1 first"
        )
    rows = read_label_rows(data.labels)
    class_names = data.class_names or tuple(sorted({name for row in rows for name in row.labels}))
    check_class_names(class_names)
    images = {
        path.name: path for path in list_files(data.images, IMAGE_ENDINGS, "set data.images to the folder of images")
    }
    names: dict[str, str | list[str]] = {}  # by the name without its ending; several are a list
    for name in images:
        stem = Path(name).stem
        names[stem] = name if stem not in names else [*_listed(names[stem]), name]
    masks = list_pngs(data.masks, "data.masks") if data.masks else {}
    saliency = list_pngs(data.saliency, "data.saliency") if data.saliency else {}

    files = []
    for row in rows:
        numbers = class_numbers(row.labels, class_names, f"{data.labels}, line {row.line}")
        image = _find_image(row, images, names, data.images, data.labels)
        if data.masks and image.stem not in masks:
            raise DataError(
                f"there is no mask {image.stem}.png in {data.masks}; add it, or leave data.masks empty: "
                "masks are for evaluation only"
            )
        if data.saliency:
            require_saliency([image.stem], saliency, data.saliency)
        files.append(SampleFiles(image.stem, image, numbers, saliency.get(image.stem), masks.get(image.stem)))
    chosen = tuple(files[: data.max_images]) if split == "train" else ()
    return Samples(chosen, class_names, split, functools.partial(read_sample, oriented=True), cached=data.cache)


def unlabelled_samples(images: Path, class_names: tuple[str, ...]) -> Samples:
    """All images of a folder, without any label: to be classified.

    Raises:
        DataError: if there is no image in the folder.
    """
    paths = list_files(images, IMAGE_ENDINGS, "name the folder of images")
    if not paths:
        raise DataError(f"there is no image in {images}; {', '.join(IMAGE_ENDINGS)} files are read")
    files = tuple(SampleFiles(path.stem, path, ()) for path in paths)
    return Samples(files, class_names, "train", functools.partial(read_sample, oriented=True))


def _listed(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else names


def _find_image(
    row: LabelRow, images: dict[str, Path], names: dict[str, str | list[str]], folder: Path, csv_path: Path
) -> Path:
    """The image of a row: by its full name, or by its name without ending where only one image has that."""
    where = f"{csv_path}, line {row.line}"
    fitting = [row.image] if row.image in images else _listed(names.get(row.image, []))
    if len(fitting) == 1:
        return images[fitting[0]]
    if fitting:
        raise DataError(f"{where}: {row.image} can be {' and '.join(fitting)} in {folder}; write the ending, too")
    if Path(row.image).name != row.image:
        raise DataError(f"{where}: {row.image!r} names a folder; give the file name only, all images lie in {folder}")
    if (folder / row.image).is_file():
        raise DataError(f"{where}: {row.image} is of a kind that is not read; save it as {' or '.join(IMAGE_ENDINGS)}")
    raise DataError(
        f"{where}: there is no image {row.image} in {folder}{nearest(row.image, [*names, *images])}; "
        "correct the name, add the image or delete the line"
    )
