"""The API over an engine in this process: what it answers is what the pair draws, and what is wrong is said."""

from __future__ import annotations

import base64
import json
import re

import torch

from bld_core.latents.bits import unpack_bits
from cluster.studio.pair import Pair
from tests.cluster.studio.client import ask, pixels, png_of
from tests.cluster.studio.conftest import AppServer


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
    assert set(ask(f"{app.url}/openapi.json").json["paths"]) >= {"/v1/model", "/v1/samples", "/v1/interpolations"}


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
