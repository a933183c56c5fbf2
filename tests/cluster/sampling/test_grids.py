"""What the driver makes of samples: classes, files, neighbours; without a cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bld_core.data.images import ImageConfig, first_images
from bld_core.data.tensors import stack
from cluster.config.experiment import Experiment
from cluster.evaluation.cas import hits_of
from cluster.evaluation.config import EvaluationConfig
from cluster.evaluation.export import samples_npz
from cluster.evaluation.neighbours import Finder, Nearest
from cluster.evaluation.references import Space, check_space, make_references, spaces_of
from cluster.evaluation.sample_metrics import over_seeds
from cluster.runtime import ClusterConfig
from cluster.sampling.sampler import balanced_labels, bound_pieces, drawn_labels


def small_digits(digits: dict[str, str]) -> ImageConfig:
    return ImageConfig(
        train=digits["train"], validation=digits["validation"], image_size=32, channels=1, extensions=["png"]
    )


def images(count: int) -> Tensor:
    return torch.randint(256, (count, 4, 4, 3), generator=torch.Generator().manual_seed(0)).byte()


def test_drawn_classes_have_the_frequencies_of_the_training_set() -> None:
    labels = drawn_labels([100, 0, 300], 20_000, 1)
    shares = torch.bincount(torch.tensor(labels), minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.25, 0, 0.75]), rtol=0, atol=0.01)
    assert drawn_labels([1, 0, 3], 50, 1) == labels[:50], "a function of the index alone"
    assert drawn_labels([1, 0, 3], 50, 2) != labels[:50]
    assert balanced_labels(4, 3) == [0, 1, 2, 0]
    assert balanced_labels(4, 0) is None


@pytest.mark.parametrize("total", [2, 256, 257, 1025])
def test_held_out_codes_are_measured_in_pieces_each_of_which_has_an_error(total: int) -> None:
    pieces = bound_pieces(None, total)
    assert [code for piece in pieces for code in range(piece.start, piece.stop)] == list(range(total))
    assert all(2 <= piece.stop - piece.start <= 256 for piece in pieces)


def write_half(url: str, x: Tensor) -> None:
    with samples_npz(url, (5, 4, 4, 3), None) as write:
        write(x[:2])
        raise RuntimeError("cut")


def test_an_npz_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    x, url = images(5), str(tmp_path / "samples.npz")
    with samples_npz(url, (5, 4, 4, 3), [0, 1, 2, 0, 1]) as write:
        for some in x.split(2):
            write(some)
    with np.load(url) as arrays:
        assert arrays["arr_0"].dtype == np.uint8
        assert np.array_equal(arrays["arr_0"], x.numpy())
        assert arrays["arr_1"].tolist() == [0, 1, 2, 0, 1]
    with samples_npz(url, (5, 4, 4, 3), None) as write:
        write(x)
    with np.load(url) as arrays:
        assert arrays.files == ["arr_0"]
    before = (tmp_path / "samples.npz").read_bytes()
    with pytest.raises(RuntimeError, match="cut"):
        write_half(url, x)
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]
    assert (tmp_path / "samples.npz").read_bytes() == before


def test_neighbours_are_those_of_all_shards_together(digits: dict[str, str]) -> None:
    data = small_digits(digits)
    experiment = Experiment(data=data, cluster=ClusterConfig(workers=0, decode_tasks=0))
    train = stack(first_images(data.train, data, 10**6))
    queries = torch.cat([train[700:702], stack(first_images(data.validation, data, 3))])
    finder = Finder(experiment, None, queries, 4)
    found: Nearest | None = None
    for shard in range(2):
        part = finder.find(data.train.replace("{0000..0003}", f"{shard:04d}"))
        assert part is not None
        found = part if found is None else found.merge(part, 4)
    assert found is not None
    truth = torch.cdist(queries.flatten(1).double(), train[:810].flatten(1).double()).topk(4, largest=False)
    torch.testing.assert_close(found.distances, truth.values)
    assert found.distances[:2, 0].tolist() == [0, 0], "images that are known by heart"
    assert torch.equal(found.images[:, 0], train[truth.indices[:, 0]])


def test_spaces_that_cannot_be_had_are_refused_before_anything_starts(digits: dict[str, str], tmp_path: Path) -> None:
    data = small_digits(digits)
    experiment = Experiment(data=data, root=str(tmp_path))
    with pytest.raises(ValueError, match=r"asks for no space.*evaluation.frechet"):
        make_references(experiment, spaces_of(experiment))
    missing = replace(experiment, evaluation=EvaluationConfig(frechet=True, inception_weights=f"{tmp_path}/none.pth"))
    with pytest.raises(FileNotFoundError, match=r"`inception_weights` names .*none.pth"):
        make_references(missing, spaces_of(missing))
    check_space(experiment, Space("classifier"))
    assert not list(tmp_path.iterdir())


def test_hits_are_counted_among_the_likeliest_classes() -> None:
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0], [0.0, 1, 2, 3, 4, 5]]).repeat(3, 1)
    assert hits_of(logits, [0, 5, 4, 1, 5, 0]).tolist() == [2, 4]
    assert hits_of(logits[:, :3], [2, 0, 1, 1, 0, 2]).tolist() == [2, 6]


def test_figures_of_several_seeds_are_means_with_their_deviation() -> None:
    sets = [{"fid": 4.0, "fid_se": 0.1, "class_accuracy": 0.5}, {"fid": 6.0, "fid_se": 0.3}]
    assert over_seeds(sets) == pytest.approx({"fid": 5, "fid_sd": 2**0.5, "fid_se": 0.2, "class_accuracy": 0.5})
    assert over_seeds(sets[:1]) == sets[0]
    assert over_seeds([{"fd_held_out": 2.0}] * 2) == {"fd_held_out": 2.0}
