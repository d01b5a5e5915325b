"""From annotations to checks: what a setting's type and marks say, as pydantic checks it and the JSON Schema shows it.

Strategy: numbers carry the marks of `proxy.units`, which `setting` turns into validators, for the sections of config.yaml and for
the constructor keywords of middleware alike. A dataclass among those is checked as a section of its own, field by field, before
it is made.
The one rule: validators speak to the operator and never repeat a value; it may be a secret in the wrong place.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationInfo,
    WithJsonSchema,
    create_model,
)
from pydantic_core import CoreSchema, core_schema

from proxy import units
from proxy.routing import well_formed
from proxy.units import Between
from proxy.wording import did_you_mean

DURATION_SCHEMA = {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string"}], "description": units.DURATION_WORDS}
SIZE_SCHEMA = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}], "description": units.SIZE_WORDS}


def _known_provider(name: str, info: ValidationInfo) -> str:
    providers = (info.context or {}).get("providers")
    if providers is not None and name not in providers:
        raise ValueError(f"there is no such provider{did_you_mean(name, providers)}")
    return name


def _known_target(name: str, info: ValidationInfo) -> str:
    provider, slash, _ = name.partition("/")
    if not slash or not well_formed(name):
        raise ValueError("must be provider/model")
    _known_provider(provider, info)
    return name


MARKS: dict[str, tuple[Any, ...]] = {
    "provider": (AfterValidator(_known_provider),),
    "target": (AfterValidator(_known_target),),
    "seconds": (BeforeValidator(units.seconds), WithJsonSchema(DURATION_SCHEMA)),
    "bytes": (BeforeValidator(units.byte_size), WithJsonSchema(SIZE_SCHEMA)),
}


def no_truth(written: Any) -> Any:
    # Python takes True for 1.
    if isinstance(written, bool):
        raise ValueError("must be a number")
    return written


class Bounds:
    """`units.Between` for pydantic: the check, and minimum and maximum in the JSON Schema of a plain number."""

    def __init__(self, between: Between) -> None:
        self.between = between

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        checked = core_schema.no_info_after_validator_function(self.check, handler(source))
        return core_schema.no_info_before_validator_function(no_truth, checked)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        found = dict(handler(schema))
        if found.get("type") in ("integer", "number"):
            found |= {"minimum": self.between.low, "maximum": self.between.high}
        return found

    def check(self, value: Any) -> Any:
        self.between.check(value)
        return value


def setting(annotation: Any) -> Any:
    """The annotation with its marks replaced by validators, also inside unions, lists, mappings and dataclasses.

    Marks: those of `proxy.units`; "provider", the name of a row of `providers:`; "target", `provider/model` with such a name;
    anything with `check(value)`, which raises ValueError in words for the operator.
    """
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return _section_of(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        marks = [found for mark in annotation.__metadata__ for found in _validators(mark)]
        inner = setting(annotation.__origin__)
        return Annotated[(inner, *marks)] if marks else inner
    if origin in (Union, types.UnionType):
        return Union[tuple(setting(argument) for argument in arguments)]  # noqa: UP007 - made from a tuple
    if origin in (list, dict, tuple, collections.abc.Mapping, collections.abc.Sequence):
        return origin[tuple(argument if argument is ... else setting(argument) for argument in arguments)]
    return annotation


def _validators(mark: Any) -> tuple[Any, ...]:
    if isinstance(mark, Between):
        return (Bounds(mark),)
    if callable(check := getattr(mark, "check", None)):
        return (AfterValidator(_checking(check)),)
    return MARKS.get(mark, ()) if isinstance(mark, str) else (mark,)


def _checking(check: Callable[[Any], object]) -> Callable[[Any], Any]:
    def checked(value: Any) -> Any:
        check(value)
        return value

    return checked


def _section_of(made: type) -> Any:
    """The section that a dataclass's fields make up; what is checked becomes an instance, with its own defaults."""
    hints = get_type_hints(made, include_extras=True)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(made):
        if field.init:
            optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
            fields[field.name] = (setting(hints[field.name]), Field(default=None) if optional else Field())
    config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, protected_namespaces=(), title=made.__name__)
    # Named in full: the schema of config.yaml has the sections of all middleware in one table.
    name = f"{made.__module__}.{made.__qualname__}".replace(".", "_")
    section = create_model(name, __config__=config, __doc__=inspect.getdoc(made), **fields)
    return Annotated[section, AfterValidator(lambda found: made(**given(found)))]


def given(options: BaseModel) -> dict[str, Any]:
    """Only what the file gives; for the rest whoever takes it has its own defaults."""
    return {name: getattr(options, name) for name in options.model_fields_set}


def options_model(name: str, factory: Callable[..., object]) -> type[BaseModel]:
    """The schema of a middleware's options: the keywords of its constructor and their annotations.

    Keywords that a file cannot carry (a clock, any callable) and those that begin with `_` are no options.
    Raises TypeError or NameError where the signature cannot be read.
    """
    source = factory.__init__ if inspect.isclass(factory) else factory
    hints = get_type_hints(source, include_extras=True)
    fields: dict[str, Any] = {}
    extra: Literal["allow", "forbid"] = "forbid"
    for parameter in inspect.signature(factory).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            extra = "allow"
        elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY) or parameter.name.startswith("_"):
            continue
        elif not _is_callable(hint := hints.get(parameter.name, Any)):
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[parameter.name] = (setting(hint), Field(default))
    config = ConfigDict(
        extra=extra, frozen=True, hide_input_in_errors=True, protected_namespaces=(), arbitrary_types_allowed=True
    )
    return create_model(name, __config__=config, __doc__=inspect.getdoc(factory), **fields)


def _is_callable(hint: Any) -> bool:
    return any(kind is collections.abc.Callable for form in (hint, *get_args(hint)) for kind in (form, get_origin(form)))
