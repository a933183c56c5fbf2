"""Mistakes of the user, as one class: a command answers them with one message, and everything else with a traceback.

Each message says the value, the bound, the reason and the remedy. Settings stand in it in `backticks`, by the names of
their fields alone: where in a file or on a command line they are set is known to the command.
"""

from __future__ import annotations


class UserError(ValueError):
    """Something that whoever gave the settings, the data or the arguments can mend.

    Attributes:
        settings: the dataclasses whose fields the message names, where a name alone could be that of another.
        stages: what is to be made first, or made again: "autoencoder", "latents", "prior".
    """

    def __init__(self, message: str, *settings: object, stages: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.settings = settings
        self.stages = stages


class MissingError(UserError, FileNotFoundError):
    """A file that was named is not there, or one that an earlier stage is yet to make."""


class DamagedError(UserError):
    """Something stored that is not what was written: missing, unreadable, cut off, changed, or of another step.

    Attributes:
        url: of the file.
        reason: what is wrong with it: the end of a sentence that begins with its name.
    """

    def __init__(self, url: str, reason: str, stages: tuple[str, ...] = ()) -> None:
        super().__init__(f"{url!r} {reason}; bring it back, or have it made again", stages=stages)
        self.url = url
        self.reason = reason

    def __reduce__(self) -> tuple[type[DamagedError], tuple[str, str, tuple[str, ...]]]:
        return DamagedError, (self.url, self.reason, self.stages)  # from one process to another


class NonFiniteError(UserError, FloatingPointError):
    """A loss or a gradient that is not finite: of these data, with these settings."""
