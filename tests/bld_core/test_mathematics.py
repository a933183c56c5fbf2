"""What bld_core/README.md says is so: its links and names, the numbers of its tables, the form of its formulas."""

from __future__ import annotations

import ast
import functools
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bld_core.diffusion.process import DiffusionProcess, calibrate, reverse_flip_coefficients, reverse_flip_probability
from bld_core.diffusion.schedule import NoiseSchedule, make_schedule
from tests.bld_core.toys import (
    SCHEDULES,
    STATES,
    chain_distribution,
    conditional_distributions,
    exact_profile,
    group_toy,
    inpainting_distributions,
    oracle_change,
    oracle_evidence,
    total_variation,
    toy_distribution,
)

PAGE = Path(__file__).parents[2] / "bld_core/README.md"
TEXT = PAGE.read_text()
TOYS = [toy_distribution(seed) for seed in range(6)]
FLIPS = STATES[:, None] != STATES[None]  # (state, state, bit)


def table(first_cell: str) -> dict[str, list[str]]:
    """The table whose header begins with that cell: its rows, without the header, by their first cell."""
    lines = TEXT[TEXT.index(f"\n| {first_cell} |") + 1 :].split("\n\n", 1)[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {first: rest for first, *rest in [cells[0], *cells[2:]]}


def assert_digits(cells: list[str], values: list[float]) -> None:
    """Each cell is its value, rounded to the digits that the cell has."""
    for cell, value in zip(cells, values, strict=True):
        digits = len(cell.split(".")[1])
        assert float(cell) == round(value, digits), f"the page says {cell}, the code computes {value:.6f}"


# --- Links, names, formulas -------------------------------------------------------------------------------------------


@functools.cache
def defined(path: Path) -> set[str]:
    """The functions and classes of a file, methods as Class.method."""
    names = set[str]()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("ring", ["bld_core", "cluster"])
def test_every_link_leads_to_a_file_and_every_name_stands_in_it(ring: str) -> None:
    page = PAGE.parents[1] / ring / "README.md"
    text = page.read_text()
    headings = {
        re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.M)
    }
    links = re.findall(r"\[([^\]]+)\]\(([^)]+)\)", text)
    assert len(links) > 10
    for words, target in links:
        if target.startswith("#"):
            assert target[1:] in headings, f"{target} is no heading of {page}"
            continue
        path = (page.parent / target).resolve()
        assert path.is_file(), f"{page} links to {target}, which does not exist"
        if words.startswith("`"):
            assert words.strip("`") in defined(path), f"{page}: {target} has no {words}"
        else:
            assert words in (path.name, ring, path.parent.name), f"{page} calls {target} {words}"


def test_every_section_names_a_function_and_a_test() -> None:
    sections = re.split(r"^## (?=\d)", TEXT, flags=re.M)[1:]
    assert [section[0] for section in sections] == list("12345678")
    for section in sections:
        targets = re.findall(r"\]\(([^)]+\.py)\)", section)
        assert {target.startswith("../tests/") for target in targets} == {False, True}, section.splitlines()[0]


def test_formulas_have_the_form_that_github_renders() -> None:
    lines = re.sub(r"```.*?```", "", TEXT, flags=re.S).splitlines()
    bars = [number for number, line in enumerate(lines) if line == "$$"]
    formulas = list[str]()
    for start, end in zip(bars[::2], bars[1::2], strict=True):
        assert lines[start - 1] == lines[end + 1] == "", f"no empty line around {lines[start + 1]}"
        formulas.append("\n".join(lines[start + 1 : end]))
        lines[start : end + 1] = [""] * (end + 1 - start)
    for line in lines:
        plain = re.sub(r"`[^`]*`", "code", line)
        inline = re.findall(r"(?<![\w$])\$([^\s$](?:[^$]*[^\s$])?)\$(?!\w)", plain)
        assert plain.count("$") == 2 * len(inline), f"a formula that is not closed or stands too close: {line}"
        formulas += inline
    for formula in formulas:
        # Markdown takes a backslash before punctuation away; * and | and < mean something to it.
        assert not re.search(r"\\[^A-Za-z]|[*|<>~`]|\\operatorname", formula), formula
        assert formula.count("{") == formula.count("}")
        assert len(re.findall(r"\\left\b", formula)) == len(re.findall(r"\\right\b", formula))
    assert len(formulas) > 200


