"""The frozen decoder LLM. Only this package, the encoders, the exports and the adapters import transformers.

`decoder` holds the base itself, `attention` the attention implementations, `sources` finding and loading a base, `cache` the
KV cache.
"""

from xfusion.backbone.cache import Cache
from xfusion.backbone.decoder import SHAPES, Backbone
from xfusion.backbone.sources import EMBEDDED, SCRATCH, cache_folder, embedded_file, special_tokens

__all__ = ["EMBEDDED", "SCRATCH", "SHAPES", "Backbone", "Cache", "cache_folder", "embedded_file", "special_tokens"]
