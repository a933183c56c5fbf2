"""Every form that a line of a run may have: `python -m tests.console LOG` names the lines of a log that have none."""

from __future__ import annotations

import re
import sys
from pathlib import Path

_NUMBER = r"-?[\d,.]+(e[+-]?\d+)?"
_FORMS = (
    rf"[a-z ]+  \d+/\d+  {_NUMBER}/s  (\d+h)?\d+m\d\ds left(  [\w/]+ {_NUMBER})*",  # progress
    r"(shards|autoencoder|latents|prior|samples|report): \S+",
    r"\w+: already done in \S+",
    r"Reconstruction|Health of the code|Prior and samples( \([\d,]+ of \d+ steps\))?",  # the table of figures
    rf"  \w+ +{_NUMBER}( dB| bits|%)?( +(sd|se) {_NUMBER}(, se {_NUMBER})?)?( +\S.*)?",
    rf"autoencoder: its bits are unsure, with an entropy of {_NUMBER} bits each: .*",  # after a short training
    r"next: python pipelines/\w+\.py .*",
    r"to play with it: BLD_ROOT=\S+ \S+/python pipelines/serve\.py .*",
    r"(BLD_ROOT=\S+ )?python pipelines/\w+\.py .*",  # make says what it runs
)
_FORM = re.compile("|".join(f"(?:{form})" for form in _FORMS))


def unknown(log: str) -> list[str]:
    """The lines of a run's stdout or stderr that have no known form."""
    return [line for line in log.splitlines() if not _FORM.fullmatch(line)]


if __name__ == "__main__":
    lines = unknown(Path(sys.argv[1]).read_text())
    for line in lines:
        print(f"unknown: {line}")
    sys.exit(bool(lines))
