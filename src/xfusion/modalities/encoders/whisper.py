"""Whisper's frozen encoder, by folder or hub id: sounds -> a feature every 20 ms (Radford et al., arXiv 2212.04356)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from xfusion.data.sequence import XFusionError
from xfusion.hub import hub_file
from xfusion.modalities.base import SoundCodec
from xfusion.modalities.encoders.loading import load_pretrained

RATE = 16_000
"""Sample rate of all Whisper models, per second."""
HOP = 320
"""Samples per feature: a spectrum every 160 samples, then a convolution of stride 2."""
LONGEST = 1500
"""Number of features in 30 s, the length it was trained on."""


class Whisper(SoundCodec):
    """Hidden states after the encoder's last layer and final norm, from log-mel spectra as computed by transformers.

    The encoder was trained on 30 s, with shorter sounds padded with silence. ``window`` sets the padded length: a shorter one
    costs proportionally less, and its features differ slightly from those at 30 s.

    Raises:
        XFusionError: the source cannot be loaded, is not a Whisper model, or has another width.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(SoundCodec.Config):
        """Which Whisper model."""

        source: str = "openai/whisper-tiny.en"
        """Folder or hub id of a Whisper model, or of its encoder alone."""
        revision: str | None = None
        """Hub revision (a commit for exact reproduction)."""
        width: int = 384
        """Feature width: 384 for tiny, 512 for base, 768 for small. Set here so that it is known before loading."""
        window: float = 30.0
        """Seconds of input, padding included; it was trained on 30."""
        batch_size: int = 16
        """Sounds per forward pass; affects memory only."""
        licence: str = "MIT"
        """Licence of the weights."""

        @property
        def weights(self) -> Path | None:
            """The file of its weights, where they are in one and this machine has it."""
            return hub_file(self.source, "model.safetensors", self.revision)

        def build(self) -> Whisper:
            """The frozen encoder, not yet loaded."""
            return Whisper(self)

    def __init__(self, config: Config):
        super().__init__()
        frames = config.window * RATE / HOP
        if not 1 <= round(frames) <= LONGEST or abs(frames - round(frames)) > 1e-6:
            raise XFusionError(f"window {config.window:g} s: Whisper hears whole multiples of 0.02 s, up to 30 s")
        self.config = config
        self.rate, self.hop, self.width, self.longest = RATE, HOP, config.width, round(frames)
        self.licence = config.licence
        self.encoders = frozenset({f"{config.source}@{config.revision}"})
        # The network is loaded at its first use and then moves with this module.
        self.network: Any = None
        self.spectra: Any = None
        self._loading = Lock()  # sounds are encoded by several threads
        self.register_buffer("place", torch.empty(0), persistent=False)

    place: Tensor
    """Empty tensor whose device is where the network is loaded."""

    @torch.no_grad()
    def encode(self, sounds: Tensor) -> Tensor:
        """Sounds [N, frames * 320] in [-1, 1] at 16 kHz -> [N, frames, width], float32."""
        frames = sounds.shape[1] // HOP
        if frames > self.longest:
            raise XFusionError(f"a sound of {frames} frames is longer than the window of {self.longest}")
        if not len(sounds):
            return torch.empty(0, frames, self.width)
        self.load()
        return torch.cat([self._encode(part)[:, :frames] for part in sounds.split(self.config.batch_size)])

    def _encode(self, sounds: Tensor) -> Tensor:
        mel = self.spectra(
            list(sounds.cpu().numpy()),
            sampling_rate=RATE,
            padding="max_length",
            max_length=self.longest * HOP,
            return_tensors="pt",
        ).input_features
        return self.network(mel.to(self.place.device)).last_hidden_state.float()

    def load(self) -> None:
        """Load the weights, once."""
        with self._loading:
            if self.network is None:
                self._load()

    def _load(self) -> None:
        from transformers import WhisperFeatureExtractor, WhisperModel
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        place = "encoder", self.config.source, self.config.revision
        encoder, report = load_pretrained(*place, WhisperEncoder.from_pretrained, output_loading_info=True)
        if report["missing_keys"]:  # a whole model, whose encoder is one level deeper
            model, report = load_pretrained(*place, WhisperModel.from_pretrained, output_loading_info=True)
            encoder = model.encoder
        if missing_keys := [name for name in report["missing_keys"] if "decoder" not in name]:
            raise XFusionError(f"encoder {self.config.source!r} is no Whisper: it lacks the weights {missing_keys[0]}")
        if encoder.config.d_model != self.width:
            raise XFusionError(
                f"encoder {self.config.source!r} has features of {encoder.config.d_model} numbers, not {self.width}: set"
                " width"
            )
        if self.longest < encoder.config.max_source_positions:  # it requires exactly as many frames as positions
            encoder.config.max_source_positions = encoder.max_source_positions = self.longest
            encoder.embed_positions = torch.nn.Embedding.from_pretrained(
                encoder.embed_positions.weight[: self.longest].clone()
            )
        self.spectra = load_pretrained(*place, WhisperFeatureExtractor.from_pretrained)
        self.network = encoder.float().requires_grad_(False).eval().to(self.place.device)
