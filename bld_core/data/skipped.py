"""What is left out of a data set, and why: counted by reason, with names, in an account that merges over its parts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from bld_core.errors import UserError

_NAMED = 5
_COUNTED_AS = 1000


class Reason(StrEnum):
    """Why something is left out."""

    TRUNCATED = "truncated tar"
    DAMAGED = "damaged tar"
    HOSTILE = "hostile member name"
    NO_FILE = "member that is no plain file"
    APART = "sample that is not contiguous"
    DUPLICATE = "duplicate key"
    NO_IMAGE = "sample without an image"
    BAD_LABEL = "unreadable label"
    NO_LABEL = "missing label"
    EMPTY = "empty image"
    TOO_LARGE = "image over data.max_pixels"
    UNREADABLE = "unreadable image"
    NO_FIT = "image larger than its square, which pad does not scale"
    NO_TAR = "file that is no tar file"
    VACANT = "shard without samples"


class Left(NamedTuple):
    """One thing of a shard that is left out: a sample by its key, or a piece of the tar file by its position."""

    reason: Reason
    key: str
    detail: str = ""

    @property
    def name(self) -> str:
        """The key, with what was found there where that is known."""
        return f"{self.key} ({self.detail})" if self.detail else self.key


@dataclass
class Skipped:
    """What is left out of a data set, by reason: how much, and the names of the first few. Parts merge.

    Attributes:
        seen: samples in all, those that were delivered and those that were left out.
        counts: left out, by reason.
        names: `<shard>/<key>` of the first few of them, by reason.
    """

    seen: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """How much is left out."""
        return self.counts.total()

    def add(self, shard: str, *left: Left) -> None:
        """Count what is left out of a shard."""
        for each in left:
            reason = str(each.reason)
            self.merge(Skipped(1, Counter([reason]), {reason: [f"{shard}/{each.name}"]}))

    def merge(self, other: Skipped) -> None:
        """Add another part of the data set."""
        self.seen += other.seen
        self.counts += other.counts
        for reason, names in other.names.items():
            self.names[reason] = list(dict.fromkeys([*self.names.get(reason, []), *names]))[:_NAMED]

    def too_many(self, limit: float, *, whole: bool = True) -> bool:
        """Whether the share that is left out is above `limit`, which is data.max_skipped.

        Where this is not the `whole` data set, fewer than 1,000 samples count as if they were as many.
        """
        return self.total > limit * (self.seen if whole else max(self.seen, _COUNTED_AS))

    def check(self, limit: float, *, whole: bool = True) -> None:
        """Stop where too many are left out.

        Raises:
            UserError: `too_many`; the message is the report.
        """
        if self.too_many(limit, whole=whole):
            raise UserError(f"{self}; {above(limit)}")

    def __str__(self) -> str:
        """The report, in one line."""
        reasons: list[str] = []
        for reason, count in self.counts.most_common():
            names = [repr(name) for name in self.names.get(reason, [])]
            reasons.append(f"{count} {reason} ({', '.join([*names, *(['...'] if count > len(names) else [])])})")
        return f"{self.total} of {self.seen} samples left out: {', '.join(reasons) or 'none'}"


def above(limit: float) -> str:
    """What to do about more than `limit`."""
    return f"`max_skipped` allows a share of {limit:g}: mend or leave out those shards, or allow more"
