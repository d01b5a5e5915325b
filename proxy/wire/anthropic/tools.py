"""Tools and the choice among them (https://docs.anthropic.com/en/docs/agents-and-tools/tool-use/overview).

Strategy: OpenAI's function tools are rewritten; Anthropic's own (`{"type": "web_search_20250305", …}`, or with an `input_schema`)
pass as they are, and so does a choice in Anthropic's own words.
The one rule: which tools a model may or must call is never approximated; what has no counterpart is a 400.
"""

from __future__ import annotations

from typing import Any

from proxy.translation import Fields, invalid, unsupported

Json = dict[str, Any]

# Fields of a tool that Anthropic documents and that clients put beside `function`, or inside it.
TOOL_EXTRAS = ("cache_control", "strict", "defer_loading", "allowed_callers", "eager_input_streaming", "input_examples")
CHOICES = {"auto": {"type": "auto"}, "none": {"type": "none"}, "required": {"type": "any"}}


def tools(fields: Fields) -> list[Json]:
    """`tools` and the older `functions`, as Anthropic has them; empty where none are offered."""
    offered = fields.take("tools")
    functions = fields.take("functions")
    for name, found in (("tools", offered), ("functions", functions)):
        if found is not None and not isinstance(found, list):
            invalid(name, "must be a list")
    native = [_tool(fields, tool, f"tools[{number}]") for number, tool in enumerate(offered or [])]
    legacy = [_function({"function": function}, f"functions[{number}]") for number, function in enumerate(functions or [])]
    return native + legacy


def _tool(fields: Fields, tool: object, path: str) -> Json:
    if not isinstance(tool, dict):
        invalid(path, "must be an object")
    kind = tool.get("type")
    if kind == "function" or "function" in tool:
        return _function(tool, f"{path}.function")
    if kind == "custom" and "custom" in tool:
        unsupported(fields.target, path, "A custom tool with free-form input")
    if kind is None and "input_schema" not in tool:
        invalid(f"{path}.type", "must be a string")
    return tool


def _function(tool: Json, path: str) -> Json:
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        invalid(f"{path}.name", "must be a string")
    found: Json = {"name": function["name"], "input_schema": _schema(function.get("parameters"), f"{path}.parameters")}
    if function.get("description"):
        found["description"] = function["description"]
    for name in TOOL_EXTRAS:
        value = function.get(name) if function.get(name) is not None else tool.get(name)
        if value is not None:
            found[name] = value
    return found


def _schema(parameters: object, path: str) -> Json:
    """Anthropic wants an object schema, also for a function without parameters."""
    if parameters is None:
        return {"type": "object", "properties": {}}
    if not isinstance(parameters, dict):
        invalid(path, "must be an object")
    return parameters if parameters.get("type") else {"type": "object", **{k: v for k, v in parameters.items() if k != "type"}}


def tool_choice(fields: Fields, offered: list[Json]) -> Json | None:
    """`tool_choice`, the older `function_call`, and `parallel_tool_calls: false`, in one; None leaves it to Anthropic's default.

    Anthropic refuses a choice where no tools are offered; `auto` and `none` then say nothing and are left out.
    """
    wanted, path = fields.take("tool_choice"), "tool_choice"
    legacy = fields.take("function_call")
    if wanted is None and legacy is not None:
        wanted, path = legacy, "function_call"
    parallel = fields.take("parallel_tool_calls")
    choice = None if wanted is None else _choice(fields, wanted, path)
    if not offered and (choice is None or choice["type"] in ("auto", "none")):
        return None
    if parallel is False:
        choice = choice or {"type": "auto"}
        if choice["type"] != "none":
            choice = {**choice, "disable_parallel_tool_use": True}
    return choice


def _choice(fields: Fields, wanted: object, path: str) -> Json:
    if isinstance(wanted, str) and wanted in CHOICES:
        return dict(CHOICES[wanted])
    if not isinstance(wanted, dict):
        invalid(path, "must be auto, none, required or an object that names a function")
    if wanted.get("type") in ("auto", "any", "tool", "none"):
        return wanted
    function = wanted if path == "function_call" else wanted.get("function")
    if wanted.get("type") in (None, "function") and isinstance(function, dict) and isinstance(function.get("name"), str):
        return {"type": "tool", "name": function["name"]}
    unsupported(fields.target, path, f"{path} of type '{wanted.get('type')}'")
