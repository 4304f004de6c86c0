"""Sounds as tokens: Whisper's features equal to transformers', k-means codes, lengths and rates."""

import math

import pytest
import soundfile
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from xfusion.data.sequence import Sound, Unreadable, XFusionError
from xfusion.data.sources import open_source
from xfusion.modalities.audio import AudioModality, resampled
from xfusion.modalities.codecs.kmeans import KMeans, fit
from xfusion.modalities.encoders.whisper import Whisper

SIZES = {
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 8,
    "vocab_size": 9,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A tiny random Whisper, whole, and a folder with its encoder alone."""
    torch.manual_seed(0)
    model = WhisperModel(WhisperConfig(**SIZES)).eval()
    folder = tmp_path_factory.mktemp("whisper")
    model.save_pretrained(folder / "whole")
    model.encoder.save_pretrained(folder / "encoder")
    for part in ("whole", "encoder"):
        WhisperFeatureExtractor().save_pretrained(folder / part)
    return model, folder


def noise(seconds, rate=16_000, seed=0):
    wave = torch.rand(round(seconds * rate), generator=torch.Generator().manual_seed(seed)) - 0.5
    return Sound(samples=wave, rate=rate)


@torch.no_grad()
def test_features_are_transformers_own(whisper):
    model, folder = whisper
    sound = noise(0.3)
    mel = WhisperFeatureExtractor()([sound.samples.numpy()], sampling_rate=16_000, return_tensors="pt").input_features
    expected = model.encoder(mel).last_hidden_state
    for part in ("whole", "encoder"):
        config = Whisper.Config(source=str(folder / part), width=16)
        audio = AudioModality.Config(codec=config, seconds=0.5, patch=5).build()
        tokens = audio.encode([sound], 25)
        assert tokens.shape == (1, 5, 80) and audio.grid(25) == (5, 1)
        torch.testing.assert_close(audio.decode(tokens, 25), expected[:, :25], rtol=0, atol=1e-5)
        strips = expected[:, :25].unflatten(1, (5, 5)).transpose(-1, -2).flatten(2)
        torch.testing.assert_close(tokens, strips, rtol=0, atol=1e-5)
    # A shorter window is the same network over the first positions alone.
    short = Whisper.Config(source=str(folder / "whole"), width=16, window=0.5).build()
    # 201 frames, although 4.02 * 16000 / 320 is 200.99999999999997.
    assert Whisper.Config(window=4.02).build().longest == 201
    wave = torch.nn.functional.pad(sound.samples, (0, 8000 - len(sound.samples)))[None]
    hidden = torch.nn.functional.gelu(
        model.encoder.conv2(torch.nn.functional.gelu(model.encoder.conv1(mel_of(sound, 8000))))
    )
    hidden = hidden.permute(0, 2, 1) + model.encoder.embed_positions.weight[:25]
    for layer in model.encoder.layers:
        hidden = layer(hidden, None)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    torch.testing.assert_close(short.encode(wave), model.encoder.layer_norm(hidden), rtol=0, atol=1e-5)
    with torch.enable_grad():
        assert not short.encode(wave.clone().requires_grad_()).requires_grad


def mel_of(sound, length):
    return WhisperFeatureExtractor()(
        [sound.samples.numpy()], sampling_rate=16_000, padding="max_length", max_length=length, return_tensors="pt"
    ).input_features


def test_a_tone_keeps_its_pitch_at_another_rate():
    time = torch.arange(4000, dtype=torch.float64) / 8000
    tone = Sound(samples=torch.sin(2 * math.pi * 500 * time).float(), rate=8000)
    made = resampled(tone, 16_000)
    assert len(made) == 8000
    expected = torch.sin(2 * math.pi * 500 * torch.arange(8000, dtype=torch.float64) / 16_000)
    assert (made - expected)[400:-400].abs().max() < 1e-3
    assert resampled(tone, 8000) is tone.samples


def test_lengths_and_kinds_are_refused_in_one_line(whisper):
    folder = str(whisper[1] / "encoder")
    audio = AudioModality.Config(codec=Whisper.Config(source=folder, width=16), seconds=0.5, patch=5).build()
    with pytest.raises(XFusionError, match=r"a sound of 0.60 s is longer than the 0.5 s that this model hears"):
        audio.encode([noise(0.6, rate=8000)], 25)
    with pytest.raises(XFusionError, match="this model hears sounds, but it was given a str"):
        audio.encode(["a.wav"], 25)
    with pytest.raises(XFusionError, match=r"multiple of 0.1 s .* at most the codec's 30 s"):
        AudioModality.Config(seconds=0.52, patch=5).build()
    with pytest.raises(XFusionError, match=r"at most the codec's 2 s"):
        AudioModality.Config(codec=Whisper.Config(window=2.0), seconds=3.0).build()
    with pytest.raises(XFusionError, match="features of 16 numbers, not 384"):
        Whisper.Config(source=folder).build().encode(torch.zeros(1, 320))
    with pytest.raises(XFusionError, match="encoder './nowhere' cannot be loaded"):
        Whisper.Config(source="./nowhere").build().encode(torch.zeros(1, 320))


def test_clusters_are_found_and_named_by_the_nearest(whisper, tmp_path):
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(6, 3, generator=generator)
    x = centres.repeat(40, 1) + 0.01 * torch.randn(240, 3, generator=generator)
    clusters, error = fit(x, 6, seed=1)
    assert torch.cdist(centres, clusters).amin(1).max() < 0.01 and error < 4e-4
    with pytest.raises(XFusionError, match="2 different features do not make 3 clusters"):
        fit(x[:2], 3)

    encoder = Whisper.Config(source=str(whisper[1] / "encoder"), width=16, window=0.4)
    config = KMeans.Config(source=str(tmp_path / "codes"), encoder=encoder, pooled=4)
    codec = config.build()
    wave = noise(0.4).samples[None]
    means = codec.features.encode(wave).unflatten(1, (5, 4)).mean(2)
    torch.testing.assert_close(codec.means(wave), means, rtol=0, atol=0)
    with pytest.raises(XFusionError, match=r"codes .*: no clusters.safetensors there"):
        codec.encode(wave)
    codec.clusters = means[0, [3, 0, 4]]
    codec.save(tmp_path / "codes")
    found = config.build().encode(wave)
    assert found.shape == (1, 5, 1) and codec.hop == 1280
    assert found[0, [3, 0, 4], 0].tolist() == [0, 1, 2]
    assert torch.equal(found[0, :, 0].long(), torch.cdist(means[0], codec.clusters).argmin(1))
    other = KMeans.Config(source=str(tmp_path / "codes"), encoder=encoder, pooled=2).build()
    with pytest.raises(XFusionError, match="were fitted with pooled 4, the model says 2"):
        other.encode(wave)


def test_a_sound_that_is_too_long_for_the_model_is_one_that_a_run_may_leave_out(whisper, tmp_path):
    """By its name; what no sound of the source could mend is not."""
    for name, seconds in (("long", 0.6), ("short", 0.3)):
        soundfile.write(tmp_path / f"{name}.wav", noise(seconds).samples.numpy(), 16_000)
        (tmp_path / f"{name}.txt").write_text(name)
    source = open_source(tmp_path)
    folder = str(whisper[1] / "encoder")
    audio = AudioModality.Config(codec=Whisper.Config(source=folder, width=16), seconds=0.5, patch=5).build()
    assert source.tokens(1, audio, 25).shape == (5, 80)
    with pytest.raises(Unreadable, match=rf"^{tmp_path}/long\.wav: a sound of 0.60 s is longer than the 0.5 s"):
        source.tokens(0, audio, 25)
    with pytest.raises(XFusionError, match=rf"^{tmp_path}/short\.wav: a length of 0.52 s is not legal") as error:
        source.tokens(1, audio, 26)
    assert not isinstance(error.value, Unreadable)
