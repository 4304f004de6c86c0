"""Raw media <-> latents <-> tokens: one file per modality, plus codecs. Nothing here depends on a language model."""

from xfusion.modalities.base import Codec, Modality
from xfusion.modalities.image import ImageModality, square_picture

__all__ = ["Codec", "ImageModality", "Modality", "square_picture"]
