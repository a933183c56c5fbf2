"""Mistakes of the user, as one class: a command answers them with one message, and everything else with a traceback.

Each message says the value, the bound, the reason and the remedy.
"""

from __future__ import annotations


class UserError(ValueError):
    """Something that whoever gave the settings, the data or the arguments can mend."""


class MissingError(UserError, FileNotFoundError):
    """A file that was named is not there, or one that an earlier stage is yet to make."""


class NonFiniteError(UserError, FloatingPointError):
    """A loss or a gradient that is not finite: of these data, with these settings."""
