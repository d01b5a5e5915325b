"""A YAML file as values that still know their lines, with `${NAME}` filled in from the environment.

Strategy: ruamel.yaml composes the node tree; one walk over it makes plain values, notes the line of every path, and fills
in variables scalar by scalar. What is wrong is noted as a fault and the walk goes on, so that all faults come out at once.
The one rule: variables are filled in *after* parsing, on the scalar. A secret that contains `: ` or `#` cannot change the
document, a quoted scalar stays text, an unquoted one gets the type that YAML gives its filled-in text.

YAML 1.2: https://yaml.org/spec/1.2.2/
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

Path = tuple[str | int, ...]
Lines = dict[Path, int]

COMMAND_LINE = 0
VARIABLE = re.compile(
    r"\$(?:(?P<escaped>\$\{)|\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}|(?P<broken>\{))",
    re.ASCII,
)
BROKEN_VARIABLE = "'${' must be followed by NAME} or NAME:-default}; write '$${' where the two characters are meant"
PLAIN_TAGS = tuple(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float"))
TEXT_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:timestamp")
MERGE_TAG = "tag:yaml.org,2002:merge"


@dataclass(frozen=True, slots=True)
class Missing:
    """Stands where a scalar needs an environment variable that is unset or empty and has no default."""

    variable: str


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """One thing that is wrong with the file; ordered by line. line: counted from 1, or COMMAND_LINE."""

    line: int
    path: str
    words: str

    def __str__(self) -> str:
        place = f"line {self.line}" if self.line != COMMAND_LINE else "command line"
        return f"{self.path} ({place}): {self.words}"


@dataclass(slots=True)
class Document:
    """The file's value and where its parts stand.

    lines: for every path the line of its key or list item. texts: for every scalar its text as written and filled in, for
    settings that are text whatever YAML makes of it (a key of digits). missing: the paths where a variable is unset.
    """

    name: str
    value: Any = None
    lines: Lines = field(default_factory=dict)
    texts: dict[Path, str] = field(default_factory=dict, repr=False)
    missing: dict[Path, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def line(self, path: Path) -> int:
        """The line of the path, or of the closest thing around it that stands in the file."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def fault(self, path: Path, words: str) -> None:
        self.faults.append(Fault(self.line(path), spelled(path) or self.name, words))

    def override(self, path: Path, value: object) -> None:
        """Put a value from the command line over the file's; a section that is no mapping is left to be found faulty."""
        *sections, last = path
        here = self.value = {} if self.value is None else self.value
        for section in sections:
            if isinstance(here, dict):
                here[section] = {} if here.get(section) is None else here[section]
                here = here[section]
        if isinstance(here, dict):
            here[last] = value
            self.lines[path] = COMMAND_LINE
            self.missing.pop(path, None)


def spelled(path: Path) -> str:
    """`("middleware", 2, "cache", "ttl")` -> `middleware[2].cache.ttl`; keys with other characters are quoted in brackets."""
    parts = []
    for part in path:
        if isinstance(part, int):
            parts.append(f"[{part}]")
        else:
            parts.append(f".{part}" if re.fullmatch(r"[\w-]+", part) else f'["{part}"]')
    return "".join(parts).removeprefix(".")


def read(text: str, environ: Mapping[str, str], name: str) -> Document:
    """Parse and fill in. Never raises for what stands in the file: see `Document.faults` and `Document.missing`."""
    document = Document(name)
    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(text)
    except MarkedYAMLError as error:
        document.faults.append(_syntax_fault(error, text, name))
        return document
    except RecursionError:
        document.fault((), "is nested too deeply")
        return document
    except YAMLError:
        document.fault((), "is no YAML: it contains a character that YAML does not allow")
        return document
    if root is not None:
        document.value = _Walk(document, environ, yaml).value(root, (), ())
    return document


def _syntax_fault(error: MarkedYAMLError, text: str, name: str) -> Fault:
    """The parser's own words, without its excerpt of the file (a secret may stand there), and a hint for the usual trap."""
    mark = error.problem_mark or error.context_mark
    number = mark.line if mark else 0
    lines = text.splitlines() or [""]
    line = lines[min(number, len(lines) - 1)]
    words = f"is no valid YAML: {error.problem or error.context}"
    variable = VARIABLE.search(line)
    if variable and "{" in line[: variable.start()]:
        words += '; inside { } a variable must be quoted: "${NAME}"'
    return Fault(number + 1, name, words)


