"""Pictures as codes: diffusers' VQModel as a codec, and the quantisers to train one.

A code is the index of the codebook entry nearest to the encoder's output at a place (VQ-VAE, van den Oord et al., arXiv
1711.00937, equations 1 and 2):

    k = argmin_j |z - e_j|^2        z_q = z + sg(e_k - z)

Three ways to train the codebook (table), one way to store it:

- `Quantizer`: by gradient (equation 3), or as moving averages of the vectors assigned to an entry (appendix A.1); by distance
  or by cosine (ViT-VQGAN, arXiv 2110.04627: unit-length vectors); with ``levels`` tables, each quantising the residual of
  the one before (RQ-VAE, arXiv 2203.01941, equation 3).
- `relaxed`: the dVAE of DALL-E (arXiv 2102.12092, section 2.1). Its encoder outputs a logit per code and its decoder reads a
  one-hot vector of K. That is a VQModel whose table is the identity, since ``argmin |z - 1_k|`` is ``argmax z_k``.

A latent of this codec is a code's index, not a vector of about unit variance: use it with a port for codes
(`xfusion.modalities.codes.CodePort`).

Shape legend: ``N`` pictures, ``L`` levels, ``K`` entries of a table, ``d`` width of an entry, ``h`` and ``w`` latent cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from xfusion.data.sequence import XFusionError
from xfusion.modalities.base import Codec
from xfusion.modalities.codecs import files

_CLASS = "VQModel"


class VectorQuantized(Codec):
    """A VQModel as a codec: a latent cell holds the index of its entry, one channel per level."""

    @dataclass(frozen=True, kw_only=True)
    class Config(files.FolderConfig):
        """A vector-quantised autoencoder of diffusers' class."""

        source: str
        """A folder, a shipped codec's name, or a hub id such as CompVis/ldm-celebahq-256."""

        def build(self) -> VectorQuantized:
            folder = self.folder(_CLASS)
            from diffusers.models.autoencoders.vq_model import VQModel as Model

            card = files.card(folder)
            levels = files.read_json(folder / "config.json").get("num_levels", 1)
            model = files.load(Model, folder)
            return VectorQuantized(model, levels, licence=self.licence or card.get("license"), psnr=card.get("psnr"))

    def __init__(
        self, model: Any, levels: int = 1, *, licence: str | None = None, psnr: dict[str, float] | None = None
    ):
        """`model` is a diffusers VQModel, frozen here; its codebook is the concatenation of the levels' tables."""
        super().__init__()
        rows, width = model.quantize.embedding.weight.shape
        if levels < 1 or rows % levels:
            raise XFusionError(f"a table of {rows} entries does not divide into {levels} levels")
        self.model = model.float()
        self.channels, self.entries = levels, rows // levels
        self.factor = 2 ** (len(model.config.block_out_channels) - 1)
        self.licence = licence or "unknown"
        self.psnr = psnr
        self.register_buffer("tables", self.model.quantize.embedding.weight.detach().view(levels, -1, width), False)
        self.freeze()

    tables: Tensor
    """``[L, K, d]``."""

    def _encode(self, images: Tensor) -> Tensor:
        return quantise(self.model.encode(images).latents, self.tables)[0].float()

    def _decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(looked_up(latents.round().long(), self.tables), force_not_quantize=True).sample


def nearest(x: Tensor, table: Tensor) -> Tensor:
    """The index of the entry of ``[K, d]`` nearest to each vector of ``[..., d]``."""
    distance = table.square().sum(-1) - 2 * x @ table.T  # |x|^2 is the same for all entries
    return distance.argmin(-1)


