"""Errors with a message for the user: what is wrong, with which file or value, and what to do about it."""


class InputError(ValueError):
    """Unusable input: a setting, a file, an argument."""


class ConfigError(InputError):
    """A setting that does not exist or does not fit, custom code or weights included; the message names it."""


class DataError(InputError):
    """Unusable data; the message names the file."""


class RunError(Exception):
    """A run that cannot start or go on.

    Attributes:
        exit_code: of the command: 2, or 1 after a failed stage, or 128 + the number of the signal that stopped it.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code
