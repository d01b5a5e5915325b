"""`POST /v1/search`: what a model would be given for a question, without asking one.

    {"query": "…", "top_k": 5, "files": ["file-…"], "knowledge": "handbook", "threshold": 0.3, "search_type": "hybrid_search"}

The one rule: it finds what a call with the same words would find, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import orjson

from middleware.retrieval.asked import Wanted, narrowed
from middleware.retrieval.refusals import answered, bad, stored
from middleware.retrieval.search import Found, Search
from proxy.errors import Refused
from proxy.own_fields import OwnFields
from proxy.pipeline import Answer, Endpoint, Query
from proxy.store import Hit, Library

Json = dict[str, Any]
HEADER = "X-Penstock-Retrieval"


class Look:
    """The endpoint. default: what holds where a request does not say."""

    def __init__(self, library: Callable[[], Library], search: Search, default: Wanted) -> None:
        self._library, self._search, self._default = library, search, default

    def endpoint(self, base: str) -> Endpoint:
        return Endpoint("POST", f"{base}/search", stored(self._look))

    async def _look(self, query: Query) -> Answer:
        wanted = self._wanted(query)
        if not wanted.query:
            raise bad("query", "must be a text")
        found = await self._search.all(self._library(), query.principal.scope, [(wanted.query, wanted)])
        answer = answered({"object": "list", "data": [shown(hit) for hit in found.hits]})
        return replace(answer, headers={HEADER: summary(found, len(found.hits))})

    def _wanted(self, query: Query) -> Wanted:
        try:
            body = orjson.loads(query.body)
        except orjson.JSONDecodeError as error:
            raise Refused(f"The body is not JSON: {error}.", code="invalid_json") from None
        if not isinstance(body, dict):
            raise Refused("The body must be a JSON object.", code="invalid_json")
        return narrowed(body, OwnFields(body, query.headers).get, self._default)


def shown(hit: Hit) -> Json:
    """A result, with the names that OpenAI's vector stores have, where they have one."""
    passage = hit.passage
    return {
        "file_id": hit.file,
        "filename": hit.name,
        "score": round(hit.score, 6),
        "passage": passage.number,
        "page": passage.page,
        "heading": passage.heading or None,
        "text": passage.text,
    }


def summary(found: Found, passages: int) -> str:
    """For the header: `passages=4`, and what was missing."""
    return f"passages={passages}" + ("; vectors=unavailable" if found.without_vectors else "")
