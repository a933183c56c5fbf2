"""The training loop of both stages, what it changes, and how that is saved."""
