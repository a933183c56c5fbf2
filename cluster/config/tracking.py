"""MLflow's settings; they are read where mlflow itself is not imported."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from bld_core.errors import UserError
from bld_core.storage import files
from cluster.evaluation.config import lower_is_better
from cluster.secrets import has_user

# What MLflow can keep runs in: a server by HTTP, Databricks, or a database.
_TRACKING_URI = re.compile(
    r"https?://(?:\[[\da-f:.]+\]|[^\s/:?#\[\]]+)(?::\d+)?(?:/.*)?|databricks(?:://.+)?"
    r"|(?:sqlite|postgresql|mysql|mssql)(?:\+\w+)?://.*[^/].*",
    re.DOTALL,
)


CHAMPION = "champion"
"""Registry alias of the best version: it moves by a rule."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow.

    Args:
        uri: tracking server, for example http://mlflow:5000; empty keeps a SQLite file, mlflow.db, in `root`, which is
            enough for one machine. Credentials belong in the MLFLOW_TRACKING_* variables, never here.
        patience: seconds that a command waits for an MLflow that was there and is away, at the start and the end of a
            stage. A server or database that has never answered is not waited for.
        when_away: what a stage does when MLflow is away, or its database full, in the middle. `keep`: goes on; what is
            to be logged waits in files of the stage's folder, and is logged later, also by the next start of the same
            command. `stop`: waits for `patience` seconds, then stops.
        experiment: MLflow experiment that holds the runs; empty takes the name of this experiment.
        model: name in the model registry; empty takes the name of this experiment.
        alias: registry alias that `register.py` moves to the version that it makes; not `champion`, which moves by the
            rule of the next three.
        champion_figure: metric of evaluation/report.json by which a version becomes `champion`. The bound compares
            priors on the same latents; across autoencoders or latents take a metric of images.
        champion_lower: the lower metric is the better one.
        champion_margin: by how much, in the metric's own unit, a version must be better than the champion to follow it.
    """

    uri: str = ""
    patience: float = 480.0
    when_away: Literal["keep", "stop"] = "keep"
    experiment: str = ""
    model: str = ""
    alias: str = "latest-trained"
    champion_figure: str = "bound"
    champion_lower: bool = True
    champion_margin: float = 0.001

    def __post_init__(self) -> None:
        if has_user(self.uri):
            raise UserError(
                "tracking.uri holds a user name or a password, which would be written into logs and runs: leave it out "
                "and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            )
        if self.uri and not _TRACKING_URI.fullmatch(self.uri):
            raise UserError(
                f"tracking.uri is {self.uri!r}; it must be an MLflow server, for example http://mlflow:5000, or a "
                "database by sqlite:///, postgresql://, mysql:// or mssql://: MLflow keeps no runs elsewhere, folders "
                "included; leave it out for a SQLite file in root"
            )
        if not re.fullmatch(r"[^/:]*", self.model):
            raise UserError(f"tracking.model is {self.model!r}; MLflow allows neither / nor : in it: choose another")
        if self.alias.lower() == CHAMPION:
            raise UserError(
                f"tracking.alias is {self.alias!r}, which moves only by the rule of tracking.champion_figure and "
                "tracking.champion_margin, and by itself when you register: choose another name, or leave it out"
            )
        if not re.fullmatch(r"[\w-]+", self.alias) or re.fullmatch(r"latest|v\d+", self.alias, re.IGNORECASE):
            raise UserError(
                f"tracking.alias is {self.alias!r}; MLflow wants letters, digits, _ and -, and keeps latest and "
                "v<number> for itself: choose another name, for example latest-trained"
            )
        if not self.patience >= 0:
            raise UserError(f"tracking.patience is {self.patience}; it must be 0 seconds or more")
        lower = lower_is_better(self.champion_figure)
        if lower is not None and lower != self.champion_lower:
            raise UserError(
                f"tracking.champion_figure is {self.champion_figure}, of which the {'lower' if lower else 'higher'} is "
                f"the better, but tracking.champion_lower is {str(self.champion_lower).lower()}, so that the worst "
                f"version would be champion: set it to {str(lower).lower()}"
            )
        if not self.champion_margin >= 0:
            raise UserError(f"tracking.champion_margin is {self.champion_margin}; it must be 0 or more")

    def resolve(self, root: str) -> str:
        """The tracking URI for an experiment root.

        Raises:
            UserError: no server for a root on object storage.
        """
        if self.uri:
            return self.uri
        if not files.is_local(root):
            raise UserError(
                f"root {root!r} is not a local folder, and SQLite needs one: set tracking.uri to an MLflow server"
            )
        return _sqlite(f"{files.absolute(root)}/mlflow.db")


def _sqlite(path: str) -> str:
    """The URI of a database file: the path as it is, or with what means something else in a URI (%, ?, #) escaped."""
    if not any(sign in path for sign in "%?#"):
        return f"sqlite:///{path}"
    from sqlalchemy.engine import URL, make_url

    uri = URL.create("sqlite", database=path).render_as_string()
    if make_url(uri).database != path:  # before SQLAlchemy 2.1
        raise UserError(
            f"root {path.rpartition('/')[0]!r} holds %, ? or #, which the installed SQLAlchemy cannot have in the name "
            "of a database: choose another root, set tracking.uri, or install SQLAlchemy 2.1"
        )
    return uri
