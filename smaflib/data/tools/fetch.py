"""Download PASCAL VOC 2012 from its official place, in pieces if need be, and check it."""

from __future__ import annotations

import hashlib
import tarfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets.voc import DATASET_YEAR_DICT

from smaflib.errors import DataError
from smaflib.runtime import progress

CHUNK = 1 << 20
TIMEOUT = 60  # seconds without a byte


@dataclass(frozen=True)
class Archive:
    """A file on a server: its address, and its MD5 as its publisher or torchvision states it."""

    url: str
    filename: str
    md5: str


VOC12 = Archive(*(DATASET_YEAR_DICT["2012"][name] for name in ("url", "filename", "md5")))
"""Training and validation data of VOC 2012, 2 GB. Source of address and checksum: torchvision."""


def fetch_voc12(folder: Path, archive: Archive = VOC12) -> Path:
    """Download and unpack VOC 2012, resuming where an earlier call stopped.

    Args:
        folder: takes the archive and ``VOCdevkit/VOC2012``.
        archive: which file.

    Returns:
        The folder to give as ``data.root``.

    Raises:
        DataError: if the server does not answer, or what came is not what its checksum says.
    """
    root = folder / "VOCdevkit" / "VOC2012"
    done = root / ".complete"
    if done.is_file():
        return root
    path = folder / archive.filename
    if not path.is_file():
        _download(archive, path)
    if _md5(path) != archive.md5:
        raise DataError(
            f"{path} is not the file that {archive.url} should give: its MD5 differs; delete it, fetch again"
        )
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        # Nothing outside of the folder, no links out of it. Python before 3.11.4 has no such filter: there the MD5 that
        # shows the official archive has to do.
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        for member in progress(members, total=len(members), desc="unpack"):
            tar.extract(member, folder)
    done.touch()
    return root


def _download(archive: Archive, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            if have and answer.status != 206:  # a server that cannot send the rest sends everything
                have = 0
            total = have + int(answer.headers.get("Content-Length", 0))
            with part.open("ab" if have else "wb") as file:
                chunks = iter(lambda: answer.read(CHUNK), b"")
                for chunk in progress(chunks, total=-(-total // CHUNK), desc="download (MB)", initial=have // CHUNK):
                    file.write(chunk)
            if total and part.stat().st_size != total:
                raise urllib.error.URLError(f"it stopped after {part.stat().st_size} of {total} bytes")
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: nothing is left to send
            raise DataError(_advice(archive, path, error)) from error
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise DataError(_advice(archive, path, error)) from error
    part.replace(path)


def _advice(archive: Archive, path: Path, error: Exception) -> str:
    return (
        f"{archive.url} does not answer as it should ({error}). The server is down from time to time: give the same "
        f"command again later, it resumes where it stopped. Or get {archive.filename} from somebody who has it, put it "
        f"at {path}, and give the same command: the checksum is compared either way"
    )


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
