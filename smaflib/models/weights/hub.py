"""timm's own weights: from the Hugging Face hub, where they lie, announced before and checked after the download."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from smaflib.errors import ConfigError, WeightsError

FILES = ("model.safetensors", "pytorch_model.bin")
"""Of a repository of the hub: the first that it has."""


def fetch_timm_weights(backbone: str, published: Any) -> Path:
    """The file of a timm model's weights, in the cache of the hub's own library.

    Host, size and SHA-256 are printed before anything is downloaded. The checksum is compared with that of the file, of
    one in the cache too: the cache names files by it.

    Args:
        backbone: for messages.
        published: timm's description of the weights, ``timm.models.get_pretrained_cfg``.

    Raises:
        ConfigError: if the file is not in the cache and cannot be downloaded.
        WeightsError: if its content is not what its checksum says.
    """
    what = f"{backbone}: timm's weights {published.tag!r} (licence {published.license or 'unknown'})"
    if not published.hf_hub_id:
        return _fetch_release(what, backbone, published.url)
    path, checksum = _cached(published.hf_hub_id), None
    if path is None:
        try:
            path, checksum = _download(what, published.hf_hub_id)
        except Exception as error:  # the hub's library does not say which: its own, its HTTP client's, the system's
            raise _not_downloaded(backbone, error) from error
    else:
        print(f"{what}, from the cache {path}", file=sys.stderr, flush=True)
    return check_sha256(path, checksum or path.resolve().name)


def check_sha256(path: Path, checksum: str) -> Path:
    """Refuse a file that is not what its checksum says; one whose checksum is not known is taken as it is.

    Raises:
        WeightsError: naming the file.
    """
    if re.fullmatch(r"[0-9a-f]{64}", checksum):
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != checksum:
            raise WeightsError(f"{path} has the SHA-256 {found}, not {checksum}; delete the file and run again")
    return path


def _cached(repository: str) -> Path | None:
    for name in FILES:
        if isinstance(found := huggingface_hub.try_to_load_from_cache(repository, name), str):
            return Path(found)
    return None


def _download(what: str, repository: str) -> tuple[Path, str]:
    """The first of a repository's files, and the checksum that the hub gives for it."""
    for name in FILES:
        try:
            found = huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, name))
        except LocalEntryNotFoundError:  # no connection
            raise
        except (EntryNotFoundError, HfHubHTTPError):
            if name == FILES[-1]:
                raise
            continue
        host, size, checksum = urlsplit(found.location).hostname, found.size or 0, found.etag or ""
        message = f"{what}: {size / 1e6:.0f} MB from {host} ({repository}), SHA-256 {checksum}"
        print(message, file=sys.stderr, flush=True)
        return Path(huggingface_hub.hf_hub_download(repository, name)), checksum
    raise AssertionError("unreachable: the last file's error is raised")


def _fetch_release(what: str, backbone: str, url: str) -> Path:
    """A file of timm's releases, whose name ends with the first digits of its checksum."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(url).path).name)
    prefix = re.search(r"-([0-9a-f]{8,})\.", path.name)
    place = f"from {urlsplit(url).hostname}, SHA-256 {prefix[1] if prefix else 'unknown'}..."
    print(f"{what}, {place}, downloaded unless it is {path}", file=sys.stderr, flush=True)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), prefix[1] if prefix else None)
        except (OSError, RuntimeError) as error:  # RuntimeError: not the file that its checksum says
            raise _not_downloaded(backbone, error) from error
    return path


def _not_downloaded(backbone: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"the weights of {backbone} could not be downloaded ({error}); download them elsewhere and give the file as "
        "model.weights"
    )
