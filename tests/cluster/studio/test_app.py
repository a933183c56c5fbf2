"""The API over an engine in this process: what it answers is what the pair draws, and what is wrong is said."""

from __future__ import annotations

import asyncio
import base64
import html
import json
import logging
import math
import random
import re
import socket
import struct
import time
import zlib
from pathlib import Path

import pytest
import torch

from bld_core.latents.bits import unpack_bits
from cluster.studio.api import SamplesRequest
from cluster.studio.config import ServeConfig
from cluster.studio.engine import Engine
from cluster.studio.pair import Pair
from cluster.studio.passes import Passes, Share
from tests.cluster.studio.client import ask, pixels, png_of
from tests.cluster.studio.conftest import TOKEN, AppServer


def test_the_model_is_described(app: AppServer, pair: Pair) -> None:
    said = ask(f"{app.url}/v1/model").json
    h, w, c = pair.generator.autoencoder.code_shape
    assert said["latent"] == {"height": h, "width": w, "bits": c}
    assert (said["image_size"], said["channels"], said["bits_per_image"]) == (32, 1, h * w * c)
    assert said["classes"] == [None] * 10
    assert said["sampling"] == {"steps": 4, "temperature": 0.9, "guidance": 1.0, "max_steps": 64}
    assert said["hashes"]["prior"] == pair.prior.record.hash
    assert said["version"] == ask(f"{app.url}/readyz").json["version"] == pair.prior.record.hash[:12]
    assert ask(f"{app.url}/healthz").status == 200
    page = ask(f"{app.url}/docs").body.decode()
    assert re.search(r"<code>count</code><td>integer; <= 64, >= 1, default 1", html.unescape(page))
    assert "//" not in page, "no foreign host"
    assert set(ask(f"{app.url}/openapi.json").json["paths"]) >= {"/v1/model", "/v1/samples", "/v1/interpolations"}


def test_a_browser_asks_again_for_the_files_of_the_page_and_is_not_sent_those_that_it_has(app: AppServer) -> None:
    [file] = [path for path in re.findall(r"static/[\w.]+", ask(f"{app.url}/").body.decode()) if path.endswith(".css")]
    first = ask(f"{app.url}/{file}")
    assert (first.status, first.headers["Cache-Control"]) == (200, "no-cache")
    again = ask(f"{app.url}/{file}", If_None_Match=first.headers["ETag"])
    assert (again.status, again.body, again.headers["Cache-Control"]) == (304, b"", "no-cache")


def test_samples_are_those_of_the_pair_and_their_bits_decode_to_them(app: AppServer, pair: Pair) -> None:
    answer = ask(f"{app.url}/v1/samples", {"label": 3, "seed": 7, "count": 6, "guidance": 2})
    images = answer.json["images"]
    assert answer.headers["X-Model-Version"] == answer.json["version"] == pair.model.version
    assert [(each["index"], each["seed"]) for each in images] == [(n, 7) for n in range(6)]
    drawn = pair.generator.sample(labels=[3] * 6, seed=7, batch_size=4, guidance=2.0)
    assert torch.equal(torch.stack([pixels(each["png"]) for each in images]), drawn)
    again = ask(f"{app.url}/v1/reconstructions", {"bits": images[5]["bits"]}).json
    assert (again["png"], again["bits"]) == (images[5]["png"], images[5]["bits"])
    alone = ask(f"{app.url}/v1/samples", {"label": 3, "seed": 7, "guidance": 2}, Accept="image/png")
    assert alone.headers["Content-Type"] == "image/png"
    assert torch.equal(pixels(alone.body), drawn[0])


def test_the_documented_request_is_answered(app: AppServer) -> None:
    operating = (Path(__file__).parents[3] / "docs/operating.md").read_text()
    (body,) = re.findall(r"/v1/samples --header 'Content-Type: application/json' --data '(.*?)'", operating)
    assert len(ask(f"{app.url}/v1/samples", body.encode()).json["images"]) == 4


def test_a_stream_shows_every_step_and_ends_with_the_samples(app: AppServer) -> None:
    wanted = {"label": 1, "seed": 2, "count": 6, "steps": 3}
    text = ask(f"{app.url}/v1/samples/stream", wanted).body.decode()
    events = [(name, json.loads(data)) for name, data in re.findall(r"event: (\w+)\ndata: (.*)\n\n", text)]
    steps = [(said["first"], said["step"], len(said["images"])) for name, said in events if name == "step"]
    assert steps == [*((0, n, 4) for n in range(4)), *((4, n, 2) for n in range(4))]
    name, last = events[-1]
    assert name == "done"
    assert last == ask(f"{app.url}/v1/samples", wanted).json
    shown = [png for kind, said in events if kind == "step" and said["step"] == said["of"] for png in said["images"]]
    assert shown == [each["png"] for each in last["images"]]


