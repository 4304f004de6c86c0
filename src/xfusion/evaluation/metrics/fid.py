"""Fréchet distance of drawings and pictures (Heusel et al., arXiv 1706.08500), by torchmetrics; with Inception it is the FID.

It is biased for few pictures (Bińkowski et al., arXiv 1801.01401), so fewer than 5,000 on a side are refused.
"""

from __future__ import annotations

import hashlib
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
from xfusion.storage import file_hash

if TYPE_CHECKING:
    from xfusion.evaluation.drawn import Drawn

FEWEST = 5000
"""Fewest pictures on either side."""
BATCH = 32
"""Pictures per forward pass; memory only."""
CHUNK = 1024
"""Rows of features whose distances are computed at once; memory only."""
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
        ``fid`` with Inception, ``frechet_distance`` with another encoder; 0 or more, lower is better. And the distances of
        `compare`.

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
    metric, nearest = compare(FrechetInceptionDistance, drawn, files, encoder, device=device, progress=progress)
    distance = {"fid" if encoder is None else "frechet_distance": float(metric.compute())}
    counts = {"num_pictures": len(drawn), "num_reference": len(files)}
    return distance | nearest | counts | {"settings": settings_of(encoder, argument, files)}


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
) -> tuple[Any, dict[str, float]]:
    """Feed both sets to one of torchmetrics' distances, and find each picture's nearest one of the folder in its features.

    Returns:
        the distance, and two medians: ``nearest_distance``, from a drawing to the nearest picture of the folder, and
        ``nearest_distance_reference``, from a picture of the folder to the nearest other one. If the folder is what the model was
        trained on, a first median far below the second says that the drawings are copies.

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
    features: dict[bool, list[Tensor]] = {real: [] for real in sides}
    done, total = 0, len(files) + len(drawn)
    for real, pictures in sides.items():
        hook = metric.inception.register_forward_hook(
            lambda _, __, output, kept=features[real]: kept.append(output.cpu())
        )
        for images in batches(pictures):
            progress("judging", done, total)
            metric.update(images.to(device), real=real)
            done += len(images)
        hook.remove()
    drawings, references = torch.cat(features[False]), torch.cat(features[True])
    return metric, {
        "nearest_distance": float(nearest_distances(drawings, references).quantile(0.5)),
        "nearest_distance_reference": float(nearest_distances(references).quantile(0.5)),
    }


def nearest_distances(rows: Tensor, references: Tensor | None = None) -> Tensor:
    """Euclidean distance of each row to the nearest of the references, or to the nearest other row.

    Args:
        rows: ``[n, width]``.
        references: ``[m, width]``; None takes the rows themselves.

    Returns:
        float64 ``[n]``.
    """
    rows = rows.double()
    columns = rows if references is None else references.double()
    nearest: list[Tensor] = []
    for start in range(0, len(rows), CHUNK):
        distances = torch.cdist(rows[start : start + CHUNK], columns)
        if references is None:
            distances.diagonal(start).fill_(torch.inf)
        nearest.append(distances.amin(dim=1))
    return torch.cat(nearest)


def settings_of(encoder: Encoder.Config | None, folder: str, files: list[Path]) -> dict[str, Any]:
    """Names of the encoder and of the reference folder, and a hash over the content of its pictures, for the record."""
    digest = hashlib.sha256("\n".join(sorted(map(file_hash, files))).encode())
    name = Path(folder).expanduser().resolve().name
    return {
        "encoder": INCEPTION if encoder is None else encoder.fingerprint,
        "reference": name,
        "reference_sha256": digest.hexdigest(),
    }


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
