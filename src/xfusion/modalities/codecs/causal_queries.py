"""SEED's tokenizer: codes with a 1D causal dependency, from left to right, instead of a 2D one in raster order.

Learned queries attend to the features of a frozen encoder and to the queries before them. An MLP and a codebook turn them
into codes (Ge et al., "Planting a SEED of Vision in Large Language Model", arXiv 2307.08041, section 3.1; the network of
SEED-LLaMA, arXiv 2310.01218):

    z = W_2 tanh(W_1 Q(q; f(x)))        k_i = argmin_j |z_i - e_j|^2        f'(x) = D(W_4 tanh(W_3 e_k) + p)

Here f is the encoder of a frozen `AutoencoderKL`, whose decoder turns f'(x) into a picture; SEED uses a vision transformer
and unCLIP. The ``side x side`` codes of a picture are laid out row by row, so that reading order is the causal order. A place
in that grid is not a place in the picture.

Shape legend: ``N`` pictures, ``c`` feature cells of width ``F``, ``m`` codes, ``d`` width of an entry, ``D`` inner width.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from xfusion.data.sequence import XFusionError
from xfusion.modalities.base import Codec
from xfusion.modalities.codecs import files
from xfusion.modalities.codecs.autoencoder_kl import AutoencoderKL
from xfusion.modalities.codecs.vq import looked_up, quantise

_CLASS = "CausalQueries"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the network, and the frozen encoder that it reads."""

    base: str = "emoji-kl"
    """An `AutoencoderKL`: a shipped codec, a folder or a hub id."""
    size: int = 32
    """Side of the pictures in pixels; fixed, because other sizes have a different number of cells."""
    side: int = 4
    """Rows, and columns, of the code grid."""
    entries: int = 512
    """Number of codes in the codebook."""
    code_width: int = 16
    """Width of a codebook entry."""
    width: int = 128
    """Width of both transformers."""
    layers: int = 4
    """Layers of each transformer; every second layer of the query transformer attends to the features."""
    heads: int = 4
    """Attention heads."""


class CausalTokenizer(nn.Module):
    """Features -> a vector per code, and back."""

    def __init__(self, shape: Shape, cells: int, features: int):
        super().__init__()
        width, heads, codes = shape.width, shape.heads, shape.side**2
        self.shape = shape

        def layer(layer_class: type[nn.Module]) -> nn.Module:
            return layer_class(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)

        def mlp(inputs: int, hidden: int, outputs: int) -> nn.Module:
            return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))

        self.read, self.said = nn.Linear(features, width), nn.Linear(width, features)
        self.places, self.queries, self.ordinals, self.asked = (
            nn.Parameter(0.02 * torch.randn(count, width)) for count in (cells, codes, codes, cells)
        )
        decoder_layer, encoder_layer = nn.TransformerDecoderLayer, nn.TransformerEncoderLayer
        self.encoder = nn.ModuleList(layer(encoder_layer if i % 2 else decoder_layer) for i in range(shape.layers))
        self.decoder = nn.ModuleList(layer(encoder_layer) for _ in range(shape.layers))
        self.norm, self.last_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.down = mlp(width, shape.code_width, shape.code_width)
        self.up = mlp(shape.code_width, shape.code_width, width)
        self.table = nn.Parameter(torch.randn(shape.entries, shape.code_width), requires_grad=False)

    def encode(self, features: Tensor) -> Tensor:
        """``[N, c, F]`` -> ``z [N, d, side, side]`` in causal order."""
        memory, x = self.read(features) + self.places, self.queries.expand(len(features), -1, -1)
        mask = nn.Transformer.generate_square_subsequent_mask(len(self.queries), device=features.device)
        for layer in self.encoder:
            is_decoder_layer = isinstance(layer, nn.TransformerDecoderLayer)
            x = layer(x, memory, tgt_mask=mask) if is_decoder_layer else layer(x, src_mask=mask)
        return self.down(self.norm(x)).mT.unflatten(-1, (self.shape.side, self.shape.side))

    def decode(self, vectors: Tensor) -> Tensor:
        """Entries ``[N, d, side, side]`` -> features ``[N, c, F]``."""
        codes = self.up(vectors.flatten(2).mT) + self.ordinals
        x = torch.cat([codes, self.asked.expand(len(codes), -1, -1)], 1)
        for layer in self.decoder:
            x = layer(x)
        return self.said(self.last_norm(x[:, len(self.queries) :]))


