"""The rows of the contract table: a tiny random base of every family, and the fusions that must hold on each.

The bases are saved by transformers and loaded through `Backbone.load`, as a user's are. All their weights are perturbed,
so that no norm is 1 and no attention is flat. `exact` keeps float64 where a family falls to float32.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from PIL import Image as PILImage
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.smollm3.modeling_smollm3 import SmolLM3RMSNorm

from xfusion.backbone import Backbone
from xfusion.data.mixture import MixtureConfig
from xfusion.data.pack import pack
from xfusion.data.sequence import Batch, Example, Media, Sequence, Text
from xfusion.fusion.adaption_prompt import AdaptionPrompt
from xfusion.fusion.base import Fusion
from xfusion.fusion.conditioned import Conditioned
from xfusion.fusion.connectors.resampler import Resampler
from xfusion.fusion.cross_attention import CrossAttention
from xfusion.fusion.dual_tower import DualTower
from xfusion.fusion.gated_tower import GatedTower
from xfusion.fusion.layered import Layered
from xfusion.fusion.lora import Lora
from xfusion.fusion.modality_experts import ModalityExperts
from xfusion.fusion.prefix import Prefix
from xfusion.fusion.shared_decoder import SharedDecoder
from xfusion.fusion.sparse_experts import SparseExperts
from xfusion.modalities.audio import AudioModality
from xfusion.modalities.base import SoundCodec
from xfusion.modalities.image import ImageModality
from xfusion.modalities.port import MediaPort
from xfusion.model import BackboneConfig, Model, ModelConfig
from xfusion.objectives.base import NoObjective
from xfusion.objectives.flow_matching import FlowMatching
from xfusion.opening import Opening, answer_state
from xfusion.training.loop import train
from xfusion.training.stages import Recipe, Stage

VOCABULARY, WIDTH, LAYERS, WINDOW = 320, 64, 4, 6
PATCH, SIDE = 4, 16
TOKEN_WIDTH = 3 * PATCH * PATCH

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.12,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def _partial(share: float) -> dict[str, object]:
    """Rotary positions on a share of each head."""
    return {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": share}


FAMILIES: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_COMMON)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_COMMON, head_dim=24)),  # queries wider than the model
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **_COMMON,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
        )
    ),
    # Bias on queries, keys and values; the upper half of the layers slides.
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**_COMMON, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_COMMON, sliding_window=WINDOW)),  # every layer slides
    # Soft-caps low enough to bend; a scale that is not the head's; no sdpa; layers slide in turns.
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **_COMMON,
            head_dim=16,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=16.0,
            sliding_window=WINDOW,
        )
    ),
    "phi3": lambda: Phi3ForCausalLM(  # fused projections, half of each head turns, dropouts
        Phi3Config(
            **_COMMON, sliding_window=WINDOW, rope_parameters=_partial(0.5), resid_pdrop=0.1, attention_dropout=0.1
        )
    ),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**_COMMON)),  # norms behind the branches, q/k norms over all heads
    "smollm3": lambda: SmolLM3ForCausalLM(  # every second layer slides and knows no positions
        SmolLM3Config(**_COMMON, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=WINDOW)
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(  # parallel branches, `layer_past`, a quarter of each head turns, dropouts
        GPTNeoXConfig(**_COMMON, rope_parameters=_partial(0.25), hidden_dropout=0.1, attention_dropout=0.1)
    ),
    "gpt2": lambda: GPT2LMHeadModel(  # Conv1D, learned positions, dropouts of 0.1
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=WIDTH,
            n_inner=96,
            n_layer=LAYERS,
            n_head=4,
            n_positions=512,
            initializer_range=0.3,  # below it, a tied head repeats one token whatever the picture
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    ),
}
FUSIONS: dict[str, Fusion.Config] = {
    "dual tower": DualTower.Config(),
    "dual tower, strided": DualTower.Config(stride=2, offset=0, mlp=40),
    "wide tower": DualTower.Config(width=96),  # a multiple of the head width of every family
    "narrow tower": DualTower.Config(width=48, mlp=56, stride=2, fuse="both", fuse_projection=True),
    "low-rank tower": DualTower.Config(rank=3),
    "x-fuse": DualTower.Config(fuse="both"),
    "dual tower, adaln": DualTower.Config(stride=2),
    "wide tower, adaln single": DualTower.Config(width=96, stride=2, offset=0, fuse="both"),
    "single tower, adaln": SharedDecoder.Config(stride=2),
    "bagel, adaln": ModalityExperts.Config(noised_only=True, stride=2),
    "x-fuse-proj on pictures": DualTower.Config(fuse="image", fuse_projection=True),
    "dynamic": DualTower.Config(fuse="both", fuse_by="token", stride=2),
    "single tower": SharedDecoder.Config(),
    "single tower, strided": SharedDecoder.Config(stride=2),
    "gated tower": GatedTower.Config(),
    "dual projection": ModalityExperts.Config(stride=2),
    "cogvlm": ModalityExperts.Config(own=("query", "key", "value", "output", "mlp")),
    "mplug-owl2": ModalityExperts.Config(own=("norm", "key", "value")),
    "bagel": ModalityExperts.Config(noised_only=True),
    "sparse experts": SparseExperts.Config(experts=3),
    "sparse experts, of the paper": SparseExperts.Config(stride=1, experts=3, frozen_expert=False),
    "prefix": Prefix.Config(),
    "lora": Lora.Config(inner=Prefix.Config(), rank=3, targets=None),
    "hybrid": Layered.Config(
        parts=(ModalityExperts.Config(layers=(0, 2)), DualTower.Config(layers=(2, 4), offset=1, fuse="text"))
    ),
}
PORTS = {
    name: MediaPort.Config(largest_grid=6, time="adaln single" if name.endswith("single") else "adaln")
    for name in FUSIONS
    if "adaln" in name
}
"""How noise levels enter, where they are not added to a picture's tokens."""
_RESAMPLER = Resampler.Config(latents=3, depth=2, heads=2, head_width=16, mlp=1)
READERS: dict[str, Fusion.Config] = {
    "flamingo": CrossAttention.Config(
        stride=3,
        offset=0,
        heads=2,
        head_width=24,
        activation="squared relu",
        media_norm=True,
        mlp=40,
        connector=_RESAMPLER,
    ),
    "openflamingo, all previous": CrossAttention.Config(
        stride=2, offset=1, heads=2, head_width=16, mlp=40, mask="all previous", connector=_RESAMPLER
    ),
    "idefics": CrossAttention.Config(
        stride=2, offset=0, heads=4, head_width=16, key_heads=2, norm="rms", head_norm=True, mlp=48, activation="swiglu"
    ),
    "cross-attention, published": CrossAttention.Config(
        stride=2, heads=2, head_width=16, mlp=40, text_only="mlp", connector=_RESAMPLER
    ),
    "llama-adapter": AdaptionPrompt.Config(layers=(1, 4), prompts=3, connector=replace(_RESAMPLER, latents=1)),
    "llama-adapter 2": AdaptionPrompt.Config(
        prompts=3, picture="early", early=2, affine=True, mask="all previous", connector=_RESAMPLER
    ),
}
"""Fusions of models that read pictures and do not draw: media stand outside the decoder's self-attention."""
WRITERS: dict[str, Fusion.Config] = {"conditioned denoiser": Conditioned.Config(width=32, depth=2, heads=2)}
"""Fusions of models that draw and do not read: no word hears of a picture."""
CORE = ("llama", "qwen3", "gemma3")
"""Families of which the default tier tries more than what `on_every_family` says: nearly all on the first, `EVERYWHERE` on the
others."""
EVERYWHERE = (
    "dual tower, strided",
    "dual projection",
    "openflamingo, all previous",
    "llama-adapter 2",
)
"""Fusions that are tried on more than Llama in the default tier; in the full one all are tried on all."""
SELDOM = ("wide tower, adaln single", "single tower, adaln", "bagel, adaln")
"""Fusions that are tried in the full tier alone; in the default one they are held to their equation."""


