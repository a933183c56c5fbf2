"""What addresses give away: passwords, keys and signatures; and what names a file without them."""

from __future__ import annotations

import re

# user:password@, where either may hold an unescaped @ or /; host:port is none, but s3:// has no ports.
PASSWORD = r"(?<=://)[^/\s:]*:(?!\d{1,5}(?:[/?#\s]|$))\S*@|(?<=s3://)[^/\s:]*:\S*@"
USER = re.compile(rf"{PASSWORD}|(?<=://)[^/\s]*@")
_VALUE = re.compile(r"([?&;][\w-]+=)(?:(?!::)[^&\s'\"])+")
_TOKEN = re.compile(r"(https?://[^\s?'\"]*\?)[^\s?&=:'\"]+(?=::|[\s'\"]|$)", re.IGNORECASE)
_WEB = re.compile(r"https?://", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """The text, its URLs without users, passwords and what follows "?name=", "&name=" or ";name=": keys, signatures.

    Nor with a query that is nothing but a token.
    """
    return _TOKEN.sub(r"\1***", _VALUE.sub(r"\1***", USER.sub("***@", text)))


def without_query(pattern: str) -> str:
    """A pattern, its web addresses without what follows their path: a signed link names the same file when renewed."""
    return "::".join(_path(source) if _WEB.search(source) else source for source in pattern.split("::"))


def _path(source: str) -> str:
    """A web address, which may have braces, without its queries: each ends with the choice of the brace it is in."""
    kept, depth, cut = "", 0, -1  # cut: how many braces are open around the query, -1 outside of one
    for letter in source:
        depth += (letter == "{") - (letter == "}")
        if cut < 0 and letter in "?#":
            cut = depth
        elif depth < cut or (letter == "," and depth == cut > 0):
            cut = -1
        kept += letter if cut < 0 else ""
    return kept
