"""What recipes are tried on: narrow bases, tones, and an encoder of Whisper's kind and clusters of sounds that know nothing."""

from pathlib import Path

import numpy
import pytest
import soundfile
import torch
from contracts.table import VOCABULARY, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig, WhisperFeatureExtractor, WhisperModel

from xfusion.backbone import SCRATCH, Backbone
from xfusion.recipes.base import find

NAMES = ("red apple", "tree")


@pytest.fixture(scope="session")
def tones(tmp_path_factory):
    """Eight short tones, four of each pitch."""
    folder = tmp_path_factory.mktemp("tones")
    for number in range(8):
        time = numpy.arange(1600) / 8000
        soundfile.write(folder / f"{number}.wav", 0.4 * numpy.sin(6.28 * (300 + 900 * (number % 2)) * time), 8000)
        (folder / f"{number}.txt").write_text(NAMES[number % 2])
    return str(folder)


@pytest.fixture(scope="session")
def whisper(tmp_path_factory):
    """A random encoder of tiny.en's width, with one layer."""
    torch.manual_seed(0)
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 1}
    ids = {"vocab_size": 9, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    folder = tmp_path_factory.mktemp("whisper")
    WhisperModel(WhisperConfig(d_model=384, **heads, **ids, **sizes)).encoder.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bases_of(tmp_path_factory):
    """A random base of so many layers, wide enough for the MLPs of which recipes keep a part; as trained, or from scratch."""
    folder, made = tmp_path_factory.mktemp("bases"), {}

    def base(layers, scratch):
        if not (folder / str(layers)).exists():
            shape = LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=512,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                initializer_range=0.12,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=2,
            )
            torch.manual_seed(0)
            LlamaForCausalLM(shape).save_pretrained(folder / str(layers))
            tokenizer().save_pretrained(folder / str(layers))
        source = f"{SCRATCH if scratch else ''}{folder / str(layers)}"
        if source not in made:
            made[source] = Backbone.load(source)
        return made[source]

    return base


@pytest.fixture(scope="module")
def codes(whisper, tmp_path_factory):
    """As many clusters of sounds as the recipe has, anywhere."""
    folder = tmp_path_factory.mktemp("clusters") / "codes"
    recipe = find("audiopalm")(codes=str(folder), encoder=whisper)
    codec = recipe.model.audio.codec.build()
    codec.clusters = torch.randn(recipe.model.port.entries, codec.features.width)
    codec.save(Path(folder))
    return str(folder)
