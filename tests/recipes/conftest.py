"""What recipes that hear are tried on: tones, and an encoder of Whisper's kind that knows nothing."""

import numpy
import pytest
import soundfile
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

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
