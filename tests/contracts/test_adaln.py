"""Contract: a noise level inside blocks (AdaLN) is DiT's equation, at media rows alone, and begins as nothing at all."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from contracts.table import (
    FAMILIES,
    FUSIONS,
    LAYERS,
    WIDTH,
    distance,
    exact,
    float64_base,
    look,
    mixed_sequences,
    model_config,
    randomise,
    view,
)
from contracts.test_equations import (
    ATTENTION,
    MLP,
    NORMS,
    Layer,
    Place,
    Vector,
    Weights,
    by_owner,
    hold_to_equation,
    of_module,
    places,
)
from diffusers.models.attention import BasicTransformerBlock
from torch import nn
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from xfusion.backbone import Backbone
from xfusion.comparison.cost import flops_of_shape
from xfusion.data.pack import pack
from xfusion.data.sequence import Media, Sequence, XFusionError
from xfusion.fusion import base
from xfusion.fusion.connectors.linear import Linear
from xfusion.fusion.cross_attention import CrossAttention
from xfusion.fusion.dual_tower import DualTower
from xfusion.fusion.gated_tower import GatedTower
from xfusion.fusion.layered import Layered
from xfusion.fusion.modality_experts import ModalityExperts
from xfusion.fusion.prefix import Prefix
from xfusion.fusion.shared_decoder import SharedDecoder
from xfusion.fusion.sparse_experts import SparseExperts
from xfusion.layers import modulated, run_rows
from xfusion.modalities.codes import CodePort
from xfusion.modalities.port import TIME_FREQUENCIES
from xfusion.model import Model, ModelConfig, compiled_graphs
from xfusion.objectives.base import NoObjective

SEQUENCES = mixed_sequences()


def config_of(backbone: Backbone, fusion: Any, time: Any = "adaln") -> ModelConfig:
    config = model_config(backbone)
    return replace(config, fusion=fusion, port=replace(config.port, time=time))


# -------------------------------------------------------------------------------------------------------- the equation


def by_noise(model: Model, sequence: Sequence, index: int) -> dict[int, dict[str, np.ndarray]]:
    """Rotary position of each picture token -> b, s, g of its two branches by its noise level: W silu(t) + c."""
    port, media = model.port, view([[sequence]], model).media["image"]
    inputs = port.embed_time(media.time).detach().numpy()
    single = model.config.port.time == "adaln single"
    (key,) = [k for k in port.block_modulation if single or k == str(index)]
    projection = of_module(port.block_modulation[key])
    row = port.by_block[str(index)].detach().numpy() if single else 0.0
    pictures = [n for n, segment in enumerate(sequence.segments) if isinstance(segment, Media)]
    out = {}
    for place in places(sequence):
        if place.media and place.both_ways:  # not [BOI]
            t = inputs[pictures.index(place.segment[0])]
            made = projection["weight"] @ (t / (1 + np.exp(-t))) + projection["bias"] + row
            assert np.abs(made).max() > 0.1
            out[place.position] = {f"{n} by noise": m for n, m in zip(NORMS, made.reshape(2, 3, -1), strict=True)}
    return out


def single_tower(layer: Layer, noise: Any) -> list[Vector]:
    """The trained block, by noise level at pictures' tokens."""
    return layer.by(lambda place: {**layer.copied, **noise(place)})


def gated_tower(layer: Layer, noise: Any) -> list[Vector]:
    """F_txt(E) + gamma F_gate(E, t)."""
    plain, gamma = layer.block(layer.frozen), float(layer.fusion.gates[str(layer.index)])
    gated = single_tower(layer, noise)
    return [h + gamma * g if p.after_media else h for p, h, g in zip(layer.places, plain, gated, strict=True)]


def dual_tower(layer: Layer, noise: Any) -> list[Vector]:
    """F_img(E, t) at media, F_txt(E) at words."""
    return by_owner(layer, layer.block(layer.frozen), single_tower(layer, noise))


