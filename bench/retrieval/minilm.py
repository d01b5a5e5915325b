"""A real embedding, offline: all-MiniLM-L6-v2 computed with numpy from the files of the model.

Strategy: the six layers are written out, so that nothing heavier than numpy is needed to measure with it; tokens are cut as
BERT's uncased vocabulary has it, 256 of them at most, and the mean over them is the vector. Exact to what float32 gives.
The one rule: only the bench uses it; a gateway asks a provider.
"""

from __future__ import annotations

import json
import re
import struct
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
LAYERS, HEADS, MOST = 6, 12, 256
_WORD = re.compile(r"\w+|[^\w\s]")
_CHINESE = re.compile("([\u4e00-\u9fff\u3400-\u4dbf])")


class MiniLm:
    """folder: has `model.safetensors` and `vocab.txt`, as the model is published."""

    def __init__(self, folder: Path) -> None:
        self._weights = _weights(folder / "model.safetensors")
        words = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
        self._vocabulary = {word: number for number, word in enumerate(words)}

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        return [self._vector(text).tolist() for text in texts]

    def _vector(self, text: str) -> Array:
        states = self._states(np.array([*islice(self._tokens(text), MOST - 1), self._vocabulary["[SEP]"]]))
        mean = states.mean(axis=0)
        vector: Array = mean / np.linalg.norm(mean)
        return vector

    def _tokens(self, text: str) -> Iterator[int]:
        yield self._vocabulary["[CLS]"]
        plain = unicodedata.normalize("NFD", _CHINESE.sub(r" \1 ", text.lower()))
        for word in _WORD.findall("".join(sign for sign in plain if unicodedata.category(sign) != "Mn").replace("_", " _ ")):
            yield from self._pieces(word)

    def _pieces(self, word: str) -> list[int]:
        """The longest pieces of the vocabulary, from the left; unknown as a whole where one is missing."""
        found: list[int] = []
        begin = 0
        while begin < len(word):
            for end in range(len(word), begin, -1):
                piece = self._vocabulary.get(("##" if begin else "") + word[begin:end])
                if piece is not None:
                    found.append(piece)
                    begin = end
                    break
            else:
                return [self._vocabulary["[UNK]"]]
        return found

    def _states(self, tokens: NDArray[Any]) -> Array:
        weights = self._weights
        states = weights["embeddings.word_embeddings.weight"][tokens] + weights["embeddings.token_type_embeddings.weight"][0]
        states = self._normal("embeddings", states + weights["embeddings.position_embeddings.weight"][: len(tokens)])
        for layer in range(LAYERS):
            name = f"encoder.layer.{layer}"
            states = self._normal(f"{name}.attention.output", states + self._attention(f"{name}.attention", states))
            inner = _gelu(self._dense(f"{name}.intermediate.dense", states))
            states = self._normal(f"{name}.output", states + self._dense(f"{name}.output.dense", inner))
        return states

    def _attention(self, name: str, states: Array) -> Array:
        def heads(part: str) -> Array:
            dense = self._dense(f"{name}.self.{part}", states)
            return dense.reshape(len(states), HEADS, -1).transpose(1, 0, 2)

        query, key, value = heads("query"), heads("key"), heads("value")
        scores = query @ key.transpose(0, 2, 1) / np.float32(np.sqrt(query.shape[-1]))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = (weights / weights.sum(axis=-1, keepdims=True)) @ value
        return self._dense(f"{name}.output.dense", mixed.transpose(1, 0, 2).reshape(len(states), -1))

    def _dense(self, name: str, states: Array) -> Array:
        result: Array = states @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]
        return result

    def _normal(self, name: str, states: Array) -> Array:
        centred = states - states.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + np.float32(1e-12))
        result: Array = scaled * self._weights[f"{name}.LayerNorm.weight"] + self._weights[f"{name}.LayerNorm.bias"]
        return result


def _gelu(values: Array) -> Array:
    """With the error function to seven digits (Abramowitz and Stegun, 7.1.26), which is all that float32 has."""
    scaled = np.abs(values) / np.float32(np.sqrt(2))
    t = 1 / (1 + np.float32(0.3275911) * scaled)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    result: Array = (values * (1 + np.sign(values) * (1 - series * np.exp(-(scaled**2)))) / 2).astype(np.float32)
    return result


def _weights(path: Path) -> dict[str, Array]:
    """The tensors of a safetensors file: eight bytes of length, a JSON table, the numbers."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    table: dict[str, Any] = json.loads(content[8 : 8 + length])
    table.pop("__metadata__", None)
    found = {}
    for name, entry in table.items():
        if entry["dtype"] == "F32":
            begin, end = entry["data_offsets"]
            data = content[8 + length + begin : 8 + length + end]
            found[name.removeprefix("bert.")] = np.frombuffer(data, dtype="<f4").reshape(entry["shape"])
    return found
