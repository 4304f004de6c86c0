"""Contract: every mechanism is its published equation, and all of them begin as the same function
(X-Fusion, arXiv 2504.20996, section 3.2 and figure 3).

The equations are written here once more, in NumPy, one position after another: a Llama layer, who may see whom, and what
each system makes of the two. They share no code with the library but the weights and the port's input states.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contracts.table import (
    FAMILIES,
    LAYERS,
    Noise,
    distance,
    exact,
    float64_base,
    look,
    mixed_sequences,
    model_config,
    picture,
    randomise,
    view,
    words,
)
from torch import Tensor

import xfusion
from xfusion.backbone import Backbone
from xfusion.data.pack import pack
from xfusion.data.sequence import Batch, Media, Rows, Sequence, Text, XFusionError, visible
from xfusion.fusion.base import Fusion, Pass
from xfusion.fusion.dual_tower import DualTower
from xfusion.fusion.gated_tower import GatedTower
from xfusion.fusion.layered import Layered
from xfusion.fusion.modality_experts import ModalityExperts
from xfusion.fusion.shared_decoder import SharedDecoder
from xfusion.fusion.sparse_experts import SparseExperts
from xfusion.layers import keys_values, slice_call
from xfusion.model import Model
from xfusion.recipes import base as recipes

FLOAT32, FLOAT64 = 1e-5, 1e-9
SEQUENCES = mixed_sequences()
COGVLM = ("query", "key", "value", "output", "mlp")
OWL = ("norm", "key", "value")
"""Parts of their own, by the library's names; below, by Llama's."""
NORMS = ("input_layernorm", "post_attention_layernorm")
ATTENTION = tuple(f"self_attn.{p}_proj" for p in "qkvo")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PLAIN_FAMILIES = ("llama", "qwen3", "gemma3")


@pytest.fixture(scope="module")
def wide(bases: dict[str, Backbone]) -> dict[str, Backbone]:
    """The bases in float64."""
    return {name: float64_base(bases[name]) for name in PLAIN_FAMILIES}


def built(base: Backbone, fusion: Fusion.Config, *, randomised: bool = True) -> Model:
    """A model in the precision of its base."""
    model = Model(dataclasses.replace(model_config(base), fusion=fusion), base)
    if randomised:
        randomise(model)
    return model.to(base.dtype).eval()


def behind_layers(model: Model, batch: Batch) -> list[dict[str, Tensor]]:
    """The states behind each layer, by owner."""
    kept: list[dict[str, Tensor]] = []
    behind = model._layer_output

    def watched(run: Any, *others: Any) -> Tensor:  # also behind a layer that is passed over
        kept.append(dict(run.states))
        return behind(run, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "_layer_output", watched)
        model.run_pass(batch)
    assert len(kept) == LAYERS
    return kept


# ------------------------------------------------------------------------------------- all begin as the same function


def beginnings(stride: int) -> dict[str, Fusion.Config]:
    """Mechanisms with copies at the same layers: all of them, or at stride 2 the layers 1 and 3. Sparse experts, whose media go
    through the frozen layers elsewhere, only at all of them.
    """
    at: dict[str, Any] = {"stride": stride}
    low, high = {**at, "layers": (0, 2)}, {**at, "layers": (2, 4)}
    sparse: dict[str, Fusion.Config] = {
        "sparse experts": SparseExperts.Config(**at, experts=3),
        "sparse experts, of the paper": SparseExperts.Config(**at, experts=4, frozen_expert=False),
    }
    return {
        "single tower": SharedDecoder.Config(**at),
        "gated tower": GatedTower.Config(**at),
        "dual projection": ModalityExperts.Config(**at),
        "dual tower": DualTower.Config(**at),
        "x-fuse": DualTower.Config(**at, fuse="both"),
        "x-fuse-proj": DualTower.Config(**at, fuse="both", fuse_projection=True),
        "dynamic": DualTower.Config(**at, fuse="both", fuse_by="token"),
        "low-rank tower": DualTower.Config(**at, rank=3),
        "cogvlm": ModalityExperts.Config(**at, own=COGVLM),
        "mplug-owl2": ModalityExperts.Config(**at, own=OWL),
        "ffn only": ModalityExperts.Config(**at, own=("mlp",)),
        "bagel": ModalityExperts.Config(**at, noised_only=True),
        "hybrid": Layered.Config(parts=(ModalityExperts.Config(**low), DualTower.Config(**high, fuse="text"))),
        "other hybrid": Layered.Config(parts=(SharedDecoder.Config(**low), GatedTower.Config(**high))),
    } | (sparse if stride == 1 else {})


def base_states(model: Model, batch: Batch) -> Tensor:
    """What the base's own decoder makes of a model's input states, by masks and positions counted here, ``[B, S, D]``."""
    base, media = model.backbone, batch.media["image"]
    embedded = base.model.get_input_embeddings()(batch.text_ids.clamp(min=0))
    embedded = torch.where((batch.text_ids < 0)[..., None], model.port.end, embedded)
    order = torch.cat([batch.text.order, media.rows.order], dim=1).tolist()
    laid_out = [places(sequence) for sequence in SEQUENCES.values()]
    position = torch.tensor(
        [[at[i].position if i >= 0 else 0 for i in o] for o, at in zip(order, laid_out, strict=True)]
    )

    def mask(window: int | None) -> Tensor:
        seen = torch.zeros(*position.shape, position.shape[1], dtype=torch.bool)
        for row, (indices, at) in enumerate(zip(order, laid_out, strict=True)):
            for i, query in enumerate(indices):
                for j, key in enumerate(indices):
                    seen[row, i, j] = sees(at[query], at[key], query - key, window) if min(query, key) >= 0 else j == i
        return torch.zeros(seen.shape, dtype=base.dtype).masked_fill(~seen, torch.finfo(base.dtype).min)[:, None]

    masks: Any = mask(None)
    if "sliding_attention" in (getattr(base.config, "layer_types", None) or ()):
        masks = {"full_attention": masks, "sliding_attention": mask(base.config.sliding_window)}
    states = torch.cat([embedded, model.port(media)], dim=1)
    return base.model.base_model(inputs_embeds=states, attention_mask=masks, position_ids=position).last_hidden_state


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("family", PLAIN_FAMILIES)
@torch.no_grad()
def test_all_mechanisms_begin_as_one_function(
    wide: dict[str, Backbone], family: str, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spec 1.4, in exact arithmetic, for every mixed sequence: equal are the states of all words and pictures.

    The blocks are copies, so it does not matter whose weights a position takes, nor which of two equal sets of keys and
    values it reads: single tower = dual projection in any division of parts = dual tower. What could add to that is shut:
    gamma = 0 (gated tower), alpha = 1 and beta = 0 (X-Fuse), a gate of tanh 0 (dynamic), B = 0 in W + B A (low rank). Experts
    are copies too, weighed by numbers whose sum is 1.
    Without slim form that function is the base's own decoder on the same input; in slim form media states pass
    every other layer unchanged, in all mechanisms alike. No noise level enters, as the spec states it.
    """
    with exact(monkeypatch):
        found: dict[str, Tensor] = {}
        for name, config in beginnings(stride).items():
            model = built(wide[family], config, randomised=False)
            for parameter in model.port.time[-1].parameters():
                parameter.zero_()
            batch = view([[s] for s in SEQUENCES.values()], model)
            assert set(batch.media["image"].time.tolist()) > {0.0}
            table = Rows.cat([batch.text, batch.media["image"].rows])
            found[name] = model.run_pass(batch)[0][table.order >= 0]
        if stride == 1:
            found["base"] = base_states(model, batch)[table.order >= 0]
        first = found["dual tower"]
        assert float(first.std()) > 0.1
        assert {n: d for n, x in found.items() if (d := float((x - first).abs().max())) > FLOAT64} == {}


