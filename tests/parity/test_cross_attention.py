"""Blocks and resampler against transformers' own, random weights copied across, in float32 to 1e-5."""

import pytest
import torch
from torch import nn
from transformers import IdeficsConfig, MllamaConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

from xfusion.fusion.connectors.resampler import Resampler
from xfusion.fusion.cross_attention import CrossAttention, GatedCrossAttention

WIDTH, HEADS, MLP, LATENTS = 48, 4, 80, 5
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def random_weights(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return module.eval()


def copied(own: nn.Module, other: nn.Module, names: dict[str, str]) -> None:
    """Every weight of the other under our name for it, none left over."""
    theirs = {k: v for k, v in other.state_dict().items() if "rotary" not in k}
    found = {}
    for name, value in theirs.items():
        new = name
        for old, ours in names.items():
            new = new.replace(old, ours)
        found[new] = value.reshape(own.state_dict()[new].shape)
    own.load_state_dict(found)


def block(**settings) -> GatedCrossAttention:
    config = CrossAttention.Config(
        heads=HEADS, head_width=WIDTH // HEADS, norm="rms", head_norm=True, mlp=MLP, activation="swiglu", **settings
    )
    return GatedCrossAttention(config, WIDTH).eval()


def states():
    torch.manual_seed(0)
    reads = torch.rand(2, 7, 9) < 0.4
    reads[0, :3] = False  # words before a picture
    return torch.randn(2, 7, WIDTH), torch.randn(2, 9, WIDTH), reads


MLPS = {"mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down"}
PROJECTIONS = {
    "cross_attn.q_proj": "query",
    "cross_attn.k_proj": "key",
    "cross_attn.v_proj": "value",
    "cross_attn.o_proj": "out",
}
NORMS = {"input_layernorm": "norm", "post_attention_layernorm": "mlp_norm"}


@pytest.mark.parametrize("text_only", ["mlp", "skip"])
@torch.no_grad()
def test_a_block_is_that_of_idefics(text_only):
    """The published one runs its MLP on words that see no picture; where they see one, ours is the same either way."""
    config = IdeficsConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        intermediate_size=MLP,
        qk_layer_norms=True,
        rms_norm_eps=1e-6,
        attn_implementation="eager",
        vision_config={"embed_dim": WIDTH},
    )
    theirs = random_weights(IdeficsGatedCrossAttentionLayer(config, layer_idx=0))
    own = block(text_only=text_only)
    heads = {"cross_attn.q_layer_norm": "query_norm", "cross_attn.k_layer_norm": "key_norm"}
    copied(own, theirs, PROJECTIONS | NORMS | MLPS | heads | {"alpha_cross_attn": "gate", "alpha_dense": "mlp_gate"})
    x, media, reads = states()
    mask = torch.zeros(reads.shape).masked_fill(~reads, torch.finfo(torch.float32).min)[:, None]
    sees = reads.any(-1)
    expected = theirs(x, image_hidden_states=media, image_attention_mask=mask, cross_attention_gate=sees.float())
    found = own(x, own.keys_values(media), reads)
    assert not torch.allclose(expected[~sees], x[~sees], atol=1e-3)  # the trap: words before any picture are changed
    torch.testing.assert_close(found[sees], expected[sees], **CLOSE)
    torch.testing.assert_close(found[~sees], expected[~sees] if text_only == "mlp" else x[~sees], **CLOSE)


@torch.no_grad()
def test_a_block_is_that_of_mllama():
    """Grouped keys, and words that see no picture left as they were."""
    config = MllamaConfig(
        text_config={
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "num_key_value_heads": 2,
            "intermediate_size": MLP,
            "rms_norm_eps": 1e-6,
            "vocab_size": 32,
            "num_hidden_layers": 1,
            "cross_attention_layers": [0],
            "pad_token_id": 0,
        }
    ).text_config
    config._attn_implementation = "eager"
    theirs = random_weights(MllamaCrossAttentionDecoderLayer(config, layer_idx=0))
    own = block(key_heads=2)
    heads = {"cross_attn.q_norm": "query_norm", "cross_attn.k_norm": "key_norm"}
    gates = {"cross_attn_attn_gate": "gate", "cross_attn_mlp_gate": "mlp_gate"}
    copied(own, theirs, gates | heads | PROJECTIONS | NORMS | MLPS)
    x, media, reads = states()
    sees = reads.any(-1)
    # The model gives a row that sees nothing a softmax over all, and then multiplies its MLP by 0.
    mask = torch.zeros(reads.shape).masked_fill(~(reads | ~sees[..., None]), torch.finfo(torch.float32).min)[:, None]
    expected = theirs(
        x,
        cross_attention_states=media,
        cross_attention_mask=mask,
        attention_mask=None,
        full_text_row_masked_out_mask=sees.float()[:, None, :, None],
    )
    found = own(x, own.keys_values(media), reads)
    torch.testing.assert_close(found[sees], expected[sees], **CLOSE)
    assert torch.equal(found[~sees], x[~sees])


def resampler_names(depth):
    """Names in Idefics' resampler -> names in ours."""
    names = {
        "context_layer_norm": "media_norm",
        "latents_layer_norm": "latent_norm",
        "q_layer_norm": "query_norm",
        "k_layer_norm": "key_norm",
        "q_proj": "query",
        "k_proj": "key",
        "v_proj": "value",
        "output_proj": "out",
        "layer_norm": "norm",
    }
    for i in range(depth):
        names[f"blocks.{i}.0"] = f"attentions.{i}"
        names |= {f"blocks.{i}.1.{a}": f"mlps.{i}.{b}" for a, b in (("ln", 0), ("fc", 1), ("c_proj", 3))}
    return names


@pytest.mark.parametrize("head_norm", [False, True])
@torch.no_grad()
def test_the_resampler_is_that_of_idefics(head_norm):
    config = IdeficsConfig(vision_config={"embed_dim": WIDTH}, perceiver_config={"qk_layer_norms_perceiver": head_norm})
    theirs = random_weights(IdeficsPerceiverResampler(config, WIDTH, 3, 2, 16, LATENTS))
    own = Resampler.Config(
        latents=LATENTS, depth=3, heads=2, head_width=16, activation="relu", head_norm=head_norm
    ).build(WIDTH)
    copied(own, theirs, resampler_names(3))
    torch.manual_seed(1)
    x = torch.randn(2, 11, WIDTH)
    found = own(x, torch.ones(2, 11, dtype=torch.bool))
    torch.testing.assert_close(found, theirs(x), **CLOSE)
    padded = own(torch.cat([x, torch.randn(2, 4, WIDTH)], 1), torch.arange(15).expand(2, -1) < 11)
    torch.testing.assert_close(padded, found, **CLOSE)
