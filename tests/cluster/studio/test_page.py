"""The page, driven in a real browser as people drive it: by mouse, by finger, by keyboard, by a link."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, Locator, Page

from cluster.studio.config import ServeConfig
from cluster.studio.pair import Pair
from tests.browser import Open, started, windows
from tests.cluster.studio.client import ask, pixels
from tests.cluster.studio.conftest import TOKEN, AppServer

pytestmark = pytest.mark.xdist_group("browser")
WANTED = "?class=3&seed=7"
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


@pytest.fixture
def address(app: AppServer) -> str:
    return f"{app.url}/"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started() as browser:
        yield browser


@pytest.fixture
def opened(browser: Browser) -> Iterator[tuple[Open, list[str]]]:
    with windows(browser) as (open_page, said):
        yield open_page, said


@pytest.fixture
def open_page(opened: tuple[Open, list[str]]) -> Iterator[Open]:
    """Opens pages on which nothing may go wrong."""
    yield opened[0]
    assert opened[1] == []


def asked(address: str, path: str, **body: Any) -> dict[str, Any]:
    """What the API says without the page."""
    return ask(address + path, body).json


def idle(page: Page, region: str) -> None:
    """Wait until a part of the page shows what was asked for."""
    page.wait_for_selector(f"#{region}[aria-busy=false]", state="attached")


def pngs(images: Locator) -> list[str]:
    """What images show, PNG in base64."""
    return [source.split(",")[1] for source in images.evaluate_all("(all) => all.map((image) => image.src)")]


def setting(page: Page, name: str) -> str:
    """A setting, as the address has it."""
    return parse_qs(urlsplit(page.url).query)[name][0]


def mask_of(page: Page) -> NDArray[np.bool_]:
    """What is made anew, as the address has it: (32, 32)."""
    text = setting(page, "mask")
    packed = np.frombuffer(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), np.uint8)
    return np.unpackbits(packed).reshape(32, 32).astype(bool)


def test_samples_appear_step_by_step_and_a_link_leads_to_the_same(address: str, open_page: Open) -> None:
    page = open_page(address + WANTED, permissions=["clipboard-read", "clipboard-write"])
    idle(page, "grid")
    images = page.locator("#grid img")
    first = pngs(images)
    settings = {"label": 3, "seed": 7, "count": 16, "steps": 4, "temperature": 0.9, "guidance": 1.0}
    assert first == [each["png"] for each in asked(address, "v1/samples", **settings)["images"]]
    page.locator("#moment").press("Home")
    assert page.locator("#moment-says").inner_text() == "coin tosses"
    assert all(now != then for now, then in zip(pngs(images), first, strict=True))
    page.locator("#moment").press("End")
    assert pngs(images) == first

    page.locator("#steps").press("ArrowRight")
    idle(page, "grid")
    page.get_by_role("button", name="Sample 6").click()
    changed = pngs(images)
    assert changed != first
    assert (setting(page, "steps"), setting(page, "chosen")) == ("5", "5")
    page.get_by_role("button", name="Copy link").click()
    page.wait_for_selector("text=Copied")
    again = open_page(page.evaluate("navigator.clipboard.readText()"))
    idle(again, "grid")
    assert pngs(again.locator("#grid img")) == changed
    assert pngs(again.locator("#chosen-image")) == [changed[5]]
    again.get_by_role("button", name="New seed").click()
    idle(again, "grid")
    assert pngs(again.locator("#grid img")) != changed
    assert again.locator("#status").inner_text().startswith("16 images drawn in ")


def test_a_mask_is_drawn_and_only_what_it_covers_is_made_anew(address: str, open_page: Open) -> None:
    page = open_page(f"{address}{WANTED}&view=complete")
    idle(page, "completions")
    page.get_by_role("button", name="Clear").click()
    idle(page, "completions")
    assert not mask_of(page).any()

    page.locator("#mask").scroll_into_view_if_needed()
    box = page.locator("#mask").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.3 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.8 * box["height"])
    page.mouse.up()
    idle(page, "completions")
    mask, images = mask_of(page), page.locator("#completions img")
    assert mask[10, 19]
    assert mask[25, 28]
    assert not mask[:, :16].any()
    outside = torch.from_numpy(~mask)
    (given,), made = pngs(page.locator("#mask-image")), pngs(images)
    assert len(set(made)) == 4
    for each in made:
        kept = (pixels(each) == pixels(given))[..., 0]
        assert kept[outside].all()
        assert not kept[~outside].all()
    again = open_page(page.url)
    idle(again, "completions")
    assert pngs(again.locator("#completions img")) == made
    page.get_by_role("button", name="Four others").click()
    idle(page, "completions")
    assert not set(pngs(images)) & set(made)


def test_a_mask_is_a_box_by_keys_and_a_dot_by_finger(address: str, open_page: Open) -> None:
    page = open_page(f"{address}{WANTED}&view=complete", **PHONE)
    idle(page, "completions")
    page.get_by_role("button", name="Clear").click()
    mask = page.locator("#mask")
    for key in ("ArrowLeft", "ArrowDown", "Shift+ArrowLeft", "Shift+ArrowUp"):
        mask.press(key)
    assert page.locator("#mask-says").inner_text() == "Box: columns 8 to 22, rows 10 to 24, of 32."
    mask.press("Enter")
    expected = np.zeros((32, 32), bool)
    expected[9:24, 7:22] = True
    assert (mask_of(page) == expected).all()
    mask.press("Backspace")
    assert not mask_of(page).any()
    mask.scroll_into_view_if_needed()
    box = mask.bounding_box()
    assert box is not None
    page.touchscreen.tap(box["x"] + box["width"] / 8, box["y"] + box["height"] / 4)
    assert mask_of(page)[8, 4]
    assert not mask_of(page)[:, 8:].any()
    idle(page, "completions")


def test_a_flipped_bit_shows_what_it_changes(address: str, open_page: Open, pair: Pair) -> None:
    page = open_page(f"{address}{WANTED}&view=code&to=8&toseed=2")
    idle(page, "decoded")
    depth = pair.model.latent.bits
    sample = asked(address, "v1/samples", label=3, seed=7, count=1)["images"][0]
    page.get_by_role("button", name="Token in row 2, column 3").click()
    page.get_by_role("button", name="Bit 4:").click()
    idle(page, "decoded")
    bits = np.unpackbits(np.frombuffer(base64.b64decode(sample["bits"]), np.uint8))
    bits[6 * depth + 3] ^= 1
    flipped = asked(address, "v1/reconstructions", bits=base64.b64encode(np.packbits(bits).tobytes()).decode())
    before, after, difference = (pngs(page.locator(f"#{name}"))[0] for name in ("before", "after", "difference"))
    assert (before, after) == (sample["png"], flipped["png"])
    apart = pixels(after).int() - pixels(before)
    assert torch.equal(pixels(difference)[..., :3], (128 + apart).clamp(0, 255).byte().expand(-1, -1, 3))
    count = f"{apart.count_nonzero():,} of 1,024 pixels changed"
    assert page.locator("#code-says").inner_text() == f"1 of {bits.size} bits flipped: {count}."

    idle(page, "strip")
    way = pngs(page.locator("#strip img"))
    assert (way[0], way[-1]) == (after, asked(address, "v1/samples", label=8, seed=2)["images"][0]["png"])
    again = open_page(page.url)
    idle(again, "decoded")
    assert pngs(again.locator("#after")) == [after]
    page.get_by_role("button", name="Flip the token").press("Enter")  # that bit is as it was, the others are not
    idle(page, "decoded")
    assert len(setting(page, "flips").split(".")) == depth - 1
    page.get_by_role("button", name="Undo all").click()
    idle(page, "decoded")
    assert pngs(page.locator("#after")) == [before]
    page.locator("#tokens [aria-pressed=true]").press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.locator("#token-title").inner_text() == "Token in row 3, column 3"


def test_an_image_of_ones_own_is_cut_and_completed_and_has_a_code(
    address: str, open_page: Open, tmp_path: Path
) -> None:
    page = open_page(f"{address}?view=complete")
    idle(page, "completions")
    (tmp_path / "notes.png").write_text("not a picture")
    page.set_input_files("#file", tmp_path / "notes.png")
    page.wait_for_selector("text=notes.png is no image that this browser can read.")
    wide = np.full((64, 200), 255, np.uint8)
    wide[:, 68:132] = 90  # the square in the middle
    Image.fromarray(wide).save(tmp_path / "wide.png")
    page.set_input_files("#file", tmp_path / "wide.png")
    page.wait_for_selector("#use-sample")
    idle(page, "completions")
    assert page.locator("#problem").is_hidden()
    (given,) = pngs(page.locator("#mask-image"))
    assert pixels(given).shape[:2] == (32, 32)
    assert (pixels(given)[..., 0] == 90).all()
    page.get_by_role("link", name="Code", exact=True).click()
    idle(page, "decoded")
    assert pngs(page.locator("#before")) == [asked(address, "v1/reconstructions", image=given)["png"]]
    page.go_back()
    page.get_by_role("button", name="Back to the sample").click()
    assert pngs(page.locator("#mask-image")) != [given]


def test_a_token_is_asked_for_and_stays_in_the_tab(pair: Pair, opened: tuple[Open, list[str]]) -> None:
    open_page, said = opened
    server = AppServer(pair, ServeConfig(batch=4), TOKEN)
    try:
        page = open_page(f"{server.url}/")
        for token in ("a guess", TOKEN):
            page.locator("#token-field").fill(token)
            page.get_by_role("button", name="Go on").click()
        idle(page, "grid")
        assert TOKEN not in page.url
        assert page.evaluate("[sessionStorage.token, localStorage.length, document.cookie]") == [TOKEN, 0, ""]
        page.reload()
        idle(page, "grid")
    finally:
        server.close()
    assert [line for line in said if "401 (Unauthorized)" not in line] == []
    said.clear()
    page.get_by_role("button", name="New seed").click()  # of a server that is no more
    page.wait_for_selector("text=The server does not answer. See whether it still runs, then ask again.")
    assert all("ERR_CONNECTION_REFUSED" in line for line in said)


def test_a_version_that_is_not_the_pages_is_told(pair: Pair, open_page: Open) -> None:
    server = AppServer(pair, ServeConfig(batch=4))
    try:
        page = open_page(f"{server.url}/")
        idle(page, "grid")
        server.engine.pair = replace(pair, model=pair.model.model_copy(update={"version": "next"}))
        page.get_by_role("button", name="New seed").click()
        page.wait_for_selector("text=The server has taken up version next: load this page again to see what it is.")
        idle(page, "grid")
        page.reload()
        page.wait_for_selector(f"text=This link was made with version {pair.model.version}: its images may have been")
        idle(page, "grid")
    finally:
        server.close()


@pytest.mark.parametrize("view", ["sample", "complete", "code", "model"])
def test_a_phone_shows_all_and_every_control_has_a_name(view: str, address: str, open_page: Open) -> None:
    page = open_page(f"{address}{WANTED}&view={view}", **PHONE)
    idle(page, "grid")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    value: Callable[[dict[str, Any], str], str] = lambda node, key: node.get(key, {}).get("value", "")  # noqa: E731
    shown = [(value(node, "role"), value(node, "name")) for node in tree if not node["ignored"]]
    controls = {"button", "link", "slider", "spinbutton", "radio", "checkbox", "combobox", "image", "application"}
    assert [role for role, name in shown if role in controls and not name.strip()] == []
    assert {"Sample", "Complete", "Code", "Model"} <= {name for role, name in shown if role == "link"}
    small = """[...document.querySelectorAll("button, a.button, select, input")].filter((each) => {
        const {width, height} = each.getBoundingClientRect();
        return width && !each.classList.contains("hidden") && Math.min(width, height) < 24;
    }).map((each) => each.outerHTML)"""
    assert page.evaluate(small) == []  # of what a finger has to hit


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_it_is_on(scheme: str, address: str, open_page: Open) -> None:
    page = open_page(address, color_scheme=scheme)
    colour = "(name) => getComputedStyle(document.documentElement).getPropertyValue(name)"

    def luminance(name: str) -> float:
        text = page.evaluate(colour, name).strip().lstrip("#")
        parts = torch.tensor([int(text[i : i + 2], 16) for i in (0, 2, 4)]) / 255
        linear = torch.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ torch.tensor([0.2126, 0.7152, 0.0722]))

    for text in ("--ink", "--soft", "--accent"):
        for ground in ("--page", "--card"):
            low, high = sorted((luminance(text), luminance(ground)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, f"{text} on {ground}"  # WCAG 2.2, AA
    low, high = sorted((luminance("--on-accent"), luminance("--accent")))
    assert (high + 0.05) / (low + 0.05) >= 4.5