def quantise(z: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
    """Residual quantisation of ``z [N, d, h, w]`` -> codes ``[N, L, h, w]`` and partial sums ``[L, N, d, h, w]``."""
    x, codes, sums = z.movedim(1, -1), [], []
    total = torch.zeros_like(x)
    for table in tables:
        codes.append(nearest(x - total, table))
        total = total + table[codes[-1]]
        sums.append(total.movedim(-1, 1))
    return torch.stack(codes, 1), torch.stack(sums)


def looked_up(codes: Tensor, tables: Tensor) -> Tensor:
    """Codes ``[N, L, h, w]`` -> the sum of their entries ``[N, d, h, w]``; XFusionError for a code out of range."""
    if ((low := int(codes.min())) < 0) | ((high := int(codes.max())) >= tables.shape[1]):
        code_out_of_range, last = low if low < 0 else high, tables.shape[1] - 1
        raise XFusionError(
            f"{code_out_of_range} is none of the codec's codes, 0 to {last}: set the port's entries to the codec's"
        )
    vectors = [table[code] for table, code in zip(tables, codes.unbind(1), strict=True)]
    return torch.stack(vectors).sum(0).movedim(-1, 1)


def code_use(codes: Tensor, entries: int) -> tuple[float, float]:
    """Share of entries in use, and the perplexity ``exp(-sum p log p)`` of the code frequencies: at most ``entries``."""
    share = torch.bincount(codes.flatten().long(), minlength=entries).double() / codes.numel()
    return (share > 0).double().mean().item(), torch.special.entr(share).sum().exp().item()


class Quantizer(nn.Module):
    """The codebook in training: codes, straight-through vectors, and the commitment and codebook losses.

        loss = beta |z - sg(e)|^2  (+ |sg(z) - e|^2 if the table learns by gradient)

    as a mean over levels of the partial sums' errors. Moving averages track the vectors Z_k assigned to an entry,

        n_k <- g n_k + (1 - g) |Z_k|    m_k <- g m_k + (1 - g) sum Z_k    e_k = m_k / n_k

    and an entry with a count below ``revive_below`` is reset to one of the batch's vectors (Jukebox, arXiv 2005.00341,
    section 3.1); the first batch sets all of them.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of a codebook."""

        entries: int = 512
        """Codes per level."""
        width: int = 16
        """Width of an entry."""
        levels: int = 1
        """Number of tables, each quantising the residual of the one before."""
        distance: Literal["l2", "cosine"] = "l2"
        """Nearest by distance, or by cosine with vectors and entries of unit length."""
        decay: float = 0.99
        """g of the moving averages; 0 trains the table by gradient."""
        commitment: float = 0.25
        """beta, the weight of the commitment loss."""
        revive_below: float = 0.1
        """Entries with fewer average uses per batch are reset; 0 never resets."""

        def build(self) -> Quantizer:
            """The codebook, randomly initialised."""
            return Quantizer(self)

    size: Tensor
    """Moving average of an entry's uses per batch, ``[L, K]``."""
    total: Tensor
    """Moving average of the sum of vectors assigned to an entry, ``[L, K, d]``."""

    def __init__(self, config: Config):
        super().__init__()
        if config.distance == "cosine" and config.levels > 1:
            raise XFusionError(f"{config.levels} levels by cosine: what an angle leaves is no angle, take distance l2")
        self.config = config
        shape = (config.levels, config.entries, config.width)
        self.tables = nn.Parameter(torch.empty(shape).uniform_(-1, 1) / config.entries, config.decay == 0)
        self.register_buffer("size", torch.zeros(shape[:2]))
        self.register_buffer("total", torch.zeros(shape))

    def scaled(self, x: Tensor, dim: int) -> Tensor:
        """Normalised to unit length if the distance is cosine."""
        return functional.normalize(x, dim=dim) if self.config.distance == "cosine" else x

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[N, d, h, w]`` -> straight-through vectors of that shape, codes ``[N, L, h, w]``, loss."""
        z = self.scaled(z, 1)
        tables = self.tables if self.config.decay else self.tables.clone()  # `follow` writes to what autograd has saved
        codes, sums = quantise(z.detach(), self.scaled(tables, -1))
        loss = self.config.commitment * (z - sums.detach()).square().mean()
        if not self.config.decay:
            loss = loss + (z.detach() - sums).square().mean()
        if self.training:
            self.follow(z.detach(), codes, sums.detach())
        return z + (sums[-1] - z).detach(), codes, loss

    @torch.no_grad()
    def follow(self, z: Tensor, codes: Tensor, sums: Tensor) -> None:
        """Update the moving averages with a batch, and reset unused entries."""
        config = self.config
        decay = config.decay or 0.99
        residuals = torch.cat([z[None], z - sums[:-1]])  # the input of each level
        for level, table in enumerate(self.tables):
            x, code = residuals[level].movedim(1, -1).flatten(0, -2), codes[:, level].flatten()
            size, total = self.size[level], self.total[level]
            size.lerp_(torch.bincount(code, minlength=config.entries).to(size), 1 - decay)
            total.lerp_(torch.zeros_like(total).index_add_(0, code, x), 1 - decay)
            if config.decay:
                is_used = size > 0
                table[is_used] = self.scaled(total[is_used] / size[is_used, None], -1)
            is_unused = size < config.revive_below
            if count := int(is_unused.sum()):
                table[is_unused] = x[torch.randint(len(x), (count,), device=x.device)]
                size[is_unused] = 2 * config.revive_below  # keeps it from being reset for some batches
                total[is_unused] = 2 * config.revive_below * table[is_unused]


def relaxed(scores: Tensor, temperature: float, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Differentiable codes (Gumbel-softmax, arXiv 1611.01144), and their KL divergence from uniform.

        y = softmax((l + g) / tau),  g = -log(-log u)        KL(q || uniform) = log K + sum q log q,  q = softmax(l)

    Args:
        scores: ``l [N, K, h, w]``.
        temperature: tau; as it goes to 0, ``y`` becomes one-hot.
        generator: random generator of ``u``.

    Returns:
        ``y [N, K, h, w]`` and the mean divergence per cell.
    """
    # By hand: torch's `gumbel_softmax` accepts no generator, and a codec must be reproducible from its seed.
    uniform = torch.rand(scores.shape, generator=generator, device=scores.device, dtype=scores.dtype)
    gumbel = -torch.log(-torch.log(uniform.clamp(1e-9, 1 - 1e-6)))
    log_q = scores.log_softmax(1)
    divergence = (log_q.exp() * (log_q + torch.tensor(float(scores.shape[1])).log())).sum(1).mean()
    return ((scores + gumbel) / temperature).softmax(1), divergence
