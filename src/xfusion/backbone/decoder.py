"""The frozen decoder: its properties, its tokenizer, its layers, and shadows of it.

Nothing here modifies the model that transformers loaded: its module tree, keys, storage and hooks stay. Fusions work on a
*shadow*: new module objects over the same tensors, in which the family's own ``forward`` applies embedding scale, rotary
tables, layer order and final norm, while a `Slot` (`xfusion.layers`) replaces each decoder layer.

Shape legend: ``B`` batch row, ``n`` rows of one tower, ``S`` all rows of a pass, ``D`` model width, ``V``
vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import os
import threading
from collections.abc import Callable, Iterable
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn

from xfusion.backbone.cache import Cache
from xfusion.backbone.sources import EMBEDDED, SCRATCH, load_weights, one_line_errors, resolve_source
from xfusion.data.sequence import Rows, XFusionError, fingerprint, first_line
from xfusion.hub import card_licence, hub_commit
from xfusion.layers import Slot, attention_path, grouped_attention, shadow, takes_cache

FUNCTION = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "rope_parameters",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_epsilon",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "logit_scale",
    "no_rope_layers",
    "use_parallel_residual",
    "scale_attn_weights",
    "num_experts_per_tok",
    "norm_topk_prob",
)
"""Configuration settings that change what the same weights compute; a family has only some of them."""
ENCODING = ("normalizer", "pre_tokenizer", "model", "added_tokens")
"""Parts of a serialised tokenizer that decide which token ids a text becomes. Truncation, padding and the post-processor do not
act here (`Backbone.encode` adds no special tokens), and the decoder only turns ids back into text."""
_LLAMA3: dict[str, Any] = {"model_type": "llama", "vocab_size": 128_256, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": _LLAMA3
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": _LLAMA3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}
"""Shapes of bases without weights: those that the paper trains on."""


class Backbone:
    """A frozen decoder LLM from transformers, with its tokenizer.

    Attributes:
        model: the model as transformers loaded it; never modified.
        tokenizer: its tokenizer.
        source: where it came from (hub id, folder, GGUF file or ``wheel:``).
        revision: the hub revision, or None.
        fingerprint: SHA-256 over all weights.
        pretrained: whether its weights were trained, so that its function is worth preserving.
    """

    def __init__(
        self, model: Any, tokenizer: Any, source: str, revision: str | None = None, *, pretrained: bool = True
    ):
        if any("_hf_hook" in m.__dict__ and getattr(m._hf_hook, "offload", False) for m in model.modules()):
            raise XFusionError(f"{source}: some weights are offloaded; load the base on one device")
        if model.config.is_encoder_decoder:
            raise XFusionError(
                f"{source}: {type(model).__name__} is an encoder-decoder; xfusion needs a decoder-only LLM"
            )
        model.requires_grad_(False)
        model.eval()
        self.model, self.tokenizer, self.source, self.revision = model, tokenizer, source, revision
        self.pretrained = pretrained
        self.decoder = model.base_model
        self.layers_key, self.layers = self._find_layers()
        self.takes_tuples = self._find_takes_tuples()
        self._fingerprint: str | None = None
        # A tokenizer keeps a call's settings until the next call, so concurrent threads could use each other's settings.
        self._tokenizing = threading.Lock()

    @classmethod
    def load(
        cls,
        source: str = EMBEDDED,
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Backbone:
        """Load and freeze a base.

        Args:
            source: ``wheel:DISTRIBUTION/FILE.gguf``, a ``.gguf`` file, a folder, or a hub id; with the prefix ``scratch:``,
                a base of the same shape and tokenizer with random weights, the same in every process.
            revision: hub revision; only for hub ids.
            dtype: None keeps the checkpoint's own.
            device: the base's device; new modules and codecs use the same one.

        Raises:
            XFusionError: the source is missing or its architecture is not supported.
        """
        from transformers import AutoTokenizer

        name_or_path, scratch = resolve_source(source), source.startswith(SCRATCH)
        with one_line_errors(f"base {source!r} cannot be loaded"):
            hub_options = {"revision": revision} if revision else {}
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False, **hub_options)
            model = load_weights(name_or_path, scratch=scratch, dtype=dtype or "auto", revision=revision)
        if not os.path.isdir(name_or_path):
            # A branch or None is resolved to its commit, so that a pack records the exact one.
            revision = hub_commit(name_or_path, revision) or revision
        return cls(model.to(device), tokenizer, source, revision, pretrained=not scratch)

    @classmethod
    def of_shape(cls, name: str, device: torch.device | str = "meta") -> Backbone:
        """A base without weights and tokenizer, to estimate what a recipe would cost on it.

        Args:
            name: a name in `SHAPES`.
            device: any device but ``meta`` gets random weights, to measure time and memory.

        Raises:
            XFusionError: the name is unknown.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        if name not in SHAPES:
            raise XFusionError(f"shape {name!r} is not one of {', '.join(SHAPES)}")
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[name]), dtype=torch.bfloat16)
        return cls(model.requires_grad_(False).eval(), None, name, pretrained=False)

    def without_weights(self) -> Backbone:
        """The same base without weights, on the ``meta`` device."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(self.config), dtype=self.dtype)
        return Backbone(model, self.tokenizer, self.source, self.revision, pretrained=self.pretrained)

    def fresh(self) -> Any:
        """The base loaded again by transformers alone: a separate object with its own storage, as `verify` needs.

        It has the same precision, device and attention. A matrix product may round differently if its operands are aligned
        differently (seen for single tokens on a CPU), so each weight gets the same offset from a cache line as in this base.

        Raises:
            XFusionError: the source is gone or holds another architecture.
        """
        with one_line_errors(f"base {self.source!r} cannot be loaded again"):
            model = load_weights(
                resolve_source(self.source),
                scratch=not self.pretrained,
                dtype=self.dtype,
                revision=self.revision,
                attention=self.attention,
            )
        model.requires_grad_(False).eval()
        model.to(self.device)
        for original, reloaded in zip(self.model.parameters(), model.parameters(), strict=True):
            if reloaded.device.type == "cpu":
                reloaded.data = _aligned_like(reloaded.data, original.data)
        return model

    def _find_layers(self) -> tuple[str, nn.ModuleList]:
        class_names: set[str] = set(getattr(self.model, "_no_split_modules", None) or ())
        recorder = (getattr(self.decoder, "_can_record_outputs", None) or {}).get("hidden_states")
        for item in recorder if isinstance(recorder, list) else [recorder]:
            class_names.add(getattr(getattr(item, "target_class", item), "__name__", ""))
        for key, child in self.decoder._modules.items():
            if isinstance(child, nn.ModuleList) and len(child) and type(child[0]).__name__ in class_names:
                kinds = set(getattr(self.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
                blind = [layer for layer in child if not any(map(takes_cache, layer.modules()))]
                if kinds or blind:
                    which = "its layers" if len(blind) == len(child) else "some of its layers"
                    reason = f" (kinds of layers: {', '.join(sorted(kinds))})" if kinds else ""
                    raise XFusionError(
                        f"{self.source}: {type(self.model).__name__} cannot be fused: {which}"
                        f" ({type((blind or child)[0]).__name__}) have no softmax attention whose keys and values could be"
                        f" shared{reason}; take a base with attention in every layer"
                    )
                bias = {"alibi", "position_bias"} & set(inspect.signature(child[0].forward).parameters)
                if bias and getattr(self.model.config, "alibi", True):  # Falcon's may be off
                    raise XFusionError(
                        f"{self.source}: {type(self.model).__name__} cannot be fused: its layers ({type(child[0]).__name__})"
                        f" take a bias by the distance of words ({min(bias)}), which has no value for pictures; take a base with"
                        " rotary or learned positions"
                    )
                return key, child
        raise XFusionError(
            f"{self.source}: {type(self.model).__name__} has no list of decoder layers that xfusion recognises "
            f"(looked for {sorted(n for n in class_names if n)}); see docs/how_it_works.md for what a base needs"
        )

    @torch.no_grad()
    def _find_takes_tuples(self) -> bool:
        """Whether the decoder reads the first of what a layer returns (GPT-J, CodeGen, Falcon), where others take it for the
        states; of states it would take the first row of a batch. No layer is computed.

        Raises:
            XFusionError: it runs in neither way.
        """
        x = torch.zeros(2, 3, self.hidden_size, dtype=self.dtype, device=self.device)
        position = torch.arange(3, device=self.device).expand(2, 3)
        failures: list[Exception] = []
        for takes_tuples in (False, True):
            self.takes_tuples = takes_tuples
            decoder = self.shadow_decoder(lambda index, layer, states, call: states)
            try:
                if self._run(decoder, x, position).shape == x.shape:
                    return takes_tuples
            except torch.OutOfMemoryError:
                raise
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
                failures.append(error)
        reason = f" ({first_line(failures[0])})" if failures else ""
        raise XFusionError(
            f"{self.source}: {type(self.model).__name__} cannot be fused: it does not run over given states{reason}"
        ) from (failures[0] if failures else None)

    # -- facts

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_parameters(self) -> int:
        """Total number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        attention: Any = self.layers[0].get_submodule(attention_path(self.layers[0]))
        return attention.head_dim if hasattr(attention, "head_dim") else attention.head_size

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def attention(self) -> str:
        """Name of the attention implementation that the base uses."""
        return self.config._attn_implementation

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes, dtypes and bytes of all weights, computed once and cached."""
        if self._fingerprint is None:
            self._fingerprint = self.compute_fingerprint()
        return self._fingerprint

    def compute_fingerprint(self) -> str:
        """The fingerprint of the current weights, recomputed."""
        return fingerprint(dict(self.model.named_parameters()))

    @property
    def identity(self) -> dict[str, str | None]:
        """Identifies the base in saved files: ``source``, ``revision`` and ``fingerprint``."""
        return {"source": self.source, "revision": self.revision, "fingerprint": self.fingerprint}

    @property
    def function(self) -> dict[str, Any]:
        """What determines a base's output besides its weights, as JSON to store in a pack: configuration settings, the layers'
        windows, a hash of the tokenizer's vocabulary and special tokens, and hashes of what else decides how text is encoded
        (`encoding_hashes`).
        """
        settings = {name: getattr(self.config, name) for name in FUNCTION if hasattr(self.config, name)}
        facts: dict[str, Any] = {"settings": settings | {"windows": [self.window(i) for i in range(self.num_layers)]}}
        if self.tokenizer is not None:
            tokenizer = self.tokenizer
            parts = (
                sorted(tokenizer.get_vocab().items()),
                sorted(self.special_tokens),
                tokenizer.bos_token_id,
                tokenizer.eos_token_id,
            )
            facts["tokenizer"] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
            facts["tokenizer_parts"] = encoding_hashes(tokenizer)
        return json.loads(json.dumps(facts, default=str))

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer in positions, or None for full attention."""
        size = getattr(self.config, "sliding_window", None)
        types = getattr(self.config, "layer_types", None)
        if types is not None:
            return size if types[layer] == "sliding_attention" else None
        return size

    @property
    def own_mask(self) -> str | None:
        """Name of a causal mask that the layers apply by the places of keys in memory, whatever mask they are given, as in
        GPT-Neo; None in most families. Text and media are sorted by owner in memory, not in reading order, so a word would never
        see a picture there.
        """
        buffers = self.layers[0].named_buffers()
        return next((name for name, b in buffers if b.ndim == 4 and b.shape[2] == b.shape[3] > 1), None)

    @property
    def context_length(self) -> int | None:
        """Maximum number of positions according to the base's configuration; None if not stated."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def longest(self) -> int | None:
        """Size of the learned position table; None if positions are rotary or absent, without a limit."""
        words = self.model.get_input_embeddings()
        tables = [m for m in self.decoder.children() if isinstance(m, nn.Embedding) and m is not words]
        sizes = (
            table.num_embeddings - getattr(table, "offset", 0) for table in tables
        )  # BioGPT's begins with two others
        return min(sizes, default=None)

    @property
    def embedding_scale(self) -> float:
        """Standard deviation of the input embeddings as the layers see them, including the family's own factor; 1 if there
        are no weights.
        """
        table = self.model.get_input_embeddings().weight
        if table.is_meta:
            return 1.0
        sample_ids = torch.arange(min(64, len(table)), device=table.device)
        with torch.no_grad():
            factor = float(self.embed(sample_ids).float().std() / table[sample_ids].float().std())
            return factor * float(table.float().std())

    @cached_property
    def licence(self) -> str:
        """The licence stated in the base's own model card, which is fetched if the base is of the hub."""
        if self.source.startswith(SCRATCH):
            return "random weights; the tokenizer is the base's own"
        if self.source == EMBEDDED:
            return "Apache-2.0"
        licence = None if self.source.endswith(".gguf") else card_licence(self.source, self.revision)
        return licence or "not recorded: see the base's own card"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Strings that the tokenizer would read as control tokens."""
        return tuple(self.tokenizer.all_special_tokens)

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """Token ids that start a text: the beginning-of-text token, or the end token if the base has no other separator."""
        token_id = self.tokenizer.bos_token_id
        token_id = self.tokenizer.eos_token_id if token_id is None else token_id
        return () if token_id is None else (token_id,)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids at which the base's own ``generate`` ends."""
        eos_token_id = self.model.generation_config.eos_token_id
        return (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id or ())

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer."""
        token_ids = list(self.stop_ids)
        if self.tokenizer.eos_token_id is not None and self.tokenizer.eos_token_id not in token_ids:
            token_ids.insert(0, self.tokenizer.eos_token_id)
        return tuple(token_ids)

    @property
    def end_id(self) -> int:
        """The token id that ends the answers of a model's training, the first of `end_ids`.

        Raises:
            XFusionError: the base has none.
        """
        if not self.end_ids:
            raise XFusionError(
                f"{self.source}: neither the tokenizer nor generation_config.json names a token that ends an answer: set"
                " eos_token in tokenizer_config.json"
            )
        return self.end_ids[0]

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text; special tokens written in it are treated as plain text.

        Raises:
            XFusionError: the text is not valid Unicode.
        """
        _refuse_surrogates(text)
        with self._tokenizing:
            return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def encode_spans(self, text: str) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        """Token ids of a text as from `encode`, and the character span ``(first, end)`` of each.

        Raises:
            XFusionError: the tokenizer cannot return character offsets, or the text is not valid Unicode.
        """
        _refuse_surrogates(text)
        if not self.tokenizer.is_fast:
            raise XFusionError(f"{self.source}: the tokenizer does not say which characters its tokens stand for")
        with self._tokenizing:
            encoding = self.tokenizer(
                text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
            )
        return tuple(encoding["input_ids"]), [(start, end) for start, end in encoding["offset_mapping"]]

    def chat(self, messages: str | list[dict[str, str]]) -> tuple[int, ...]:
        """Token ids of a conversation in the tokenizer's own chat template, or in a plain format if it has none.

        Args:
            messages: ``{"role": ..., "content": ...}``, oldest first, or the text of one question.

        Raises:
            XFusionError: the template rejects these roles.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.read_chat(self.chat_text(messages))

    def chat_text(self, messages: list[dict[str, str]]) -> str:
        """The conversation as text, up to the start of the answer.

        Raises:
            XFusionError: the template rejects these roles.
        """
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            lines = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
            return "\n".join([*lines, "Assistant:"])
        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise XFusionError(f"{self.source}: the chat template refuses this conversation: {error}") from error

    def read_chat(self, text: str) -> tuple[int, ...]:
        """Token ids of text from `chat_text`, whole or in parts: the template's control tokens are read as control tokens.

        Raises:
            XFusionError: the text is not valid Unicode.
        """
        if not self.tokenizer.chat_template:
            return self.encode(text)
        _refuse_surrogates(text)
        with self._tokenizing:
            return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    # -- the parts that fusions build on

    def copy_layer(self, index: int, config: Any) -> nn.Module:
        """A trainable float32 copy of a decoder layer, without dropout, with attention settings from ``config``."""
        layer = copy.deepcopy(self.layers[index], {id(self.config): config})
        for module in layer.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
            _disable_dropout(module)
        return layer.float().requires_grad_(True)

    def tower_config(self, width: int | None = None, mlp: int | None = None, *, all_keys: bool = False) -> Any:
        """A separate configuration for a tower, so that its attention implementation can differ from the base's.

        Args:
            width: model width of the tower's blocks; None means the base's. Heads keep the base's head width, since they use
                its rotary tables, so the number of heads changes: with as many query heads per key head as in the base, or
                the next number that divides.
            mlp: MLP width for blocks of another width; None scales the base's in proportion.
            all_keys: for blocks of another width, give every head its own keys and values.

        Raises:
            XFusionError: the width is not a multiple of the head width, or the MLP width is below 1.
        """
        config = copy.deepcopy(self.config)
        if width is None:
            return config
        if width < 1 or width % self.head_width:
            nearest_width = max(1, width // self.head_width) * self.head_width
            raise XFusionError(
                f"tower width {width} is not made of heads of {self.head_width}, which the rotary tables of {self.source}"
                f" are for: take {nearest_width} or {nearest_width + self.head_width}"
            )
        if mlp is not None and mlp < 1:
            raise XFusionError(f"MLP width {mlp} of a tower of width {width}: take at least 1")
        heads, base_heads = width // self.head_width, config.num_attention_heads
        if getattr(config, "num_key_value_heads", None):
            group = 1 if all_keys else base_heads // config.num_key_value_heads
            config.num_key_value_heads = heads // next(n for n in range(min(group, heads), heads + 1) if heads % n == 0)
        name = "n_inner" if hasattr(config, "n_inner") else "intermediate_size"
        base_mlp = getattr(config, name) or 4 * self.hidden_size
        setattr(config, name, mlp or max(1, round(base_mlp * width / self.hidden_size)))
        config.hidden_size, config.num_attention_heads = width, heads
        return config

    def fresh_layer(self, index: int, config: Any) -> nn.Module:
        """A trainable float32 decoder layer of the family's own class with ``config``'s sizes, without dropout.

        Its matrices are initialised as in the family's training from scratch; norms start at 1.
        """
        is_meta = next(self.layers[index].parameters()).is_meta
        with torch.device("meta" if is_meta else "cpu"):  # the same random numbers whatever the base's device
            layer: nn.Module = type(self.layers[index])(config, layer_idx=index).float()
        for module in layer.modules():
            if not is_meta and any(True for _ in module.parameters(recurse=False)):
                self.model._init_weights(module)
            _disable_dropout(module)
        return layer.to(self.device).requires_grad_(True)

    def working_copy(self, dtype: torch.dtype, attention: str) -> Backbone:
        """The frozen weights cast once to ``dtype`` for training, if theirs differs; rotary tables are not cast.

        If the family does not support ``attention``, the base's own implementation stays.

        The text path, ``verify`` and ``text_logits`` never use this copy.
        """
        attention, _ = self.supported_attention(attention)
        if dtype == self.dtype:
            return self if attention == self.attention else self.over_same_weights(attention)
        backbone = self.over_same_weights(attention)
        replace_by_casts(backbone.model, dtype, self.device, {})
        return backbone

    def over_same_weights(self, attention: str) -> Backbone:
        """New module objects that share this base's weights, and in which these can be replaced by others."""
        model = copy.deepcopy(self.model, {id(parameter): parameter for parameter in self.model.parameters()})
        model.config._attn_implementation, _ = self.supported_attention(attention)
        return Backbone(model, self.tokenizer, self.source, self.revision, pretrained=self.pretrained)

    def supported_attention(self, attention: str, reason: str = "") -> tuple[str, str]:
        """The implementation with which the family computes if ``attention`` is chosen, and the reason: the given one, or why
        the base's own implementation stays.

        Raises:
            XFusionError: the family has no ``flex_attention``.
        """
        if attention == "flex_attention" and not self.model._supports_flex_attn:
            raise XFusionError(
                f"{self.source}: {type(self.model).__name__} has no attention {attention!r}: leave --attention out"
            )
        # Otherwise soft-caps would be silently lost.
        if attention in ("sdpa", "grouped") and not self.model._supports_sdpa:
            return self.attention, f"{type(self.model).__name__} has no sdpa, so the base's own stays"
        if attention == "grouped":
            _register_grouped()
        return attention, reason

    def new_cache(self, num_towers: int, batch: int) -> Cache:
        """An empty cache for the frozen decoder (slot 0) and ``num_towers - 1`` more towers."""
        return Cache(Rows.empty(batch, self.device), [{} for _ in range(num_towers)])

    def embed(self, ids: Tensor) -> Tensor:
        """Frozen input embeddings ``[..., D]`` of token ids, with the family's own scale."""
        return self.model.get_input_embeddings()(ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits of final states ``[B, n, D]``, with the family's head, scale and soft-cap: ``[B, n, V]``."""
        hidden = hidden.to(self.dtype)  # new modules may have upcast it
        head = shadow(self.model)
        head._modules[self.model.base_model_prefix] = _FixedStates(hidden)
        return head(inputs_embeds=hidden).logits

    def shadow_decoder(self, compute_layer: Callable[[int, nn.Module, Tensor, dict[str, Any]], Tensor]) -> nn.Module:
        """A decoder that runs its own forward over slots: ``compute_layer(index, frozen_layer, states, call)`` computes
        each layer.
        """
        decoder = shadow(self.decoder)
        decoder._modules[self.layers_key] = nn.ModuleList(
            Slot(layer, i, compute_layer, in_tuple=self.takes_tuples) for i, layer in enumerate(self.layers)
        )
        return decoder

    def shadow_model(self, compute_layer: Callable[[int, nn.Module, Tensor, dict[str, Any]], Tensor]) -> Any:
        """A model that runs the whole model's own forward (including the head) over slots."""
        model = shadow(self.model)
        model._modules[self.model.base_model_prefix] = self.shadow_decoder(compute_layer)
        return model

    def drive(self, decoder: nn.Module, x: Tensor, position: Tensor) -> Tensor:
        """Run a shadow decoder over states ``x`` ``[B, S, D]`` in any order; slots supply their own masks.

        Args:
            decoder: a decoder from `shadow_decoder`.
            x: input embeddings.
            position: position ids ``[B, S]``.

        Returns:
            final states ``[B, S, D]``, after the decoder's last norm.

        Raises:
            XFusionError: a position exceeds the base's learned position table.
        """
        if self.longest is not None and int(position.max()) >= self.longest:
            raise XFusionError(
                f"{self.source}: a sequence of {int(position.max()) + 1} positions; the base has learned"
                f" {self.longest}: use shorter texts or smaller pictures"
            )
        return self._run(decoder, x, position)

    @staticmethod
    def _run(decoder: nn.Module, x: Tensor, position: Tensor) -> Tensor:
        # Every family passes a ready 4-D mask on unchanged; with None, transformers would try to detect packed sequences.
        unused_mask = torch.zeros(1, 1, 1, 1, dtype=x.dtype, device=x.device)
        output = decoder(inputs_embeds=x, attention_mask=unused_mask, position_ids=position, use_cache=False)
        return output.last_hidden_state


def replace_by_casts(
    module: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    casts: dict[int, nn.Parameter],
    excluded: Iterable[nn.Parameter] = (),
) -> None:
    """Put casts of its parameters on a device in the place of a frozen module's own, one by one; one that is used twice stays
    one, also among modules of one ``casts``.
    """
    skipped = set(excluded)
    for submodule in module.modules():
        for name, parameter in submodule._parameters.items():
            if parameter is None or parameter in skipped:
                continue
            if id(parameter) not in casts:
                casts[id(parameter)] = nn.Parameter(parameter.detach().to(device, dtype), requires_grad=False)
            submodule._parameters[name] = casts[id(parameter)]


@cache
def _register_grouped() -> None:
    """Register `grouped_attention` with transformers as "grouped"."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register("grouped", grouped_attention)
    AttentionMaskInterface.register("grouped", eager_mask)


class _ModelOutput(dict):
    def __getattr__(self, key: str) -> Any:
        return self.get(key)

    def __getitem__(self, key: Any) -> Any:  # by name or, as some families read the first of them, by number
        return [*self.values()][key] if isinstance(key, int) else super().__getitem__(key)


class _FixedStates(nn.Module):
    """Replaces the decoder and returns fixed states."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: Any, **__: Any) -> _ModelOutput:
        return _ModelOutput(last_hidden_state=self.hidden)


def _refuse_surrogates(text: str) -> None:
    """Refuse half a character (a lone surrogate), which stands in a Python string for bytes that are not valid UTF-8.

    Raises:
        XFusionError: there is one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise XFusionError(
            f"the text {text!r:.60} is not valid Unicode: {text[error.start]!r} is half a character; leave it out"
        ) from error


def _disable_dropout(module: nn.Module) -> None:
    """Set a module's dropout rates to 0: families use up to 0.1, which our towers do not want."""
    if isinstance(module, nn.Dropout):
        module.p = 0.0
    for name, value in vars(module).items():
        if "dropout" in name and isinstance(value, float):  # passed to the attention kernel
            setattr(module, name, 0.0)


def _aligned_like(values: Tensor, reference: Tensor) -> Tensor:
    """The same values in new memory with the same offset from a 64-byte boundary as ``reference``."""
    size = values.numel() * values.element_size()
    buffer = torch.empty(size + 128, dtype=torch.uint8)
    start = (reference.data_ptr() - buffer.data_ptr()) % 64
    return buffer[start : start + size].view(values.dtype).view(values.shape).copy_(values)


def encoding_hashes(tokenizer: Any) -> dict[str, str | None]:
    """SHA-256 of each part of a tokenizer in `ENCODING`, None for a part that it lacks: merges, normaliser, added tokens, ...

    Two tokenizers of one vocabulary may split a text differently. What another version of the library writes differently but
    means the same has no influence: fields that are off, the format of merges, and character offsets. A tokenizer without a
    serialised form, which is one in Python, has no hashes.
    """
    if not getattr(tokenizer, "is_fast", False):
        return {}
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    plain_parts = {name: _plain(parts.get(name)) for name in ENCODING}
    absent = (None, {"type": "Sequence"})  # an empty sequence of normalisers does nothing
    return {name: None if part in absent else _hash_of_json(part) for name, part in plain_parts.items()}


def _plain(part: Any) -> Any:
    """A part of a serialised tokenizer without what says nothing about token ids."""
    if isinstance(part, list):
        return [_plain(item) for item in part]
    if not isinstance(part, dict):
        return part
    plain = {key: value if key == "vocab" else _plain(value) for key, value in part.items() if key != "trim_offsets"}
    if isinstance(merges := plain.get("merges"), list):
        plain["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return {
        key: value for key, value in plain.items() if value is not None and value is not False and value not in ("", [])
    }


def _hash_of_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
