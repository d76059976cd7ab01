"""How jupyter_client starts the runner's kernels: of this interpreter, from the spare process where there is one.

A kernel provisioner is jupyter_client's extension point for that. It is registered by its name in the factory of this
process, so neither a checkout nor an installation needs an entry point.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning.factory import KernelProvisionerFactory
from jupyter_client.provisioning.local_provisioner import LocalProvisioner
from traitlets import Any as AnyTrait

NAME = "smaf-provisioner"
KernelProvisionerFactory.provisioners[NAME] = EntryPoint(
    NAME, f"{__name__}:Provisioner", KernelProvisionerFactory.GROUP_NAME
)
COMMAND = [sys.executable, "-m", "smaflib.runs.kernel"]


class Provisioner(LocalProvisioner):
    """Launches a kernel whose output goes to a file: in the terminal it would tear the progress bar.

    Attributes:
        spare: a function like :meth:`smaflib.runs.kernel.SpareKernel.become_kernel`, for all but the version; or None.
        output: the file.
        on_kernel: is told the process id.
    """

    spare = AnyTrait()
    output = AnyTrait()
    on_kernel = AnyTrait()

    async def launch_kernel(self, cmd: list[str], **options: Any) -> Any:
        """Turn the spare process into the kernel; without one, start a process."""
        cwd = options.get("cwd") or os.getcwd()
        process = self.spare and self.spare(cmd[len(COMMAND) :], options["env"], cwd, str(self.output))
        if process is None:
            with self.output.open("wb") as output:
                await super().launch_kernel(cmd, **options | {"stdout": output, "stderr": output})
        else:
            self.process, self.pid, self.pgid, self.cwd = process, process.pid, process.pid, cwd
        self.on_kernel(self.pid)
        return self.connection_info


def kernel_manager_class(
    folder: Path, env: Mapping[str, str], **config: Callable[..., Any] | None
) -> type[AsyncKernelManager]:
    """A manager of kernels of this very interpreter; an installed kernel called python3 may belong to another one.

    Args:
        folder: takes the kernel's sockets and its log.
        env: the kernel's environment, beside the one of this process.
        config: ``spare`` and ``on_kernel`` of the :class:`Provisioner`.
    """
    spec = KernelSpec(
        argv=[*COMMAND, "-f", "{connection_file}"],
        display_name="Python 3",
        language="python",
        env=dict(env) | {"IPYTHONDIR": str(folder / "ipython")},  # no start-up files of the user's
        metadata={"kernel_provisioner": {"provisioner_name": NAME, "config": {**config, "output": folder / "log"}}},
    )

    class ThisInterpreter(AsyncKernelManager):
        def __init__(self, **options: Any) -> None:
            # Sockets in a folder of this user's: code and outputs do not pass through ports that all can reach.
            sockets = {"transport": "ipc"} if os.name == "posix" else {}
            super().__init__(**options, **sockets, connection_file=str(folder / "kernel.json"))

        @property
        def kernel_spec(self) -> KernelSpec:
            return spec

    return ThisInterpreter
