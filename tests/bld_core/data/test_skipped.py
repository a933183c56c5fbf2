from __future__ import annotations

import itertools

import pytest

from bld_core.data.skipped import Left, Reason, Skipped

LEFT = [Left(reason, f"{i:03d}") for i, reason in zip(range(40), itertools.cycle(Reason), strict=False)]


def account(left: list[Left], delivered: int = 0) -> Skipped:
    found = Skipped(delivered)
    found.add("a.tar", *left)
    return found


@pytest.mark.parametrize("cut", [0, 1, 7, 39, 40])
def test_the_account_of_the_whole_is_that_of_its_parts(cut: int) -> None:
    whole, parts = account(LEFT, 100), account(LEFT[:cut], 60)
    parts.merge(account(LEFT[cut:], 40))
    assert parts == whole
    assert whole.seen == 140
    assert whole.total == 40
    assert all(len(names) == min(5, whole.counts[reason]) for reason, names in whole.names.items())


def test_the_report_names_the_first_few_of_each_reason() -> None:
    found = account([Left(Reason.UNREADABLE, f"{i}") for i in range(7)], 90)
    found.add("b.tar", Left(Reason.TRUNCATED, "byte 512"))
    assert str(found) == (
        "8 of 98 samples left out: 7 unreadable image ('a.tar/0', 'a.tar/1', 'a.tar/2', 'a.tar/3', 'a.tar/4', ...), "
        "1 truncated tar ('b.tar/byte 512')"
    )
    assert str(Skipped(3)) == "0 of 3 samples left out: none"


def test_the_same_sample_seen_again_is_counted_again_and_named_once() -> None:
    found = account([LEFT[0]])
    found.merge(account([LEFT[0]]))
    assert found.total == 2
    assert found.names == {LEFT[0].reason: ["a.tar/000"]}


def test_more_than_the_limit_is_too_much() -> None:
    found = account(LEFT[:2], 98)
    found.check(0.02)
    with pytest.raises(ValueError, match=r"2 of 100 samples left out: .* allows a share of 0\.019: mend or leave out"):
        found.check(0.019)
    found.check(0.002, whole=False)  # judged as if 1,000 had been seen
    with pytest.raises(ValueError, match="2 of 100"):
        found.check(0.0019, whole=False)
    Skipped().check(0)
    account(LEFT).check(1)
