"""The bench: what a request, a chunk and an open stream cost, beside other gateways. `scripts/bench --help`; bench/README.md."""
