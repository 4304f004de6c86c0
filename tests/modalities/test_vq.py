"""Codes: equations of the quantisers, parity with diffusers, and a VQModel folder as a codec."""

import itertools
import json
import math

import pytest
import torch
from diffusers.models.autoencoders.vae import VectorQuantizer
from diffusers.models.autoencoders.vq_model import VQModel
from torch.nn import functional

from xfusion.data.sequence import XFusionError
from xfusion.modalities.codecs.kmeans import explained
from xfusion.modalities.codecs.vq import Quantizer, VectorQuantized, code_use, looked_up, quantise, relaxed
from xfusion.modalities.image import ImageModality


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def latents(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def vq_model(entries=12, width=5, **changes):
    torch.manual_seed(0)
    settings = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": 6,
        "num_vq_embeddings": entries,
        "vq_embed_dim": width,
        "mid_block_add_attention": False,
    }
    model = VQModel(**{**settings, **changes}).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model


def images(size=16, count=3):
    return torch.rand(count, 3, size, size, generator=generator(1)) * 2 - 1


def test_by_gradient_it_is_diffusers_quantiser():
    theirs = VectorQuantizer(20, 6, beta=0.25, legacy=False)
    ours = Quantizer.Config(entries=20, width=6, decay=0.0).build().eval()
    torch.nn.init.normal_(theirs.embedding.weight)
    with torch.no_grad():
        ours.tables.copy_(theirs.embedding.weight[None])
    z = [latents(2, 6, 3, 4).requires_grad_() for _ in range(2)]
    expected, loss, (_, _, index) = theirs(z[0])
    found, codes, cost = ours(z[1])
    assert torch.equal(codes.flatten(), index)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(cost, loss, rtol=0, atol=1e-5)
    (expected.square().sum() + loss).backward()
    (found.square().sum() + cost).backward()
    torch.testing.assert_close(z[1].grad, z[0].grad, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.tables.grad[0], theirs.embedding.weight.grad, rtol=0, atol=1e-5)


def test_tables_that_are_learned_by_gradient_on_angles_have_one():
    """Unused entries are reset in place behind the loss, which must not be what autograd has saved."""
    quantizer = Quantizer.Config(entries=9, width=4, distance="cosine", decay=0.0, revive_below=0.5).build()
    torch.nn.init.normal_(quantizer.tables)
    before = quantizer.tables.detach().clone()
    _, _, loss = quantizer(latents(2, 4, 3, 3))
    loss.backward()
    assert quantizer.tables.grad.abs().sum() > 0 and not torch.equal(before, quantizer.tables)


def test_nearest_by_cosine_is_the_smallest_angle():
    quantizer = Quantizer.Config(entries=9, width=4, distance="cosine", revive_below=0.0).build().eval()
    torch.nn.init.normal_(quantizer.tables)
    z = latents(2, 4, 3, 3)
    vectors, codes, _ = quantizer(z)
    for n in range(2):
        for i in range(3):
            for j in range(3):
                cosine = torch.cosine_similarity(quantizer.tables[0], z[n, :, i, j][None])
                assert int(codes[n, 0, i, j]) == int(cosine.argmax())
    assert float((vectors.norm(dim=1) - 1).abs().max()) < 1e-5
    with pytest.raises(XFusionError, match="2 levels by cosine"):
        Quantizer.Config(distance="cosine", levels=2).build()


@torch.no_grad()
def test_levels_quantise_what_is_left_as_the_equation_says():
    tables, z = latents(3, 7, 4).double(), latents(2, 4, 2, 3, seed=1).double()
    codes, sums = quantise(z, tables)
    for n, i, j in ((0, 0, 0), (1, 1, 2), (1, 0, 1)):
        rest, total = z[n, :, i, j], torch.zeros(4).double()
        for level in range(3):
            k = min(range(7), key=lambda e: float((rest - tables[level, e]).square().sum()))
            assert int(codes[n, level, i, j]) == k
            rest, total = rest - tables[level, k], total + tables[level, k]
            torch.testing.assert_close(sums[level, n, :, i, j], total, rtol=0, atol=1e-12)
    torch.testing.assert_close(looked_up(codes, tables), sums[-1], rtol=0, atol=1e-12)


@torch.no_grad()
def test_averages_follow_what_falls_on_an_entry_as_the_equation_says():
    quantizer = Quantizer.Config(entries=6, width=3, levels=2, decay=0.9, revive_below=0.0).build().double()
    torch.nn.init.normal_(quantizer.tables)
    table, size, total = quantizer.tables.clone(), torch.zeros(2, 6).double(), torch.zeros(2, 6, 3).double()
    for step in range(3):
        z = latents(2, 3, 4, 4, seed=step).double()
        codes, sums = quantise(z, table)
        quantizer(z)
        for level in range(2):
            x = (z if level == 0 else z - sums[0]).movedim(1, -1)
            for k in range(6):
                mine = x[codes[:, level] == k]
                size[level, k] = 0.9 * size[level, k] + 0.1 * len(mine)
                total[level, k] = 0.9 * total[level, k] + 0.1 * mine.sum(0)
                if size[level, k] > 0:
                    table[level, k] = total[level, k] / size[level, k]
        torch.testing.assert_close(quantizer.tables.data, table, rtol=0, atol=1e-10)
    before = quantizer.tables.clone()
    quantizer.eval()(latents(2, 3, 4, 4).double())
    assert torch.equal(quantizer.tables, before) and not quantizer.tables.requires_grad


