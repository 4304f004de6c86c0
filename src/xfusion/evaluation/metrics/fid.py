"""Fréchet distance of drawings and pictures (Heusel et al., arXiv 1706.08500), by torchmetrics; with Inception it is the FID.

It is biased for few pictures (Bińkowski et al., arXiv 1801.01401), so fewer than 5,000 on a side are refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from xfusion.data.pictures import SUFFIXES, read
from xfusion.data.sequence import XFusionError, first_line
from xfusion.evaluation.metrics.clip_score import levels
from xfusion.evaluation.teachers import refuse_teacher
from xfusion.modalities.base import Encoder

if TYPE_CHECKING:
    from xfusion.evaluation.drawn import Drawn

FEWEST = 5000
"""Fewest pictures on either side."""
BATCH = 32
"""Pictures per forward pass; memory only."""
INCEPTION = "Inception v3 of torch-fidelity"


def judge(
    drawn: Drawn,
    argument: str,
    *,
    encoder: Encoder.Config | None,
    device: str,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """``--by fid:FOLDER``: distance between the distributions of the drawings and of a folder's pictures.

    Returns:
        ``fid`` with Inception, ``frechet_distance`` with another encoder; 0 or more, lower is better.

    Raises:
        XFusionError: there are fewer than 5,000 pictures on a side, the encoder was used to train the drawing model or is not
            available, or torchmetrics is not installed.
    """
    files = reference(argument, "fid")
    if min(len(drawn), len(files)) < FEWEST:
        raise XFusionError(
            f"a Fréchet distance needs {FEWEST:,} pictures or more on both sides; {drawn.folder} has {len(drawn):,},"
            f" {argument} {len(files):,}: take the unbiased kernel distance, --by kernel-distance:{argument}"
        )
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise XFusionError(f"a Fréchet distance needs the package {error.name}: pip install 'xfusion[eval]'") from error
    metric = compare(FrechetInceptionDistance, drawn, files, encoder, device=device, progress=progress)
    distance = {"fid" if encoder is None else "frechet_distance": float(metric.compute())}
    return distance | {"num_pictures": len(drawn), "num_reference": len(files), "settings": encoder_settings(encoder)}


def reference(folder: str, judge: str) -> list[Path]:
    """The pictures of a folder and its subfolders.

    Raises:
        XFusionError: there are none.
    """
    files = [p for p in sorted(Path(folder).expanduser().rglob("*")) if p.suffix.lower() in SUFFIXES] if folder else []
    if not files:
        raise XFusionError(f"{folder or 'no folder'} has no pictures to compare with: name some, --by {judge}:FOLDER")
    return files


def compare(
    kind: Callable[..., Any],
    drawn: Drawn,
    files: list[Path],
    encoder: Encoder.Config | None,
    *,
    device: str,
    progress: Callable[[str, int, int], None],
    **settings: Any,
) -> Any:
    """Feed both sets to one of torchmetrics' distances.

    Raises:
        XFusionError: the encoder was used in training, or is not available.
    """
    if encoder is not None:
        refuse_teacher(encoder.fingerprint, drawn.teachers)
    try:
        with warnings.catch_warnings():  # that it keeps features in memory: a few thousand rows
            warnings.simplefilter("ignore", UserWarning)
            metric = kind(feature=2048 if encoder is None else EncoderFeatures(encoder.build()), **settings).to(device)
    except ImportError as error:
        raise XFusionError(
            f"{INCEPTION} is not installed: pip install torch-fidelity (it brings torchvision), or name another --encoder"
        ) from error
    except OSError as error:
        raise XFusionError(f"{INCEPTION} cannot be had: {first_line(error)}; name another --encoder") from error
    sides = {True: map(read, files), False: drawn.pictures(0, len(drawn))}
    done, total = 0, len(files) + len(drawn)
    for real, pictures in sides.items():
        for images in batches(pictures):
            progress("judging", done, total)
            metric.update(images.to(device), real=real)
            done += len(images)
    return metric


def encoder_settings(encoder: Encoder.Config | None) -> dict[str, Any]:
    """Name of the encoder, for the record."""
    return {"encoder": INCEPTION if encoder is None else encoder.fingerprint}


def batches(pictures: Iterator[Image]) -> Iterator[Tensor]:
    """Pictures -> uint8 [n, 3, H, W]; consecutive pictures of equal size share a batch."""
    for _, same_size in groupby(pictures, key=lambda picture: picture.size):
        while batch := list(islice(same_size, BATCH)):
            yield torch.stack([levels(picture) for picture in batch])


class EncoderFeatures(nn.Module):
    """Adapts an encoder to the interface of torchmetrics."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder, self.num_features = encoder, encoder.width

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> features [N, num_features], of unit length as the encoder returns them."""
        return self.encoder.features(images.float() / 127.5 - 1)
