"""What numbers depend on besides settings and code: device, versions, commit."""

import contextlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smaflib.files import IS_CHECKOUT, PROJECT_ROOT

if TYPE_CHECKING:
    from smaflib.runtime import Runtime

PACKAGES = (
    "smaflib torch torchvision timm numpy pandas matplotlib pillow scipy safetensors pydantic "
    "pydensecrf2 papermill nbclient ipykernel"
).split()


def describe_machine(runtime: "Runtime") -> dict[str, Any]:
    """The device by name, the processor, the precision, Python, platform, commit and package versions."""
    import torch

    name = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else platform.machine()
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "device": f"{runtime.device.type} ({name})",
        # Other processors, and other instructions of one, round otherwise: their runs differ like those of two seeds.
        "cpu": f"{_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}",
        "precision": runtime.precision,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **git_state(),
        "packages": versions,
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor()  # no Linux, or a processor without a name


def git_state() -> dict[str, Any]:
    """``git_commit`` and ``git_dirty`` of the checkout; None for an installed package or without git."""

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(PROJECT_ROOT), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

    if IS_CHECKOUT:  # the working directory may belong to another project
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            # "git status" lists a notebook that was only saved with outputs, which the filter of `make setup` strips.
            changes = git("diff", "HEAD", "--shortstat") + git("ls-files", "--others", "--exclude-standard")
            return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(changes)}
    return {"git_commit": None, "git_dirty": None}
