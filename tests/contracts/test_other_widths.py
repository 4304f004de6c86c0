"""Contract: towers of another width than the base's, and what they take over from a pretrained diffusion transformer."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.table import LAYERS, Noise, distance, look, mixed_sequences, model_config, view
from diffusers import AutoencoderTiny, DiTTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel

import xfusion
from xfusion.backbone import Backbone
from xfusion.data.mixture import MixtureConfig
from xfusion.data.sequence import XFusionError
from xfusion.fusion import pretrained
from xfusion.fusion.base import Fusion
from xfusion.fusion.dual_tower import DualTower
from xfusion.fusion.layered import Layered
from xfusion.fusion.modality_experts import ModalityExperts
from xfusion.layers import layer_pieces
from xfusion.model import Model
from xfusion.training import loop
from xfusion.training.stages import Recipe, Stage

HEAD, HEADS = 16, 4
"""Width and number of heads of the sources; 16 is also the head width of the Llama here."""
DEPTH, WIDTH = 6, HEAD * HEADS
ATTENTION = {f"self_attn.{own}_proj.weight": f"attn1.to_{name}.weight" for own, name in zip("qkv", "qkv", strict=True)}
ATTENTION["self_attn.o_proj.weight"] = "attn1.to_out.0.weight"
MLP = {"mlp.up_proj.weight": "ff.net.0.proj.weight", "mlp.down_proj.weight": "ff.net.2.weight"}


def built(base: Backbone, fusion: Fusion.Config, seed: int = 0) -> Any:
    """A fresh model."""
    return Model(dataclasses.replace(model_config(base), fusion=fusion, init_seed=seed), base).eval()


# ------------------------------------------------------------------------------------------------------- its beginning


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "olmo2"])
@pytest.mark.parametrize("width", [48, 96, 144])
@torch.no_grad()
def test_a_tower_of_another_width_starts_near_the_identity(bases: dict[str, Backbone], family: str, width: int) -> None:
    """P_in reads features in turn; P_out P_in is the identity on them times a tenth of the scale of embeddings."""
    base = bases[family]
    scale = 0.1 * base.embedding_scale
    model, plain = built(base, DualTower.Config(width=width)), base.hidden_size
    assert set(model.fusion.blocks) == {str(i) for i in range(LAYERS)}
    for block in model.fusion.blocks.values():
        into, out = block.into.weight, block.out.weight
        assert into.shape == (width, plain) and out.shape == (plain, width)
        assert set(into.flatten().tolist()) == {0.0, 1.0} and bool((into.sum(1) == 1).all())
        assert bool((into.sum(0) > 0).all()) if width >= plain else int((into.sum(0) > 0).sum()) == width
        read = torch.zeros(plain).index_fill(0, torch.arange(min(width, plain)), 1.0)
        torch.testing.assert_close(out @ into, scale * torch.diag(read))
        unit, zero = torch.ones(()), torch.zeros(())
        for name, parameter in block.layer.named_parameters():
            if "norm" in name or "ln_" in name:
                wanted = zero if name.endswith("bias") or family == "gemma3" else unit  # Gemma multiplies by 1 + weight
                assert bool((parameter == wanted).all()), name
            elif not name.endswith("bias"):
                assert 0.01 < float(parameter.std()) < 0.5, name
    batch = view([[s] for s in mixed_sequences().values()], model)
    before = model.run_pass(batch)[1].states["image"]
    for block in model.fusion.blocks.values():
        block.out.weight.zero_()
    without = model.run_pass(batch)[1].states["image"]
    share = float((before - without).std() / without.std())
    assert (
        0 < share < (2.0 if family == "gpt2" else 0.5)
    )  # this GPT-2's matrices begin 15 times as large as the family's


@torch.no_grad()
def test_fresh_blocks_hang_on_the_models_seed_alone(bases: dict[str, Backbone]) -> None:
    state = torch.get_rng_state()
    one = built(bases["llama"], DualTower.Config(width=96)).learned_state()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    same = built(bases["llama"], DualTower.Config(width=96)).learned_state()
    other = built(bases["llama"], DualTower.Config(width=96), seed=1).learned_state()
    assert all(torch.equal(one[name], same[name]) for name in one)
    matrices = [name for name in one if name.startswith("fusion.") and "_proj" in name]
    assert matrices and not any(torch.equal(one[name], other[name]) for name in matrices)


@pytest.mark.parametrize(
    ("width", "mlp", "heads", "keys", "inner"),
    [(96, None, 6, 3, 144), (80, 24, 5, 1, 24), (48, None, 3, 1, 72), (16, None, 1, 1, 24), (64, None, 4, 2, 96)],
)
def test_heads_keep_their_width_and_keys_their_share(
    bases: dict[str, Backbone], width: int, mlp: int | None, heads: int, keys: int, inner: int
) -> None:
    """The base has 4 heads of 16, two to a key, and an MLP of 96."""
    block: Any = built(bases["llama"], DualTower.Config(width=width, mlp=mlp)).fusion.blocks["0"].layer
    assert block.self_attn.q_proj.weight.shape == (heads * HEAD, width)
    assert block.self_attn.k_proj.weight.shape == (keys * HEAD, width)
    assert block.mlp.up_proj.weight.shape == (inner, width)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DualTower.Config(width=70), "tower width 70 is not made of heads of 16, .*: take 64 or 80"),
        (DualTower.Config(width=0), "tower width 0 .*: take 16 or 32"),
        (DualTower.Config(width=96, mlp=0), "MLP width 0 of a tower of width 96: take at least 1"),
        (DualTower.Config(width=96, rank=3), "rank 3 with width 96"),
        (DualTower.Config(start="org/name"), "start 'org/name' without width"),
    ],
)
def test_impossible_widths_are_refused(bases: dict[str, Backbone], config: Fusion.Config, message: str) -> None:
    with pytest.raises(XFusionError, match=message):
        built(bases["llama"], config)


def test_a_base_by_shape_alone_has_such_towers_without_weights() -> None:
    base = Backbone.of_shape("Llama-3.2-1B")
    config = DualTower.Config(width=1536, mlp=6144, stride=4, start="of no use here")
    fusion = config.build()
    fusion.install(base)
    fusion.begin(base)
    assert fusion.taken == {} and all(p.is_meta for p in fusion.parameters())
    block = 4 * 1536 * 1536 + 3 * 1536 * 6144 + 2 * 1536
    assert sum(p.numel() for p in fusion.parameters()) == 4 * (block + 2 * 1536 * 2048)


# ------------------------------------------------------------------------------ a pretrained diffusion transformer


def transformer(kind: type = DiTTransformer2DModel, **settings: Any) -> Any:
    """A tiny random one, biases included."""
    plain = {"num_layers": DEPTH, "attention_head_dim": HEAD, "num_attention_heads": HEADS, "sample_size": 8}
    own: dict[Any, dict[str, Any]] = {
        DiTTransformer2DModel: {"in_channels": 3, "out_channels": 3, "num_embeds_ada_norm": 10, "norm_num_groups": 3},
        PixArtTransformer2DModel: {
            "in_channels": 4,
            "out_channels": 8,
            "cross_attention_dim": WIDTH,
            "caption_channels": 32,
            "norm_num_groups": 4,
        },
        SD3Transformer2DModel: {
            "in_channels": 4,
            "out_channels": 4,
            "joint_attention_dim": 32,
            "caption_projection_dim": WIDTH,
            "pooled_projection_dim": 32,
        },
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = kind(**plain | own[kind] | settings)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


@pytest.fixture
def source(tmp_path: Path) -> tuple[Any, Path]:
    """A diffusion transformer, and the folder that holds it."""
    model = transformer()
    model.save_pretrained(tmp_path / "dit")
    return model, tmp_path / "dit"


def started(folder: Path, **settings: Any) -> DualTower.Config:
    """A tower with an MLP that is as wide as the source's."""
    return DualTower.Config(**{"width": WIDTH, "mlp": 4 * WIDTH, "start": str(folder)} | settings)


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [({}, {0: 0, 1: 2, 2: 3, 3: 4}), ({"stride": 2, "offset": 1}, {1: 0, 3: 3}), ({"layers": (0, 1)}, {0: 0})],
)
@torch.no_grad()
def test_what_fits_is_copied_and_the_rest_is_not(
    bases: dict[str, Backbone], source: tuple[Any, Path], settings: dict[str, Any], numbers: dict[int, int]
) -> None:
    """Block k of n takes number round(6 k / n): all six matrices, bit for bit; norms, gate and projections stay fresh."""
    given, folder = source
    model = built(bases["llama"], started(folder, **settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DualTower, "begin", lambda *_: None)
        plain = built(bases["llama"], started(folder, **settings)).fusion
    wanted = ATTENTION | MLP
    assert model.fusion.taken == {
        index: {own: f"{number}.{name}" for own, name in wanted.items()} for index, number in numbers.items()
    }
    for index, number in numbers.items():
        theirs = dict(given.transformer_blocks[number].named_parameters())
        fresh = dict(plain.blocks[str(index)].named_parameters())
        for name, parameter in model.fusion.blocks[str(index)].named_parameters():
            own = name.removeprefix("layer.")
            if own in wanted:
                assert torch.equal(parameter, theirs[wanted[own]]), name
                assert not torch.equal(parameter, fresh[name]), name
            else:
                assert torch.equal(parameter, fresh[name]), name
        assert {n.removeprefix("layer.") for n in fresh} - set(wanted) == {
            *("into.weight", "out.weight", "mlp.gate_proj.weight"),
            *("input_layernorm.weight", "post_attention_layernorm.weight"),
        }


@torch.no_grad()
def test_an_mlp_of_another_width_stays_fresh(bases: dict[str, Backbone], source: tuple[Any, Path]) -> None:
    model = built(bases["llama"], started(source[1], mlp=None))
    assert set(model.fusion.taken[0]) == set(ATTENTION)


@pytest.mark.parametrize(
    ("kind", "settings", "missing"),
    [
        (PixArtTransformer2DModel, {}, set()),
        (SD3Transformer2DModel, {"patch_size": 2}, set()),
        (DiTTransformer2DModel, {"activation_fn": "geglu"}, {"ff.net.0.proj.weight"}),
    ],
)
@torch.no_grad()
def test_other_transformers_of_diffusers(
    bases: dict[str, Backbone], tmp_path: Path, kind: type, settings: dict[str, Any], missing: set[str]
) -> None:
    """Attention to itself, never the one to words; a gated feed-forward does not fit."""
    given = transformer(kind, **settings)
    given.save_pretrained(tmp_path / "model")
    model = built(bases["llama"], started(tmp_path / "model"))
    attention = "attn" if kind is SD3Transformer2DModel else "attn1"
    wanted = {own: name.replace("attn1.", f"{attention}.") for own, name in (ATTENTION | MLP).items()}
    wanted = {own: name for own, name in wanted.items() if name not in missing}
    assert {own: name.split(".", 1)[1] for own, name in model.fusion.taken[2].items()} == wanted
    theirs = dict(given.transformer_blocks[3].named_parameters())
    for own, name in wanted.items():
        assert torch.equal(model.fusion.blocks["2"].layer.get_parameter(own), theirs[name]), own


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3", "qwen2"])
@torch.no_grad()
def test_matrices_that_hold_several_roles_and_biases(
    bases: dict[str, Backbone], source: tuple[Any, Path], family: str
) -> None:
    """Rows of one matrix, matrices that lie the other way round, and biases where the family has them, by role."""
    given, folder = source
    block: Any = built(bases[family], started(folder)).fusion.blocks["0"].layer
    theirs, x = given.transformer_blocks[0], torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    for role, name in {"query": "to_q", "key": "to_k", "value": "to_v"}.items():
        (piece,) = layer_pieces(block)[role]
        matrix, linear = block.get_submodule(piece.path), getattr(theirs.attn1, name)
        found, wanted = matrix(x), linear(x) if matrix.bias is not None else linear(x) - linear.bias
        torch.testing.assert_close(found if piece.rows is None else found[:, piece.rows], wanted, rtol=0, atol=1e-5)
    up = {"gpt2": "c_fc", "gpt_neox": "dense_h_to_4h", "phi3": "gate_up_proj", "qwen2": "up_proj"}[family]
    matrix, linear = getattr(block.mlp, up), theirs.ff.net[0].proj
    wanted = linear(x) if getattr(matrix, "bias", None) is not None else linear(x) - linear.bias
    torch.testing.assert_close(matrix(x)[:, -4 * WIDTH :], wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_pack_does_not_need_what_training_began_with(
    bases: dict[str, Backbone], source: tuple[Any, Path], tmp_path: Path
) -> None:
    folder, base = source[1], bases["llama"]
    model = built(base, started(folder, fuse="both"))
    model.save_pretrained(tmp_path / "pack")
    batch = view([[s] for s in mixed_sequences().values()], model)
    shutil.rmtree(folder)
    loaded = xfusion.load(tmp_path / "pack", backbone=base)
    assert loaded.config == model.config and loaded.fingerprint == model.fingerprint
    assert distance(look(loaded, batch), look(model, batch)) == 0
    with pytest.raises(XFusionError, match="is no folder or hub id of a diffusers transformer"):
        built(base, model.config.fusion)


def test_a_run_says_what_it_took_and_resumes_without_the_source(
    bases: dict[str, Backbone], source: tuple[Any, Path], tmp_path: Path
) -> None:
    model = dataclasses.replace(model_config(bases["llama"]), fusion=started(source[1], stride=2))
    stage = Stage(steps=4, warmup=1, mixture=MixtureConfig(draw=2, caption=2, pack=2))
    settings: dict[str, Any] = {"source": Noise(), "backbone": bases["llama"], "compile": False, "dtype": torch.float32}
    settings |= {"preview_every": 0}
    recipe = Recipe(model=model, data="noise", stages=(stage,))
    straight = loop.train(recipe, out=tmp_path / "straight", **settings)

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(loop.Interrupted):
        loop.train(recipe, out=tmp_path / "run", listener=stop, **settings)
    shutil.rmtree(source[1])
    resumed = loop.train(recipe, out=tmp_path / "run", resume=True, **settings)
    assert resumed.fingerprint == straight.fingerprint
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    first, second = (event["taken"] for event in events if event["event"] == "start")
    assert first["1"]["mlp.up_proj.weight"] == "0.ff.net.0.proj.weight" and second == {}


def test_a_part_of_a_hybrid_starts_so_too(bases: dict[str, Backbone], source: tuple[Any, Path]) -> None:
    parts = (ModalityExperts.Config(layers=(0, 2)), started(source[1], layers=(2, 4)))
    assert set(built(bases["llama"], Layered.Config(parts=parts)).fusion.taken) == {2, 3}


def test_a_pipelines_transformer_is_found_in_its_folder(bases: dict[str, Backbone], tmp_path: Path) -> None:
    transformer().save_pretrained(tmp_path / "pipeline" / "transformer")
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    assert len(built(bases["llama"], started(tmp_path / "pipeline")).fusion.taken) == LAYERS


def test_sources_that_do_not_fit_are_refused(bases: dict[str, Backbone], tmp_path: Path) -> None:
    def refused(message: str, base: str = "llama", width: int = WIDTH) -> None:
        with pytest.raises(XFusionError, match=message) as error:
            built(bases[base], started(tmp_path / "model", width=width))
        assert "\n" not in str(error.value)

    refused("is no folder or hub id")
    transformer().save_pretrained(tmp_path / "model")
    refused(f"its blocks are {WIDTH} wide, the tower 96: set width to {WIDTH}", width=96)
    refused("its heads are 16 wide, those of .* 24: choose another", base="qwen3", width=96)
    weights = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "kept")
    refused("cannot be loaded as DiTTransformer2DModel")
    torch.save(transformer().state_dict(), tmp_path / "model" / "diffusion_pytorch_model.bin")
    refused("cannot be loaded as DiTTransformer2DModel")  # a pickle is not opened
    settings = tmp_path / "model" / "config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "num_layers": DEPTH + 1}))
    (tmp_path / "kept").rename(weights)
    refused("is not a whole DiTTransformer2DModel: .* weights are not there")
    settings.write_text(json.dumps({"_class_name": "Popen"}))
    refused("is of class Popen: diffusers has no such model")
    shutil.rmtree(tmp_path / "model")
    AutoencoderTiny().save_pretrained(tmp_path / "model")
    refused("AutoencoderTiny has no list of blocks with to_q")


def test_the_choice_of_blocks() -> None:
    assert pretrained.choose(6, 4) == [0, 2, 3, 4]
    assert pretrained.choose(28, 6) == [0, 5, 9, 14, 19, 23]
    assert pretrained.choose(1, 4) == [0, 0, 0, 0]
    assert pretrained.choose(3, 3) == [0, 1, 2]
