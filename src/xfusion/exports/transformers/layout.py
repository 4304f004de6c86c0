"""The chat template and the generation settings of an exported model, so that transformers builds the same prompts as xfusion.

A conversation with a picture or a sound is written in reading order: one line per turn, without roles, and a line break after
the last text (`xfusion.generation.conversation`, `xfusion.data.templates.opened`). A conversation of text alone uses the base's
own chat template.
"""

from __future__ import annotations

import json
from typing import Any

from xfusion.exports.base import not_exact
from xfusion.model import Model

TEMPLATE = """\
{%- set said = namespace(media=false, turns=[], line='', out='') -%}
{%- for message in messages -%}
    {%- set line = namespace(words='') -%}
    {%- if not loop.first -%}{%- set said.line = said.line ~ '\\n' -%}{%- endif -%}
    {%- for block in ([{'type': 'text', 'text': message.content}] if message.content is string else message.content) -%}
        {%- if block.type == 'text' -%}
            {%- set line.words = line.words ~ block.text -%}
            {%- set said.line = said.line ~ block.text -%}
        {%- elif block.type == kind -%}
            {%- if said.line -%}
                {%- set said.out = (said.out or begin) ~ lead ~ said.line -%}
            {%- endif -%}
            {%- set said.out = (said.out or opens) ~ medium -%}
            {%- set said.media = true -%}
            {%- set said.line = '' -%}
        {%- else -%}
            {{- raise_exception('a block of type ' ~ block.type ~ ' is neither text nor ' ~ kind) -}}
        {%- endif -%}
    {%- endfor -%}
    {%- set said.turns = said.turns + [{'role': message.role, 'content': line.words}] -%}
{%- endfor -%}
{%- if said.media -%}
    {{- said.out ~ (lead ~ said.line ~ '\\n' if said.line else '') -}}
{%- else -%}
{%- set messages = said.turns %}
"""
"""First part of an exported chat template (Jinja); the base's own template follows it.

`chat_template` writes the values of ``kind``, ``begin``, ``opens``, ``lead`` and ``medium`` before it.
"""
PLAIN = "{% for turn in messages %}{{ turn.role | capitalize }}: {{ turn.content }}\n{% endfor %}Assistant:"
"""The chat template of a base that has none, as in `Backbone.chat_text`."""
TRIAL_TEXTS = ("What is this?", "a red apple", "Name it: 7, or\ntwo?")
"""Texts with which `lay_out` tests the exported template."""


def chat_template(model: Model, kind: str, medium: str, lead: str) -> str:
    """The chat template of an exported tokenizer, as Jinja source.

    Args:
        model: the exported model.
        kind: type of the content blocks that hold a medium: ``image`` or ``audio``.
        medium: the special tokens that stand for one medium, as text.
        lead: text before each text that follows a special token: empty, or a space for tokenizers that otherwise split such a
            text differently.
    """
    backbone = model.backbone
    begin = "".join(backbone.tokenizer.convert_ids_to_tokens(list(backbone.begin_ids)))
    medium_begin = begin if model.modality.config.behind_begin else ""
    constants = {"kind": kind, "begin": begin, "opens": medium_begin, "lead": lead, "medium": medium}
    head = "".join(f"{{%- set {name} = {json.dumps(text)} -%}}\n" for name, text in constants.items())
    base_template = backbone.tokenizer.chat_template or PLAIN
    base_template = base_template["default"] if isinstance(base_template, dict) else base_template
    return f"{head}{TEMPLATE}{base_template.removesuffix(chr(10))}{{%- endif -%}}"


def lay_out(tokenizer: Any, model: Model, kind: str, medium: str) -> None:
    """Set a tokenizer's chat template, and stop it from adding tokens of its own to a prompt.

    The template writes the token that begins a prompt. Padding is on the left, because an answer continues its prompt. The
    result is tested on `TRIAL_TEXTS`.

    Args:
        tokenizer: the exported tokenizer; changed in place.
        model: the exported model.
        kind: see `chat_template`.
        medium: see `chat_template`.

    Raises:
        XFusionError: no template makes the tokens that `generate` reads, because the tokenizer splits text after a special
            token differently.
    """
    # ``save_pretrained`` writes the arguments of the constructor, so the side is set there, too.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_bos_token = tokenizer.add_eos_token = False
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.post_processor = None  # it only adds these tokens and corrects offsets
    for lead in ("", " "):
        tokenizer.chat_template = chat_template(model, kind, medium, lead)
        if all(_is_read_alike(tokenizer, model, kind, medium, words) for words in TRIAL_TEXTS):
            return
    reason = "the tokenizer of its base reads words behind a special token otherwise than alone, and no space mends it"
    raise not_exact(model, "transformers", reason)


def _is_read_alike(tokenizer: Any, model: Model, kind: str, medium: str, words: str) -> bool:
    """Whether the template makes the same tokens as `generate` for a medium with a text before and after it."""
    backbone = model.backbone
    blocks = [{"type": "text", "text": words}, {"type": kind}, {"type": "text", "text": words}]
    template_ids = tokenizer.apply_chat_template([{"role": "user", "content": blocks}], return_dict=True)["input_ids"]
    medium_ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(medium))
    return template_ids == [*backbone.begin_ids, *backbone.encode(words), *medium_ids, *backbone.encode(f"{words}\n")]


def generation_settings(model: Model, suppressed: list[int]) -> Any:
    """Settings with which transformers' ``generate`` answers as xfusion does: greedy, without penalties, same end tokens.

    Args:
        model: the exported model.
        suppressed: ids of tokens that are never generated.

    Returns:
        a ``transformers.GenerationConfig``.
    """
    from transformers import GenerationConfig

    backbone = model.backbone
    padding = backbone.tokenizer.pad_token_id
    return GenerationConfig(
        bos_token_id=backbone.tokenizer.bos_token_id,
        eos_token_id=list(backbone.end_ids),
        pad_token_id=backbone.end_id if padding is None else padding,
        suppress_tokens=suppressed,
    )
