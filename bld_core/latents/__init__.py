"""The packed data set of bits: written, opened, fed to training."""

from bld_core.latents.bits import pack_bits, unpack_bits
from bld_core.latents.reader import open_latents

__all__ = ["open_latents", "pack_bits", "unpack_bits"]
