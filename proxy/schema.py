"""JSON Schema of config.yaml, for editors.

Strategy: pydantic's own export of the shape, with the options of every known middleware put in, and `${NAME}` allowed
wherever the environment may fill in a number, a boolean or a word.
The one rule: what `config.parse` accepts, the schema accepts; it may be laxer (`30s` is any text), never stricter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from proxy.settings import options_model
from proxy.shape import File

Known = Mapping[str, Callable[..., Any]]

PLACEHOLDER = {"type": "string", "pattern": r"\$\{"}


def json_schema(known: Known) -> dict[str, Any]:
    """JSON Schema (2020-12) of config.yaml for editors, the options of all known middleware included."""
    schema = File.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    entries: list[dict[str, Any]] = [{"type": "string", "enum": list(known)}, {"type": "string", "pattern": ":"}]
    properties: dict[str, Any] = {}
    for name, factory in known.items():
        options = options_model(name, factory).model_json_schema(ref_template="#/$defs/{model}")
        definitions |= options.pop("$defs", {})
        properties[name] = {"anyOf": [options, {"type": "null"}]}
    entries.append(
        {
            "type": "object",
            "properties": properties,
            "patternProperties": {":": {"type": ["object", "null"]}},
            "additionalProperties": False,
            "minProperties": 1,
            "maxProperties": 1,
        }
    )
    schema["properties"]["middleware"] |= {"items": {"anyOf": entries}}
    found = _with_placeholders(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found, "title": "Penstock config.yaml"}


def _with_placeholders(node: Any) -> Any:
    """Wherever a number, a boolean or one of several words belongs, `${NAME}` may stand as well."""
    if isinstance(node, list):
        return [_with_placeholders(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {name: _with_placeholders(item) for name, item in node.items()}
    if found.get("type") in ("integer", "number", "boolean") or isinstance(found.get("enum"), list):
        kept = {name: found.pop(name) for name in ("default", "description", "title") if name in found}
        return {"anyOf": [found, PLACEHOLDER], **kept}
    return found
