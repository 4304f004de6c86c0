"""Small random models of other libraries' classes, saved as a folder or a hub has them: what sees beside a base."""

from pathlib import Path

import torch
from contracts.table import tokenizer
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)

TEMPLATE = (
    "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} answer:"
)


def _save(
    kind: type[PreTrainedModel], config: CLIPConfig | LlavaConfig, folder: Path, seed: int, spread: float
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
        for parameter in model.parameters():
            parameter.data.add_(spread * torch.randn_like(parameter))
    model.save_pretrained(folder)


def make_clip(folder: Path, side: int = 16, patch: int = 4) -> Path:
    """A CLIP of three layers, whose words are letters."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    words = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    CLIPProcessor(image_processor=images, tokenizer=words).save_pretrained(folder)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {"vocab_size": 54, "max_position_embeddings": 14, "bos_token_id": 52, "eos_token_id": 53}
    vision = {"image_size": side, "patch_size": patch}
    config = CLIPConfig(vision_config=sizes | vision, text_config=sizes | text, projection_dim=8)
    _save(CLIPModel, config, folder, seed=3, spread=0.2)
    return folder


def make_llava(folder: Path) -> Path:
    """A LLaVA of two layers that reads pictures of 16 pixels."""
    words = tokenizer()
    words.add_tokens(["<image>"], special_tokens=True)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=words,
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=4),
        text_config=LlamaConfig(**sizes, vocab_size=len(words), eos_token_id=1, pad_token_id=2, bos_token_id=0),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    _save(LlavaForConditionalGeneration, config, folder, seed=0, spread=0.3)
    return folder
