"""Image shards: tar files, samples, images; what is left out of them, and why."""
