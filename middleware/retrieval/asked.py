"""What a request says about retrieval, read once, before anything is asked.

    useRAG: true · use_rag: true
    rag: {top_k: 5, files: ["file-…"], threshold: 0.3, knowledge: "handbook", search_type: "hybrid_search", query: "…"}
    knowledge_bases: [{knowledge_id, top_k, threshold, search_type, query}]        (orq's; also in `orq: {…}`)

Strategy: each way of asking becomes one or more `Wanted`, what is not said comes from the operator's defaults. `POST /v1/search`
is read into the same, so that a look without a model finds what a model would be given.
The one rule: what would change which passages are found, and is not supported, is refused with its path, never passed over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from proxy.own_fields import Field, OwnFields
from proxy.store import Where

Json = dict[str, Any]
Get = Callable[[str], Field | None]
How = Literal["hybrid_search", "keyword_search", "vector_search"]
HOWS: Mapping[str, How] = {
    "hybrid_search": "hybrid_search",
    "keyword_search": "keyword_search",
    "vector_search": "vector_search",
}
MOST_PASSAGES, MOST_QUERY, MOST_BASES = 50, 4000, 16
COLLECTION = re.compile(r"[\w.:-]{1,64}", re.ASCII)
COLLECTION_WORDS = "must be a name of at most 64 letters, digits and _ . : -"
RAG = frozenset({"top_k", "files", "threshold", "knowledge", "search_type", "query"})
# Of orq's fields: those that only say how hits are shown are passed over; the others choose among hits.
SHOWN = frozenset({"search_options"})
BASE = frozenset({"knowledge_id", "top_k", "threshold", "search_type", "query"})


@dataclass(frozen=True, slots=True)
class Wanted:
    """One search. top_k: the most passages. threshold: a cosine, see `search`. query: None is the question itself.

    vectors: whether there are any to be had. path: of the field that names the files, for a refusal.
    """

    top_k: int = 5
    threshold: float = 0.0
    how: How = "hybrid_search"
    query: str | None = None
    where: Where = field(default_factory=Where)
    vectors: bool = True
    path: str = "files"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a call wants found for it: at least one search."""

    searches: tuple[Wanted, ...]


def asked_of(own: OwnFields, default: Wanted) -> Asked | None:
    """None where the request asks for nothing. Raises Refused with the path."""
    use, rag, bases = own.get("useRAG") or own.get("use_rag"), own.get("rag"), own.get("knowledge_bases")
    if use is None and rag is None and bases is None:
        return None
    wanted = use.flag() if use is not None else None
    searches = [_base(entry, default) for entry in bases.items(MOST_BASES)] if bases is not None else []
    if rag is not None:
        searches.insert(0, narrowed(rag.object().value, rag.get, default, rag.path + "."))
    elif wanted and not searches:
        searches.append(default)
    return Asked(tuple(searches)) if searches and wanted is not False else None


def narrowed(found: Json, get: Get, default: Wanted, path: str = "") -> Wanted:
    """The object `rag`, or the body of `POST /v1/search`. get: finds a field in it. path: what goes before fields' names."""
    _only(found, RAG, path)
    files, knowledge = get("files"), get("knowledge")
    ids = [entry.text() for entry in _some(files)] if files is not None else []
    where = Where(files=tuple(ids), knowledge=tuple(_collections(knowledge)) if knowledge is not None else ())
    return replace(_details(get, default), where=where, path=f"{path}files")


def _some(found: Field) -> Iterable[Field]:
    """The entries of a list. An empty one is refused, for what is not named is all there is."""
    return found.items() if found.value != [] else found.refuse("must name at least one, or be left out")


def _base(entry: Field, default: Wanted) -> Wanted:
    """One of orq's knowledge bases."""
    _only(entry.object().value, BASE | SHOWN, entry.path + ".")
    name = entry.get("knowledge_id") or entry.refuse("must have a knowledge_id")
    return replace(_details(entry.get, default), where=Where(knowledge=(collection(name),)))


def _details(get: Get, default: Wanted) -> Wanted:
    top_k, threshold, how, query = (get(name) for name in ("top_k", "threshold", "search_type", "query"))
    if how is not None and how.one_of(HOWS) == "vector_search" and not default.vectors:
        how.refuse("vector_search needs embeddings, which are not configured here")
    return replace(
        default,
        top_k=top_k.integer(1, MOST_PASSAGES) if top_k else default.top_k,
        threshold=threshold.number(0, 1) if threshold else default.threshold,
        how=HOWS[how.value] if how else default.how,
        query=query.text(MOST_QUERY) if query else default.query,
    )


def _only(found: Json, known: Collection[str], path: str) -> None:
    """Refuse what is not known: with a misspelled `files` everything would be searched."""
    for name, value in found.items():
        if name not in known and value not in (None, {}, []):
            Field(value, f"{path}{name[:64]}").refuse("is not supported here")


def _collections(found: Field) -> Iterable[str]:
    """One name, or a list of them."""
    return [collection(entry) for entry in _some(found)] if isinstance(found.value, list) else [collection(found)]


def collection(found: Field) -> str:
    name: Any = found.value
    return name if isinstance(name, str) and COLLECTION.fullmatch(name) else found.refuse(COLLECTION_WORDS)
