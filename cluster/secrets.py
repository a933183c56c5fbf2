"""What addresses must not give away: passwords, keys and signatures."""

from __future__ import annotations

import re

from bld_core.errors import UserError

# user:password@, where either may hold an unescaped @ or /; host:port is none, but s3:// has no ports.
_PASSWORD = r"(?<=://)[^/\s:]*:(?!\d{1,5}(?:[/?#\s]|$))\S*@|(?<=s3://)[^/\s:]*:\S*@"
_USER = re.compile(rf"{_PASSWORD}|(?<=://)[^/\s]*@")


def has_user(url: str) -> bool:
    """Whether a URL names a user, with or without a password."""
    return _USER.search(url) is not None


def check_no_password(setting: str, url: str) -> None:
    """Passwords are no part of an address: it is stored, logged and shown.

    Args:
        setting: what is named so, for the message.
        url: a path, URL or pattern.

    Raises:
        UserError: it holds one.
    """
    if re.search(_PASSWORD, url):
        raise UserError(
            f"{setting} holds a user name and a password, which would be written into logs and runs: leave them out, "
            "and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://; of a web server, give signed links"
        )


def without_secrets(text: str) -> str:
    """The text, its URLs without users, passwords and what follows "?name=", "&name=" or ";name=": keys, signatures."""
    return re.sub(r"([?&;][\w-]+=)[^&\s'\"]+", r"\1***", _USER.sub("***@", text))