class CausalQueries(Codec):
    """A `CausalTokenizer` on its frozen autoencoder; a latent cell holds a code's index."""

    channels = 1

    @dataclass(frozen=True, kw_only=True)
    class Config(files.FolderConfig):
        """Codes in causal order."""

        source: str
        """A folder written by `runs/train_emoji_causal_codes.py`, a shipped codec's name, or a hub id."""

        def build(self) -> CausalQueries:
            from safetensors.torch import load_file

            folder = self.folder(_CLASS)
            card, config = files.card(folder), files.read_json(folder / "config.json")
            field_names = [f.name for f in fields(Shape)]
            if missing := [name for name in field_names if name not in config]:
                raise XFusionError(f"{folder / 'config.json'} lacks {', '.join(missing)}: take an intact copy")
            codec = CausalQueries(Shape(**{name: config[name] for name in field_names}))
            try:
                codec.tokenizer.load_state_dict(load_file(folder / files.WEIGHTS))
            except RuntimeError as error:
                raise XFusionError(f"{folder} does not fit {_CLASS}: {' '.join(str(error).split())[:300]}") from error
            codec.licence, codec.psnr = self.licence or str(card.get("license", "unknown")), card.get("psnr")
            return codec

    def __init__(self, shape: Shape):
        """Create the tokenizer with random weights and load the autoencoder; everything is frozen."""
        super().__init__()
        if shape.size % shape.side:
            raise XFusionError(f"pictures of {shape.size} pixels do not divide into {shape.side} rows of codes")
        self.shape, self.entries, self.factor = shape, shape.entries, shape.size // shape.side
        self.base = AutoencoderKL.Config(source=shape.base).build()
        width, rows, columns = self.base.latent_shape(shape.size, shape.size)
        self.grid = (rows, columns)
        self.tokenizer = CausalTokenizer(shape, rows * columns, width)
        self.freeze()

    def features(self, images: Tensor) -> Tensor:
        """Features of pictures from the frozen encoder, ``[N, c, F]``."""
        if tuple(images.shape[2:]) != (self.shape.size, self.shape.size):
            height, width = images.shape[2:]
            raise XFusionError(f"a picture of {height}x{width} pixels: this codec knows {self.shape.size} pixels alone")
        return self.base.encode(images).flatten(2).mT

    def pictures(self, features: Tensor) -> Tensor:
        """The inverse of `features`."""
        return self.base.decode(features.mT.unflatten(-1, self.grid))

    def _encode(self, images: Tensor) -> Tensor:
        return quantise(self.tokenizer.encode(self.features(images)), self.tokenizer.table[None])[0].float()

    def _decode(self, latents: Tensor) -> Tensor:
        side = self.shape.side
        if tuple(latents.shape[1:]) != (1, side, side):
            raise XFusionError(f"latents of shape {list(latents.shape)} are not {side} x {side} codes")
        vectors = looked_up(latents.round().long(), self.tokenizer.table[None])
        return self.pictures(self.tokenizer.decode(vectors))

    def save(self, folder: Path) -> None:
        """Write config.json and weights, in half precision."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True)
        settings = {"_class_name": _CLASS, **asdict(self.shape)}
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        weights = {name: value.half().contiguous() for name, value in self.tokenizer.state_dict().items()}
        save_file(weights, folder / files.WEIGHTS)
