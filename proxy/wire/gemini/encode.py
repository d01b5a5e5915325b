"""An OpenAI-shaped chat request as a Gemini generateContent request: everything but the messages.

Strategy: OpenAI's fields are taken one by one into `generationConfig`, `tools` and `toolConfig`; fields that Gemini itself
documents pass under their names. Both may be given: then Gemini's own objects lie underneath, and OpenAI's fields win.
The one rule: a JSON Schema goes out as it came (`parametersJsonSchema`, `responseJsonSchema`), never rewritten.

https://ai.google.dev/api/generate-content, https://ai.google.dev/api/caching#Tool
"""

from __future__ import annotations

from typing import Any

from proxy.call import Call, Target
from proxy.translation import Fields, endpoint, headers, invalid, json_body, unsupported
from proxy.transport import UpstreamRequest
from proxy.wire.gemini.contents import Contents
from proxy.wire.gemini.thinking import THINKING_KEYS, thinking_config

Json = dict[str, Any]

PASSED = frozenset({"safetySettings", "cachedContent", "labels", "modelArmorConfig", "serviceTier"})

# Fields of GenerationConfig that may also stand at the top of the request.
GENERATION_PASSED = frozenset(
    {
        "candidateCount", "stopSequences", "maxOutputTokens", "topP", "topK", "presencePenalty", "frequencyPenalty",
        "responseLogprobs", "responseMimeType", "responseSchema", "responseJsonSchema", "responseModalities",
        "speechConfig", "imageConfig", "mediaResolution", "audioTimestamp", "enableEnhancedCivicAnswers", "routingConfig",
    }
)  # fmt: skip

RENAMED = {
    "temperature": "temperature",
    "top_p": "topP",
    "top_k": "topK",
    "n": "candidateCount",
    "seed": "seed",
    "presence_penalty": "presencePenalty",
    "frequency_penalty": "frequencyPenalty",
    "logprobs": "responseLogprobs",
    "top_logprobs": "logprobs",
}

STOP_LIMIT = 5  # "The set of character sequences (up to 5) that will stop output generation"

NATIVE_TOOLS = frozenset(
    {
        "googlesearch", "googlesearchretrieval", "codeexecution", "urlcontext", "googlemaps", "filesearch", "computeruse",
        "retrieval", "enterprisewebsearch", "mcpservers", "functiondeclarations",
    }
)  # fmt: skip


def encode(call: Call, target: Target) -> UpstreamRequest:
    """The POST for one attempt. Raises Refused (400) with the path of what Gemini cannot carry."""
    if call.kind == "embeddings":
        unsupported(target, "model", "An embeddings request")
    fields = Fields(call, target)
    fields.take("messages")
    contents = Contents(call, target)
    body: Json = {"contents": contents.turns}
    if contents.system:
        body["systemInstruction"] = {"parts": contents.system}
    fields.pass_on(body, PASSED)
    tools = _tools(fields)
    if tools:
        body["tools"] = tools
    tool_config = _tool_config(fields, any("functionDeclarations" in tool for tool in tools))
    if tool_config:
        body["toolConfig"] = tool_config
    generation = _generation_config(fields)
    if generation:
        body["generationConfig"] = generation
    dropped = fields.leftover()
    method, query = ("streamGenerateContent", {"alt": "sse"}) if call.stream else ("generateContent", {})
    url = endpoint(target.provider, target.model, f"/models/{{model}}:{method}", query)
    return UpstreamRequest(url, headers(target.provider, "x-goog-api-key"), json_body(body), dropped)


def _generation_config(fields: Fields) -> Json:
    config: Json = {**_object(fields, "generationConfig")}
    fields.pass_on(config, GENERATION_PASSED)
    for name, theirs in RENAMED.items():
        value = fields.take(name)
        if value is not None and value is not False:
            config[theirs] = value
    limits = fields.take("max_tokens"), fields.take("max_completion_tokens")
    limit = limits[1] if limits[1] is not None else limits[0]
    if limit is not None:
        config["maxOutputTokens"] = limit
    _stop(fields, config)
    _response_format(fields, config)
    _modalities(fields, config)
    _thinking(fields, config)
    return config


def _stop(fields: Fields, config: Json) -> None:
    """Stop sequences; of more than five the first five go, and `stop` is listed as dropped."""
    stop = fields.take("stop")
    if stop is None:
        return
    sequences = [stop] if isinstance(stop, str) else stop
    if not isinstance(sequences, list) or not all(isinstance(text, str) for text in sequences):
        invalid("stop", "must be a string or a list of strings")
    if len(sequences) > STOP_LIMIT:
        fields.drop("stop")
    if sequences:
        config["stopSequences"] = sequences[:STOP_LIMIT]


def _response_format(fields: Fields, config: Json) -> None:
    wanted = fields.take("response_format")
    if wanted is None:
        return
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "text":
        return
    if kind not in ("json_object", "json_schema"):
        unsupported(fields.target, "response_format", f"A response_format of type '{kind}'")
    config["responseMimeType"] = "application/json"
    if kind == "json_schema":
        named = wanted.get("json_schema")
        schema = named.get("schema") if isinstance(named, dict) else None
        if not isinstance(schema, dict):
            invalid("response_format.json_schema.schema", "must be an object")
        config["responseJsonSchema"] = schema


