"""One experiment = one file: what every stage reads."""
