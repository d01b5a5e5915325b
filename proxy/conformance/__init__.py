"""The conformance kit: what any OpenAI-compatible gateway does with a provider that misbehaves.

    provider.py   the fake provider, which answers each request with the bytes that a case wants
    client.py     the checker's end: HTTP and SSE (`sse.py`) read by hand, so that every byte and every end is seen
    said.py       what a provider says and a client makes of it; verdict.py: when the one is as good as the other
    framing.py, content.py, calls.py, broken.py, flow.py, leaving.py   the cases
    run.py, report.py, command.py, own.py        a run, its table, its options, and our own gateway for `--self`

The one rule: nothing of the gateway is used to judge it; the kit would be as good beside any other.
"""
