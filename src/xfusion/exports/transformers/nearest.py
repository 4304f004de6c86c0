"""The reason for refusing an export: the most similar class of transformers, and how it differs from the pack."""

from __future__ import annotations

from xfusion.fusion.adaption_prompt import AdaptionPrompt
from xfusion.fusion.conditioned import Conditioned
from xfusion.fusion.connectors.frame_transformer import FrameTransformer
from xfusion.fusion.connectors.object_encoder import ObjectEncoder
from xfusion.fusion.connectors.pooling import Pooling
from xfusion.fusion.connectors.positional_resampler import PositionalResampler
from xfusion.fusion.connectors.prefix_mapper import PrefixMapper
from xfusion.fusion.connectors.query_transformer import Queries
from xfusion.fusion.cross_attention import CrossAttention
from xfusion.fusion.dual_tower import DualTower
from xfusion.fusion.gated_tower import GatedTower
from xfusion.fusion.layered import Layered
from xfusion.fusion.lora import Lora
from xfusion.fusion.modality_experts import ModalityExperts
from xfusion.fusion.shared_decoder import SharedDecoder
from xfusion.fusion.sparse_experts import SparseExperts
from xfusion.modalities.codes import CodePort
from xfusion.model import ModelConfig
from xfusion.objectives.contrastive import Contrastive
from xfusion.objectives.masked_words import MaskedWords
from xfusion.objectives.matching import Matching

BY_CODES = ("JanusForConditionalGeneration", "which draws by codes from one decoder, where this pack denoises")
NEAREST: dict[type, tuple[str, str]] = {
    Contrastive.Config: (
        "VisionTextDualEncoderModel",
        "whose text feature is that of a pooler, which a decoder does not have",
    ),
    Matching.Config: ("BlipForImageTextRetrieval", "whose text tower is an encoder of its own, read both ways"),
    MaskedWords.Config: (
        "LxmertForPreTraining",
        "whose words go through an encoder of its own, here through the frozen decoder",
    ),
    CodePort.Config: (
        "JanusForConditionalGeneration",
        "which has no vectors of row and column beside its codes and no norm of their own before the scores",
    ),
    Queries.Config: (
        "Blip2ForConditionalGeneration",
        "whose queries read the class token, and all behind a last norm, of its own vision transformer; here patches alone",
    ),
    PositionalResampler.Config: (
        "AriaForConditionalGeneration",
        "which has no places in the attention of its queries, and a norm and a perceptron behind it",
    ),
    ObjectEncoder.Config: ("LxmertModel", "whose words go through an encoder of its own and read what its layers made"),
    FrameTransformer.Config: ("VoxtralForConditionalGeneration", "which has two matrices in the transformer's place"),
    PrefixMapper.Config: (
        "VoxtralForConditionalGeneration",
        "whose tokens are of frames, not rows of one pooled vector",
    ),
    Pooling.Config: ("Gemma3ForConditionalGeneration", "which norms pooled features before its matrix"),
    AdaptionPrompt.Config: ("peft's AdaptionPrompt", "which xfusion export --to peft writes where it can"),
    CrossAttention.Config: (
        "IdeficsForVisionText2Text",
        "whose resampler reads the class token too, at the encoder's own width; here patches behind a matrix",
    ),
    SparseExperts.Config: (
        "MixtralForCausalLM",
        "whose router takes every token; here not the row that opens a picture, and with a frozen expert no word before it",
    ),
    ModalityExperts.Config: (
        "Ernie4_5_VLMoeForConditionalGeneration",
        "whose attention is one for words and pictures, and which draws none",
    ),
    DualTower.Config: (
        "PI0ForConditionalGeneration",
        "whose second tower denoises the actions of a robot, not pictures",
    ),
    GatedTower.Config: BY_CODES,
    Layered.Config: BY_CODES,
    SharedDecoder.Config: BY_CODES,
    Conditioned.Config: ("a pipeline of diffusers", "whose denoisers have other blocks than this one"),
}
"""Configuration class of an objective, a port or a fusion -> the most similar class, and how that class differs.

The difference continues the sentence "the nearest to X is CLASS, ...".
"""


def reason(config: ModelConfig) -> str:
    """One line for the error: the most similar class of transformers, and how it differs.

    The first part of the model that `NEAREST` lists decides: its further objectives, then its port, then its fusion (without
    low-rank deltas).

    Args:
        config: the model's configuration.
    """
    fusion = config.fusion.inner if isinstance(config.fusion, Lora.Config) else config.fusion
    kind = next((type(part) for part in (*config.extra, config.port, fusion) if type(part) in NEAREST), None)
    if kind is None:
        return "no class of transformers is this mechanism, or near to it"
    name, otherwise = NEAREST[kind]
    return f"the nearest to {kind.__qualname__.partition('.')[0]} is {name}, {otherwise}"