def test_completions_are_those_of_the_pair_and_surroundings_leave_the_middle(app: AppServer, pair: Pair) -> None:
    image = pair.generator.sample(labels=[4], seed=1)[0]
    mask = torch.ones(32, 32, dtype=torch.bool)
    mask[8:, :16] = False
    drawn = pair.generator.inpaint(image[None], mask[None], count=3, labels=[4], seed=5, batch_size=4)[0]
    for part in ({"box": [0, 8, 16, 32]}, {"mask": png_of((mask * 255).to(torch.uint8)[..., None])}):
        body = {"image": png_of(image), "label": 4, "seed": 5, "count": 3, **part}
        made = ask(f"{app.url}/v1/inpaintings", body).json["images"]
        assert torch.equal(torch.stack([pixels(each["png"]) for each in made]), drawn)
    body = {"image": png_of(torch.full((32, 32, 1), 200, dtype=torch.uint8)), "left": 16, "right": 0, "count": 2}
    for each in ask(f"{app.url}/v1/outpaintings", body).json["images"]:
        assert bool((pixels(each["png"])[8:24, 16:] == 200).all())


def test_an_interpolation_flips_a_share_of_the_bits_each_time(app: AppServer, pair: Pair) -> None:
    made = ask(f"{app.url}/v1/interpolations", {"from": {"seed": 1, "label": 2}, "to": {"seed": 3}, "count": 5}).json
    shape = pair.generator.autoencoder.code_shape
    packed = torch.stack(
        [torch.tensor(list(base64.b64decode(each["bits"])), dtype=torch.uint8) for each in made["images"]]
    )
    codes = unpack_bits(packed, shape).int()
    far = int((codes[0] != codes[-1]).sum())
    assert far > 0
    assert [int((code != codes[0]).sum()) for code in codes] == [round(far * n / 4) for n in range(5)]
    start = ask(f"{app.url}/v1/samples", {"seed": 1, "label": 2}).json["images"][0]
    assert made["images"][0]["png"] == start["png"]
    image = {"image": png_of(pair.generator.sample(labels=[1])[0])}
    assert (
        ask(f"{app.url}/v1/interpolations", {"from": image, "to": {"bits": start["bits"]}, "count": 2}).json["images"][
            1
        ]["png"]
        == start["png"]
    )


def malformed(number: int, image: str) -> tuple[str, bytes]:
    """A request that cannot be answered: its path and body."""
    dice = random.Random(number)
    png = base64.b64decode(image)
    bomb = png[:16] + struct.pack(">II", 60_000, 60_000) + png[24:29]
    bomb += struct.pack(">I", zlib.crc32(bomb[12:29])) + png[33:]
    pictures = [
        "",
        "////",
        "no base64!",
        "../../etc/passwd",
        image[: dice.randrange(8, len(image) - 8)],  # cut off
        base64.b64encode(png[: dice.randrange(1, len(png) - 30)]).decode(),
        base64.b64encode(bomb).decode(),
        base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n").decode(),
        base64.b64encode(dice.randbytes(200)).decode(),
        png_of(torch.zeros(dice.choice([1, 31, 33, 200]), 32, 1, dtype=torch.uint8)),
        [image],
        7,
        None,
    ]
    numbers = [-1, 0, 65, 10**9, 10**400, 1.5, "3", [1], {}, True, math.nan, math.inf, -math.inf, "../../etc/passwd"]
    box = [dice.randrange(-9, 99) for _ in range(dice.randrange(8))]
    picture, given = dice.choice(pictures), dice.choice(numbers)
    requests: list[tuple[str, object]] = [
        ("samples", {"count": given if given is not True else 0}),
        ("samples/stream", {"count": given if given is not True else 65}),
        ("samples", {"steps": dice.choice([-1, 0, 65, 10**30, 1.5, "3", [1], {}, math.nan, math.inf])}),
        ("samples", {"temperature": dice.choice([0, -1, 101, "1", math.nan, math.inf, 10**400, [], {}])}),
        ("samples", {"guidance": dice.choice([-1, 101, "1", math.nan, -math.inf, 10**400, [], {}])}),
        ("samples", {"seed": dice.choice([-1, 2**53, 10**400, 1.5, "s", math.nan, [0]])}),
        ("samples", {"label": dice.choice([-1, 10, 10**400, 1.5, "../../etc/passwd", "\x00", [0], math.nan])}),
        ("samples", {dice.choice(["Label", "path", "__class__", "x" * 10_000]): 1}),
        ("samples", dice.choice([[], 3, "text", None, [{}], True])),
        ("inpaintings", {"image": picture, "box": [0, 0, 8, 8]}),
        ("inpaintings", {"image": image, "mask": picture if picture is not None else ""}),
        ("inpaintings", {"image": image, "box": [*box, 99][:4] if len(box) > 2 else box}),
        ("inpaintings", {"image": image, "mask": image, "box": [0, 0, 8, 8]}),
        ("inpaintings", {"image": image, "box": [0, 0, 8, 8], "count": 17}),
        ("outpaintings", {"image": picture}),
        (
            "outpaintings",
            {
                "image": image,
                dice.choice(["left", "top", "right", "bottom"]): dice.choice(
                    [-1, 32, 40, 10**400, 1.5, "3", math.nan, 65536]
                ),
            },
        ),
        ("reconstructions", {"image": picture} if picture is not None else {}),
        ("reconstructions", {"bits": dice.choice(["", "AAAA", "!", 3, "A" * 10_000, "é"])}),
        ("reconstructions", {"image": image, "bits": "AAAA"}),
        ("interpolations", {"from": {"seed": 1}, "to": dice.choice([{}, [], {"bits": "AAAA"}, {"seed": -1}, 3])}),
        ("interpolations", {"from": {"image": picture or 7}, "to": {"seed": 1}}),
        ("interpolations", {"from": {"seed": 1}, "to": {"seed": 2}, "count": dice.choice([-1, 0, 1, 65, "2"])}),
        ("interpolations", {"from": {"seed": 1, "bits": "AAAA"}, "to": {"seed": 2}}),
        ("nothing", {}),
    ]
    path, body = (
        requests[number % (len(requests) + 1)]
        if number % (len(requests) + 1) < len(requests)
        else (
            "samples",
            dice.choice(
                [
                    b"",
                    b"{",
                    b"[" * 100_000,
                    b"\xff\xfe",
                    b"{}{}",
                    b'{"count": 1' + b"0" * 5000 + b"}",
                    b"\x89PNG",
                    dice.randbytes(99),
                ]
            ),
        )
    )
    return f"/v1/{path}", body if isinstance(body, bytes) else json.dumps(body).encode()


