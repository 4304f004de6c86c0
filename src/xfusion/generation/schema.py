"""Answers restricted to the JSON texts of a schema. All of them are enumerated, so that constrained decoding is exact."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence as Seq
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from xfusion.data.sequence import XFusionError

LARGEST_SCHEMA = 4096
"""Maximum number of answers that a schema may allow, since all are enumerated."""


TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (NoneType,),
}
"""The values of each type of a schema; True and False are no numbers."""


def schema_answers(schema: dict[str, Any]) -> list[str]:
    """All JSON texts that a schema allows: an object of required properties, each ``enum``, ``const``, ``boolean``, ``null``
    or an ``integer`` from ``minimum`` to ``maximum``; objects may be nested.

    Raises:
        XFusionError: the schema uses anything else, allows nothing, or allows more than `LARGEST_SCHEMA` texts.
    """
    if not isinstance(schema, dict):
        raise XFusionError(f"schema: {schema!r:.60} is not a schema: give an object, such as {{'type': 'boolean'}}")
    names = {"type", "enum", "const", "minimum", "maximum", "properties", "required", "additionalProperties", "title"}
    names |= {"description", "$schema"}
    if unknown := sorted(set(map(str, schema)) - names):
        raise XFusionError(f"schema: {unknown[0]!r} is not understood; it may have {', '.join(sorted(names))}")
    kind = schema.get("type")
    if "const" in schema or "enum" in schema:
        values = _entry(schema, "enum", list, "a list of values") if "enum" in schema else [schema["const"]]
        texts = [_json_text(value) for value in values if _is_allowed(value, schema)]
        _refuse_count(len(texts))
    elif kind in ("boolean", "null"):
        texts = ["true", "false"] if kind == "boolean" else ["null"]
    elif kind == "integer":
        if not {"minimum", "maximum"} <= set(schema):
            raise XFusionError("schema: an integer needs minimum and maximum, so that its values can be written out")
        low, high = math.ceil(_bound(schema, "minimum")), math.floor(_bound(schema, "maximum"))
        _refuse_count(high - low + 1)
        texts = [str(value) for value in range(low, high + 1)]
    elif kind == "object":
        properties = _entry(schema, "properties", dict, "an object of schemas", {})
        required = _entry(schema, "required", list, "a list of names", list(properties))
        if missing := sorted(set(properties) - set(map(str, required))):
            raise XFusionError(f"schema: property {missing[0]!r} is optional: name it in required, or leave it out")
        if undescribed := sorted(set(map(str, required)) - set(properties)):
            raise XFusionError(f"schema: property {undescribed[0]!r} is required, but properties does not describe it")
        texts = ["{"]
        for index, (name, property_schema) in enumerate(properties.items()):
            values = schema_answers(property_schema)
            _refuse_count(len(texts) * len(values))
            key = f"{', ' if index else ''}{json.dumps(name, ensure_ascii=False)}: "
            texts = [f"{text}{key}{value}" for text in texts for value in values]
        texts = [f"{text}}}" for text in texts]
    else:
        raise XFusionError(f"schema: type {kind!r} is not one of object, integer, boolean, null, or an enum")
    return texts


def _entry(schema: dict[str, Any], name: str, kind: type, expected: str, default: Any = None) -> Any:
    """A part of a schema, refused if it is not of the expected kind."""
    value = schema.get(name, default)
    if not isinstance(value, kind):
        raise XFusionError(f"schema: {name} is {value!r:.60}: give {expected}")
    return value


def _bound(schema: dict[str, Any], name: str) -> float:
    """``minimum`` or ``maximum``, refused if it is not a finite number."""
    value = schema[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise XFusionError(f"schema: {name} is {value!r:.60}: give a number")
    return value


def _is_allowed(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value of ``enum`` or ``const`` fits the rest of its schema."""
    kinds = schema.get("type", list(TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or any(str(kind) not in TYPES for kind in kinds):
        raise XFusionError(f"schema: type {schema['type']!r} is not one of {', '.join(TYPES)}")
    if "const" in schema and _json_text(value) != _json_text(schema["const"]):
        return False
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and "minimum" in schema and value < _bound(schema, "minimum"):
        return False
    if is_number and "maximum" in schema and value > _bound(schema, "maximum"):
        return False
    return any(isinstance(value, TYPES[kind]) and (is_number or kind not in ("integer", "number")) for kind in kinds)


def _json_text(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise XFusionError(f"schema: {value!r:.60} has no JSON text: {error}") from error


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
