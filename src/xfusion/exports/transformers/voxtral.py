"""Export as VoxtralForConditionalGeneration: Whisper's encoder, pooled frames, one matrix, and the frozen decoder.

Voxtral (arXiv 2507.13264) concatenates ``c`` successive states of Whisper's encoder and applies two matrices without bias. Ours
is Qwen-Audio's connector (arXiv 2311.07919, section 3.1): the mean of ``c`` states, one matrix and a bias.

    Voxtral:  h = V_2 act(V_1 [z_1; ...; z_c])        ours:  h = W mean(z_1 ... z_c) + b

Ours is written as Voxtral's in three steps:

1. ``act`` and V_2 are the identity, and V_1 is ``W / c`` repeated c times.
2. Voxtral derives c from the width of the encoder's feed-forward networks: ``c = intermediate_size / hidden_size``. The networks
   are widened to it by units that are always 0.
3. The bias goes into V_1. A state after the last norm is ``z = g n + s``, where g is the gain, s the offset, and n has a mean of
   0. For ``u = 1 / g``, therefore, ``u z = sum(s / g)`` is the same constant for every sound, and V_1 can turn it into b. Moving
   s by g, or by -g, keeps this constant away from 0; V_1 takes the move back.

Shape legend: ``F`` width of a state, ``D`` model width, ``c`` states per token.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xfusion.exports.base import not_exact
from xfusion.exports.transformers.decoder import BEGIN, END, fill_decoder, mechanism, num_words, save, text_config
from xfusion.fusion.connectors.pooling import Pooling
from xfusion.fusion.prefix import Prefix
from xfusion.modalities.audio import AudioModality
from xfusion.modalities.encoders.whisper import HOP, RATE, Whisper
from xfusion.model import Model
from xfusion.storage import write_json

PLACEHOLDER = "<audio>"
TOLERANCE = 1e-4
"""Largest accepted difference between an exported token and the pack's, relative to the standard deviation of the pack's tokens.

