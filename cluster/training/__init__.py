"""Ray Train and Ray Tune around the core loop."""