@dataclass(slots=True)
class _Walk:
    """One walk over the node tree. An anchored node is read anew under each path that it stands at, and never changed."""

    document: Document
    environ: Mapping[str, str]
    yaml: Any

    def value(self, node: Node, path: Path, above: tuple[Node, ...]) -> Any:
        self.document.lines.setdefault(path, node.start_mark.line + 1)
        if any(node is ancestor for ancestor in above):
            self.document.fault(path, "contains itself")
            return None
        if isinstance(node, MappingNode):
            return self.mapping(node, path, (*above, node))
        if isinstance(node, SequenceNode):
            return [self.value(item, (*path, number), (*above, node)) for number, item in enumerate(node.value)]
        assert isinstance(node, ScalarNode)  # the third and last kind that a composer makes
        return self.scalar(node, path)

    def mapping(self, node: MappingNode, path: Path, above: tuple[Node, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, item in node.value:
            if key.tag == MERGE_TAG:
                continue
            below = (*path, str(key.value))
            if not isinstance(key, ScalarNode):
                self.document.fault(path, "a key must be plain text")
            elif key.value in found:
                self.document.faults.append(Fault(key.start_mark.line + 1, spelled(below), "stands here a second time"))
            else:
                self.document.lines[below] = key.start_mark.line + 1
                found[key.value] = self.value(item, below, above)
        for merged in self.merged(node, path):
            if not any(merged is ancestor for ancestor in above):
                self.merge_into(found, merged, path, above)
        return found

    def merged(self, node: MappingNode, path: Path) -> Iterator[MappingNode]:
        """What `<<: *anchor` and `<<: [*one, *two]` bring in."""
        for key, item in node.value:
            if key.tag == MERGE_TAG:
                for source in item.value if isinstance(item, SequenceNode) else [item]:
                    if isinstance(source, MappingNode):
                        yield source
                    else:
                        self.document.fault(path, "'<<' takes a mapping or a list of mappings")

    def merge_into(self, found: dict[str, Any], source: MappingNode, path: Path, above: tuple[Node, ...]) -> None:
        """Keys that stand in the mapping itself win, then those of earlier sources; lines are those of the source."""
        own = [(key, item) for key, item in source.value if key.tag != MERGE_TAG and str(key.value) not in found]
        rest = [(key, item) for key, item in source.value if key.tag == MERGE_TAG]
        picked = MappingNode(source.tag, own + rest, source.start_mark, source.end_mark)
        for name, value in self.mapping(picked, path, (*above, source)).items():
            found.setdefault(name, value)

    def scalar(self, node: ScalarNode, path: Path) -> Any:
        text = self.filled(node.value, path)
        if isinstance(text, Missing):
            self.document.missing[path] = text.variable
            return text
        tag = node.tag
        if text != node.value and node.style is None:
            tag = str(self.yaml.resolver.resolve(ScalarNode, text, (True, False)))
        self.document.texts[path] = text
        if tag in TEXT_TAGS:
            return text
        if tag not in PLAIN_TAGS:
            self.document.fault(path, f"the tag {tag} is not supported")
            return text
        return self.plain(ScalarNode(tag, text, node.start_mark, node.end_mark), path)

    def plain(self, node: ScalarNode, path: Path) -> Any:
        try:
            return self.yaml.constructor.construct_object(node)
        except (YAMLError, ValueError, KeyError, IndexError):
            self.document.fault(path, f"is no {str(node.tag).rpartition(':')[2]}")
            return None

    def filled(self, text: str, path: Path) -> str | Missing:
        """The text with its variables filled in; an empty variable counts as unset. Filled-in text is not looked at again."""
        absent: list[str] = []

        def fill(match: re.Match[str]) -> str:
            if match["escaped"]:
                return "${"
            if match["broken"]:
                self.document.fault(path, BROKEN_VARIABLE)
                return match[0]
            found = self.environ.get(match["name"]) or match["default"]
            if found is None:
                absent.append(match["name"])
            return found or ""

        done = VARIABLE.sub(fill, text)
        return Missing(absent[0]) if absent else done
