"""Sweeps: many short trainings, the trials, each with other settings, compared."""
