"""Models of transformers that are not a base: CLIP for scoring drawings, vision-language models for captioning.

No remote code is run: a model whose class is not part of transformers is refused.
"""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from xfusion.data.recaption import Ask
from xfusion.data.sequence import XFusionError, first_line
from xfusion.hub import hub_commit
from xfusion.modalities.encoders.loading import load_pretrained
from xfusion.storage import file_hash


def parse_source(text: str) -> tuple[str, str | None]:
    """Source and revision of ``ORG/MODEL[@revision]`` or of a folder. A folder has none, even if its name contains an @."""
    if Path(text).expanduser().exists():
        return str(Path(text).expanduser()), None
    source, _, revision = text.partition("@")
    return source, revision or None


class CLIPTowers(nn.Module):
    """CLIP with the interface of torchmetrics: features are tensors, not the output objects of transformers."""

    def __init__(self, model: Any):
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixels: Tensor) -> Tensor:
        """Features ``[N, width]``, not normalised, of pixels ``[N, 3, side, side]`` from CLIP's processor."""
        return _pooled(self.model.get_image_features(pixel_values=pixels))

    def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Features ``[N, width]``, not normalised, of token ids and their mask ``[N, T]``."""
        return _pooled(self.model.get_text_features(input_ids=ids, attention_mask=mask))


class CLIPReader:
    """CLIP's processor, which truncates long texts to ``longest`` tokens. The end token, whose feature CLIP uses, is kept."""

    def __init__(self, processor: Any, longest: int):
        self.processor, self.longest = processor, longest
        self.cut: set[str] = set()
        """The texts that were truncated."""

    def __call__(self, *, images: Any = None, text: Any = None, **options: Any) -> Any:
        """Inputs for `CLIPTowers`, as from transformers' processor."""
        if text is None:
            return self.processor(images=images, **options)
        lengths = map(len, self.processor.tokenizer(text)["input_ids"])
        self.cut.update(words for words, length in zip(text, lengths, strict=True) if length > self.longest)
        return self.processor(text=text, truncation=True, max_length=self.longest, **options)


def clip(source: str, revision: str | None, *, device: str) -> tuple[CLIPTowers, CLIPReader]:
    """CLIP, frozen and in float32, and its processor.

    Raises:
        XFusionError: the model cannot be loaded, lacks weights, or is not a CLIP.
    """
    from transformers import AutoConfig, AutoProcessor, CLIPModel

    config = _load(source, revision, AutoConfig)
    if config.model_type != "clip":
        raise XFusionError(f"{source!r} is a {config.model_type}, not a CLIP: a CLIP score is another model's to give")
    model = _load_complete(source, revision, CLIPModel, dtype=torch.float32)
    processor = _load(source, revision, AutoProcessor)
    longest = config.text_config.max_position_embeddings
    return CLIPTowers(model.to(device)).requires_grad_(False).eval(), CLIPReader(processor, longest)


def captioner(text: str, *, device: str, max_tokens: int) -> tuple[str, Ask]:
    """A vision-language model (InternVL, Qwen-VL, LLaVA, ...) that answers greedily, prompted in its own chat template.

    Args:
        text: ``ORG/MODEL[@revision]`` or a folder.
        device: device of the model.
        max_tokens: longest answer in tokens.

    Returns:
        the name to record, with the commit or, for a folder, a hash of its files; and a function from pictures and a prompt to
        one answer per picture.

    Raises:
        XFusionError: the model cannot be loaded, lacks weights, has no chat template, or reads pictures through torchvision,
            which is not installed.
    """
    from transformers import AutoModelForImageTextToText

    source, revision = parse_source(text)
    processor = _processor(source, revision)
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or not getattr(processor, "chat_template", None):
        raise XFusionError(f"{source!r} has no chat template for pictures: name a vision-language model that was tuned")
    tokenizer.padding_side = "left"  # answers of shorter prompts, too, directly follow the prompt
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = _load_complete(source, revision, AutoModelForImageTextToText, dtype="auto").to(device)
    model = model.requires_grad_(False).eval()

    options: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
    if "processor_kwargs" in inspect.signature(processor.apply_chat_template).parameters:  # not in transformers 5.0
        options = {"processor_kwargs": options}

    @torch.inference_mode()
    def ask(pictures: list[Image], prompt: str) -> list[str]:
        words = [{"type": "text", "text": prompt}] if prompt else []
        inputs = processor.apply_chat_template(
            [[{"role": "user", "content": [{"type": "image", "image": picture}, *words]}] for picture in pictures],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **options,
        ).to(device, model.dtype)
        ids = model.generate(
            **inputs, max_new_tokens=max_tokens, do_sample=False, num_beams=1, pad_token_id=tokenizer.pad_token_id
        )
        return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    commit = hub_commit(source, revision) or revision
    return f"{source}@{_files_hash(Path(source)) if Path(source).is_dir() else commit}", ask


def _processor(source: str, revision: str | None) -> Any:
    """The processor of a vision-language model: chat template, tokenizer and image processor.

    Those of Qwen-VL and InternVL also have a video processor, which exists only where torchvision is installed. Without
    torchvision the processor is loaded without it; the image processor is then transformers' Pillow version.

    Raises:
        XFusionError: it cannot be loaded, or only with torchvision.
    """
    from transformers import PROCESSOR_MAPPING, AutoConfig, AutoProcessor
    from transformers.utils.import_utils import is_torchvision_available

    if is_torchvision_available():
        return _load(source, revision, AutoProcessor)
    config = type(_load(source, revision, AutoConfig))
    kind = PROCESSOR_MAPPING.get(config, None)
    has_videos = "video_processor" in getattr(kind, "get_attributes", list)()
    try:
        return _load(source, revision, _without_videos(kind) if has_videos else AutoProcessor)
    except (XFusionError, TypeError) as error:  # TypeError: the constructor's arguments are in another order
        if isinstance(error, XFusionError) and "torchvision" not in str(error).lower():
            raise
        raise XFusionError(
            f"model {source!r} cannot be loaded without torchvision ({first_line(error)}): pip install torchvision"
        ) from error


def _without_videos(kind: Any) -> Any:
    """A processor class without its video processor."""

    class PictureProcessor(kind):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

    return PictureProcessor


def _pooled(output: Any) -> Tensor:
    """The features, which newer versions of transformers return inside an output object."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _files_hash(folder: Path) -> str:
    """A hash of the names and contents of a model's files."""
    lines = [f"{path.name} {file_hash(path)}" for path in sorted(folder.iterdir()) if path.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _load_complete(source: str, revision: str | None, kind: Any, **options: Any) -> Any:
    """A model, refused if its files lack weights that transformers would initialise at random."""
    model, report = _load(source, revision, kind, output_loading_info=True, use_safetensors=True, **options)
    if report["missing_keys"]:
        raise XFusionError(f"model {source!r} lacks weights: {sorted(report['missing_keys'])[0]}")
    return model


def _load(source: str, revision: str | None, kind: Any, **options: Any) -> Any:
    return load_pretrained("model", source, revision, kind.from_pretrained, trust_remote_code=False, **options)