# ------------------------------------------------------------------------------------------- one perturbed weight


MECHANISMS = {
    "single tower": SharedDecoder.Config(),
    "dual projection": ModalityExperts.Config(),
    "dual tower": DualTower.Config(),
}
AROUND = (words(3, 3), picture((2, 3), 3), words(4, 4))
AT = 1
"""The layer whose weight is perturbed."""


def new_weight(model: Model, path: str) -> Tensor:
    """A matrix of the block that media positions take at layer `AT`."""
    return model.fusion.block(AT, model.backbone.layers[AT]).get_submodule(path).get_parameter("weight")


@pytest.mark.parametrize(
    "family", [f if f == "llama" else pytest.param(f, marks=pytest.mark.full) for f in PLAIN_FAMILIES]
)
@pytest.mark.parametrize("path", [*ATTENTION, *MLP])
@torch.no_grad()
def test_which_states_a_single_new_weight_reaches(bases: dict[str, Backbone], family: str, path: str) -> None:
    """Spec 1.4: words read the keys and values that dual projection makes of a picture, and the dual tower's never.

    What makes queries, outputs and MLP of a picture is the picture's alone in both. The single tower's weights are the
    words' own. Every perturbation moves the picture at its layer, and with it the words one layer on.
    """
    changed: dict[tuple[str, str, int], float] = {}
    for name, config in MECHANISMS.items():
        model = built(bases[family], config, randomised=False)
        batch = view([[Sequence(segments=AROUND)]], model)
        before = behind_layers(model, batch)
        weight = new_weight(model, path)
        weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        after = behind_layers(model, batch)
        for layer in (AT - 1, AT, AT + 1):
            moved = {o: (after[layer][o] - before[layer][o])[0].abs().amax(-1) for o in ("text", "image")}
            changed[name, "prompt", layer] = float(moved["text"][:3].max())
            changed[name, "words", layer] = float(moved["text"][3:].min())
            changed[name, "some word", layer] = float(moved["text"][3:].max())
            changed[name, "picture", layer] = float(moved["image"][1:].min())
    nothing, much = 0.0, 1e-4  # the same calls on the same numbers: not one bit
    assert {n: v for n, v in changed.items() if n[2] == AT - 1 and v != nothing} == {}
    assert all(changed[name, "picture", AT] > much for name in MECHANISMS)
    assert all(changed[name, "words", AT + 1] > much for name in MECHANISMS)
    for name in ("dual projection", "dual tower"):
        assert changed[name, "prompt", AT] == changed[name, "prompt", AT + 1] == nothing, name
    assert changed["single tower", "prompt", AT] > much
    assert changed["single tower", "words", AT] > much
    assert changed["dual tower", "some word", AT] == nothing
    if path in ("self_attn.k_proj", "self_attn.v_proj"):
        assert changed["dual projection", "words", AT] > much
    else:
        assert changed["dual projection", "some word", AT] == nothing


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("part", "moves"),
    [("query", set()), ("key", {"keys"}), ("value", {"values"}), ("output", set()), ("mlp", set())],
)
@torch.no_grad()
def test_a_part_of_its_own_is_that_part_in_every_family(
    bases: dict[str, Backbone], family: str, part: Any, moves: set[str]
) -> None:
    """Also where one matrix makes queries, keys and values together: each head's keys and values, and nothing else."""
    model = built(bases[family], ModalityExperts.Config(own=(part,)))
    batch = view([[Sequence(segments=AROUND)]], model)
    made: dict[bool, list[tuple[Tensor, Tensor]]] = {True: [], False: []}
    layer = model.fusion.layer

    def watched(index: int, frozen: torch.nn.Module, call: dict[str, Any], run: Pass) -> dict[str, Tensor]:
        x, whole = torch.cat(list(run.states.values()), dim=1), slice_call(call, slice(None))
        for own in made:
            made[own].append(keys_values(model.fusion.block(index, frozen) if own else frozen, x, whole))
        return layer(index, frozen, call, run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.fusion, "layer", watched)
        media = model.run_pass(batch)[1].states["image"]
    plain = built(bases[family], ModalityExperts.Config(own=(part,)), randomised=False)
    for own, frozen in zip(made[True], made[False], strict=True):
        for name, one, other in zip(("keys", "values"), own, frozen, strict=True):
            each_head = (one - other).abs().amax((0, 2, 3))
            assert bool((each_head > 1e-3).all()) if name in moves else bool((each_head == 0).all()), name
    plain.port.load_state_dict(model.port.state_dict())
    assert float((plain.run_pass(batch)[1].states["image"] - media).abs().max()) > 1e-3