Tiny gains in the encoder's last norm make the difference larger: the bias divides by them.
"""


def is_like(model: Model) -> bool:
    """Whether a model is built like Voxtral: sounds enter as a prefix of pooled features."""
    return (
        isinstance(mechanism(model), Prefix)
        and isinstance(model.port, Pooling)
        and isinstance(model.modality, AudioModality)
    )


@torch.no_grad()
def export(model: Model, folder: Path) -> list[str]:
    """Write a model that ``VoxtralForConditionalGeneration.from_pretrained(folder)`` loads, with tokenizer and feature extractor.

    Args:
        model: a model for which `is_like` is true.
        folder: output folder; it must exist.

    Returns:
        notes for users: how a prompt is written, and how spectra are computed.

    Raises:
        XFusionError: Voxtral cannot compute the same: features are not states of Whisper's encoder; tokens are not in causal
            order at running positions; the pack reads less than the encoder's window; fewer states make a token than the
            encoder's feed-forward width needs; Voxtral's file of settings loses some of the base's; the bias cannot be moved
            within `TOLERANCE`; or the base has a head or a tokenizer that the class does not support.
    """
    port, audio, codec = model.port, model.audio, model.audio.codec
    assert isinstance(port, Pooling)
    cells = port.config.cells
    if not isinstance(codec, Whisper) or port.feature_width != codec.width:
        raise not_exact(model, "transformers", "its sounds are not states of Whisper's encoder, as Voxtral's are")
    if audio.config.order != "causal" or audio.config.position != "running":
        raise not_exact(model, "transformers", "Voxtral's tokens stand in causal order, at running positions")
    if audio.sizes[0] != codec.longest:
        heard_seconds, read_seconds = codec.longest * HOP / RATE, audio.sizes[0] * HOP / RATE
        reason = (
            f"Voxtral makes tokens of all {heard_seconds:g} s that its encoder hears, this pack of the first {read_seconds:g} s:"
            f" train one with --model.audio.seconds {heard_seconds:g}, or with --model.audio.codec.window {read_seconds:g}"
        )
        raise not_exact(model, "transformers", reason)
    codec.load()
    whisper = codec.network.config
    if whisper.encoder_ffn_dim > cells * codec.width:
        min_frames = -(-whisper.encoder_ffn_dim // codec.width)
        reason = f"Voxtral makes a token of {min_frames} frames or more of this Whisper, this pack of {cells}"
        raise not_exact(model, "transformers", reason)
    from transformers import VoxtralConfig, VoxtralEncoderConfig, VoxtralForConditionalGeneration

    vocabulary_size, num_tokens = num_words(model), codec.longest // cells
    audio_settings = VoxtralEncoderConfig(
        hidden_size=codec.width,
        intermediate_size=cells * codec.width,
        num_hidden_layers=whisper.encoder_layers,
        num_attention_heads=whisper.encoder_attention_heads,
        activation_function=whisper.activation_function,
        num_mel_bins=whisper.num_mel_bins,
        max_source_positions=codec.longest,
    )
    text_settings = text_config(model)
    if (
        getattr(text_settings, "head_dim", None) is None
    ):  # stated: a missing width is read as that of Voxtral's own decoder
        text_settings.head_dim = text_settings.hidden_size // text_settings.num_attention_heads
    config = VoxtralConfig(
        audio_config=audio_settings,
        text_config=text_settings,
        audio_token_id=vocabulary_size + 1,
        projector_hidden_act="linear",
    )
    reread: Any = VoxtralConfig.from_dict(json.loads(config.to_json_string())).text_config
    if lost_settings := sorted(
        name for name, value in text_settings.to_dict().items() if reread.to_dict().get(name) != value
    ):
        reason = (
            "Voxtral's file of settings is read as that of a Llama, and of"
            f" {type(text_settings).__name__} loses {', '.join(lost_settings)}"
        )
        raise not_exact(model, "transformers", reason)
    exported: Any = VoxtralForConditionalGeneration(config).float().eval()
    exported.model.audio_tower.load_state_dict(_widen(codec.network.state_dict(), cells * codec.width))
    _set_projector(exported.model.multi_modal_projector, exported.model.audio_tower.layer_norm, port)
    _check_tokens(model, codec, port, exported)
    save(fill_decoder(exported, model), model, folder, "audio", PLACEHOLDER, num_tokens)
    # A plain pair of feature extractor and tokenizer: VoxtralProcessor takes only Mistral's tokenizer and windows of 30 s.
    write_json(folder / "processor_config.json", {"processor_class": "ClapProcessor"})
    samples = codec.longest * HOP
    spectra = copy.deepcopy(codec.spectra)
    if samples % RATE == 0:
        spectra.chunk_length, spectra.n_samples = samples // RATE, samples
        spectra.nb_max_frames = samples // spectra.hop_length
    spectra.save_pretrained(folder)
    return [
        f"a sound is written {BEGIN}{num_tokens} times {PLACEHOLDER}{END}, and a question behind it ends in a new line: the"
        f" tokenizer's chat template writes both; logits of the {vocabulary_size} words are this pack's",
        f"its spectra are WhisperFeatureExtractor's of {samples} samples at {RATE} Hz, silence behind: padding='max_length',"
        f" max_length={samples}",
    ]


def _widen(state: dict[str, Tensor], inner: int) -> dict[str, Tensor]:
    """The encoder's weights with wider feed-forward networks that compute the same: the new units are 0.

    Args:
        state: the encoder's state dict.
        inner: units of each feed-forward network afterwards, ``c F``.
    """
    widened = dict(state)
    for name, value in state.items():
        if ".fc1." in name:  # weight [units, F] and bias [units]
            widened[name] = torch.cat([value, value.new_zeros(inner - len(value), *value.shape[1:])])
        elif name.endswith(".fc2.weight"):  # [F, units]
            widened[name] = nn.functional.pad(value, (0, inner - value.shape[1]))
    return widened


def _set_projector(projector: Any, norm: nn.LayerNorm, port: Pooling) -> None:
    """Write mean, matrix and bias as two matrices without bias (see above); changes the offset of the encoder's last norm.

    Args:
        projector: Voxtral's projector; changed. ``linear_1.weight`` is ``[D, c F]``, ``linear_2.weight`` is ``[D, D]``.
        norm: the encoder's last norm, of width F; its offset is changed.
        port: the pack's connector; its matrix is ``[D, F]``.
    """
    gain, offset, weight, bias = (
        value.double() for value in (norm.weight, norm.bias, port.project.weight, port.project.bias)
    )
    sign = 1.0 if float((offset / gain).sum()) >= 0 else -1.0
    moved_offset = offset + sign * gain
    constant = (moved_offset / gain).sum()
    bias_left = bias - sign * weight @ gain
    matrix = (weight + torch.outer(bias_left / constant, 1 / gain)) / port.config.cells
    norm.bias.copy_(moved_offset)
    projector.linear_1.weight.copy_(matrix.repeat(1, port.config.cells))
    nn.init.eye_(projector.linear_2.weight)


def _check_tokens(model: Model, codec: Whisper, port: Pooling, exported: Any) -> None:
    """Compare the tokens ``[tokens, D]`` of one random sound, by the pack and by the exported model.

    Raises:
        XFusionError: they differ by more than `TOLERANCE`.
    """
    wave = 0.1 * torch.randn(1, codec.longest * HOP, generator=torch.Generator().manual_seed(0))
    pooled = codec.encode(wave.to(codec.place.device))[0].unflatten(0, (-1, port.config.cells)).mean(1)
    expected = port.project(pooled.to(port.project.weight.device))
    mel = codec.spectra(
        list(wave.numpy()), sampling_rate=RATE, padding="max_length", max_length=wave.shape[1], return_tensors="pt"
    )
    features = exported.get_audio_features(mel.input_features).pooler_output
    difference = float((features - expected.to(features)).abs().max() / expected.std())
    if not difference < TOLERANCE:
        reason = (
            f"Voxtral's way in has no bias, and folded into the encoder's last norm this pack's is {difference:.1g} off"
        )
        raise not_exact(model, "transformers", reason)