# --- The tables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedules_are_those_of_the_page(name: str) -> None:
    rows = table("schedule")
    ts = [int(cell.removeprefix("t = ")) for cell in rows["schedule"][1:]]
    assert_digits(rows[name][1:], make_schedule(name, 64).k[torch.tensor(ts)].tolist())


def test_the_offset_of_calibration_is_that_of_the_page() -> None:
    rows, k = table("t"), make_schedule("linear", 64).k
    zero = torch.zeros((), dtype=torch.float64)
    offsets = [float(calibrate(zero, k[int(t)])) for t in rows["t"]]
    assert_digits(rows["offset"], offsets)
    assert offsets[:-1] == pytest.approx([-2 * math.atanh(k[int(t)]) for t in rows["t"][:-1]], rel=1e-12)


def test_a_and_b_are_those_of_the_page() -> None:
    rows, k = table("s, t"), make_schedule("linear", 64).k.tolist()
    pairs = [(int(s), int(t)) for s, t in (cell.split(", ") for cell in rows["s, t"])]
    found = [reverse_flip_coefficients(k[s], k[t]) for s, t in pairs]
    assert_digits(rows["A"], [float(a) for a, _ in found])
    assert_digits(rows["B"], [float(b) for _, b in found])
    for (a, b), (s, t) in zip(found, pairs, strict=True):
        assert a - b == pytest.approx((1 - k[t] / k[s]) * (k[s] + k[t]) / (1 - k[t] ** 2), rel=1e-12)


def by_ratio(one: Tensor, k_s: float, k_t: float, k: float, b: float) -> Tensor:
    """P(z_s != z_t) by the form of Eq. 10: q(z_t | z_s) (k P(z_0) + b), normalised; `one` is the P(z_0 = 1) put in."""
    beta = 1 - k_t / k_s
    for_one = ((1 - beta) * STATES + beta / 2) * (k * one + b)
    for_zero = ((1 - beta) * (1 - STATES) + beta / 2) * (k * (1 - one) + b)
    return torch.where(STATES == 1, for_zero, for_one) / (for_one + for_zero)


def probability_of_one(r: Tensor) -> Tensor:
    return torch.where(STATES == 1, 1 - r, r)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_second_derivation_gives_the_same_step(name: str) -> None:
    k, p = make_schedule(name, 64).k.tolist(), TOYS[0]
    for s, t in ((0, 1), (0, 40), (31, 32), (5, 50), (63, 64), (20, 64)):
        evidence = oracle_evidence(p, k[t])
        from_others = probability_of_one(torch.sigmoid(evidence))
        second = by_ratio(from_others, k[s], k[t], k[s], (1 - k[s]) / 2)
        first = reverse_flip_probability(torch.sigmoid(calibrate(evidence, k[t])), k[s], k[t])
        torch.testing.assert_close(second, first, rtol=0, atol=1e-12)
        torch.testing.assert_close(first, oracle_change(p, k[s], k[t]), rtol=0, atol=1e-12)  # by counting


