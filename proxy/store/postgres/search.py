"""Passages found in PostgreSQL, by their words (tsvector) and by their vectors (pgvector).

Strategy: PostgreSQL's own rank knows nothing of how rare a word is, and a question where any word may match needs just that; so
each word's rank is weighted with its rarity among the passages that are asked, as bm25 does, for those that have the rarest of
the words. An owner's passages carry a word of their own, as in SQLite. Vectors are gone through, all of those asked: exact,
without an index that would need one length for all.
The one rule: only passages of files with the status `processed` are found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from proxy.store import Hit, Passage, Vector, Where
from proxy.store.postgres.database import Connection
from proxy.store.wording import key, scope, unkey, words

Row = Sequence[Any]

CANDIDATES = 500  # passages whose rank is computed; for each its whole list of words is read
HIT = "f.id, f.name, p.number, p.text, p.heading, p.page"
FILES = """f.owner = $1 AND f.status = 'processed' AND (
    cardinality($2::text[] || $3::text[]) = 0 OR f.id = ANY($2) OR f.knowledge = ANY($3))"""
# OFFSET 0: each word by itself through the index, also where the planner knows nothing yet of a table that has just been filled.
# Weights of {D, C, B, A}: a heading's words are B, the text's A. Length counts as its logarithm.
BY_TEXT = f"""WITH asked AS (
        SELECT f.key, f.passages FROM penstock_files AS f WHERE {FILES}
    ), wanted AS (
        SELECT quote_literal(lexeme)::tsquery AS word, (quote_literal(lexeme) || ' & ' || quote_literal($6))::tsquery AS mine
        FROM unnest(tsvector_to_array(to_tsvector('english'::regconfig, $4))) AS lexeme
    ), matches AS (
        SELECT p.key, w.word FROM wanted AS w
        CROSS JOIN LATERAL (SELECT key, file FROM penstock_passages WHERE words @@ w.mine OFFSET 0) AS p
        JOIN asked AS a ON a.key = p.file
    ), rare AS (
        SELECT word, ln(1 + ((SELECT sum(passages) FROM asked) - count(*) + 0.5) / (count(*) + 0.5)) AS rarity
        FROM matches GROUP BY word
    ), likely AS (
        SELECT key FROM matches JOIN rare USING (word) GROUP BY key ORDER BY sum(rarity) DESC, key LIMIT $5 + {CANDIDATES}
    ), best AS (
        SELECT p.key, sum(ts_rank('{{0, 0, 0.5, 1}}', p.words, word, 1) * rarity) AS score
        FROM likely JOIN penstock_passages AS p USING (key) JOIN rare ON p.words @@ word
        GROUP BY p.key ORDER BY score DESC, p.key LIMIT $5
    ) SELECT {HIT}, score FROM best JOIN penstock_passages AS p USING (key) JOIN penstock_files AS f ON f.key = p.file
    ORDER BY score DESC, p.key"""
BY_VECTOR = f"""WITH best AS (
        SELECT p.key, (p.vector::{{0}}.vector) OPERATOR({{0}}.<=>) ($4::real[]::{{0}}.vector) AS distance
        FROM penstock_files AS f JOIN penstock_passages AS p ON p.file = f.key
        WHERE {FILES} AND p.dimensions = cardinality($4::real[]) ORDER BY distance, p.key LIMIT $5
    ) SELECT {HIT}, 1 - distance FROM best JOIN penstock_passages AS p USING (key) JOIN penstock_files AS f ON f.key = p.file
    ORDER BY distance, p.key"""


async def by_text(db: Connection, owner: str, query: str, most: int, where: Where) -> Sequence[Hit]:
    found = words(query)
    if not found or most <= 0:
        return []
    rows = await db.fetch(BY_TEXT, owner, *_named(where), " ".join(found), most, scope(owner))
    return [_hit(row) for row in rows]


async def by_vector(
    db: Connection, schema: str, owner: str, vector: Vector, most: int, where: Where
) -> Sequence[Hit]:  # fmt: skip
    """schema: where pgvector lies, quoted."""
    rows = await db.fetch(BY_VECTOR.format(schema), owner, *_named(where), list(vector), max(most, 0))
    return [_hit(row) for row in rows]


def _named(where: Where) -> tuple[list[str], list[str]]:
    return [key(id) for id in where.files], [key(name) for name in where.knowledge]


def _hit(row: Row) -> Hit:
    id, name, number, text, heading, page, score = row
    return Hit(unkey(id), name, Passage(number, text, heading, page), score)
