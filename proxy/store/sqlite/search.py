"""Passages found in SQLite, by their words (FTS5) and by their vectors.

Strategy: an owner's passages carry a word that no other owner's have, and a question asks for that word as well: so the index
looks at no tenant but this one, and the join on the owner stays what decides. A question is taken apart into words here, each
quoted, so nothing in it is syntax. Better than bm25's own idea of a heading is a little weight on it.
The one rule: only passages of files with the status `processed` are found.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import orjson

from proxy.store import Hit, Passage, Vector, Where
from proxy.store.vectors import packed
from proxy.store.wording import key, scope, unkey, words

Row = tuple[Any, ...]

HIT = "f.id, f.name, p.number, p.text, p.heading, p.page"
FILES = """f.owner = :owner AND f.status = 'processed' AND (
    :all OR f.id IN (SELECT value FROM json_each(:files)) OR f.knowledge IN (SELECT value FROM json_each(:knowledge)))"""
# Weights of text, heading and scope. bm25 is the smaller the better.
BY_TEXT = f"""SELECT {HIT}, -bm25(passages_text, 1.0, 0.5, 0.0) AS score
    FROM passages_text JOIN passages AS p ON p.key = passages_text.rowid JOIN files AS f ON f.key = p.file
    WHERE passages_text MATCH :match AND {FILES} ORDER BY score DESC, p.key LIMIT :most"""
VECTORS = f"""SELECT v.passage, v.vector
    FROM files AS f JOIN passages AS p ON p.file = f.key JOIN vectors AS v ON v.passage = p.key
    WHERE length(v.vector) = :length AND {FILES}"""
BY_KEY = f"SELECT {HIT} FROM passages AS p JOIN files AS f ON f.key = p.file WHERE p.key = ?"


def by_text(db: sqlite3.Connection, owner: str, query: str, most: int, where: Where) -> Sequence[Hit]:
    found = words(query)
    if not found or most <= 0:
        return []
    any_word = " OR ".join(f'"{word}"' for word in found)
    match = f'{{text heading}} : ({any_word}) AND scope : "{scope(owner)}"'
    rows = db.execute(BY_TEXT, {**_files(owner, where), "match": match, "most": most}).fetchall()
    # Letters that the index takes for none leave a question that everything answers, with a score of nothing.
    return [_hit(row[:-1], row[-1]) for row in rows if row[-1] > 0]


def by_vector(db: sqlite3.Connection, owner: str, vector: Vector, most: int, where: Where) -> Sequence[Hit]:
    if not has_numpy():
        return []
    from proxy.store.sqlite.nearest import nearest  # here, since it loads numpy

    wanted = packed(vector)
    best = nearest(wanted, db.execute(VECTORS, {**_files(owner, where), "length": len(wanted)}), most)
    rows = [(db.execute(BY_KEY, (passage,)).fetchone(), score) for passage, score in best]
    # A file may have been removed since the line above.
    return [_hit(row, score) for row, score in rows if row is not None]


def has_numpy() -> bool:
    return find_spec("numpy") is not None


def _files(owner: str, where: Where) -> dict[str, Any]:
    return {
        "owner": owner,
        "all": not where.files and not where.knowledge,
        "files": orjson.dumps([key(id) for id in where.files]).decode(),
        "knowledge": orjson.dumps([key(name) for name in where.knowledge]).decode(),
    }


def _hit(row: Row, score: float) -> Hit:
    id, name, number, text, heading, page = row
    return Hit(unkey(id), name, Passage(number, text, heading, page), score)
