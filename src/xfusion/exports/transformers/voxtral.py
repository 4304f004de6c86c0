"""Pooled frames of Whisper's encoder at the input of the decoder, behind one matrix, as VoxtralForConditionalGeneration.

Voxtral is Whisper's encoder, whose last states are concatenated by fours (``intermediate_size / hidden_size`` of them), and two
matrices without bias:

    h = V_2 act(V_1 [z_1; ...; z_c])        ours:  h = W mean(z_1 ... z_c) + b

Three turns make one of the other. ``act`` is the identity and V_2 too, V_1 repeats W / c. The size of the encoder's feed-forward
networks says how many states make a token, so these get units that always are 0. And the bias: a state behind the last norm is
``z = g n + s`` with a mean of n of 0, so that ``u z = sum(s / g)`` for ``u = 1 / g``, whatever was heard: a constant, which V_1
can multiply by b. So that this constant is never near 0, s is moved by g, which V_1 takes back.

Shape legend: ``F`` width of a state, ``D`` model width, ``c`` states to a token.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xfusion.exports.base import not_exact
from xfusion.exports.transformers.decoder import BEGIN, END, filled, mechanism, num_words, save, text_config
from xfusion.fusion.connectors.pooling import Pooling
from xfusion.fusion.prefix import Prefix
from xfusion.modalities.audio import AudioModality
from xfusion.modalities.encoders.whisper import HOP, RATE, Whisper
from xfusion.model import Model
from xfusion.storage import write_json

PLACEHOLDER = "<audio>"
NEAR = 1e-4
"""Largest difference of a token from the pack's, in widths of a word's row: a last norm with tiny gains leaves none so near."""


def is_like(model: Model) -> bool:
    """Whether Voxtral is the class to compare with."""
    return (
        isinstance(mechanism(model), Prefix)
        and isinstance(model.port, Pooling)
        and isinstance(model.modality, AudioModality)
    )


@torch.no_grad()
def export(model: Model, folder: Path) -> list[str]:
    """Write a model that ``VoxtralForConditionalGeneration.from_pretrained(folder)`` loads, with tokenizer and spectra."""
    port, audio, codec = model.port, model.audio, model.audio.codec
    assert isinstance(port, Pooling)
    cells = port.config.cells
    if not isinstance(codec, Whisper) or port.feature_width != codec.width:
        raise not_exact(model, "transformers", "its sounds are not states of Whisper's encoder, as Voxtral's are")
    if audio.config.order != "causal" or audio.config.position != "running":
        raise not_exact(model, "transformers", "Voxtral's tokens stand in causal order, at running positions")
    if audio.sizes[0] != codec.longest:
        hears, reads = codec.longest * HOP / RATE, audio.sizes[0] * HOP / RATE
        reason = (
            f"Voxtral makes tokens of all {hears:g} s that its encoder hears, this pack of the first {reads:g} s: train one with"
            f" --model.audio.seconds {hears:g}, or with --model.audio.codec.window {reads:g}"
        )
        raise not_exact(model, "transformers", reason)
    codec.load()
    whisper = codec.network.config
    if whisper.encoder_ffn_dim > cells * codec.width:
        least = -(-whisper.encoder_ffn_dim // codec.width)
        reason = f"Voxtral makes a token of {least} frames or more of this Whisper, this pack of {cells}"
        raise not_exact(model, "transformers", reason)
    from transformers import VoxtralConfig, VoxtralEncoderConfig, VoxtralForConditionalGeneration

    words, tokens = num_words(model), codec.longest // cells
    heard = VoxtralEncoderConfig(
        hidden_size=codec.width,
        intermediate_size=cells * codec.width,
        num_hidden_layers=whisper.encoder_layers,
        num_attention_heads=whisper.encoder_attention_heads,
        activation_function=whisper.activation_function,
        num_mel_bins=whisper.num_mel_bins,
        max_source_positions=codec.longest,
    )
    text = text_config(model)
    if getattr(text, "head_dim", None) is None:  # said, because what is not said is read as in Voxtral's own decoder
        text.head_dim = text.hidden_size // text.num_attention_heads
    config = VoxtralConfig(
        audio_config=heard,
        text_config=text,
        audio_token_id=words + 1,
        projector_hidden_act="linear",
    )
    read: Any = VoxtralConfig.from_dict(json.loads(config.to_json_string())).text_config
    if other := sorted(name for name, value in text.to_dict().items() if read.to_dict().get(name) != value):
        reason = f"Voxtral's file of settings is read as that of a Llama, and of {type(text).__name__} loses {', '.join(other)}"
        raise not_exact(model, "transformers", reason)
    made: Any = VoxtralForConditionalGeneration(config).float().eval()
    made.model.audio_tower.load_state_dict(_wider(codec.network.state_dict(), cells * codec.width))
    _one_matrix(made.model.multi_modal_projector, made.model.audio_tower.layer_norm, port)
    _check(model, codec, port, made)
    save(filled(made, model), model, folder, "audio", PLACEHOLDER, tokens)
    # Any plain pair of spectra and tokenizer: VoxtralProcessor reads Mistral's own tokenizer and whole 30 s alone.
    write_json(folder / "processor_config.json", {"processor_class": "ClapProcessor"})
    samples = codec.longest * HOP
    spectra = copy.deepcopy(codec.spectra)
    if samples % RATE == 0:
        spectra.chunk_length, spectra.n_samples = samples // RATE, samples
        spectra.nb_max_frames = samples // spectra.hop_length
    spectra.save_pretrained(folder)
    return [
        f"a sound is written {BEGIN}{tokens} times {PLACEHOLDER}{END}, and a question behind it ends in a new line: the"
        f" tokenizer's chat template writes both; logits of the {words} words are this pack's",
        f"its spectra are WhisperFeatureExtractor's of {samples} samples at {RATE} Hz, silence behind: padding='max_length',"
        f" max_length={samples}",
    ]


def _wider(state: dict[str, Tensor], inner: int) -> dict[str, Tensor]:
    """The encoder with feed-forward networks of ``inner`` units, of which the new ones are 0 and go nowhere."""
    out = dict(state)
    for name, value in state.items():
        if ".fc1." in name:  # weight [units, F] and bias [units]
            out[name] = torch.cat([value, value.new_zeros(inner - len(value), *value.shape[1:])])
        elif name.endswith(".fc2.weight"):  # [F, units]
            out[name] = nn.functional.pad(value, (0, inner - value.shape[1]))
    return out


def _one_matrix(projector: Any, norm: nn.LayerNorm, port: Pooling) -> None:
    """The mean, the matrix and its bias, as two matrices without; the last norm's offset moves."""
    gain, offset, weight, bias = (
        value.double() for value in (norm.weight, norm.bias, port.project.weight, port.project.bias)
    )
    sign = 1.0 if float((offset / gain).sum()) >= 0 else -1.0
    moved = offset + sign * gain
    constant = (moved / gain).sum()
    rest = bias - sign * weight @ gain
    every = (weight + torch.outer(rest / constant, 1 / gain)) / port.config.cells
    norm.bias.copy_(moved)
    projector.linear_1.weight.copy_(every.repeat(1, port.config.cells))
    nn.init.eye_(projector.linear_2.weight)


def _check(model: Model, codec: Whisper, port: Pooling, made: Any) -> None:
    """Tokens of one noise, here and there.

    Raises:
        XFusionError: they differ.
    """
    wave = 0.1 * torch.randn(1, codec.longest * HOP, generator=torch.Generator().manual_seed(0))
    tokens = codec.encode(wave.to(codec.place.device))[0].unflatten(0, (-1, port.config.cells)).mean(1)
    wanted = port.project(tokens.to(port.project.weight.device))
    mel = codec.spectra(
        list(wave.numpy()), sampling_rate=RATE, padding="max_length", max_length=wave.shape[1], return_tensors="pt"
    )
    found = made.get_audio_features(mel.input_features).pooler_output
    apart = float((found - wanted.to(found)).abs().max() / wanted.std())
    if not apart < NEAR:
        reason = f"Voxtral's way in has no bias, and folded into the encoder's last norm this pack's is {apart:.1g} off"
        raise not_exact(model, "transformers", reason)
