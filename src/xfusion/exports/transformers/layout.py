"""How words and media stand in an exported folder: the chat template and the settings of ``generate``, as xfusion has them.

With a picture or a sound among them, turns stand in reading order, a line each and without roles, and an answer begins behind a
new line where words come last (`xfusion.generation.conversation`, `xfusion.data.templates.opened`). Words alone stand in the
base's own template.
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
"""Up to the base's own template; what ``kind``, ``begin``, ``opens``, ``lead`` and ``medium`` are is set before it."""
PLAIN = "{% for turn in messages %}{{ turn.role | capitalize }}: {{ turn.content }}\n{% endfor %}Assistant:"
"""`Backbone.chat_text` of a base without a template."""
TRIED = ("What is this?", "a red apple", "Name it: 7, or\ntwo?")
"""Words that the layout is tried with."""


def chat_template(model: Model, kind: str, medium: str, lead: str) -> str:
    """The template of an exported tokenizer.

    Args:
        model: what is exported.
        kind: type of the blocks that show something, ``image`` or ``audio``.
        medium: tokens that stand for one.
        lead: what stands before words behind a token that is none, where the tokenizer joins words to what precedes them.
    """
    base = model.backbone
    begin = "".join(base.tokenizer.convert_ids_to_tokens(list(base.begin_ids)))
    opens = begin if model.modality.config.behind_begin else ""
    constants = {"kind": kind, "begin": begin, "opens": opens, "lead": lead, "medium": medium}
    head = "".join(f"{{%- set {name} = {json.dumps(text)} -%}}\n" for name, text in constants.items())
    own = base.tokenizer.chat_template or PLAIN
    own = own["default"] if isinstance(own, dict) else own
    return f"{head}{TEMPLATE}{own.removesuffix(chr(10))}{{%- endif -%}}"


def lay_out(tokenizer: Any, model: Model, kind: str, medium: str) -> None:
    """Give a tokenizer the template, and nothing that it adds to a prompt on its own: what opens one stands in the template.

    Args:
        tokenizer: the exported one; changed.
        model: what is exported.
        kind: see `chat_template`.
        medium: see `chat_template`.

    Raises:
        XFusionError: words behind a medium are read as other tokens than `generate` reads.
    """
    # An answer follows its prompt, so padding stands before it; what is saved are the arguments.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_bos_token = tokenizer.add_eos_token = False
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.post_processor = None  # it only adds such tokens, and corrects offsets
    for lead in ("", " "):
        tokenizer.chat_template = chat_template(model, kind, medium, lead)
        if all(_as_read(tokenizer, model, kind, medium, words) for words in TRIED):
            return
    reason = "the tokenizer of its base reads words behind a special token otherwise than alone, and no space mends it"
    raise not_exact(model, "transformers", reason)


def _as_read(tokenizer: Any, model: Model, kind: str, medium: str, words: str) -> bool:
    """Whether words around a medium are the tokens that `generate` reads."""
    base = model.backbone
    blocks = [{"type": "text", "text": words}, {"type": kind}, {"type": "text", "text": words}]
    found = tokenizer.apply_chat_template([{"role": "user", "content": blocks}], return_dict=True)["input_ids"]
    ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(medium))
    return found == [*base.begin_ids, *base.encode(words), *ids, *base.encode(f"{words}\n")]


def generation_settings(model: Model, unsaid: list[int]) -> Any:
    """Settings of transformers' ``generate`` by which it answers as ours does: greedily, the likeliest token without
    penalties, up to the same ends.

    Args:
        model: what is exported.
        unsaid: tokens that no answer has.
    """
    from transformers import GenerationConfig

    base = model.backbone
    padding = base.tokenizer.pad_token_id
    return GenerationConfig(
        bos_token_id=base.tokenizer.bos_token_id,
        eos_token_id=list(base.end_ids),
        pad_token_id=base.end_ids[0] if padding is None else padding,
        suppress_tokens=unsaid,
    )