def wide_tower(layer: Layer, noise: Any) -> list[Vector]:
    """The same inside the block, in its own width."""
    own = {name.removeprefix("layer."): values for name, values in layer.copied.items()}
    into, out, inside = own.pop("into"), own.pop("out"), copy.copy(layer.llama)
    inside.heads, inside.keys = 6, 3
    narrow = [into @ x for x in layer.x]
    wide = replace(layer, llama=inside, x=narrow).by(lambda place: {**own, **noise(place)})
    by_media = [x + out @ (h - n) for x, h, n in zip(layer.x, wide, narrow, strict=True)]
    return by_owner(layer, layer.block(layer.frozen), by_media)


def bagel(layer: Layer, noise: Any) -> list[Vector]:
    """The noise level is the new weights' own: a clean picture takes the frozen ones as they are."""
    new: dict[str, np.ndarray] = {}
    for path, part in layer.fusion.blocks[str(layer.index)].items():
        for name, values in of_module(part).items():
            new[f"{path.replace('/', '.')}.{name}".removesuffix(".weight")] = values
    assert set(new) == {*NORMS, *ATTENTION, *MLP}
    return layer.by(lambda place: {**new, **noise(place)} if place.noised else layer.frozen)


EQUATIONS: dict[str, Any] = {
    "dual tower": (DualTower.Config(stride=2), "adaln", (1, 3), dual_tower),
    "x-fuse": (DualTower.Config(fuse="both", stride=3), "adaln single", (1,), dual_tower),
    "wide tower": (DualTower.Config(width=96, stride=2, offset=0), "adaln single", (0, 2), wide_tower),
    "single tower": (SharedDecoder.Config(stride=2), "adaln", (1, 3), single_tower),
    "gated tower": (GatedTower.Config(stride=2), "adaln", (1, 3), gated_tower),
    "bagel": (ModalityExperts.Config(stride=2, noised_only=True), "adaln", (1, 3), bagel),
}
"""Name -> fusion, how the noise level enters, the layers at which blocks stand, and the equation."""


