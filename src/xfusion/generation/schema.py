"""Answers restricted to the JSON texts of a schema. All of them are enumerated, so that constrained decoding is exact."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from xfusion.data.sequence import XFusionError

LARGEST_SCHEMA = 4096
"""Maximum number of answers that a schema may allow, since all are enumerated."""


def schema_answers(schema: dict[str, Any]) -> list[str]:
    """All JSON texts that a schema allows: an object of required properties, each ``enum``, ``const``, ``boolean``, ``null``
    or an ``integer`` from ``minimum`` to ``maximum``; objects may be nested.

    Raises:
        XFusionError: the schema uses anything else, allows nothing, or allows more than `LARGEST_SCHEMA` texts.
    """
    names = {"type", "enum", "const", "minimum", "maximum", "properties", "required", "additionalProperties", "title"}
    names |= {"description", "$schema"}
    if unknown := sorted(set(schema) - names):
        raise XFusionError(f"schema: {unknown[0]!r} is not understood; it may have {', '.join(sorted(names))}")
    kind = schema.get("type")
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else list(schema["enum"])
        _refuse_count(len(values))
        texts = [json.dumps(value, ensure_ascii=False) for value in values]
    elif kind in ("boolean", "null"):
        texts = ["true", "false"] if kind == "boolean" else ["null"]
    elif kind == "integer":
        if not {"minimum", "maximum"} <= set(schema):
            raise XFusionError("schema: an integer needs minimum and maximum, so that its values can be written out")
        low, high = math.ceil(schema["minimum"]), math.floor(schema["maximum"])
        _refuse_count(high - low + 1)
        texts = [str(value) for value in range(low, high + 1)]
    elif kind == "object":
        properties = schema.get("properties") or {}
        if missing := sorted(set(properties) - set(schema.get("required", properties))):
            raise XFusionError(f"schema: property {missing[0]!r} is optional: name it in required, or leave it out")
        texts = ["{"]
        for index, (name, property_schema) in enumerate(properties.items()):
            values = schema_answers(property_schema)
            _refuse_count(len(texts) * len(values))
            key = f"{', ' if index else ''}{json.dumps(name, ensure_ascii=False)}: "
            texts = [f"{text}{key}{value}" for text in texts for value in values]
        texts = [f"{text}}}" for text in texts]
    else:
        raise XFusionError(f"schema: type {kind!r} is not one of object, integer, boolean, null, or an enum")
    if not texts:
        raise XFusionError("schema: it allows no answer")
    return texts


def _refuse_count(count: int) -> None:
    if not 0 < count <= LARGEST_SCHEMA:
        raise XFusionError(f"schema: it allows {count} answers, from 1 to {LARGEST_SCHEMA} can be written out")


def next_tokens(generated: Seq[int], allowed: Seq[tuple[int, ...]], end: int) -> list[int]:
    """Next tokens that keep a partial answer a prefix of an allowed one; includes ``end`` if it is already complete."""
    length, prefix = len(generated), tuple(generated)
    continuations = {answer[length] for answer in allowed if len(answer) > length and answer[:length] == prefix}
    return sorted(continuations | ({end} if not continuations or prefix in allowed else set()))


def restrict_logits(logits: Tensor, answers: Seq[Seq[int]], allowed: Seq[tuple[int, ...]], end: int) -> Tensor:
    """Logits ``[B, V]``, set to -inf except at tokens that keep a partial answer a prefix of an allowed one."""
    restricted_logits = torch.full_like(logits, -torch.inf)
    for row, generated in enumerate(answers):
        token_ids = torch.tensor(next_tokens(generated, allowed, end), device=logits.device)
        restricted_logits[row, token_ids] = logits[row, token_ids]
    return restricted_logits
