"""Random numbers from a seed: the CPU's own stream, no other device's, and all go on where they were."""

import pytest
import torch
from contracts.table import make_model

import xfusion
from xfusion.backbone.sources import load_weights
from xfusion.modalities.codecs.autoencoder_tiny import AutoencoderTiny
from xfusion.seeding import seeded


def test_a_block_has_the_numbers_of_its_seed_and_leaves_no_trace():
    state = torch.get_rng_state()
    with seeded(5):
        found = torch.randn(4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found, torch.randn(4, generator=torch.Generator().manual_seed(5)))
    with pytest.raises(RuntimeError), seeded(5):
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), state)


def test_no_device_is_seeded_that_is_not_put_back(bases, monkeypatch):
    """`torch.manual_seed` seeds every GPU there is, now or once it is first used."""
    base, others = bases["llama"], []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", others.append)
    monkeypatch.setattr(torch.mps, "manual_seed", others.append)
    model = make_model(base)
    model.generate(["a red apple"], max_tokens=2, temperature=1.0)
    model.generate(["a red apple", xfusion.Image()], steps=1)
    load_weights(base.source, scratch=True, dtype=torch.float32)
    AutoencoderTiny.Config().build()
    assert others == []
    torch.manual_seed(torch.initial_seed())
    assert len(others) >= 1


def test_an_apple_gpu_that_is_named_has_its_seed_and_goes_on_where_it_was(monkeypatch):
    """Its own generator, for which one of the CPU stands here."""
    generator = torch.Generator().manual_seed(1)
    for name in ("manual_seed", "get_rng_state", "set_rng_state"):
        of_generator = name.replace("rng_", "")
        monkeypatch.setattr(torch.mps, name, getattr(generator, of_generator))
    state = generator.get_state()
    with seeded(5):
        assert torch.equal(generator.get_state(), state)
    with seeded(5, "mps"):
        found = torch.randn(4, generator=generator)
    assert torch.equal(found, torch.randn(4, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(generator.get_state(), state)
    with pytest.raises(RuntimeError), seeded(5, "mps"):
        raise RuntimeError
    assert torch.equal(generator.get_state(), state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here to draw numbers on")
def test_a_gpu_that_is_named_has_its_seed_and_goes_on_where_it_was():
    torch.cuda.manual_seed(1)
    state = torch.cuda.get_rng_state()
    with seeded(5):
        assert torch.equal(torch.cuda.get_rng_state(), state)
    with seeded(5, "cuda"):
        found = torch.randn(4, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), state)
    torch.cuda.manual_seed(5)
    assert torch.equal(found, torch.randn(4, device="cuda"))
    torch.cuda.set_rng_state(state)