@pytest.mark.parametrize("name", EQUATIONS)
@torch.no_grad()
def test_a_noise_level_inside_blocks_is_its_equation(
    bases: dict[str, Backbone], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DiT's block in naive float64, behind every layer, on the fast and on the reference path."""
    fusion, time, layers, equation = EQUATIONS[name]
    with exact(monkeypatch):
        exactly = float64_base(bases["llama"])
        model = Model(config_of(exactly, fusion, time), exactly)
        randomise(model)
        model.double().eval()
        for title in ("words around picture", "noised copy beside clean one", "picture behind words"):
            sequence = SEQUENCES[title]

            def by_level(layer: Layer, sequence: Sequence = sequence) -> list[Vector]:
                found = by_noise(model, sequence, layer.index)

                def noise(place: Place) -> Weights:
                    return found.get(place.position, {})

                return equation(layer, noise)

            hold_to_equation(model, {title: sequence}, layers, by_level)


@pytest.mark.parametrize("norm_type", ["ada_norm_zero", "ada_norm_single"])
@torch.no_grad()
def test_a_modulated_layer_is_the_block_of_diffusers(norm_type: str) -> None:
    """A GPT-2 layer has the parts of DiT's and PixArt's block; modulated it is that block, gates of 0 being theirs of 1."""
    torch.manual_seed(0)
    zero = norm_type == "ada_norm_zero"
    theirs: Any = BasicTransformerBlock(
        24,
        num_attention_heads=2,
        attention_head_dim=12,
        activation_fn="gelu-approximate",
        attention_bias=True,
        norm_type=norm_type,
        norm_eps=1e-6,
        norm_elementwise_affine=False,
        num_embeds_ada_norm=10 if zero else None,
    ).eval()
    for parameter in theirs.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape))
    config = GPT2Config(n_embd=24, n_head=2, n_inner=96, layer_norm_epsilon=1e-6)
    config._attn_implementation = "eager"
    ours: Any = GPT2Block(config, layer_idx=0).eval()
    q, k, v, o = (*(getattr(theirs.attn1, f"to_{n}") for n in "qkv"), theirs.attn1.to_out[0])
    ours.attn.c_attn.weight.copy_(torch.cat([q.weight, k.weight, v.weight]).T)
    ours.attn.c_attn.bias.copy_(torch.cat([q.bias, k.bias, v.bias]))
    same = ((ours.attn.c_proj, o), (ours.mlp.c_fc, theirs.ff.net[0].proj), (ours.mlp.c_proj, theirs.ff.net[2]))
    for own, other in same:
        own.weight.copy_(other.weight.T)
        own.bias.copy_(other.bias)
    x, time, label = torch.randn(2, 5, 24), torch.tensor([3, 700]), torch.tensor([1, 2])
    if zero:
        made = theirs.norm1.linear(nn.functional.silu(theirs.norm1.emb(time, label))).unflatten(-1, (6, 24))
        expected = theirs(x, timestep=time, class_labels=label)
    else:
        level = torch.randn(2, 6 * 24)
        made = level.unflatten(-1, (6, 24)) + theirs.scale_shift_table
        expected = theirs(x, timestep=level)
    made[:, [2, 5]] -= 1
    everyone = torch.zeros(2, 1, 5, 5)
    found, _ = run_rows(modulated(ours, made[:, None].expand(2, 5, 6, 24)), x, {}, everyone, [], [])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert float((run_rows(ours, x, {}, everyone, [], [])[0] - expected).abs().max()) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_closed_gates_shut_both_branches_in_every_family(bases: dict[str, Backbone], family: str) -> None:
    """Gates stand on what is added, behind the norms that some families have there; and nothing changes at zero."""
    seen: list[float] = []
    # Blocks that stand on the frozen weights too, some rows of a fused matrix and deltas of one.
    standing = [ModalityExperts.Config(own=("norm", "key")), DualTower.Config(rank=2)]
    models = [Model(config_of(bases[family], fusion), bases[family]) for fusion in standing]

    def act(index: int, frozen: nn.Module, x: torch.Tensor, call: dict[str, Any]) -> torch.Tensor:
        by = torch.zeros(*x.shape[:2], 6, WIDTH)
        plain = frozen(x, **call)
        assert torch.equal(modulated(frozen, by)(x, **call), plain)
        for i in (0, 1, 3, 4):  # shifts and scales reach something, each by itself; norms hide one that is even
            by[:, :, i] = torch.linspace(-0.5, 0.5, WIDTH)
            seen.append(float((modulated(frozen, by)(x, **call) - plain).abs().max()))
            by[:, :, i] = 0.0
        by[:] = torch.randn(by.shape, generator=torch.Generator().manual_seed(index))
        by[:, :, [2, 5]] = -1
        for block in (frozen, *(model.fusion.block(index, frozen) for model in models)):
            assert torch.equal(modulated(block, by)(x, **call), x)
        return plain

    bases[family].shadow_decoder(act)(input_ids=torch.tensor([[5, 6, 7, 8]]), use_cache=False)
    assert len(seen) == 4 * LAYERS and min(seen) > 1e-3


# ----------------------------------------------------------------------------------------------------- how it begins


@pytest.mark.parametrize("time", ["adaln", "adaln single"])
@torch.no_grad()
def test_fresh_modulation_is_a_pass_without_noise_levels(bases: dict[str, Backbone], time: str) -> None:
    fusion = FUSIONS["hybrid"]
    plain, model = (Model(config_of(bases["llama"], fusion, t), bases["llama"]).eval() for t in ("modulate", time))
    for port in (plain.port, model.port):
        port.head.weight.copy_(torch.randn(port.head.weight.shape, generator=torch.Generator().manual_seed(0)))
    batch = view([[s] for s in SEQUENCES.values()], model)
    assert distance(look(model, batch), look(plain, batch)) == 0
    for weight in model.port.block_modulation.parameters():
        weight.add_(0.1)
    assert distance(look(model, batch), look(plain, batch)) > 1e-2


