"""What addresses must not give away: passwords, keys and signatures."""

from __future__ import annotations

import re

from bld_core.errors import UserError
from bld_core.storage.addresses import PASSWORD, USER, without_secrets

__all__ = ["check_no_password", "has_user", "without_secrets"]


def has_user(url: str) -> bool:
    """Whether a URL names a user, with or without a password."""
    return USER.search(url) is not None


def check_no_password(setting: str, url: str) -> None:
    """Passwords are no part of an address: it is stored, logged and shown.

    Args:
        setting: what is named so, for the message.
        url: a path, URL or pattern.

    Raises:
        UserError: it holds one.
    """
    if re.search(PASSWORD, url):
        raise UserError(
            f"{setting} holds a user name and a password, which would be written into logs and runs: leave them out, "
            "and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://; of a web server, give signed links"
        )
