"""Jobs that draw images."""
