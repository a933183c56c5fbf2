"""The paper's prior behind the seam: how known tokens steer it, whatever its target."""

from __future__ import annotations

from typing import Literal, get_args

import pytest
import torch

from bld_core.diffusion.process import DiffusionConfig, Target
from bld_core.diffusion.sampling import Known, SampleSpec, SamplingConfig
from bld_core.prior.binary import BinaryModel
from bld_core.prior.transformer import PriorConfig
from tests.bld_core.toys import perturb, tiny_prior


@pytest.mark.parametrize("target", get_args(Target))
@pytest.mark.parametrize(("share", "method"), [(0.5, "conditioned"), (0.0, "replacement")])
def test_auto_is_conditioned_where_the_prior_knows_marks_and_replacement_where_not(
    target: Target, share: float, method: Literal["conditioned", "replacement"]
) -> None:
    model = BinaryModel(PriorConfig(known_share=share), DiffusionConfig(steps=16, target=target), 4, 8)
    index = torch.arange(20)
    known = Known(torch.ones(20, 4, 8), torch.arange(80).view(20, 4) % 3 == 0)
    prior = tiny_prior(known_share=share)
    perturb(prior)

    def draw(inpainting: Literal["auto", "conditioned", "replacement"]) -> torch.Tensor:
        config = SamplingConfig(steps=16, guidance=1.0, inpainting=inpainting)
        return model.sample(prior, SampleSpec(index, index % 3), config, known)

    assert torch.equal(draw("auto"), draw(method))
    if method == "conditioned":
        assert not torch.equal(draw("auto"), draw("replacement"))
    else:
        with pytest.raises(ValueError, match=r"`known_share` 0.*replacement"):
            draw("conditioned")
