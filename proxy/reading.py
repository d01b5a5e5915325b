"""The checks of config.yaml: each part against its shape, then what must hold across parts.

Strategy: one pass over a parsed document. Every check notes its faults and goes on, also where an earlier one failed: those
across parts look at what is written, not at what was accepted. Middleware is checked against its constructor's keywords, then
built once and thrown away: what `check` passes, `serve` can build. So a constructor has no side effects; `start` is for those.
The one rule: nothing here raises for what stands in the file, and no fault repeats a value that may be a secret.
"""

from __future__ import annotations

import importlib
import importlib.util
import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from proxy.origins import ANY
from proxy.routing import well_formed
from proxy.settings import given, options_model
from proxy.shape import APIS, File, address, long_form
from proxy.wording import did_you_mean, keys, words
from proxy.yamlfile import Document, Missing, spelled

Factory = Callable[..., Any]
Known = Mapping[str, Factory]
Layer = tuple[str, Factory, dict[str, Any]]
At = tuple[str | int, ...]

# Where the vendor's API is; an OpenAI-compatible one has no default. `demo:` answers inside the process.
BASE_URLS: Mapping[str, str] = {
    "anthropic": "https://api.anthropic.com/v1",
    "gemini": "https://generativelanguage.googleapis.com/v1beta",
    "cohere": "https://api.cohere.com/v2",
    "demo": "demo:",
}
OWN_MIDDLEWARE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", re.ASCII)
# Stands in for a base_url whose variable is unset, so that the rest of a disabled row is checked all the same.
NO_URL = "http://disabled.invalid"