def test_200_malformed_requests_are_refused_with_a_reason(app: AppServer, pair: Pair) -> None:
    image = png_of(pair.generator.sample(labels=[4], seed=1)[0])
    for number in range(200):
        path, body = malformed(number, image)
        answer = ask(f"{app.url}{path}", body)
        assert 400 <= answer.status < 500, (number, path, body[:300], answer.status, answer.body[:300])
        assert answer.json["error"]["message"], (number, path, body[:300])
    assert app.engine.failure is None
    assert ask(f"{app.url}/v1/samples", {"label": 1}).status == 200, "it goes on"


@pytest.mark.parametrize("said", [True, False], ids=["length", "chunks"])
def test_a_body_above_the_bound_is_not_read_to_its_end(app: AppServer, said: bool) -> None:
    host, port = app.url.removeprefix("http://").split(":")
    length = f"Content-Length: {9 << 20}" if said else "Transfer-Encoding: chunked"
    with socket.create_connection((host, int(port)), 30) as client:
        client.sendall(f"POST /v1/reconstructions HTTP/1.1\r\nHost: x\r\n{length}\r\n\r\n".encode())
        for _ in range(0 if said else 9):
            client.sendall(b"100000\r\n" + b" " * (1 << 20) + b"\r\n")
        answer = client.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"it must be at most 8 MiB" in answer


def test_without_the_token_nothing_is_answered_and_no_log_has_it(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    server = AppServer(pair, ServeConfig(), TOKEN)
    try:
        with caplog.at_level(logging.DEBUG):
            for path in ("/v1/model", "/report"):
                for header in (
                    {},
                    {"Authorization": "Bearer "},
                    {"Authorization": TOKEN},
                    {"Authorization": f"Bearer {TOKEN}x"},
                ):
                    answer = ask(server.url + path, **header)
                    assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
                assert ask(server.url + path, Authorization=f"Bearer {TOKEN}").status in (200, 404)
            assert ask(f"{server.url}/healthz").status == 200
        assert TOKEN not in caplog.text
    finally:
        server.close()


def test_those_who_are_answered_together_ask_again_together(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """However they come at first: they do not take turns, each group with a pass that is half empty."""
    rows, real = list[int](), Passes._pass  # pyright: ignore[reportPrivateUsage]

    def slow(self: Passes, shares: list[Share]) -> None:
        rows.append(sum(part.stop - part.start for _, part in shares))
        real(self, shares)
        time.sleep(0.5)
        self._step_seconds = 0.125  # pyright: ignore[reportPrivateUsage]

    monkeypatch.setattr(Passes, "_pass", slow)

    async def all_users() -> None:
        engine = Engine(pair, ServeConfig(batch=8, wait=1.0))

        async def user(seed: int) -> None:
            while seed % 2 and not rows:  # half of them come while the first pass is under way
                await asyncio.sleep(0.01)
            for _ in range(3):
                await engine.answer(SamplesRequest(seed=seed, count=1, label=3))
                await asyncio.sleep(0.05)

        await asyncio.gather(*(user(seed) for seed in range(8)))

    asyncio.run(all_users())
    assert rows[:3] == [4, 8, 8]
    assert sum(rows) == 24
