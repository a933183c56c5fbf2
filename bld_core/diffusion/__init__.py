"""Bernoulli diffusion over bits (Section 4): schedule, process, bound, sampling."""

from bld_core.diffusion.process import calibrate, reverse_flip_probability, transition
from bld_core.diffusion.schedule import make_schedule

__all__ = ["calibrate", "make_schedule", "reverse_flip_probability", "transition"]