def _row(fusion: str, family: str) -> ParameterSet:
    default = (family == "llama" and fusion not in SELDOM) or (fusion in EVERYWHERE and family in CORE)
    name = f"{fusion}-{family}".replace(", ", "_").replace(" ", "_")
    return pytest.param(fusion, family, id=name, marks=() if default else pytest.mark.full)


ROWS = [_row(fusion, family) for fusion in FUSIONS for family in FAMILIES]
READER_ROWS = [_row(fusion, family) for fusion in READERS for family in FAMILIES]


def on_every_family(parameter_sets: list[ParameterSet]) -> list[ParameterSet]:
    """Rows of a contract that shows whether a family fits: the fusions of EVERYWHERE stand in the default tier for all."""
    return [pytest.param(*row.values, id=row.id) if row.values[0] in EVERYWHERE else row for row in parameter_sets]


def rows(*, preserves_text: bool | None = None, prefix_is_constant: bool | None = None) -> list[ParameterSet]:
    """The rows whose fusion declares this."""
    declarations = {"preserves_text": preserves_text, "prefix_is_constant": prefix_is_constant}
    fusions = {name: config.build() for name, config in FUSIONS.items()}
    return [
        row
        for row in ROWS
        if all(
            value is None or getattr(fusions[str(row.values[0])], key) == value for key, value in declarations.items()
        )
    ]


