"""pipelines is the order of work: each command is one call into cluster."""
