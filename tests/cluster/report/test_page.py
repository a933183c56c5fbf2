"""The report: one page that holds everything, shown by a real browser."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bld_core.data.pictures import grid, png
from bld_core.storage import files
from cluster.config.experiment import Experiment
from cluster.config.tracking import TrackingConfig
from cluster.report.page import thinned, write_report
from cluster.tracking.runs import start_run
from tests.browser import problems
from tests.conftest import random_pair, report_of
from tests.servers import MlflowServer

FIGURES = {
    "psnr": 24.13,
    "psnr_std": 1.9,
    "ssim": 0.921,
    "dead_bits": 0.125,
    "bit_entropy": 0.4,
    "bound": 0.4578,
    "bound_se": 0.01,
    "bound_sampling": 0.4711,
    "bound_sampling_se": 0.03,
    "skipped_images": 7,
    "neighbour_ratio_pixels": 0.9752,
    "kid": 0.0123,
}


@pytest.fixture(scope="module")
def evaluated(
    tmp_path_factory: pytest.TempPathFactory, digits: dict[str, str], mlflow_server: MlflowServer
) -> Experiment:
    """An experiment that was, by its files and its MLflow runs, trained and evaluated."""
    experiment = random_pair(tmp_path_factory.mktemp("reported"), digits, mlflow_server.uri)
    for stage in ("autoencoder", "prior"):
        run = start_run(experiment, stage, None)
        for step in range(1, 31):
            run.metrics({"train_loss": 1 / step, "train_l1": 0.5 / step, "train_gradient_norm": 1.0}, step)
        run.metrics({"val_bound": 0.5, "val_bound_se": 0.01, "val_psnr": 20.0}, 30)
        run.end("FINISHED")
        files.write_json(f"{experiment.folder}/{stage}/stage.json", {"run": run.run_id, "fingerprint": {}})
    report: dict[str, object] = {"figures": FIGURES, "bit_usage": [0.5, 0.001, *[0.4] * 6], "samples": 40}
    sampling = {"steps": 4, "grid": [], "temperature": 0.9, "guidance": 1.0}
    report_of(experiment, report | {"sampling": sampling})
    images = torch.randint(256, (20, 32, 32, 1), generator=torch.Generator().manual_seed(0)).byte()
    for name, columns in (("samples", 10), ("reconstructions", 5), ("bit-usage", 5), ("nearest-neighbours", 40)):
        files.write_bytes(f"{experiment.folder}/evaluation/{name}.png", png(grid(images, columns)))
    return experiment


def test_a_browser_shows_every_picture_and_has_nothing_to_say(evaluated: Experiment, tmp_path: Path) -> None:
    page = Path(write_report(evaluated))
    assert problems(page) == []
    spoiled = tmp_path / "spoiled.html"
    text, count = re.subn(r"base64,.{20}", "base64,", page.read_text(), count=1)
    assert count == 1
    spoiled.write_text(text.replace("</main>", '<script>missing()</script><img src="http://bld.example/x.png"></main>'))
    said = " ".join(problems(spoiled))
    for problem in ("missing is not defined", "picture without width", "asked for http://bld.example/x.png"):
        assert problem in said


def test_the_page_holds_figures_curves_the_papers_rows_and_where_they_come_from(evaluated: Experiment) -> None:
    page = Path(write_report(evaluated)).read_text()
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)).replace("\N{MULTIPLICATION SIGN}", "x")
    for shown in (
        *("24.13 dB", "sd 1.9", "12.5%", "0.4578", "se 0.01", "kid", "0.0123"),
        "Likelihood bound, steps sampled of the steps that samples take 0.4711 se 0.03",
        "Nearest training image, pixels how far samples are from it",
        "from the first start to the last end",
    ):
        assert shown in text, shown
    reconstruction, samples = (text.index(f" {group} ") for group in ("Reconstruction PSNR", "Prior and samples"))
    assert reconstruction < text.index("Images left out held-out images that could not be read 7 ") < samples
    assert "this experiment, pair 24.13 0.92" in text
    assert "binary, 16 x 16 x 32 24.02 0.75" in text
    assert "none of its figures was measured: Samples: Table 2, ImageNet" in text
    assert page.count("<img") == 3, "samples, reconstructions, neighbours; the bits are drawn"
    assert page.count("<svg") == 1 + 2 * 4, "bits; loss and its terms, PSNR, bound, gradient norm, of both stages"
    assert "1 of 8 channels dead" in text
    for part in ("autoencoder", "prior"):
        assert files.read_json(f"{evaluated.folder}/{part}/final/config.json")["hash"] in text
        assert files.read_json(f"{evaluated.folder}/{part}/stage.json")["run"] in text
    assert "d" * 64 in text
    assert "python " in text
    assert "prior.layers 1" in text
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page), "the page needs another file"


def test_a_page_of_stage_1_alone_and_without_its_runs(
    evaluated: Experiment, tmp_path: Path, digits: dict[str, str]
) -> None:
    alone = random_pair(tmp_path, digits, "")
    files.remove(f"{alone.folder}/prior")
    with pytest.raises(FileNotFoundError, match=r"report.json' is missing: evaluate first"):
        write_report(alone)
    report_of(alone, {"figures": {"psnr": 20.0}})
    files.write_json(f"{alone.folder}/autoencoder/stage.json", {"run": "f" * 32, "fingerprint": {}})
    page = Path(write_report(replace(alone, tracking=TrackingConfig(uri=evaluated.tracking.uri)))).read_text()
    assert "MLflow does not have the runs" in page
    assert "20.00 dB" in page


def test_a_long_curve_is_thinned_to_the_means_of_neighbours() -> None:
    steps = [float(step) for step in range(1000)]
    short = thinned(steps, 400)
    assert (len(short), short[0], short[-1]) == (334, 1.0, 999.0)
    assert thinned(steps[:400], 400) == steps[:400]
    assert thinned([]) == []