BASES = [pytest.param(family, marks=() if family in CORE else pytest.mark.full) for family in FAMILIES]
"""The families, for tests of one fusion."""
TOWERS = [row for row in ROWS if str(row.values[0]).startswith("dual tower")]
"""The rows of whole copied blocks."""
WORDS = (
    "a red apple on a table, the green tree, two blue birds, what is this? name this picture. one small house and a cat"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that every Unicode text has ids."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([WORDS] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=special[0], eos_token=special[1], pad_token=special[2]
    )


def make_base(family: str, folder: Path, seed: int = 0) -> Path:
    """Save a tiny random base of a family, all weights perturbed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FAMILIES[family]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.08 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


class Bases(dict[str, Backbone]):
    """A base of each family, made when it is first asked for."""

    def __init__(self, folder: Callable[[str], Path]):
        super().__init__()
        self.folder, self.before = folder, {}

    def __missing__(self, family: str) -> Backbone:
        self[family] = base = Backbone.load(str(make_base(family, self.folder(family))))
        self.before[family] = base.compute_fingerprint()
        return base

    def check(self) -> None:
        """Nothing changed a base, nor a copy of one in float64."""
        assert {family: base.compute_fingerprint() for family, base in self.items()} == self.before
        assert all(base.compute_fingerprint() == before for base, before in _IN_FLOAT64.values())


def model_config(base: Backbone, fusion: str = "dual tower", **media: object) -> ModelConfig:
    """A model of 16 px pictures in 16 tokens."""
    reads = fusion in READERS
    return ModelConfig(
        backbone=BackboneConfig(source=base.source),
        image=ImageModality.Config(patch=PATCH, sizes=(SIDE,)),
        port=PORTS.get(fusion, MediaPort.Config(largest_grid=6)),
        fusion=(FUSIONS | READERS | WRITERS)[fusion],
        media=NoObjective.Config() if reads else FlowMatching.Config(**media),  # type: ignore[arg-type]
    )


def make_model(base: Backbone, fusion: str = "dual tower", *, randomised: bool = True, **media: object) -> Model:
    """A model on a base; by default with all new weights moved away from their copies and zeros."""
    model = Model(model_config(base, fusion, **media), base)
    if randomised:
        randomise(model)
    return model.eval()


SOUND_RATE = 2000
"""Samples per second of what `Frames` hears."""


class Frames(SoundCodec):
    """Six samples to a frame, as they are."""

    width, hop, rate, longest = 6, 6, SOUND_RATE, 40

    class Config(SoundCodec.Config):
        """Nothing to set."""

        def build(self) -> Frames:
            """The codec."""
            return Frames()

    @torch.no_grad()
    def encode(self, wave: Tensor) -> Tensor:
        """Samples ``[N, n]`` -> frames ``[N, n / 6, 6]``."""
        return wave.unflatten(-1, (-1, self.width))


def hearing_model(base: Backbone, fusion: str = "prefix", seed: int = 0, *, makes: bool = False) -> Model:
    """A model that reads sounds of five frames, and makes some if asked; its new weights moved."""
    config = model_config(base, fusion)
    audio = AudioModality.Config(codec=Frames.Config(), seconds=0.015)
    media = FlowMatching.Config() if makes else NoObjective.Config()
    model = Model(replace(config, audio=audio, media=media, port=MediaPort.Config(largest_grid=6)), base)
    randomise(model, seed)
    return model.eval()


def randomise(model: Model, seed: int = 0, by: float = 0.1) -> None:
    """Move every new weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.new_parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator).to(parameter.device))


# ------------------------------------------------------------------------------------------------------- sequences


def words(count: int, seed: int, *, loss: bool = False) -> Text:
    """Random ordinary tokens."""
    rng = random.Random(seed)
    return Text(ids=tuple(rng.randrange(3, VOCABULARY) for _ in range(count)), has_loss=loss)


