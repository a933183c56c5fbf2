"""What addresses give away: passwords, keys and signatures; and what names a file without them."""

from __future__ import annotations

import re

# user:password@, where either may hold an unescaped @ or /; host:port is none, but s3:// has no ports.
PASSWORD = r"(?<=://)[^/\s:]*:(?!\d{1,5}(?:[/?#\s]|$))\S*@|(?<=s3://)[^/\s:]*:\S*@"
USER = re.compile(rf"{PASSWORD}|(?<=://)[^/\s]*@")
_VALUE = re.compile(r"([?&;][\w-]+=)(?:(?!::)[^&\s'\"])+")
_QUERY = re.compile(r"(https?://[^\s?#'\",]*)[?#](?:(?!::)[^\s'\",}])*")


def without_secrets(text: str) -> str:
    """The text, its URLs without users, passwords and what follows "?name=", "&name=" or ";name=": keys, signatures."""
    return _VALUE.sub(r"\1***", USER.sub("***@", text))


def without_query(text: str) -> str:
    """The text, its web addresses without what follows their path: a signed link names the same file when renewed."""
    return _QUERY.sub(r"\1", text)