def other_chains(p: Tensor, schedule: NoiseSchedule) -> list[Tensor]:
    """Where three inexact chains end: the last step thresholds r; plug-in; Eq. 10 as printed."""
    k = schedule.k.tolist()
    ends = [torch.full((8,), 1 / 8, dtype=torch.float64)] * 3
    for t in range(schedule.steps, 0, -1):
        k_s, k_t = k[t - 1], k[t]
        r = torch.sigmoid(calibrate(oracle_evidence(p, k_t), k_t))
        one = probability_of_one(r)
        changes = [
            reverse_flip_probability(r, k_s, k_t) if t > 1 else (r > 0.5).double(),
            by_ratio(one, k_s, k_t, k_s, (1 - k_s) / 2),
            by_ratio(one, k_s, k_t, k_t, (1 - k_t) / 2 / 2),
        ]
        ends = [
            now @ torch.where(FLIPS, change[:, None], 1 - change[:, None]).prod(-1)
            for now, change in zip(ends, changes, strict=True)
        ]
    return ends


def test_the_errors_of_four_reverse_steps_are_those_of_the_page() -> None:
    rows = table("reverse step")
    steps = [int(cell.removeprefix("T = ")) for cell in rows.pop("reverse step")]
    errors = torch.zeros(4, len(steps), dtype=torch.float64)
    for column, count in enumerate(steps):
        schedule = make_schedule("linear", count)
        for p in TOYS:
            ends = [
                chain_distribution(p, DiffusionProcess(schedule, "flip"), schedule.grid(count)),
                *other_chains(p, schedule),
            ]
            errors[:, column] += torch.tensor([total_variation(end, p) / len(TOYS) for end in ends])
    for cells, values in zip(rows.values(), errors.tolist(), strict=True):
        assert_digits(cells, values)


def test_the_errors_of_inpainting_are_those_of_the_page() -> None:
    lines = re.findall(r"^\| (replacement, R = (\d+)|conditioned) \| (\d+) \| (\S+) \|$", TEXT, re.M)
    assert len(lines) == 7
    for _, jumps, steps, error in lines:
        schedule = make_schedule("linear", int(steps))
        differences = [
            inpainting_distributions(p, schedule, int(jumps) if jumps else None) - conditional_distributions(p)
            for p in TOYS
        ]
        assert_digits([error], [float((torch.stack(differences).abs().sum(-1) / 2).mean())])


# --- The bound --------------------------------------------------------------------------------------------------------


def entropy(p: Tensor) -> Tensor:
    """In bits, over the last dimension."""
    return -torch.xlogy(p, p).sum(-1) / math.log(2)


def test_the_bounds_of_grids_are_those_of_the_page() -> None:
    rows, schedule = table("steps"), make_schedule("linear", 256)
    *counts, last = rows["steps"]
    assert last == "entropy"
    bounds = [
        sum(float(exact_profile(p, schedule, schedule.grid(int(count))).sum()) for p in TOYS) / len(TOYS)
        for count in counts
    ]
    assert_digits(rows["bound"], [*bounds, sum(float(entropy(p)) / 3 for p in TOYS) / len(TOYS)])


