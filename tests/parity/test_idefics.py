"""A whole Idefics of transformers, random weights copied across, in float32 to 1e-5: where blocks stand and who reads what."""

from dataclasses import replace

import pytest
import torch
from contracts.table import VOCABULARY, model_config, picture, randomise, tokenizer, words
from parity.test_cross_attention import MLPS, NORMS, PROJECTIONS, copied, random_weights, resampler_names
from torch import Tensor
from transformers import IdeficsConfig, IdeficsForVisionText2Text, LlamaConfig, LlamaForCausalLM

from xfusion.backbone import Backbone
from xfusion.data.pack import pack
from xfusion.data.sequence import Batch, Sequence
from xfusion.fusion.connectors.resampler import Resampler
from xfusion.fusion.cross_attention import CrossAttention
from xfusion.model import Model

WIDTH, LAYERS, EVERY, LATENTS = 48, 4, 2, 3
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
BLOCK = (
    PROJECTIONS
    | NORMS
    | MLPS
    | {"cross_attn.q_layer_norm": "query_norm", "cross_attn.k_layer_norm": "key_norm"}
    | {"alpha_cross_attn": "gate", "alpha_dense": "mlp_gate"}
)
RESAMPLER = resampler_names(2)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[IdeficsForVisionText2Text, Model]:
    """Theirs, and ours on a Llama of its text layers."""
    torch.manual_seed(0)
    config = IdeficsConfig(
        **SIZES,
        additional_vocab_size=0,
        cross_layer_interval=EVERY,
        qk_layer_norms=True,
        use_resampler=True,
        tie_word_embeddings=False,
        vision_config={"embed_dim": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
        perceiver_config={
            "resampler_depth": 2,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "resampler_n_latents": LATENTS,
            "qk_layer_norms_perceiver": True,
        },
    )
    theirs: IdeficsForVisionText2Text = random_weights(IdeficsForVisionText2Text(config))  # type: ignore[assignment]
    base, folder = LlamaForCausalLM(LlamaConfig(**SIZES)), tmp_path_factory.mktemp("base")
    skipped = ("vision_model", "gated_cross_attn_layers", "perceiver_resampler", "rotary_emb")
    base.load_state_dict({k: v for k, v in theirs.state_dict().items() if not any(part in k for part in skipped)})
    base.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    fusion = CrossAttention.Config(
        stride=EVERY,
        offset=0,
        heads=4,
        head_width=WIDTH // 4,
        norm="rms",
        head_norm=True,
        mlp=80,
        activation="swiglu",
        text_only="mlp",  # the published form
        connector=Resampler.Config(latents=LATENTS, depth=2, heads=2, head_width=16, activation="relu", head_norm=True),
    )
    backbone = Backbone.load(str(folder))
    own = Model(replace(model_config(backbone, "idefics"), fusion=fusion), backbone).eval()
    randomise(own)
    for block, other in zip(own.fusion.blocks.values(), theirs.model.gated_cross_attn_layers, strict=True):
        copied(block, other, BLOCK)
    copied(own.fusion.connector, theirs.model.perceiver_resampler, RESAMPLER)
    return theirs, own


def without_ends(batch: Batch) -> Batch:
    """Only words, at the positions that they have in Idefics: pictures take none, and there is no [EOI]."""
    (kept,) = (batch.text_ids[0] >= 0).nonzero(as_tuple=True)
    rows = replace(batch.text.columns(kept), position=torch.arange(len(kept))[None])
    return replace(batch, text=rows, text_ids=batch.text_ids[:, kept], labels=batch.labels[:, kept])


@torch.no_grad()
def test_words_around_two_pictures_are_those_of_idefics(pair: tuple[IdeficsForVisionText2Text, Model]) -> None:
    """A block stands before its layer, the first before the first layer, and a word reads the last picture before it."""
    theirs, own = pair
    said = [words(3, 1), words(4, 2), words(3, 3)]
    segments = (said[0], picture((2, 3), 1), said[1], picture((2, 3), 2), said[2])
    batch = without_ends(pack([[Sequence(segments=segments)]]))
    media = batch.media["image"]
    features = own.port(media)[0][media.item[0] >= 0].view(1, 2, 6, WIDTH)
    hidden, run = own.run_pass(batch)
    found = own.backbone.logits(hidden[:, run.slices["text"]])
    sees = torch.tensor([[0, 0]] * 3 + [[1, 0]] * 4 + [[0, 1]] * 3)[None]

    def expected(image_attention_mask: Tensor) -> Tensor:
        return theirs(
            input_ids=batch.text_ids, image_encoder_embeddings=features, image_attention_mask=image_attention_mask
        ).logits

    torch.testing.assert_close(found, expected(sees), rtol=1e-5, atol=1e-5)
    for other in (sees.flip(-1), torch.ones_like(sees)):
        assert float((found - expected(other)).abs().max()) > 1e-2
