"""Errors whose message is for the person who meets them: what was wrong, with which file or value, what to do."""


class InputError(ValueError):
    """Something from outside that cannot be used; the message is for the person who gave it."""


class ConfigError(InputError):
    """A setting that does not exist or does not fit; the message names the setting and the cure."""


class PluginError(ConfigError):
    """Code of somebody's own that a config names does not do what it must; the message names it and what is wrong.

    Attributes:
        names_image: whether the message begins with the image that was at work.
    """

    names_image = False


class DataError(InputError):
    """Data that cannot be used; the message names the file, what is wrong and the cure."""


class WeightsError(InputError):
    """Weights that do not fit the network; the message lists the keys."""


class RunError(Exception):
    """A run that cannot go on; the message says what is in the way and what helps."""

    exit_code = 2


class RunMismatch(RunError):
    """The run folder belongs to other settings."""


class MissingStage(RunError):
    """A stage was opened before the stages that it depends on."""


class StageFailed(RunError):
    """A stage ended with an error; the message names the notebook, the cell, the error and how to resume."""

    exit_code = 1


class RunStopped(RunError):
    """Ctrl-C or a signal ended the run; ``exit_code`` is 128 + the signal, as shells count it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
