"""bld_core is the paper: Binary Latent Diffusion (Wang et al., CVPR 2023) in pure torch.

Two lines make images from a trained experiment, on any machine with torch:

    generator = bld_core.load("runs/demo")
    images = generator.sample(labels=[0, 1, 2], seed=7)  # uint8, (3, H, W, channels)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bld_core.generator import Generator

__all__ = ["load"]


def load(folder: str, device: str = "cpu") -> Generator:
    """Open a trained autoencoder (and prior, where there is one) as a ready generator.

    Args:
        folder: an experiment folder, or a registered copy of one; a path or any fsspec URL.
        device: where the networks run, for example "cpu" or "cuda".

    Raises:
        MissingError: the folder holds no finished autoencoder.
        UserError: prior and autoencoder do not belong together.
    """
    from bld_core.generator import load_generator

    return load_generator(folder, device)