# --------------------------------------------------------------------------------- a Llama, one position at a time


Vector = np.ndarray
Weights = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """One position of a sequence, as the papers speak of it."""

    position: int
    """Index given to the rotary code."""
    segment: tuple[int, str]
    media: bool = False
    both_ways: bool = False
    later: bool = True
    """Whether positions of other segments behind it may see it."""
    noised: bool = False
    after_media: bool = False


def places(sequence: Sequence) -> list[Place]:
    """The positions of a sequence in reading order: words, [BOI] before a picture, its patches, [EOI] behind it."""
    out: list[Place] = []
    position, media_seen = 0, False
    for number, segment in enumerate(sequence.segments):
        last = number == len(sequence.segments) - 1
        if isinstance(segment, Text):
            for _ in range(len(segment.ids) - (last and segment.has_loss)):  # the last word of an answer is a label
                out.append(Place(position=position, segment=(number, "words"), after_media=media_seen))
                position += 1
            continue
        media_seen, own = True, {"segment": (number, "picture"), "media": True, "later": segment.visible_to_later}
        out.append(Place(position=position, after_media=True, **own))
        position += 1
        for _ in range(segment.grid[0] * segment.grid[1]):
            noised, both_ways = segment.state == "noised", segment.bidirectional
            out.append(Place(position=position, after_media=True, noised=noised, both_ways=both_ways, **own))
            position += 0 if segment.shared_position else 1
        position += 1 if segment.shared_position else 0
        if not last:
            out.append(Place(position=position, segment=(number, "end"), after_media=True))
            position += 1
    return out


def sees(query: Place, key: Place, behind: int, window: int | None = None) -> bool:
    """Causal, within a sliding window; both ways and whole inside a picture; a hidden picture is seen by itself alone.

    Args:
        behind: by how many positions the query stands behind the key.
    """
    same = query.segment == key.segment
    if same and query.both_ways and key.both_ways:
        return True
    return behind >= 0 and (window is None or behind < window) and (same or key.later)


