"""Which settings a stage reads: found while it runs, not declared.

The runner's kernels switch this on (:mod:`smaflib.runs.kernel`), and so do processes that they start. Elsewhere
settings stay plain attributes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from smaflib.config import FREE_SETTINGS, Config, StageConfig

SETTINGS_FILE = "SMAF_SETTINGS_FILE"
"""Environment variable: a file that takes the names of the settings that are read."""

_followed: dict[int, tuple[StageConfig, set[str]]] = {}  # by id; the group itself keeps the id from being used again
_noted: set[str] = set()
_unnoted: ContextVar[bool] = ContextVar("unnoted", default=False)
_copy = StageConfig.model_copy


@contextlib.contextmanager
def recording(path: Path) -> Iterator[None]:
    """Append to a file, a line each, the settings that are read of followed configs, such as ``attention.fusion``.

    At once, because a kernel may be killed in the middle of a cell. A group that is dumped, compared or pickled for
    another process is read whole: its line names the group. A copy with changes stands for what it was copied from.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def note(setting: str) -> None:
        if setting not in _noted:
            _noted.add(setting)
            os.write(descriptor, f"{setting}\n".encode())

    def read(self: StageConfig, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if _unnoted.get():
            return value
        whole = name == "__dict__"
        if (whole or name in type(self).__pydantic_fields__) and (followed := _followed.get(id(self))):
            for group in list(followed[1]):
                setting = group if whole else f"{group}.{name}".lstrip(".")
                if isinstance(value, StageConfig):
                    follow(value, setting)
                else:
                    note(setting)
        return value

    def copy(self: StageConfig, **options: Any) -> StageConfig:
        with not_noting():
            copied = _copy(self, **options)
        for group in _followed[id(self)][1] if id(self) in _followed else ():
            follow(copied, group)
        return copied

    StageConfig.__getattribute__ = read  # type: ignore[method-assign, assignment]
    StageConfig.model_copy = copy  # type: ignore[assignment]
    try:
        yield
    finally:
        del StageConfig.__getattribute__
        StageConfig.model_copy = _copy  # type: ignore[method-assign]
        _followed.clear()
        _noted.clear()
        os.close(descriptor)


def recording_where_asked() -> contextlib.AbstractContextManager[None]:
    """:func:`recording` into the file that :data:`SETTINGS_FILE` names; nothing where it names none."""
    path = os.environ.get(SETTINGS_FILE)
    return recording(Path(path)) if path else contextlib.nullcontext()


@contextlib.contextmanager
def not_noting() -> Iterator[None]:
    """Do not count what is read inside the block: copied, handed over, or for what decides no result."""
    token = _unnoted.set(True)
    try:
        yield
    finally:
        _unnoted.reset(token)


def follow(config: StageConfig, group: str = "") -> None:
    """Count what is read of these settings as settings of the run, where it is recorded; other configs do not count."""
    if "__getattribute__" in vars(StageConfig):
        _followed.setdefault(id(config), (config, set()))[1].add(group)


def recorded_settings(path: Path, config: Config) -> dict[str, Any]:
    """The settings that :func:`recording` wrote to a file, with their values; none if there is no such file."""
    names = path.read_text(encoding="utf-8").splitlines() if path.is_file() else ()
    return settings_at(sorted(set(names)), config)


def settings_at(names: Iterable[str], config: Config) -> dict[str, Any]:
    """Settings and whole groups by name; what the config does not have, or what decides no result, is left out."""
    found, everything = {}, config.model_dump(mode="json", exclude=set(FREE_SETTINGS))
    for name in names:
        value: Any = everything
        for part in filter(None, name.split(".")):
            value = value.get(part, ...) if isinstance(value, dict) else ...
        if value is not ...:
            found[name] = value
    return found
