"""What a person sees of a command: progress, tables, and the one message that answers a mistake."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NoReturn

import tqdm

from bld_core.errors import DamagedError, MissingError, UserError
from bld_core.storage.files import full
from cluster.secrets import without_secrets

_SECONDS_BETWEEN_LINES = 5.0
COMMANDS = {
    "autoencoder": "stage1_ae.py",
    "decoder": "stage1_ae.py --finetune decoder",
    "latents": "encode_latents.py",
    "prior": "stage2_prior.py",
    "samples": "sample.py",
    "evaluation": "evaluate.py",
    "classifier": "evaluate.py",
    "study": "study.py",
    "reference": "reference.py",
}
"""The command of each stage."""
MENDED = ("autoencoder", "decoder", "latents", "prior")
"""The stages whose commands know --mend."""


def on_terminal() -> bool:
    """Whether a person watches this process."""
    return sys.stderr.isatty() and not os.environ.get("CI")


@contextlib.contextmanager
def user_errors_answered(settings: Mapping[str, Any], again: str) -> Generator[None]:
    """A mistake of the user ends the command with one message and exit code 2; anything else keeps its traceback.

    SIGTERM, and Ctrl-C, end it as its errors do, step by step, with exit code 143, or 130.

    Args:
        settings: the command's, those of a section as a mapping.
        again: the command line that goes on where this one is stopped.
    """
    terminated = list[int]()

    def stop(number: int, _: object) -> NoReturn:
        """As Ctrl-C does: Ray turns any other exception of a handler into one of its own."""
        signal.signal(number, signal.SIG_IGN)  # who asks again, asks for what is under way
        terminated.append(number)
        raise KeyboardInterrupt

    handles = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if handles else None
    try:
        yield
    except UserError as error:
        print(f"error: {without_secrets(_told(error, settings))}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if (problem := full(error)) is None:
            raise
        print(f"error: {without_secrets(str(problem))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        number = signal.SIGTERM if terminated else signal.SIGINT
        print(f"stopped by {number.name}; this goes on where it was: {again}", file=sys.stderr)
        sys.exit(128 + number)
    finally:
        if handles and not terminated:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _told(error: UserError, settings: Mapping[str, Any]) -> str:
    """The message of an error, with its settings as the command knows them, and the commands that are its remedy."""
    sections: dict[str, dict[str, Any]] = {name: part for name, part in settings.items() if isinstance(part, dict)}
    meant: list[dict[str, Any]] = [vars(each) for each in error.settings]
    kinds = [each.keys() for each in meant]

    def flag(name: re.Match[str]) -> str:
        owners = [section for section, part in sections.items() if name[1] in part]
        exact = [section for section in owners if sections[section] in meant]  # of two that have the same fields
        alike = [section for section in owners if sections[section].keys() in kinds]
        owners = exact[:1] or alike or owners
        return f"{owners[0]}.{name[1]}" if len(owners) == 1 else name[1]

    message = re.sub(r"`(\w+)`", flag, str(error))
    commands = [f"pipelines/{COMMANDS[stage]}{_how(error, stage)}" for stage in error.stages if stage in COMMANDS]
    return f"{message}: {', then '.join(commands)}" if commands else message


def _how(error: UserError, stage: str) -> str:
    """The flag by which a stage's command mends an error."""
    if isinstance(error, MissingError):
        return ""
    return " --mend" if isinstance(error, DamagedError) and stage in MENDED else " --fresh"


class Progress:
    """Counts up to `total` and says so: a bar on a terminal, one plain line a while in a job log; rate and time left.

    Args:
        label: what is being done.
        total: units of work in all.
        start: units done by an earlier, interrupted run; they do not count towards the rate.
        bar: a tqdm class for a terminal, None for plain lines; by default as the terminal is.
    """

    def __init__(self, label: str, total: int, start: int = 0, bar: type | None = tqdm.tqdm) -> None:
        self.label, self.total, self.start = label, total, start
        self._began = self._spoke = time.monotonic()
        use_bar = bar is not None and (bar is not tqdm.tqdm or on_terminal())
        self._bar = bar(total=total, desc=label) if use_bar and bar is not None else None
        if self._bar is not None:
            self._bar.update(start)
        self._done = start

    def update(self, done: int, metrics: Mapping[str, float] | None = None) -> None:
        """Say that `done` units are done; `metrics` are shown beside them."""
        shown = "  ".join(f"{name} {value:.4g}" for name, value in (metrics or {}).items())
        if self._bar is not None:
            self._bar.update(done - self._done)
            if shown:
                self._bar.set_description(f"{self.label}  {shown}")
        self._done = done
        now = time.monotonic()
        due = now - self._spoke >= _SECONDS_BETWEEN_LINES or done == self.total
        if self._bar is None and due:
            self._spoke = now
            rate = (done - self.start) / max(now - self._began, 1e-9)
            left = (self.total - done) / max(rate, 1e-9)
            line = f"{self.label}  {done}/{self.total}  {rate:.3g}/s  {_duration(left)} left  {shown}"
            sys.stderr.write(line.rstrip() + "\n")  # not print, which Ray Train would repeat in its own log
            sys.stderr.flush()

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """The cells of a table as lines of text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
