"""What is wrong with config.yaml, in words that an operator understands.

Strategy: pydantic's error kinds are looked up in one table; names that were not found are compared with those that exist.
The one rule: no value is repeated, it may be a secret in the wrong place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

# Said at start and by `check` where several workers serve.
PER_WORKER = "each with an equal part of the limits, and with a cache and circuits of its own (docs/workers.md)"


def did_you_mean(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = get_close_matches(word, list(known), n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(known)}" if known else ""


def keys(shape: type[BaseModel], loc: tuple[str | int, ...]) -> list[str]:
    """The keys that are known where a pydantic location points; walks models, and mappings and lists of models."""
    for part in loc:
        fields = shape.model_fields
        if part in fields:
            shape = _model_in(fields[str(part)].annotation) or shape
    return list(shape.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)


WORDS = {
    "missing": "is required",
    "extra_forbidden": "unknown key",
    "int_from_float": "must be a whole number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text; put it in quotes",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "has a character that is not allowed in a name",
    "too_short": "must not be empty",
    "dict_type": "must be a mapping",
    "mapping_type": "must be a mapping",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
}


def words(detail: ErrorDetails) -> str:
    """pydantic's error for an operator, without the value."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        return f"must be {context['expected']}"
    if kind.startswith("int_"):
        return "must be a whole number"
    if kind.startswith("float_"):
        return "must be a number"
    return WORDS.get(kind, detail["msg"][:1].lower() + detail["msg"][1:])