def test_gradients_reach_every_blocks_modulation_at_the_start(bases: dict[str, Backbone]) -> None:
    model = Model(config_of(bases["llama"], DualTower.Config(stride=2)), bases["llama"])
    nn.init.normal_(model.port.head.weight)
    batch = pack([[SEQUENCES["picture behind words"]]])
    total, _ = model.losses(batch, torch.Generator().manual_seed(0))["flow_matching"]
    total.backward()
    for index in (1, 3):
        grad = model.port.block_modulation[str(index)].weight.grad  # type: ignore[union-attr]
        assert isinstance(grad, torch.Tensor)
        assert float(grad.unflatten(0, (6, WIDTH)).abs().amax((1, 2)).min()) > 0


@pytest.mark.full
def test_compiled_layers_agree_and_no_step_makes_new_graphs(
    bases: dict[str, Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What modulates is other tensors in each layer and step; the graphs are those of the first step."""
    eager = torch.compile(base.tower_rows, fullgraph=True, dynamic=False, backend="eager")
    monkeypatch.setattr(base, "compiled", lambda _: eager)
    model = Model(config_of(bases["llama"], DualTower.Config(stride=2)), bases["llama"])
    randomise(model)
    batch = view([[SEQUENCES["words around picture"]], [SEQUENCES["picture behind words"]]], model)
    expected, graphs = look(model, batch), []
    engine = model.training_engine(torch.float32, "as asked", "eager", True)
    with torch._dynamo.config.patch(recompile_limit=64), model.using(engine):  # as `compiled` does
        for time in (1.0, 0.5, 1.0):
            media = batch.media["image"]
            found = look(model, batch.with_media("image", time=media.time * time))
            graphs.append(compiled_graphs())
    assert distance(found, expected) <= 2e-5
    assert graphs[0] > 0 and graphs[0] == graphs[-1]


# -------------------------------------------------------------------------------------------------------------- costs


def test_its_weights_and_products_are_counted(bases: dict[str, Backbone]) -> None:
    """DiT: 6 D (D + 1) weights per block; PixArt: once, and a row of 6 D per block."""
    fusion, models = DualTower.Config(stride=2), {}
    for time in ("add", "adaln", "adaln single"):
        models[time] = Model(config_of(bases["llama"], fusion, time), bases["llama"])
    count = {time: model.num_new_parameters for time, model in models.items()}
    assert count["adaln"] - count["add"] == 2 * 6 * WIDTH * (WIDTH + 1)
    assert count["adaln single"] - count["add"] == 6 * WIDTH * (WIDTH + 1) + 2 * 6 * WIDTH
    flops = {time: flops_of_shape(model)["draw"]["forward"] for time, model in models.items()}
    level = 2 * WIDTH * (2 * TIME_FREQUENCIES + WIDTH)  # once where it is added, else before each of two blocks
    assert flops["adaln"] - flops["add"] == level + 2 * 2 * 6 * WIDTH * WIDTH
    assert flops["adaln single"] == flops["adaln"]


# ------------------------------------------------------------------------------------------------------ bad settings


@pytest.mark.parametrize(
    "fusion",
    [
        Prefix.Config(),
        SparseExperts.Config(experts=3),
        CrossAttention.Config(heads=2, head_width=16, connector=None),
        Layered.Config(parts=(DualTower.Config(layers=(0, 2)), SparseExperts.Config(layers=(2, 4), experts=2))),
    ],
    ids=lambda fusion: type(fusion).__qualname__.split(".")[0],
)
def test_a_fusion_without_blocks_for_media_refuses_in_one_line(bases: dict[str, Backbone], fusion: Any) -> None:
    with pytest.raises(XFusionError, match="'adaln' acts inside new blocks.* has none: take 'add' or") as error:
        Model(replace(config_of(bases["llama"], fusion), media=NoObjective.Config()), bases["llama"])
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize("port", [CodePort.Config(time="adaln"), Linear.Config(time="modulate")])
def test_ports_without_noise_levels_refuse_to_modulate(port: Any) -> None:
    with pytest.raises(XFusionError, match=f"no noise level.*leave the port's time at 'add', not '{port.time}'"):
        port.build(8, 4, 0.1, 2)