@torch.no_grad()
def test_dead_entries_come_back_to_life():
    """All vectors lie in one corner: without revival one entry takes them all."""
    use = {}
    for revive in (0.0, 0.1):
        torch.manual_seed(0)
        quantizer = Quantizer.Config(entries=32, width=2, revive_below=revive).build()
        torch.nn.init.normal_(quantizer.tables)
        for step in range(30):
            codes = quantizer(10 + latents(8, 2, 4, 4, seed=step))[1]
        use[revive] = code_use(codes, 32)
    assert use[0.0][0] <= 0.1 and use[0.1][0] >= 0.8 and use[0.1][1] > 5 * use[0.0][1]


def test_gradients_pass_straight_through_and_hold_the_encoder_to_its_entry():
    quantizer = Quantizer.Config(entries=5, width=3, revive_below=0.0).build().eval()
    z = latents(1, 3, 2, 2).requires_grad_()
    vectors, _, loss = quantizer(z)
    (gradient,) = torch.autograd.grad(vectors.sum(), z, retain_graph=True)
    assert torch.equal(gradient, torch.ones_like(z))
    (gradient,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(gradient, 0.25 * 2 * (z - vectors).detach() / z.numel(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("levels", "decay"), [(2, 0.0), (3, 0.0), (3, 0.99)])
def test_the_loss_is_the_mean_over_the_levels_partial_sums(levels, decay):
    """Each level's, and not the last one's alone: by the equation, cell by cell, in float64."""
    torch.manual_seed(0)
    quantizer = Quantizer.Config(entries=5, width=3, levels=levels, decay=decay, commitment=0.3).build().double().eval()
    with torch.no_grad():
        quantizer.tables.normal_()
    z = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    _, codes, loss = quantizer(z)
    tables, cells = quantizer.tables.detach(), []
    wanted_z, wanted_tables = torch.zeros_like(z), torch.zeros_like(tables)
    for n, row, column in itertools.product(range(2), range(2), range(2)):
        x, partial = z[n, :, row, column].detach(), torch.zeros(3, dtype=torch.float64)
        chosen = []
        for level in range(levels):
            distances = [float((x - partial - entry).square().sum()) for entry in tables[level]]
            chosen.append(min(range(5), key=distances.__getitem__))
            partial = partial + tables[level, chosen[-1]]
            error = x - partial
            cells.append(float(error.square().mean()))
            wanted_z[n, :, row, column] += 0.3 * 2 * error
            for earlier, code in enumerate(chosen):
                wanted_tables[earlier, code] -= 2 * error
        assert codes[n, :, row, column].tolist() == chosen
    mean = sum(cells) / len(cells)
    count = z.numel() * levels
    assert float(loss.detach()) == pytest.approx((0.3 if decay else 1.3) * mean, rel=1e-12)
    loss.backward()
    torch.testing.assert_close(z.grad, wanted_z / count)
    if not decay:
        torch.testing.assert_close(quantizer.tables.grad, wanted_tables / count)


def test_averages_by_cosine_follow_directions():
    """Vectors count by their direction alone, and entries stay of unit length."""
    torch.manual_seed(1)
    quantizer = Quantizer.Config(entries=4, width=3, distance="cosine", decay=0.9, revive_below=0.0).build().double()
    z = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    size, total = quantizer.size.clone(), quantizer.total.clone()
    table = functional.normalize(quantizer.tables.detach().clone(), dim=-1)
    directions = functional.normalize(z, dim=1)[0].flatten(1).T
    codes = (directions @ table[0].T).argmax(1)
    for entry in range(4):
        own = directions[codes == entry]
        size[0, entry] = 0.9 * size[0, entry] + 0.1 * len(own)
        total[0, entry] = 0.9 * total[0, entry] + 0.1 * own.sum(0)
        if len(own):
            table[0, entry] = functional.normalize(total[0, entry] / size[0, entry], dim=0)
    quantizer.train()(100 * z)
    torch.testing.assert_close(quantizer.size, size)
    torch.testing.assert_close(quantizer.total, total)
    used = size[0] > 0
    torch.testing.assert_close(quantizer.tables[0, used].detach(), table[0, used])


def test_use_of_codes():
    assert code_use(torch.tensor([0, 1, 2, 3]), 4) == pytest.approx((1.0, 4.0))
    assert code_use(torch.tensor([1.0, 1.0]), 4) == pytest.approx((0.25, 1.0))
    assert code_use(torch.arange(512).repeat(3).view(3, 1, 16, 32), 512) == pytest.approx((1.0, 512.0))
    # Shares 1/2, 1/4, 1/4: an entropy of 1.5 bits.
    assert code_use(torch.tensor([7, 7, 0, 3]), 8) == pytest.approx((3 / 8, 2**1.5))


def test_variance_that_clusters_explain():
    x, clusters = torch.tensor([[0.0], [2.0], [10.0], [12.0]]), torch.tensor([[1.0], [11.0]])
    assert explained(x, clusters) == pytest.approx(1 - 1 / 26)  # each is 1 off; from their mean, 6: 36, 16, 16, 36
    assert explained(x, x) == pytest.approx(1)
    assert explained(x, torch.tensor([[6.0]])) == pytest.approx(0)
    assert explained(x, torch.tensor([[0.0]])) < 0


def test_relaxed_codes_are_gumbels_and_the_divergence_is_from_uniform():
    scores = latents(2, 5, 3, 3).double().requires_grad_()
    soft, divergence = relaxed(scores, 1.0, generator())
    torch.testing.assert_close(soft.sum(1), torch.ones(2, 3, 3).double())
    q = scores.detach().softmax(1)
    expected = sum(float((q[:, k] * (q[:, k] * 5).log()).sum()) for k in range(5)) / 18
    assert divergence.item() == pytest.approx(expected)
    assert float(relaxed(torch.zeros(1, 4, 2, 2), 1.0)[1]) == pytest.approx(0, abs=1e-6)
    assert float(relaxed(scores, 1e-3, generator())[0].amax(1).mean()) > 0.98  # one of K
    many = relaxed(scores[:1, :, :1, :1].expand(20_000, -1, -1, -1), 1e-3, generator())[0].argmax(1)
    share = torch.bincount(many.flatten(), minlength=5) / 20_000
    torch.testing.assert_close(share.double(), q[0, :, 0, 0], rtol=0, atol=0.015)
    soft[:, 0].sum().backward()
    assert float(scores.grad.abs().max()) > 0


@torch.no_grad()
def test_a_folder_of_diffusers_is_a_codec(tmp_path):
    model = vq_model()
    model.save_pretrained(tmp_path / "vq")
    codec = VectorQuantized.Config(source=str(tmp_path / "vq")).build()
    assert (codec.channels, codec.entries, codec.factor) == (1, 12, 2)
    codes = codec.encode(images())
    assert codes.shape == (3, 1, 8, 8) and codes.dtype == torch.float32 and torch.equal(codes, codec.encode(images()))
    z = model.encode(images()).latents
    assert torch.equal(codes.flatten().long(), model.quantize(z)[2][2])
    expected = model.decode(z).sample.clamp(-1, 1)
    torch.testing.assert_close(codec.decode(codes), expected, rtol=0, atol=1e-5)
    tokens = ImageModality.Config(codec=VectorQuantized.Config(source=str(tmp_path / "vq")), patch=2, sizes=(16,))
    found = tokens.build().encode(images(), 16)
    assert found.shape == (3, 16, 4)
    torch.testing.assert_close(tokens.build().decode(found, 16), expected, rtol=0, atol=1e-5)
    codec.train()
    assert not codec.training and not any(p.requires_grad for p in codec.parameters())
    for bad in (-1, 12):
        with pytest.raises(XFusionError, match=rf"^{bad} is none of the codec's codes, 0 to 11"):
            codec.decode(torch.full((1, 1, 8, 8), float(bad)))


@torch.no_grad()
def test_levels_stand_one_below_the_other(tmp_path):
    model = vq_model()
    model.register_to_config(num_levels=3)
    model.save_pretrained(tmp_path / "rq")
    codec = VectorQuantized.Config(source=str(tmp_path / "rq")).build()
    assert (codec.channels, codec.entries) == (3, 4)
    tables = model.quantize.embedding.weight.view(3, 4, 5)
    codes, sums = quantise(model.encode(images()).latents, tables)
    assert torch.equal(codec.encode(images()), codes.float())
    expected = model.decode(sums[-1], force_not_quantize=True).sample.clamp(-1, 1)
    torch.testing.assert_close(codec.decode(codes.float()), expected, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "rq" / "config.json").read_text())
    (tmp_path / "rq" / "config.json").write_text(json.dumps(config | {"num_levels": 5}))
    with pytest.raises(XFusionError, match="12 entries does not divide into 5 levels"):
        VectorQuantized.Config(source=str(tmp_path / "rq")).build()


@torch.no_grad()
def test_a_dvae_is_a_vqmodel_with_the_identity_as_its_table(tmp_path):
    """The likeliest code is the nearest row, and one of K is what the decoder reads."""
    model = vq_model(entries=10, width=10)
    torch.nn.init.eye_(model.quantize.embedding.weight)
    model.save_pretrained(tmp_path / "dvae")
    codec = VectorQuantized.Config(source=str(tmp_path / "dvae")).build()
    scores = model.encode(images()).latents
    assert torch.equal(codec.encode(images())[:, 0].long(), scores.argmax(1))
    one_of_k = torch.nn.functional.one_hot(scores.argmax(1), 10).movedim(-1, 1).float()
    expected = model.decode(one_of_k, force_not_quantize=True).sample.clamp(-1, 1)
    torch.testing.assert_close(codec.decode(codec.encode(images())), expected, rtol=0, atol=1e-5)
    assert math.isfinite(float(expected.sum()))