class Llama:
    """The arithmetic of a Llama layer for single positions, in float64; rotary tables in float32, as transformers has them."""

    def __init__(self, config: Any):
        self.heads, self.keys, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.eps = config.rms_norm_eps
        theta = config.rope_parameters["rope_theta"]
        frequency = 1.0 / theta ** (torch.arange(0, self.width, 2).float() / self.width)
        angle = torch.arange(64).float()[:, None] * frequency
        self.cos, self.sin = angle.cos().double().numpy(), angle.sin().double().numpy()

    def norm(self, x: Vector, weight: Vector) -> Vector:
        return weight * x / np.sqrt(np.mean(x * x) + self.eps)

    def turn(self, x: Vector, position: int) -> Vector:
        """Rotary code of heads ``[H, K]``."""
        a, b = np.split(x, 2, axis=-1)
        cos, sin = self.cos[position], self.sin[position]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def read(self, w: Weights, norm: str, x: Vector) -> Vector:
        """What a branch reads: ``(1 + s) norm(x) + b`` where the weights come with b, s and g of a noise level (DiT)."""
        shift, scale, _ = w.get(f"{norm} by noise", np.zeros((3, 1)))
        return (1 + scale) * self.norm(x, w[norm]) + shift

    def added(self, w: Weights, norm: str, out: Vector) -> Vector:
        """What a branch adds: ``(1 + g) f``."""
        return (1 + w.get(f"{norm} by noise", np.zeros((3, 1)))[2]) * out

    def key_value(self, w: Weights, x: Vector, position: int) -> tuple[Vector, Vector]:
        n = self.read(w, NORMS[0], x)
        k, v = ((w[f"self_attn.{p}_proj"] @ n).reshape(self.keys, self.width) for p in "kv")
        return self.turn(k, position), v

    def behind(self, w: Weights, x: Vector, position: int, seen: list[tuple[Vector, Vector]]) -> Vector:
        """The layer's output at one position that reads some keys and values."""
        q = self.turn((w["self_attn.q_proj"] @ self.read(w, NORMS[0], x)).reshape(self.heads, -1), position)
        read = []
        for head in range(self.heads):
            shared = head * self.keys // self.heads
            scores = np.array([k[shared] @ q[head] for k, _ in seen]) / np.sqrt(self.width)
            weight = np.exp(scores - scores.max())
            read.append(sum(a * v[shared] for a, (_, v) in zip(weight / weight.sum(), seen, strict=True)))
        y = x + self.added(w, NORMS[0], w["self_attn.o_proj"] @ np.concatenate(read))
        n = self.read(w, NORMS[1], y)
        gate = w["mlp.gate_proj"] @ n
        return y + self.added(w, NORMS[1], w["mlp.down_proj"] @ (gate / (1 + np.exp(-gate)) * (w["mlp.up_proj"] @ n)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """What an equation speaks of: the states before a layer, the frozen weights, and the mechanism's own."""

    llama: Llama
    index: int
    places: list[Place]
    x: list[Vector]
    frozen: Weights
    fusion: Any

    def by(self, weights: Callable[[Place], Weights]) -> list[Vector]:
        """The layer at all positions; each has its weights for queries, keys, values, output, norms and MLP."""
        pairs = list(zip(self.places, self.x, strict=True))
        made = [self.llama.key_value(weights(p), x, p.position) for p, x in pairs]
        out = []
        for i, (place, x) in enumerate(pairs):
            seen = [made[j] for j, other in enumerate(self.places) if sees(place, other, i - j)]
            out.append(self.llama.behind(weights(place), x, place.position, seen))
        return out

    def block(self, weights: Weights) -> list[Vector]:
        """One whole block at all positions."""
        return self.by(lambda _: weights)

    def skipped(self) -> list[Vector]:
        """A layer without a block: the frozen one for words, media unchanged."""
        plain = self.block(self.frozen)
        return [x if p.media else h for p, x, h in zip(self.places, self.x, plain, strict=True)]

    @property
    def copied(self) -> Weights:
        """A whole block's own weights."""
        return of_module(self.fusion.blocks[str(self.index)])


def of_module(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """The weights of a layer by the paths of its parts."""
    return {name.removesuffix(".weight"): p.detach().double().numpy() for name, p in module.named_parameters()}


def single_tower(layer: Layer) -> list[Vector]:
    """H = F(E)."""
    return layer.block(layer.copied)


def gated_tower(layer: Layer) -> list[Vector]:
    """H = F_txt(E) + gamma F_gate(E), from the first media token on."""
    plain, gated = layer.block(layer.frozen), layer.block(layer.copied)
    gamma = float(layer.fusion.gates[str(layer.index)])
    assert gamma != 0
    return [h + gamma * g if p.after_media else h for p, h, g in zip(layer.places, plain, gated, strict=True)]


def dual_tower(layer: Layer) -> list[Vector]:
    """h_i = F_img(E)_i at media, F_txt(E)_i at words; with X-Fuse mixed, from the first media token on."""
    return by_owner(layer, layer.block(layer.frozen), layer.block(layer.copied))


def tower_of_width(heads: int, keys: int) -> Callable[[Layer], list[Vector]]:
    """The dual tower with F_img(x) = x + P_out (G(P_in x) - P_in x), G a block of its own width, heads and keys."""

    def equation(layer: Layer) -> list[Vector]:
        own, inside = {}, copy.copy(layer.llama)
        inside.heads, inside.keys = heads, keys
        for name, values in layer.copied.items():
            own[name.removeprefix("layer.")] = values
        into, out = own.pop("into"), own.pop("out")
        assert len(into) == heads * inside.width and set(own) == {*NORMS, *ATTENTION, *MLP}
        narrow = [into @ x for x in layer.x]
        wide = dataclasses.replace(layer, llama=inside, x=narrow).block(own)
        by_media = [x + out @ (h - n) for x, h, n in zip(layer.x, wide, narrow, strict=True)]
        return by_owner(layer, layer.block(layer.frozen), by_media)

    return equation


def low_rank_tower(layer: Layer) -> list[Vector]:
    """The dual tower with F_img's matrices W + B A and its norms frozen."""
    deltas = layer.fusion.blocks[str(layer.index)]
    assert {path.replace("/", ".") for path in deltas} == {*ATTENTION, *MLP}
    own = dict(layer.frozen)
    for path in (*ATTENTION, *MLP):
        part = deltas[path.replace(".", "/")]
        b, a = (getattr(part, name).detach().numpy() for name in ("up", "down"))
        assert a.shape[0] == b.shape[1] == 3 and np.abs(b).max() > 0
        own[path] = own[path] + b @ a
    return by_owner(layer, layer.block(layer.frozen), layer.block(own))


def by_owner(layer: Layer, by_text: list[Vector], by_media: list[Vector]) -> list[Vector]:
    """Each position keeps its tower's output, or mixes it with the other's where the fusion has a mix for its side."""
    out = []
    for place, x, text, media in zip(layer.places, layer.x, by_text, by_media, strict=True):
        own, other = (media, text) if place.media else (text, media)
        name = f"{'media' if place.media else 'text'}_{layer.index}"
        mixed = name in layer.fusion.mixes and place.after_media
        out.append(mix_of(layer.fusion.mixes[name], x, own, other) if mixed else own)
    return out


def mix_of(mix: Any, x: Vector, own: Vector, other: Vector) -> Vector:
    """alpha own + beta P other; or by a gate of the position's own state, own + tanh(w . norm(x) + b) P (other - own)."""
    w = {name: p.detach().numpy() for name, p in mix.named_parameters()}
    project = w.get("projection.weight", np.eye(len(x)))
    if "alpha" in w:
        assert w["beta"] != 0
        return w["alpha"] * own + w["beta"] * (project @ other)
    gate = np.tanh(w["weight"] @ (x / np.sqrt(np.mean(x * x))) + w["bias"])
    assert gate != 0
    return own + gate * (project @ (other - own))


def experts(own: tuple[str, ...], chosen: Callable[[Place], bool]) -> Callable[[Layer], list[Vector]]:
    """One joint attention, in which some positions have some parts of their own."""

    def equation(layer: Layer) -> list[Vector]:
        new: dict[str, np.ndarray] = {}
        for path, part in layer.fusion.blocks[str(layer.index)].items():
            for name, values in of_module(part).items():
                new[f"{path.replace('/', '.')}.{name}".removesuffix(".weight")] = values
        assert set(new) == set(own)
        media = {**layer.frozen, **new}
        return layer.by(lambda place: media if chosen(place) else layer.frozen)

    return equation


def hybrid(layer: Layer) -> list[Vector]:
    """Dual projection below, a dual tower with X-Fuse on words above."""
    below = layer.index < 2
    fusion = layer.fusion.parts[0 if below else 1]
    return (dual_projection if below else dual_tower)(dataclasses.replace(layer, fusion=fusion))


dual_projection = experts((*NORMS, *ATTENTION, *MLP), lambda p: p.media)
ALL = range(LAYERS)
EQUATIONS: dict[str, tuple[Fusion.Config, range | tuple[int, ...], Callable[[Layer], list[Vector]]]] = {
    "single tower": (SharedDecoder.Config(), ALL, single_tower),
    "single tower in slim form": (SharedDecoder.Config(stride=2), (1, 3), single_tower),
    "gated tower": (GatedTower.Config(), ALL, gated_tower),
    "gated tower in slim form": (GatedTower.Config(stride=2), (1, 3), gated_tower),
    "dual tower": (DualTower.Config(), ALL, dual_tower),
    "dual tower in slim form": (DualTower.Config(stride=2, offset=0, mlp=40), (0, 2), dual_tower),
    "wide tower": (DualTower.Config(width=96), ALL, tower_of_width(6, 3)),
    "wide tower, mixed": (
        DualTower.Config(width=80, mlp=24, stride=2, fuse="both", fuse_by="token"),
        (1, 3),
        tower_of_width(5, 1),
    ),
    "narrow tower": (
        DualTower.Config(width=48, stride=2, offset=0, fuse="both", fuse_projection=True),
        (0, 2),
        tower_of_width(3, 1),
    ),
    "low-rank tower": (DualTower.Config(rank=3), ALL, low_rank_tower),
    "x-fuse": (DualTower.Config(fuse="both"), ALL, dual_tower),
    "x-fuse on words": (DualTower.Config(fuse="text", stride=3, offset=2), (2,), dual_tower),
    "x-fuse-proj": (DualTower.Config(fuse="both", fuse_projection=True), ALL, dual_tower),
    "dynamic": (DualTower.Config(fuse="both", fuse_by="token", fuse_projection=True), ALL, dual_tower),
    "dynamic low-rank tower on pictures": (
        DualTower.Config(fuse="image", fuse_by="token", rank=3, stride=2),
        (1, 3),
        low_rank_tower,
    ),
    "dual projection": (ModalityExperts.Config(), ALL, dual_projection),
    "dual projection in slim form": (ModalityExperts.Config(stride=2), (1, 3), dual_projection),
    "cogvlm": (ModalityExperts.Config(own=COGVLM), ALL, experts((*ATTENTION, *MLP), lambda p: p.media)),
    "mplug-owl2": (
        ModalityExperts.Config(own=OWL),
        ALL,
        experts((*NORMS, "self_attn.k_proj", "self_attn.v_proj"), lambda p: p.media),
    ),
    "ffn only": (ModalityExperts.Config(own=("mlp",)), ALL, experts(MLP, lambda p: p.media)),
    "bagel": (
        ModalityExperts.Config(noised_only=True),
        ALL,
        experts((*NORMS, *ATTENTION, *MLP), lambda p: p.noised),
    ),
    "hybrid": (
        Layered.Config(
            parts=(ModalityExperts.Config(layers=(0, 2)), DualTower.Config(layers=(2, 4), offset=1, fuse="text"))
        ),
        (0, 1, 3),
        hybrid,
    ),
}
"""Name -> what is built, the layers at which something new stands, and the equation."""


def input_states(model: Model, batch: Batch, sequence: Sequence) -> list[Vector]:
    """Embeddings of words and the port's rows, in reading order."""
    table = model.backbone.model.get_input_embeddings().weight
    text = [model.port.end if i < 0 else table[i] for i in batch.text_ids[0].tolist()]
    rows = list(zip(batch.text.order[0].tolist(), text, strict=True))
    if batch.media:
        media = batch.media["image"]
        rows += zip(media.rows.order[0].tolist(), model.port(media)[0], strict=True)
    assert len(rows) == len(places(sequence))
    return [x.detach().numpy() for _, x in sorted(rows, key=lambda row: row[0])]


def by_equation(
    model: Model, batch: Batch, sequence: Sequence, layers: range | tuple[int, ...], equation: Any
) -> Iterator[list[Vector]]:
    """States behind each layer, in reading order."""
    x, llama = input_states(model, batch, sequence), Llama(model.backbone.config)
    for index, frozen in enumerate(model.backbone.layers):
        layer = Layer(
            llama=llama,
            index=index,
            places=places(sequence),
            x=x,
            frozen=of_module(frozen),
            fusion=model.fusion,
        )
        x = equation(layer) if index in layers else layer.skipped()
        yield x


def in_reading_order(states: dict[str, Tensor], batch: Batch) -> Tensor:
    """Rows ``[S, D]`` of a batch of one row."""
    tables = {"text": batch.text, **{name: m.rows for name, m in batch.media.items()}}
    order = torch.cat([tables[owner].order[0] for owner in states])
    return torch.cat([x[0] for x in states.values()])[order.argsort()]


def hold_to_equation(model: Model, sequences: dict[str, Sequence], layers: Any, equation: Any) -> None:
    assert model.fusion.state_layers == tuple(layers)
    for name, sequence in sequences.items():
        batch = view([[sequence]], model)
        wanted = [torch.tensor(np.stack(x)) for x in by_equation(model, batch, sequence, layers, equation)]
        for engine in (model.plain_engine(), model.reference_engine()):
            with model.using(engine):
                found = behind_layers(model, batch)
            for index, (states, expected) in enumerate(zip(found, wanted, strict=True)):
                worst = float((in_reading_order(states, batch) - expected).abs().max())
                assert worst <= FLOAT64, (name, index, engine.reason, worst)


@pytest.mark.parametrize("name", EQUATIONS)
@torch.no_grad()
def test_a_mechanism_is_its_equation(wide: dict[str, Backbone], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind every layer, at every position of every mixed sequence, on the fast and on the reference path."""
    config, layers, equation = EQUATIONS[name]
    with exact(monkeypatch):
        hold_to_equation(built(wide["llama"], config), SEQUENCES, layers, equation)


@torch.no_grad()
def test_the_naive_llama_is_transformers(wide: dict[str, Backbone], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all above could share one mistake about words."""
    base, ids = wide["llama"], words(9, 1).ids
    with exact(monkeypatch):
        expected = base.model(torch.tensor([ids])).logits[0]
    model, sequence = built(base, SharedDecoder.Config(), randomised=False), Sequence(segments=(words(9, 1),))
    for x in by_equation(model, pack([[sequence]]), sequence, (), None):
        last = x
    head, norm = (m.weight.detach().numpy() for m in (base.model.lm_head, base.decoder.norm))
    found = np.stack([head @ Llama(base.config).norm(h, norm) for h in last])
    assert float((torch.tensor(found) - expected).abs().max()) <= FLOAT64


# ------------------------------------------------------------------------------- CogVLM's positions and causal order


def as_in_cogvlm(sequence: Sequence) -> Sequence:
    """One rotary position per picture, causal order inside it."""
    changed = {"shared_position": True, "bidirectional": False}
    segments = [dataclasses.replace(s, **changed) if isinstance(s, Media) else s for s in sequence.segments]
    return Sequence(segments=tuple(segments))


def tables_of(sequence: Sequence) -> tuple[list[int], list[str]]:
    """Position ids and who sees whom ("1"), both in reading order."""
    batch = pack([[sequence]])
    table = Rows.cat([batch.text, *(m.rows for m in batch.media.values())])
    order = table.order[0].argsort()
    seen = visible(table, table)[0][order][:, order]
    return table.position[0][order].tolist(), ["".join(str(int(v)) for v in row) for row in seen]


def test_positions_and_mask_of_a_picture_by_hand() -> None:
    """Two words, [BOI], four patches, [EOI], two words, [BOI], one patch: as CogVLM numbers them, and as usual."""
    sequence = Sequence(segments=(words(2, 1), picture((2, 2), 1), words(2, 2), picture((1, 1), 2)))
    positions, mask = tables_of(as_in_cogvlm(sequence))
    assert positions == [0, 1, 2, 3, 3, 3, 3, 4, 5, 6, 7, 8]
    assert mask == ["1" * (i + 1) + "0" * (11 - i) for i in range(12)]
    positions, mask = tables_of(sequence)
    assert positions == list(range(12))
    assert mask == [
        "100000000000",
        "110000000000",
        "111000000000",  # [BOI] stands outside the block
        "111111100000",
        "111111100000",
        "111111100000",
        "111111100000",
        "111111110000",
        "111111111000",
        "111111111100",
        "111111111110",
        "111111111111",
    ]


def test_each_of_the_two_fields_does_its_own() -> None:
    only = {"shared_position": [0, 1, 1, 1, 2], "bidirectional": [0, 1, 2, 3, 4]}
    masks = {
        "shared_position": ["10000", "11110", "11110", "11110", "11111"],
        "bidirectional": ["10000", "11000", "11100", "11110", "11111"],
    }
    for name, value in {"shared_position": True, "bidirectional": False}.items():
        media = dataclasses.replace(picture((1, 3), 1), **{name: value})
        assert tables_of(Sequence(segments=(media, words(1, 1), words(1, 2, loss=True)))) == (
            [*only[name], only[name][-1] + 1],
            [row + "0" for row in masks[name]] + ["111111"],
        )


@pytest.mark.parametrize("name", ["cogvlm", "dual tower"])
@torch.no_grad()
def test_shared_positions_and_causal_patches_enter_the_equation(
    wide: dict[str, Backbone], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CogVLM as published; and that both fields change what is computed."""
    config, layers, equation = EQUATIONS[name]
    with exact(monkeypatch):
        model = built(wide["llama"], config)
        hold_to_equation(model, {n: as_in_cogvlm(s) for n, s in SEQUENCES.items()}, layers, equation)
        sequence, said = SEQUENCES["words around picture"], []
        for changes in ({}, {"shared_position": True}, {"bidirectional": False}):
            segments = [dataclasses.replace(s, **changes) if isinstance(s, Media) else s for s in sequence.segments]
            said.append(look(model, view([[Sequence(segments=tuple(segments))]], model)))
        assert min(distance(said[i], said[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-2


# ------------------------------------------------------------------------------------ from the first media token on


def opened(model: Model) -> None:
    """Every gate wide open."""
    fusion = model.fusion
    for gate in fusion.gates.values() if isinstance(fusion, GatedTower) else ():
        gate.fill_(0.5)
    for mix in fusion.mixes.values() if isinstance(fusion, DualTower) else ():
        (mix.beta if mix.by == "layer" else mix.bias).fill_(0.5)


RULES: dict[str, Callable[[Pass, str], Tensor] | None] = {
    "from the first media token on": None,
    "always": lambda run, owner: torch.ones_like(run.rows[owner].after_media[..., None]),
    "where the sequence has a picture": lambda run, owner: torch.full_like(
        run.rows[owner].after_media[..., None], run.media is not None
    ),
}


@pytest.mark.parametrize("reference", [False, True], ids=["fast", "reference"])
@pytest.mark.parametrize(
    "config",
    [
        GatedTower.Config(),
        DualTower.Config(fuse="text"),
        DualTower.Config(fuse="both", fuse_projection=True),
        DualTower.Config(fuse="text", fuse_by="token"),
    ],
    ids=["gated_tower", "x-fuse", "x-fuse-proj", "dynamic"],
)
@torch.no_grad()
def test_what_breaks_where_gates_do_not_wait_for_the_first_media_token(
    bases: dict[str, Backbone], config: Fusion.Config, reference: bool
) -> None:
    """A gate on every word is another language model; one that opens with any picture of the sequence also changes what
    was said before the picture came, so that no cache and no answer stands. The rule does neither. The fast path leaves the gates
    out where the text has no picture at all, so that a wrong rule shows only before a picture.
    """
    model = built(bases["llama"], config)
    opened(model)
    text = words(8, 1)
    base = model.text_logits(torch.tensor([text.ids]))[0]
    found: dict[str, tuple[bool, bool]] = {}
    for name, rule in RULES.items():
        with pytest.MonkeyPatch.context() as patch:
            if rule is not None:
                patch.setattr(Pass, "after_media", rule)
            with model.using(model.reference_engine() if reference else model.plain_engine()):
                alone = look(model, view([[Sequence(segments=(text,))]], model))[0][0]
                whole = Sequence(segments=(text, picture((2, 2), 1), words(3, 2)))
                mixed = look(model, view([[whole]], model))[0][0]
        errors = [float((alone - base).abs().max()), float((mixed[: len(alone)] - alone).abs().max())]
        assert all(error <= FLOAT32 or error > 0.1 for error in errors), errors  # nothing in between
        found[name] = (errors[0] <= FLOAT32, errors[1] <= FLOAT32)
    assert found == {  # words alone are the base's; a picture changes nothing before it
        "from the first media token on": (True, True),
        "always": (False, True) if reference else (True, False),
        "where the sequence has a picture": (True, False),
    }


# ------------------------------------------------------------------------------------ a mechanism of somebody else's


MADE_UP = """
from __future__ import annotations
from dataclasses import dataclass, replace
from torch import nn
from xfusion.data.mixture import MixtureConfig
from xfusion.fusion.base import Fusion
from xfusion.recipes.xfusion import xfusion

class SideStep(Fusion):
    preserves_text = prefix_is_constant = True
    @dataclass(frozen=True, kw_only=True)
    class Config(Fusion.Config):
        def build(self): return SideStep(self)
    def make(self, index, backbone):
        return nn.Linear(backbone.hidden_size, backbone.hidden_size)
    def layer(self, index, frozen, call, run):
        new = run.states | self.tower(0, index, frozen, run.states, call, run)
        return new | {o: h + self.block(index, frozen)(h) for o, h in new.items() if o != "text"}

def recipe():
    published = xfusion()
    backbone = replace(published.model.backbone, source=SOURCE)
    image = replace(published.model.image, patch=4, sizes=(16,))
    own = published.with_model(backbone=backbone, image=image, fusion=SideStep.Config())
    mixture = MixtureConfig(draw=2, caption=2, pack=2)
    stage = replace(published.stages[0], steps=3, warmup=1, rate=1e-2, ema=0.0, mixture=mixture)
    return replace(own, data="noise", stages=(stage,))
"""


@pytest.fixture
def made_up(bases: dict[str, Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's file with a mechanism and a recipe."""
    file = tmp_path / "my_own_fusion.py"
    file.write_text(MADE_UP.replace("SOURCE", repr(bases["llama"].source)))
    monkeypatch.setitem(sys.modules, file.stem, None)  # so that the test leaves no module behind
    del sys.modules[file.stem]
    return file


def train(recipe: str, out: Path, base: Backbone, **settings: Any) -> Model:
    plain: dict[str, Any] = {"compile": False, "dtype": torch.float32, "preview_every": 0}
    return xfusion.train(recipe, out=out, source=Noise(), backbone=base, **plain, **settings)


def test_a_mechanism_in_a_file_of_ones_own_is_trained_saved_resumed_and_loaded(
    bases: dict[str, Backbone], made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, out, base = f"{made_up}:recipe", tmp_path / "run", bases["llama"]
    recipe = recipes.find(name)()
    fresh = Model(recipe.model, base)
    assert type(fresh.fusion).__name__ == "SideStep"
    model = train(name, out, base)
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert len([e for e in steps if e["event"] == "step"]) == 3
    before, after = fresh.learned_state(), model.learned_state()
    assert [k for k, v in after.items() if k.startswith("fusion.") and torch.equal(v, before[k])] == []
    ids = torch.tensor([words(7, 1).ids])
    assert torch.equal(model.text_logits(ids, stack="fused"), model.text_logits(ids))

    assert train(name, out, base, resume=True).fingerprint == model.fingerprint
    with pytest.raises(XFusionError, match=r"'my_own_fusion:SideStep\.Config', which is not xfusion's: pass --trust"):
        xfusion.load(out / "pack", backbone=base)
    batch = view([[s] for s in SEQUENCES.values()], model)
    with torch.no_grad():
        expected = look(model, batch)
        assert distance(look(xfusion.load(out / "pack", backbone=base, trust=True), batch), expected) == 0
        assert distance(look(fresh, batch), expected) > 1e-3

        # Another process does not know the file: one line says what to do, and doing it helps.
        del sys.modules[made_up.stem]
        with pytest.raises(XFusionError, match="put the folder of my_own_fusion.py on PYTHONPATH") as error:
            xfusion.load(out / "pack", backbone=base, trust=True)
        assert "\n" not in str(error.value)
        monkeypatch.syspath_prepend(made_up.parent)
        importlib.invalidate_caches()
        assert distance(look(xfusion.load(out / "pack", backbone=base, trust=True), batch), expected) == 0


# ------------------------------------------------------------------------------------------------------ bad settings


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DualTower.Config(rank=0), "rank 0 .* a rank of at least 1"),
        (DualTower.Config(rank=2, mlp=32), "rank 2 with mlp 32.* leave mlp at None"),
        (DualTower.Config(fuse="images"), "fuse 'images'.*image, text, both"),  # type: ignore[arg-type]
        (DualTower.Config(fuse="both", fuse_by="head"), "fuse_by 'head'.*layer, token"),  # type: ignore[arg-type]
        (DualTower.Config(fuse_projection=True), "fuse_projection.* fuse"),
        (DualTower.Config(fuse_by="token"), "fuse_by 'token'.* fuse"),
        (ModalityExperts.Config(own=()), r"own \(\): name some of norm, query, key, value, output, mlp"),
        (ModalityExperts.Config(own=("norm", "queries")), "queries.*name some of norm, query"),  # type: ignore[arg-type]
        (Layered.Config(), "give each of the 0 mechanisms its layers"),
        (Layered.Config(parts=(DualTower.Config(), GatedTower.Config(layers=(2, 4)))), "2 mechanisms its layers"),
        (
            Layered.Config(parts=(DualTower.Config(layers=(2, 4)), GatedTower.Config(layers=(0, 3)))),
            "layers 2 to 4 begin before 3: ranges must not overlap",
        ),
        (Layered.Config(parts=(GatedTower.Config(layers=(2, 9)),)), "layers 2 to 9 are not within the base's 4"),
        (DualTower.Config(layers=(3, 2)), "layers 3 to 2 are not within"),
        (SharedDecoder.Config(layers=(2, 2)), "layers 2 to 2 are not within"),
        (ModalityExperts.Config(layers=(0, 5)), "layers 0 to 5 are not within the base's 4"),
        (GatedTower.Config(layers=(-1, 2)), "layers -1 to 2 are not within"),
        (GatedTower.Config(stride=0), "stride 0"),
        (SharedDecoder.Config(stride=-2), "stride -2"),
        (ModalityExperts.Config(offset=4), "offset 4 puts no block into 4 layers"),
        (DualTower.Config(offset=-1), "offset -1"),
        (DualTower.Config(layers=(1, 3), offset=2), "offset 2 puts no block into 2 layers"),
        (SharedDecoder.Config(stride=16), "stride 16, offset 8 puts no block into 4 layers"),
    ],
)
def test_settings_that_mean_nothing_are_refused_in_one_line(
    bases: dict[str, Backbone], config: Fusion.Config, message: str
) -> None:
    with pytest.raises(XFusionError, match=message) as error:
        built(bases["llama"], config, randomised=False)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@torch.no_grad()
def test_a_range_of_layers_leaves_the_others_to_the_base(bases: dict[str, Backbone]) -> None:
    """``layers=`` of one mechanism: outside it media states pass unchanged."""
    for kind in (DualTower, GatedTower, ModalityExperts, SharedDecoder):
        model = built(bases["llama"], kind.Config(layers=(1, 3)))
        assert model.fusion.state_layers == (1, 2)
        batch = view([[SEQUENCES["words around picture"]]], model)
        states = [model.port(batch.media["image"]), *(s["image"] for s in behind_layers(model, batch))]
        unchanged = [torch.equal(*pair) for pair in pairwise(states)]
        assert unchanged == [True, False, False, True], kind


def test_a_mechanism_of_all_layers_computes_only_at_its_own_in_a_hybrid(bases: dict[str, Backbone]) -> None:
    """Media go through the frozen layers of sparse experts; looked up, the states of text must be those of the right layer."""
    parts = (SparseExperts.Config(layers=(0, 2), experts=3), DualTower.Config(layers=(2, 4)))
    model = built(bases["llama"], Layered.Config(parts=parts))
    assert model.fusion.state_layers == (0, 1, 2, 3)
    batch = pack([[SEQUENCES["picture behind words"]]])
    looked_up = model.losses(batch, torch.Generator().manual_seed(0))
    model.engine.keep_text = False
    torch.testing.assert_close(model.losses(batch, torch.Generator().manual_seed(0)), looked_up)