def _modalities(fields: Fields, config: Json) -> None:
    wanted = fields.take("modalities")
    if wanted is None:
        return
    if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
        invalid("modalities", "must be a list of strings")
    config["responseModalities"] = [name.upper() for name in wanted]


def _thinking(fields: Fields, config: Json) -> None:
    """reasoning_effort over Gemini's own thinkingConfig; never level and budget both, which Gemini refuses."""
    native = _object(fields, "thinkingConfig") or config.get("thinkingConfig") or {}
    if not isinstance(native, dict):
        invalid("generationConfig.thinkingConfig", "must be an object")
    effort = fields.take("reasoning_effort")
    chosen = None
    if effort is not None:
        chosen = thinking_config(fields.target.model, effort)
        if chosen is None:
            fields.drop("reasoning_effort")
    if chosen is not None:
        kept = {name: value for name, value in native.items() if name not in THINKING_KEYS}
        native = {**chosen, **kept}
    if native:
        config["thinkingConfig"] = native


def _tools(fields: Fields) -> list[Json]:
    """All functions in one tool, then the tools that Google runs itself, as they came."""
    declared: list[Json] = []
    native: list[Json] = []
    for number, tool in enumerate(_list(fields, "tools")):
        path = f"tools[{number}]"
        if not isinstance(tool, dict):
            invalid(path, "must be an object")
        if "function" in tool:
            declared.append(_declaration(tool["function"], f"{path}.function"))
        else:
            native.append(_native_tool(fields.target, tool, path))
    declared += [_declaration(function, f"functions[{n}]") for n, function in enumerate(_list(fields, "functions"))]
    if fields.take("parallel_tool_calls") is False and declared:
        fields.drop("parallel_tool_calls")
    return [{"functionDeclarations": declared}, *native] if declared else native


def _declaration(function: object, path: str) -> Json:
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        invalid(path, "must be an object with a name")
    declaration: Json = {"name": function["name"]}
    if function.get("description"):
        declaration["description"] = function["description"]
    if function.get("parameters"):
        declaration["parametersJsonSchema"] = function["parameters"]
    return declaration


def _native_tool(target: Target, tool: Json, path: str) -> Json:
    """Gemini's own form ({"googleSearch": {}}) passes; {"type": "google_search", …} becomes it; other vendors' tools do not."""
    rest = {name: value for name, value in tool.items() if name != "type"}
    kind = tool.get("type")
    if isinstance(kind, str) and _is_native(kind):
        return rest if kind in rest else {kind: rest}
    if rest and (kind is None or any(map(_is_native, rest))):
        return rest
    unsupported(target, path, f"A tool of type '{kind}'")


def _is_native(name: str) -> bool:
    return name.replace("_", "").lower() in NATIVE_TOOLS


def _tool_config(fields: Fields, functions: bool) -> Json:
    config: Json = {**_object(fields, "toolConfig")}
    choice, legacy = fields.take("tool_choice"), fields.take("function_call")
    if choice is None and isinstance(legacy, dict):
        choice = {"type": "function", "function": legacy}
    elif choice is None:
        choice = legacy
    if choice is None:
        return config
    calling = _calling_config(fields.target, choice)
    if functions or calling["mode"] == "ANY":  # Gemini refuses a mode for functions where there are none
        native = config.get("functionCallingConfig")
        config["functionCallingConfig"] = {**native, **calling} if isinstance(native, dict) else calling
    return config


MODES = {"auto": "AUTO", "none": "NONE", "required": "ANY", "any": "ANY"}


def _calling_config(target: Target, choice: object) -> Json:
    if isinstance(choice, str) and choice in MODES:
        return {"mode": MODES[choice]}
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"mode": "ANY", "allowedFunctionNames": [_name(choice, "tool_choice")]}
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools" and isinstance(choice.get("allowed_tools"), dict):
        allowed = choice["allowed_tools"]
        # AUTO takes no allowedFunctionNames; VALIDATED is the mode that does and still lets the model answer in text.
        mode = "ANY" if allowed.get("mode") == "required" else "VALIDATED"
        tools = allowed.get("tools")
        names = [_name(tool, "tool_choice.allowed_tools.tools") for tool in (tools if isinstance(tools, list) else [None])]
        return {"mode": mode, "allowedFunctionNames": names}
    unsupported(target, "tool_choice", "This tool_choice")


def _name(choice: object, path: str) -> str:
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        invalid(path, "must name a function")
    return name


def _object(fields: Fields, name: str) -> Json:
    value = fields.take(name)
    if value is not None and not isinstance(value, dict):
        invalid(name, "must be an object")
    return value or {}


def _list(fields: Fields, name: str) -> list[Any]:
    value = fields.take(name)
    if value is not None and not isinstance(value, list):
        invalid(name, "must be a list")
    return value or []
