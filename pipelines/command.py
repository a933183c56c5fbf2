"""What every command shares: its flags are the experiment's fields, its errors one line, its end the next command."""

from __future__ import annotations

import difflib
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader
from omegaconf.errors import OmegaConfBaseException

from cluster.config.experiment import Experiment
from cluster.console import user_errors_answered
from cluster.lineage import command_line
from cluster.secrets import without_secrets


class Parser(ArgumentParser):
    """A parser that names the nearest right flag where one is unknown, and lets a settings file stand on another."""

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Namespace:
        """What a settings file says, over what the file says that its own `config` names: field by field.

        The path is relative to the file that names it. Left to jsonargparse, one field of a group in the file would
        take the base's whole group away.
        """
        try:
            said = get_loader("yaml")(content)
        except yaml.YAMLError as problem:
            self.error(f"{kwargs.get('path')} is not YAML: {problem}")
        if not isinstance(said, dict) or "config" not in said:
            return super().parse_string(content, *args, **kwargs)
        how: dict[str, Any] = {"env": False, "defaults": False, "_skip_validation": True}
        base = said.pop("config")
        try:
            settings = self.parse_path(base, **how)
        except TypeError as problem:
            self.error(f"config in {kwargs.get('path')} is {base!r}: {problem}")
        return self.parse_object(said, settings, **how)

    def error(self, message: str, *args: Any, **kwargs: Any) -> NoReturn:
        unknown = re.search(r"(?:option '|arguments: -*)([\w.]+)", message)
        if unknown:
            known = {option.lstrip("-") for action in self._actions for option in action.option_strings}
            by_leaf = {name.split(".")[-1]: name for name in sorted(known)}
            near = difflib.get_close_matches(unknown[1], known, 1)
            near = near or [by_leaf[leaf] for leaf in difflib.get_close_matches(unknown[1].split(".")[-1], by_leaf, 1)]
            message += f"; the nearest is {near[0]!r}" if near else ""
        # Not as argparse does it, beneath the names of all flags.
        self.exit(2, f"error: {without_secrets(message.rstrip())} (--help lists the settings)\n")


def command(
    description: str | None,
    work: Callable[[Any, Namespace], None],
    settings: type = Experiment,
    extras: Callable[[Parser], None] = lambda made: None,
) -> None:
    """Parse the command line, do the work; a user's mistake ends in one message and exit code 2, not a traceback.

    So does storage that cannot be reached. Any other error is a fault, and keeps its traceback.

    Args:
        description: what --help says first.
        work: called with the settings and with all flags.
        settings: the dataclass whose fields are the flags.
        extras: adds flags of this command alone.
    """
    # ${...} in a configuration file refers to its other fields and to the environment.
    made = Parser(description=description, parser_mode="omegaconf+", allow_abbrev=False)
    made.add_argument(
        "--config", action="config", help="settings file; its own config names one below it, flags go above"
    )
    made.add_class_arguments(settings)
    extras(made)
    try:
        parsed = made.parse_args(_files_first(sys.argv[1:]))
    except OmegaConfBaseException as error:  # ${...} that leads nowhere
        made.error(", ".join(line.strip() for line in str(error).splitlines()[:2]))
    with user_errors_answered(parsed.as_dict(), _again()):
        flags = made.instantiate(parsed)
        work(settings(**{field.name: flags[field.name] for field in fields(settings)}), flags)


def _again() -> str:
    """The command that goes on where this one is stopped: what has been made is not to be deleted."""
    words = [word for word in sys.argv[1:] if word != "--fresh"]
    return command_line(f"pipelines/{Path(sys.argv[0]).name}", *words)


def _files_first(words: Sequence[str]) -> list[str]:
    """The words of a command line, settings files before all else: a flag goes above any file, wherever it stands."""
    found: list[str] = []
    rest: list[str] = []
    words_left = iter(words)
    for word in words_left:
        if word == "--config":
            found += [word, *itertools.islice(words_left, 1)]
        else:
            (found if word.startswith("--config=") else rest).append(word)
    return found + rest


def fresh_flag(made: Parser) -> None:
    """--fresh, for stages that would otherwise resume or say that they are done."""
    made.add_argument("--fresh", action="store_true", help="start over: delete what this stage made before")


def mend_flags(made: Parser) -> None:
    """--verify and --mend, for stages whose results are kept."""
    made.add_argument(
        "--verify", action="store_true", help="make nothing: read all that was made, and name what differs"
    )
    made.add_argument("--mend", action="store_true", help="read all that was made, and make again what is damaged")


def start_flag(made: Parser) -> None:
    """--start_from, for the two trainings."""
    made.add_argument(
        "--start_from",
        default="",
        help="folder of a shorter training with the same settings, such as the best of a sweep's: its last checkpoint "
        "that this training would come by, too, is the first of this one",
    )


def next_command(script: str, *more: str) -> None:
    """Say which command follows."""
    print(f"next: {following(script, *more)}")


def following(script: str, *more: str) -> str:
    """A command with those flags of this one that it knows too, the experiment's, and `more`.

    It goes into logs: signatures of links in it are for the user to fill in.
    """
    kept: list[str] = []
    words = iter(sys.argv[1:])
    for word in words:
        if word in ("--fresh", "--mend"):
            continue
        if not word.startswith("--"):  # what a sweep is of
            continue
        value = [] if "=" in word else [*itertools.islice(words, 1)]
        if not word.startswith(("--grid.", "--finetune", "--start_from", "--sweep.")):
            kept += [word, *value]
    return command_line(f"pipelines/{script}", *kept, *more)