def picture(grid: tuple[int, int], seed: int, *, noised: bool = False, loss: bool = False, later: bool = True) -> Media:
    """Random tokens of a picture."""
    tokens = torch.rand(grid[0] * grid[1], TOKEN_WIDTH, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return Media(tokens=tokens, grid=grid, state="noised" if noised else "clean", has_loss=loss, visible_to_later=later)


def mixed_sequences() -> dict[str, Sequence]:
    """Every way in which words and pictures may stand together."""
    kinds = {
        "picture behind words": (words(5, 1), picture((4, 4), 1, noised=True, loss=True)),
        "words behind picture": (picture((4, 4), 2), words(7, 2, loss=True)),
        "words around picture": (words(3, 3), picture((2, 3), 3), words(2, 4), words(6, 5, loss=True)),
        "pictures between words": (
            words(2, 6),
            picture((3, 3), 6),
            words(4, 7),
            picture((2, 2), 7),
            words(1, 8),
            words(5, 9, loss=True),
        ),
        "picture beside picture": (picture((2, 3), 10), picture((3, 3), 11), words(4, 10, loss=True)),
        "picture alone": (picture((4, 4), 12, noised=True, loss=True),),
        "noised copy beside clean one": (
            words(3, 13),
            picture((2, 3), 13, noised=True, loss=True, later=False),
            picture((2, 3), 13),
            words(4, 14, loss=True),
        ),
        "words alone": (words(4, 15), words(8, 16, loss=True)),
    }
    return {name: Sequence(segments=segments) for name, segments in kinds.items()}


def corrupted(batch: Batch) -> Batch:
    """Noise that is a function of the picture alone, so that it does not depend on where in a batch the picture lies."""
    for modality, media in batch.media.items():
        is_media, count = media.item >= 0, len(media.noised)
        total = torch.zeros(count).index_add(0, media.item[is_media], media.tokens[is_media].sum(-1))
        time = torch.where(media.noised, 0.2 + 0.7 * torch.sigmoid(total), 0.0)
        noise, level = torch.cos(37 * media.tokens), media.at(time)[:, :, None]
        tokens = (1 - level) * media.tokens + level * noise
        batch = batch.with_media(modality, tokens=tokens, time=time, clean=media.tokens, target=media.tokens)
    return batch


def in_float64(batch: Batch) -> Batch:
    """A batch for a model in float64."""
    for modality, media in batch.media.items():
        batch = batch.with_media(modality, tokens=media.tokens.double(), time=media.time.double())
    return batch


def view(rows: list[list[Sequence]], model: Model) -> Batch:
    """Packed rows, corrupted, in the model's precision."""
    batch = corrupted(pack(rows))
    return in_float64(batch) if model.backbone.dtype == torch.float64 else batch


Found = list[tuple[Tensor, Tensor]]
"""Per sequence: logits of its text positions and predictions of its media rows, in reading order."""


def look(model: Model, batch: Batch) -> Found:
    """What a full pass says about every sequence of a batch."""
    hidden, run = model.run_pass(batch)
    no_logits, no_predictions = hidden.new_empty(0, VOCABULARY), hidden.new_empty(0, TOKEN_WIDTH)
    logits = model.engine.backbone.logits(hidden[:, run.slices["text"]]) if "text" in run.slices else no_logits
    media = model.port.readout(run.states["image"]) if run.media else no_predictions
    answers: Found = []
    for row in range(batch.text.order.shape[0]):
        tables = [(batch.text, logits), *((m.rows, media) for m in batch.media.values())]
        for sample in range(1 + max(int(t.sample[row].max()) for t, _ in tables if t.count)):
            parts = []
            for table, values in tables:
                is_row = (table.sample[row] == sample) & (table.order[row] >= 0)
                in_order = table.order[row][is_row].argsort()
                parts.append(values[row][is_row][in_order] if table.count else no_logits)
            answers.append((parts[0], parts[1] if len(parts) > 1 else no_predictions))
    return answers


def distance(first: Found, second: Found) -> float:
    """Largest difference between two answers of the same shape."""
    assert len(first) == len(second)
    largest = 0.0
    for a, b in zip(first, second, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.shape == y.shape
            if x.numel():
                largest = max(largest, float((x - y).detach().abs().max()))
    return largest


# -------------------------------------------------------------------------------------------------------- precision


def _llama_norm(self: LlamaRMSNorm, x: Tensor) -> Tensor:
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def _gemma_norm(self: Gemma3RMSNorm, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


def _gemma2_attention(
    module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, softcap: float, **_: object
) -> tuple[Tensor, None]:
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = softcap * torch.tanh(q @ k.mT * scaling / softcap) + mask
    return (scores.softmax(-1) @ v).transpose(1, 2), None


_LLAMA_NORMS = (
    LlamaRMSNorm,
    MistralRMSNorm,
    Olmo2RMSNorm,
    Phi3RMSNorm,
    Qwen2RMSNorm,
    Qwen3RMSNorm,
    SmolLM3RMSNorm,
)


@contextmanager
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All in the precision of its input: transformers computes norms and eager softmax in float32 whatever comes in."""
    with monkeypatch.context() as patch:
        for norm in _LLAMA_NORMS:
            patch.setattr(norm, "forward", _llama_norm)
        for norm in (Gemma2RMSNorm, Gemma3RMSNorm):
            patch.setattr(norm, "forward", _gemma_norm)
        patch.setattr(modeling_gemma2, "eager_attention_forward", _gemma2_attention)
        yield


_IN_FLOAT64: dict[str, tuple[Backbone, str]] = {}
"""By source: a base in float64, and its fingerprint when it was loaded."""


def float64_base(base: Backbone) -> Backbone:
    """The base in float64, loaded once for all tests."""
    if base.source not in _IN_FLOAT64:
        loaded = Backbone.load(base.source, dtype=torch.float64)
        _IN_FLOAT64[base.source] = loaded, loaded.compute_fingerprint()
    return _IN_FLOAT64[base.source][0]


def float64_model(base: Backbone, fusion: str) -> Model:
    """A model whose base and new weights are float64."""
    return make_model(float64_base(base), fusion).double()


# -------------------------------------------------------------------------------------------------------------- data


class Noise:
    """A source of random pictures with short captions of different lengths."""

    licence = "none needed"

    def __init__(self, count: int = 6, spec: str = "noise"):
        self.spec = spec
        names = ["red apple", "tree", "two blue birds", "house", "cat on a table", "what"]
        self.examples = tuple(
            Example(id=str(i), captions=(names[i % 6] + " " * (i // 6), "a picture"), group=str(i), origin=f"noise:{i}")
            for i in range(count)
        )

    def __len__(self) -> int:
        return len(self.examples)

    def picture(self, index: int, size: int) -> PILImage.Image:
        generator = torch.Generator().manual_seed(index)
        coarse = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
        return PILImage.fromarray(coarse.numpy()).resize((size, size), PILImage.Resampling.NEAREST)


def opening_head(backbone: Backbone, conversations: list[Any], draws: list[bool]) -> Opening:
    """A head that is sure about text conversations, each in its own way, and takes all of the last turn as what to draw."""
    head = Opening(backbone.hidden_size).requires_grad_(False)
    for parameter in head.parameters():
        parameter.zero_()
    states = torch.stack([answer_state(backbone, conversation) for conversation in conversations])
    head.opens.weight[0] = torch.linalg.pinv(states) @ (6.0 * (2.0 * torch.tensor(draws).float() - 1.0))
    return head


def of_other_groups(source: Any) -> Any:
    """The same examples as if they were not those that are trained on."""
    relabelled = copy.copy(source)
    relabelled.examples = tuple(replace(example, group=f"other {example.group}") for example in source.examples)
    return relabelled


# ---------------------------------------------------------------------------------------------------------- training


def twenty_steps(mixture: MixtureConfig, rate: float = 2e-2) -> Stage:
    """A stage that a tiny base learns something in."""
    return Stage(steps=20, warmup=2, rate=rate, schedule="constant", ema=0, mixture=mixture)


def trained(recipe: Recipe, base: Backbone, out: Path, **settings: Any) -> tuple[Model, list[dict[str, float]]]:
    """A recipe through the real loop, by default on pictures of noise: the model, and the losses of each step.

    Behind it the base is as it was, and text bit-equal wherever the fusion declares so. The run is in ``out``.
    """
    ids = torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(5))
    before, logits, losses = base.compute_fingerprint(), base.model(ids).logits.detach(), []
    model = train(
        recipe,
        out=out,
        backbone=base,
        listener=lambda e: losses.append(e["losses"]) if e["event"] == "step" else None,
        **{"source": Noise(), "compile": False, "dtype": torch.float32, "preview_every": 0, **settings},
    )
    assert len(losses) == settings.get("steps", sum(stage.steps for stage in recipe.stages))
    assert base.compute_fingerprint() == before
    if model.fusion.preserves_text:
        with torch.no_grad():
            assert torch.equal(model.text_logits(ids, stack="fused"), logits)
            assert torch.equal(model.text_logits(ids), logits)
    return model, losses


def share_left(losses: list[dict[str, float]], name: str) -> float:
    """A loss over the last four steps as a share of that over the first four."""
    first, last = (sum(step[name] for step in part) for part in (losses[:4], losses[-4:]))
    return last / first
