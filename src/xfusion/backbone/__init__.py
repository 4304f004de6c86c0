"""The frozen decoder LLM. With encoders, exports and adapters this is all that imports transformers.

`decoder` is the base itself, `attention` what its layers attend by, `sources` where it is found, `cache` what it has read.
"""

from xfusion.backbone.cache import Cache
from xfusion.backbone.decoder import SHAPES, Backbone
from xfusion.backbone.sources import EMBEDDED, SCRATCH, cache_folder, embedded_file, special_tokens

__all__ = ["EMBEDDED", "SCRATCH", "SHAPES", "Backbone", "Cache", "cache_folder", "embedded_file", "special_tokens"]
