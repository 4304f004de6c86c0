"""Our quantiser against transformers' Janus one, a random table copied across, in float32 to 1e-5.

Janus, and SEED's code with it, weighs the other term than the paper (VQ-VAE, arXiv 1711.00937, equation 3, and ours):

    paper     |sg(z) - e|^2 + beta |z - sg(e)|^2        the encoder is held loosely
    legacy    |z - sg(e)|^2 + beta |sg(z) - e|^2        the table follows slowly

With beta = 1/4 the legacy loss is a quarter of ours with ``commitment`` 4: 1/4 (4 |z - sg(e)|^2 + |sg(z) - e|^2).
"""

import pytest
import torch
from torch import Tensor, nn
from transformers import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAEVectorQuantizer

from xfusion.modalities.codecs.vq import Quantizer, looked_up

ENTRIES, WIDTH, BETA = 20, 6, 0.25
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def pair(**settings: float) -> tuple[JanusVQVAEVectorQuantizer, Quantizer]:
    """Theirs, and ours with its table, which learns by gradient."""
    config = JanusVQVAEConfig(num_embeddings=ENTRIES, embed_dim=WIDTH)
    theirs = JanusVQVAEVectorQuantizer(config)
    assert theirs.beta == BETA
    torch.manual_seed(0)
    nn.init.normal_(theirs.embedding.weight)
    own = Quantizer.Config(entries=ENTRIES, width=WIDTH, decay=0.0, revive_below=0.0, **settings).build()
    with torch.no_grad():
        own.tables.copy_(theirs.embedding.weight[None])
    return theirs, own


def latents() -> Tensor:
    return torch.randn(2, WIDTH, 3, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()


def gradients(vectors: Tensor, loss: Tensor, z: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Of something that is read off the vectors, and of the loss, to the encoder and to the table."""
    return torch.autograd.grad(vectors.pow(3).sum() + loss, [z, table])


def test_codes_vectors_loss_and_gradients_are_those_of_janus():
    theirs, own = pair(commitment=1 / BETA)
    one, other = latents(), latents()
    expected, loss, index = theirs(one)
    found, codes, cost = own(other)
    assert torch.equal(codes.flatten(), index) and len(set(index.tolist())) >= 8
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(BETA * cost, loss, **CLOSE)
    wanted = gradients(expected, loss, one, theirs.embedding.weight)
    made = gradients(found, BETA * cost, other, own.tables)
    torch.testing.assert_close(made[0], wanted[0], **CLOSE)
    torch.testing.assert_close(made[1][0], wanted[1], **CLOSE)
    assert float(wanted[1].abs().max()) > 1e-3


def test_the_gradient_passes_straight_through_as_in_janus():
    theirs, own = pair()
    for quantizer in (theirs, own):
        z = latents()
        (gradient,) = torch.autograd.grad(quantizer(z)[0].pow(3).sum(), z)
        torch.testing.assert_close(gradient, 3 * looked_up(own(z)[1], own.tables).square(), **CLOSE)


def terms(quantizer: nn.Module, place: int) -> tuple[float, float]:
    """Weights of the two terms of a loss: of the encoder's distance to its entry, and of the entry's to the encoder."""
    z = latents()
    out = quantizer(z)
    table = next(quantizer.parameters())
    (to_encoder, to_table), entry = torch.autograd.grad(out[place], [z, table]), out[0].detach()
    apart = 2 * (z.detach() - entry) / z.numel()
    summed = torch.zeros(ENTRIES, WIDTH).index_add(0, _codes(z, table), -apart.movedim(1, -1).flatten(0, -2))
    return float((to_encoder / apart).mean()), float(
        (to_table.view(ENTRIES, WIDTH) * summed).sum() / summed.square().sum()
    )


def _codes(z: Tensor, table: Tensor) -> Tensor:
    return torch.cdist(z.detach().movedim(1, -1).flatten(0, -2), table.detach().view(ENTRIES, WIDTH)).argmin(-1)


def test_beta_stands_where_the_paper_has_it_and_not_where_legacy_code_puts_it():
    """The trap that the specification names: at the same beta the legacy code holds the encoder four times as hard."""
    theirs, own = pair(commitment=BETA)
    assert terms(own, 2) == pytest.approx((BETA, 1.0), rel=1e-4)
    assert terms(theirs, 1) == pytest.approx((1.0, BETA), rel=1e-4)
    assert Quantizer.Config().commitment == BETA
