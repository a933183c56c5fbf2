"""A client of the API in plain Python."""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from email.message import Message
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class Answer(NamedTuple):
    """Status, headers and body of an answer."""

    status: int
    headers: Message
    body: bytes

    @property
    def json(self) -> Any:
        """The body, read."""
        return json.loads(self.body)


def ask(url: str, body: object = None, **headers: str) -> Answer:
    """GET, or POST of bytes or of what becomes JSON."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    sent = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, sent), timeout=120) as answer:
            return Answer(answer.status, answer.headers, answer.read())
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.headers, error.read())


def begin(url: str, body: object, **headers: str) -> Any:
    """POST of what becomes JSON; the answer, yet to be read."""
    sent = {"Content-Type": "application/json"} | headers
    return urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), sent), timeout=120)


def pixels(png: str | bytes) -> Tensor:
    """A PNG, in base64 or as it is, as an image, uint8 (H, W, channels)."""
    data = base64.b64decode(png) if isinstance(png, str) else png
    found = torch.from_numpy(np.array(Image.open(io.BytesIO(data))))
    return found[..., None] if found.ndim == 2 else found


def png_of(image: Tensor) -> str:
    """An image, uint8 (H, W, channels), as a PNG in base64."""
    out = io.BytesIO()
    Image.fromarray(image.squeeze(-1).numpy()).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()
