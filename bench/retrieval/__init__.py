"""Retrieval quality: how often what answers a question is among the first passages found. `python -m bench.retrieval --help`."""