@dataclass(slots=True)
class Reading:
    """One document being checked; every fault goes to `document.faults`.

    disabled: by provider the variables whose absence disables it, in the order of the file; known after `check`.
    authenticated: some middleware says who is calling, so clients beyond this machine may be served; known after `middleware`.
    workers: how many processes will serve.
    """

    document: Document
    known: Known
    disabled: dict[str, list[str]] = field(default_factory=dict)
    authenticated: bool = False
    workers: int = 1

    def check(self) -> tuple[File | None, list[Layer]]:
        """Check everything. The file and its middleware count only where no fault was noted."""
        value = {name: section for name, section in self.document.value.items() if section is not None}
        names = self.section(value, "providers")
        self.variables(names)
        file = self.checked(File, self.prepared(value), ())
        workers = str(self.section(value, "server").get("workers"))
        self.workers = int(workers) if workers.isdecimal() else 1
        self.default(value.get("default_provider"), names)
        for name, row in names.items():
            self.provider(name, row)
        for name, written in self.section(value, "models").items():
            self.route(name, written, names)
        layers = [layer for layer in self.middleware(value.get("middleware"), names) if layer]
        self.listen(file, value)
        self.store(file)
        return (file if isinstance(file, File) else None), layers

    def section(self, value: dict[str, Any], name: str) -> dict[str, Any]:
        found = value.get(name)
        return found if isinstance(found, dict) else {}

    # What the environment lacks

    def variables(self, rows: Mapping[str, Any]) -> None:
        """An unset variable disables the row whose key or URL it is; anywhere else it is a fault."""
        for path, variable in self.document.missing.items():
            if path[2:] and path[0] == "providers" and (path[2] == "api_key" or path[2:] == ("base_url",)):
                self.disabled.setdefault(str(path[1]), []).append(variable)
            else:
                self.document.fault(path, f"environment variable {variable} is not set")

    def prepared(self, value: dict[str, Any]) -> dict[str, Any]:
        """The value with rows made ready for the shape: nothing missing, and text where text is meant (a key of digits)."""
        rows = value.get("providers")
        if not isinstance(rows, dict):
            return value
        return {**value, "providers": {name: self.prepared_row(name, row) for name, row in rows.items()}}

    def prepared_row(self, name: str, row: Any) -> Any:
        if not isinstance(row, dict):
            return row
        found = {key: self.as_text(item, ("providers", name, key)) for key, item in row.items() if item is not None}
        for key, stand_in in (("api_key", "missing"), ("base_url", NO_URL)):
            if isinstance(found.get(key), Missing):
                found[key] = stand_in
        return found

    def as_text(self, item: Any, path: At) -> Any:
        if path[2:] and path[2] not in ("api_key", "base_url", "query", "headers"):
            return item
        if isinstance(item, dict):
            return {key: self.as_text(value, (*path, key)) for key, value in item.items()}
        if isinstance(item, list) and path[2:] == ("api_key",):
            found = [self.as_text(value, (*path, number)) for number, value in enumerate(item)]
            return ["missing" if isinstance(value, Missing) else value for value in found]
        return self.document.texts.get(path, item) if isinstance(item, int | float) else item

    # Each part by itself

    def checked(self, shape: type[BaseModel], value: Any, path: At, context: Any = None) -> BaseModel | None:
        """The value as its model, or None after noting a fault for everything that pydantic found."""
        try:
            return shape.model_validate(value, context=context)
        except ValidationError as error:
            details = error.errors(include_url=False, include_context=True)
            places = [self.place((*path, *detail["loc"]), detail["type"]) for detail in details]
            for detail, here in zip(details, places, strict=True):
                # A word or a section: who wrote a section is told what is wrong inside of it, and not that it is no word.
                inside = any(len(place) > len(here) and place[: len(here)] == here for place in places)
                if not (inside and detail["type"] == "literal_error"):
                    self.note(detail, shape, path)
            return None

    def note(self, detail: ErrorDetails, shape: type[BaseModel], path: At) -> None:
        """One fault, at the closest part that stands in the file; one that already has a fault gets no second."""
        found = self.place((*path, *detail["loc"]), detail["type"])
        if any(fault.path == spelled(found) for fault in self.document.faults):
            return
        text = words(detail)
        if detail["type"] == "extra_forbidden":
            text += did_you_mean(str(detail["loc"][-1]), keys(shape, detail["loc"][:-1]))
        self.document.fault(found, text)

    def place(self, loc: At, kind: str) -> At:
        """pydantic's location without the parts that it puts in for unions and keys; a missing key stays at the end."""
        found: At = ()
        here = self.document.value
        for number, part in enumerate(loc):
            inside = (isinstance(here, dict) and part in here) or (
                isinstance(here, list) and isinstance(part, int) and part < len(here)
            )
            if inside:
                found, here = (*found, part), here[part]
            elif kind == "missing" and number == len(loc) - 1:
                found = (*found, part)
        return found

    def store(self, file: BaseModel | None) -> None:
        if isinstance(file, File) and file.store.url is not None and importlib.util.find_spec("asyncpg") is None:
            self.document.fault(("store",), "PostgreSQL needs asyncpg: pip install 'penstock[postgres]'")

    # What holds across parts

    def listen(self, file: BaseModel | None, value: dict[str, Any]) -> None:
        """Without auth, nobody beyond this machine may be served unless the operator says so. The admin address never has it."""
        server = self.section(value, "server")
        host = server.get("host", "127.0.0.1")
        # The checked value, so that every spelling of "no" is one; the written one only where the file is faulty anyway.
        allowed = file.server.allow_anonymous if isinstance(file, File) else server.get("allow_anonymous") is True
        means = "set allow_anonymous: true if that is meant"
        if isinstance(host, str) and host and not _is_loopback(host) and not allowed and not self.authenticated:
            text = f"'{host}' is reachable beyond this machine and there is no auth; {means}"
            self.document.fault(("server", "host"), text)
        admin = file.server.admin_listen if isinstance(file, File) else None
        if admin is not None and not _is_loopback(address(admin)[0]) and not allowed:
            text = f"'{admin}' is reachable beyond this machine and the admin address has no auth; {means}"
            self.document.fault(("server", "admin_listen"), text)

        cors = file.server.cors if isinstance(file, File) else None
        if cors is not None and ANY in cors.origins and not allowed and not self.authenticated:
            text = f"'*' lets every page that is open on this machine call the gateway, and there is no auth; {means}"
            self.document.fault(("server", "cors", "origins"), text)

    def default(self, name: Any, rows: Mapping[str, Any]) -> None:
        if isinstance(name, str) and name not in rows:
            self.document.fault(("default_provider",), f"there is no provider '{name}'{did_you_mean(name, rows)}")

    def provider(self, name: str, row: Any) -> None:
        if not isinstance(row, dict):
            return
        path: At = ("providers", name)
        api, url = row.get("api"), row.get("base_url")
        if isinstance(api, str) and api in APIS and api not in BASE_URLS and url is None:
            self.document.fault((*path, "base_url"), f"is required for api: {api}")
        if isinstance(api, str) and api in BASE_URLS and api != "demo" and url is None and row.get("api_key") in (None, "", [""]):
            self.document.fault((*path, "api_key"), f"is required for {BASE_URLS[api]}")
        if api == "demo" and url is not None:
            self.document.fault((*path, "base_url"), "api: demo answers inside the gateway and takes no base_url")
        models = row.get("models")
        for number, model in enumerate(models if isinstance(models, list) else []):
            if isinstance(model, str) and not well_formed(model):
                self.document.fault((*path, "models", number), "is no possible model name")

    def route(self, name: str, written: Any, rows: Mapping[str, Any]) -> None:
        path: At = ("models", name)
        prefix, slash, _ = name.partition("/")
        if not well_formed(name):
            self.document.fault(
                path, "is no possible model name; use letters, digits and _ . : @ + - in segments separated by '/'"
            )
        elif slash and prefix in rows:
            self.document.fault(path, f"is taken: '{prefix}/…' names a model of the provider '{prefix}'")
        row = long_form(written)
        targets = row.get("targets") if isinstance(row, dict) else None
        for number, target in enumerate(targets if isinstance(targets, list) else []):
            at = (
                path if isinstance(written, str) else (*path, number) if isinstance(written, list) else (*path, "targets", number)
            )
            if isinstance(target, dict):
                target, at = target.get("target"), (*at, "target")
            if isinstance(target, str):
                self.target(target, at, rows)

    def target(self, target: str, path: At, rows: Mapping[str, Any]) -> None:
        name, slash, _ = target.partition("/")
        if not slash or not well_formed(target):
            self.document.fault(path, "must be provider/model")
        elif name not in rows:
            self.document.fault(path, f"there is no provider '{name}'{did_you_mean(name, rows)}")

    # Middleware

    def middleware(self, entries: Any, providers: Mapping[str, Any]) -> Iterator[Layer | None]:
        for number, entry in enumerate(entries if isinstance(entries, list) else []):
            path: At = ("middleware", number)
            if isinstance(entry, str):
                yield self.layer(entry, {}, path, providers)
            elif isinstance(entry, dict) and len(entry) == 1:
                (name, options), *_ = entry.items()
                yield self.layer(name, {} if options is None else options, (*path, name), providers)
            elif not isinstance(entry, Missing):
                self.document.fault(path, "must be a name, or one name with its options: {name: {option: value}}")

    def layer(self, name: str, options: Any, path: At, providers: Mapping[str, Any]) -> Layer | None:
        factory = self.factory(name, path[:2])
        # A faulty auth is still meant to be one: its own fault says what is wrong.
        self.authenticated = self.authenticated or hasattr(factory, "authenticate")
        if self.workers > 1 and (why := getattr(factory, "NEEDS_ONE_WORKER", None)):
            self.document.fault(path[:2], f"{why}; set server.workers: 1, or leave it out")
            return None
        if factory is None or isinstance(options, Missing):
            return None
        if not isinstance(options, dict):
            self.document.fault(path, "must be a mapping of options")
            return None
        try:
            shape = options_model(name, factory)
        except Exception as error:  # whatever a stranger's annotations raise
            self.document.fault(path, f"its options cannot be read from its constructor ({type(error).__name__}: {error})")
            return None
        checked = self.checked(shape, options, path, {"providers": providers})
        if checked is None or any(missing[: len(path)] == path for missing in self.document.missing):
            return None
        return (name, factory, given(checked)) if self.can_be_built(factory, given(checked), path) else None

    def can_be_built(self, factory: Factory, options: Mapping[str, Any], path: At) -> bool:
        """Does the constructor accept what its annotations could not say? Its ValueErrors speak to the operator."""
        try:
            made = factory(**options)
        except ValueError as error:
            self.document.fault(path, str(error))
            return False
        except Exception as error:  # whatever a stranger's constructor raises; its words may hold a secret
            self.document.fault(path, f"cannot be built from these options ({type(error).__name__})")
            return False
        self.authenticated = self.authenticated or hasattr(made, "authenticate")
        return True

    def factory(self, name: str, path: At) -> Factory | None:
        """A name of the table, or `module:Name` imported."""
        if name in self.known:
            return self.known[name]
        if ":" not in name:
            hint = did_you_mean(name, self.known)
            self.document.fault(path, f"there is no middleware '{name}'{hint}; one's own is written module:Name")
            return None
        if not OWN_MIDDLEWARE.fullmatch(name):
            self.document.fault(path, "must be a known name or module:Name")
            return None
        return self.imported(name, path)

    def imported(self, name: str, path: At) -> Factory | None:
        module, _, attribute = name.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute, None)
        except Exception as error:  # whatever a stranger's module raises
            self.document.fault(path, f"the module '{module}' cannot be imported ({type(error).__name__}: {error})")
            return None
        if not callable(found):
            self.document.fault(path, f"the module '{module}' has no '{attribute}' that can be called")
            return None
        return found  # type: ignore[no-any-return]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"
