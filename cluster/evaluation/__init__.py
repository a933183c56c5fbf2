"""Jobs that measure: evaluation, references, studies."""
