# pyright: reportPrivateUsage=false

from __future__ import annotations

import torch

from bld_core.training.inference import for_inference
from tests.bld_core.toys import perturb, tiny_autoencoder, tiny_prior


@torch.no_grad()
def test_weights_that_are_rounded_once_are_autocast_bit_for_bit() -> None:
    prior, decoder = tiny_prior(), tiny_autoencoder().decoder
    perturb(prior)
    z_BNC = (torch.rand(5, 4, 8, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    for network, inputs in ((prior, (z_BNC, torch.full((5,), 0.3))), (decoder, (z_BNC.view(5, 8, 2, 2),))):
        plain = network(*inputs)
        fast = for_inference(network, "bfloat16", compiled=False)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(*inputs)
            assert torch.equal(fast(*inputs), rounded)
        assert not torch.equal(rounded.float(), plain)
        assert torch.equal(network(*inputs), plain)


@torch.no_grad()
def test_a_compiled_copy_is_of_the_same_class_and_the_original_stays_plain() -> None:
    prior, z_BNC, time = tiny_prior(), torch.ones(2, 4, 8), torch.zeros(2)
    with torch.compiler.set_stance("force_eager"):  # what compiled code computes is PyTorch's to test
        fast = for_inference(prior, "float32", compiled=True)
        assert torch.equal(fast(z_BNC, time), prior(z_BNC, time))
    assert type(fast) is type(prior)
    assert fast._compiled_call_impl is not None
    assert prior._compiled_call_impl is None