def law(k_s: float, k_t: float) -> Tensor:
    """q(z_t | z_s) of every pair of states: (z_s, z_t)."""
    differs = torch.tensor((1 - k_t / k_s) / 2, dtype=torch.float64)
    return torch.where(FLIPS, differs, 1 - differs).prod(-1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_a_bound_adds_to_the_entropy_is_the_total_correlation_of_its_steps(name: str) -> None:
    schedule, p = make_schedule(name, 32), TOYS[4]
    k = schedule.k.tolist()
    for grid in (schedule.grid(32), schedule.grid(5), [32, 0]):
        correlation = 0.0
        for t, s in itertools.pairwise(grid):
            joint = (p @ law(1.0, k[s]))[:, None] * law(k[s], k[t])  # (z_s, z_t)
            of_t = joint.sum(0)
            given = (joint / of_t).T  # (z_t, z_s)
            ones = given @ STATES  # (z_t, bit)
            bits = entropy(torch.stack([ones, 1 - ones], -1)).sum(-1)
            correlation += float((of_t * (bits - entropy(given))).sum())
        bound = float(exact_profile(p, schedule, grid).sum())
        assert bound == pytest.approx((float(entropy(p)) + correlation) / 3, rel=1e-9)
        assert correlation > 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_stop_between_two_levels_lowers_the_bound_by_what_the_page_says(name: str) -> None:
    schedule, p = make_schedule(name, 32), TOYS[0]
    s, u, t = 5, 14, 23
    k_s, k_u, k_t = (float(schedule.k[level]) for level in (s, u, t))
    chain = p[:, None, None, None] * law(1.0, k_s)[:, :, None, None] * law(k_s, k_u)[:, :, None] * law(k_u, k_t)
    joint = chain.reshape((2,) * 12)  # bits 0, 1, 2 of z_0, then those of z_s, z_u, z_t

    def information(x: set[int], y: set[int], given: set[int]) -> float:
        def joint_entropy(kept: set[int]) -> float:
            return float(entropy(joint.sum(tuple({*range(12)} - kept)).flatten()))

        return sum(joint_entropy(known | given) * sign for known, sign in ((x, 1), (y, 1), (x | y, -1), (set(), -1)))

    gain = 0.0
    for bit in range(3):
        others_u, others_t = {6, 7, 8} - {6 + bit}, {9, 10, 11} - {9 + bit}
        beside_noisy = information({bit}, others_u, others_t | {6 + bit})
        beside_clean = information({bit}, others_u, others_t | {3 + bit})
        assert beside_noisy > beside_clean > 0
        gain += beside_noisy - beside_clean
    direct, stopping = (float(exact_profile(p, schedule, grid).sum()) for grid in ([32, t, s, 0], [32, t, u, s, 0]))
    assert direct - stopping == pytest.approx(gain / 3, rel=1e-6)


# --- Groups -----------------------------------------------------------------------------------------------------------


def test_the_bounds_and_errors_of_groups_are_those_of_the_page() -> None:
    rows = table("groups")
    *counts, last = rows.pop("groups")
    assert last == "entropy"
    assert list(rows) == [f"{name}, $g = {g}$" for name in ("bound", "total variation") for g in (1, 2)]
    for g in (1, 2):
        toys = [group_toy(seed, g, 64) for seed in range(6)]
        grids = [toys[0].process.schedule.grid(int(cell.split()[0])) for cell in counts]
        bounds = [sum(toy.bound(grid) for toy in toys) / 6 for grid in grids]
        errors = [sum(total_variation(toy.chain(grid), toy.p) for toy in toys) / 6 for grid in grids]
        assert_digits(rows[f"bound, $g = {g}$"], [*bounds, sum(float(entropy(toy.p)) / 4 for toy in toys) / 6])
        assert_digits(rows[f"total variation, $g = {g}$"], [*errors, 0.0])


def test_what_groups_save_is_the_total_correlation_within_them() -> None:
    one, two = (group_toy(3, g, 16) for g in (1, 2))
    k = one.process.schedule.k.tolist()
    for grid in ([16, 0], [16, 9, 4, 0], one.process.schedule.grid(16)):
        saved = 0.0
        for t, s in itertools.pairwise(grid):
            to_s, to_t = (one.q(a, b).flatten(2).prod(-1) for a, b in ((1.0, k[s]), (k[s], k[t])))
            joint = to_t * (to_s @ one.p)  # (z_t, z_s)
            given = (joint / joint.sum(1, keepdim=True)).view(16, 4, 4)  # (z_t, values of the two groups of z_s)
            for of_group in (given.sum(2), given.sum(1)):
                ones = torch.stack([of_group[:, [2, 3]].sum(1), of_group[:, [1, 3]].sum(1)], -1)  # (z_t, bit)
                of_bits = entropy(torch.stack([ones, 1 - ones], -1)).sum(-1)
                saved += float((joint.sum(1) * (of_bits - entropy(of_group))).sum())
        assert one.bound(grid) - two.bound(grid) == pytest.approx(saved / 4, rel=1e-9)
        assert saved > 0
