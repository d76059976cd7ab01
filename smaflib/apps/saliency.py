"""Saliency maps of photos from U2-Net or IS-Net, which the package rembg runs."""

from pathlib import Path
from typing import Any

from PIL import Image

from smaflib.data.labels import IMAGE_ENDINGS
from smaflib.data.voc import find_images, list_files, read_image
from smaflib.errors import ConfigError, DataError
from smaflib.files import save_image
from smaflib.runtime import progress

MODELS = ("u2net", "isnet-general-use")  # some others of rembg send photos to a server


def write_saliency(images: Path, out: Path, model: str) -> int:
    """Write a grey PNG per photo, as large as the upright photo, unless it is there; returns the number of photos.

    ``model`` is one of :data:`MODELS`, whose weights rembg downloads once, or an ONNX file of such a network.
    ConfigError if rembg or the weights are missing, DataError if a photo cannot be read or two would share a map.
    """
    paths = list_files(images, IMAGE_ENDINGS, "name a folder of photos", below=True)
    names = [path.relative_to(images).as_posix() for path in paths if path.parent != out]
    if not names:
        raise DataError(f"{images} holds no photo outside of the folder of the maps, {out}")
    photos = {out / f"{name}.png": path for name, path in find_images(names, images, "", "take another folder").items()}
    missing = {target: path for target, path in photos.items() if not target.is_file()}
    session: Any = open_session(model) if missing else None
    for target, path in progress(missing.items(), len(missing), "saliency"):
        photo = Image.fromarray(read_image(path, oriented=True).permute(1, 2, 0).numpy())
        save_image(target, session.predict(photo)[0].convert("L"))
    return len(photos)


def open_session(model: str) -> Any:
    """A session of rembg for a model; ConfigError as above."""
    try:
        import onnxruntime
        import rembg.sessions
    except ImportError as error:
        raise ConfigError('smaf saliency needs the package rembg: pip install "smaflib[saliency]"') from error
    try:
        if model in MODELS:
            return rembg.new_session(model)
        # rembg itself takes files of one folder only
        (given,) = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).get_inputs()
        kind = rembg.sessions.sessions[MODELS[given.shape[-1] == 1024]]  # IS-Net's side in pixels; U2-Net's is 320
        of_file = type("Session", (kind,), {"download_models": classmethod(lambda *args, **options: model)})
        return of_file(model, onnxruntime.SessionOptions())
    except Exception as error:  # of requests, pooch, onnxruntime
        cure = f"name {' or '.join(MODELS)}, which are downloaded, or an ONNX file"
        raise ConfigError(f"--model {model} cannot be used: {error}; {cure}") from error
