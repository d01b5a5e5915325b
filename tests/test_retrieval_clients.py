"""Retrieval as its users see it: the official SDKs upload a PDF and ask about it, and the commands of docs/retrieval.md run.

Strategy: `demo/inspect` answers with the request as the provider got it, so what was inserted is read out of the answer.
The one rule: no client is told anything but a base URL and the fields of the docs.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from middleware.retrieval import layer
from proxy.app import Gateway
from proxy.demo import DemoTransport
from tests.support.gateway import gateway
from tests.support.programs import output
from tests.support.uploads import pdf

Json = dict[str, Any]
NODE = Path(__file__).parent / "node"
DOCS, METRICS = (Path(__file__).parent.parent / "docs" / name for name in ("retrieval.md", "metrics.md"))
CONFIG = """
server: {{port: 0}}
data_dir: {folder}
providers: {{demo: {{api: demo}}}}
middleware:
  - retrieval: {{embeddings: demo/embed}}
"""
KEY = "pk-super-agent-0123456789"
LINE = "The penstock of Ulm is 42 metres long."
QUESTION = "How long is the penstock of Ulm?"
MESSAGES: Any = [{"role": "user", "content": QUESTION}]


async def at_once(seconds: float) -> None:
    """The demo's pauses, without the pause."""


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Gateway]:
    async with gateway(config=CONFIG, transports={"demo": DemoTransport(sleep=at_once)}, folder=str(folder)) as running:
        yield running


def check_source(source: Any, file: str) -> None:
    assert (source["number"], source["file_id"], source["name"], source["page"]) == (1, file, "ulm.pdf", 1)
    assert LINE in source["text"]


def check_prompt(text: str) -> None:
    (message,) = json.loads(text)["messages"]
    assert LINE in message["content"]
    assert message["content"].endswith(QUESTION)


def use(client: OpenAI, content: bytes) -> None:
    """All that a user of the files API does, in Python."""
    sent = client.files.create(file=("ulm.pdf", content), purpose="assistants", extra_body={"knowledge_id": "dams"})
    assert (sent.filename, sent.bytes, sent.purpose) == ("ulm.pdf", len(content), "assistants")
    again = client.files.create(file=("ulm.pdf", content), purpose="assistants", extra_body={"knowledge_id": "dams"})
    assert again.id == sent.id
    other = client.files.create(file=("other.txt", b"Something else."), purpose="user_data")
    for file in (sent, other):
        assert client.files.wait_for_processing(file.id, poll_interval=0.02, max_wait_seconds=15).status == "processed"
    assert [file.filename for file in client.files.list(limit=1)] == ["other.txt", "ulm.pdf"]
    assert [file.id for file in client.files.list(purpose="assistants", order="asc")] == [sent.id]
    assert client.files.content(sent.id).content == content

    text, last = "", None
    for chunk in client.chat.completions.create(
        model="demo/inspect", messages=MESSAGES, stream=True, extra_body={"useRAG": True, "rag": {"files": [sent.id]}}
    ):
        text += chunk.choices[0].delta.content or ""
        last = chunk
    assert last is not None
    assert last.choices[0].finish_reason == "stop"
    assert last.model_extra is not None
    check_source(last.model_extra["penstock"]["sources"][0], sent.id)
    check_prompt(text)
    bases = {"orq": {"knowledge_bases": [{"knowledge_id": "dams", "top_k": 1, "search_type": "hybrid_search"}]}}
    whole = client.chat.completions.create(model="demo/inspect", messages=MESSAGES, extra_body=bases)
    assert whole.model_extra is not None
    check_source(whole.model_extra["penstock"]["sources"][0], sent.id)
    check_prompt(whole.choices[0].message.content or "")

    assert client.files.delete(sent.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(sent.id)
    with pytest.raises(openai.BadRequestError, match="no text"):
        client.files.create(file=("a.bin", b"\0\1\2"), purpose="assistants")


async def test_the_python_sdk(tmp_path: Path) -> None:
    content = pdf(LINE, "It was built in 1931.")

    def run(base: str) -> None:
        with OpenAI(base_url=base, api_key="unused", max_retries=0, timeout=15) as client:
            use(client, content)

    async with serving(tmp_path) as running:
        base = f"http://127.0.0.1:{running.port}/v1"
        await asyncio.to_thread(run, base)
        async with AsyncOpenAI(base_url=base, api_key="unused", max_retries=0, timeout=15) as client:
            sent = await client.files.create(file=("ulm.pdf", content), purpose="assistants")
            assert (await client.files.retrieve(sent.id)).filename == "ulm.pdf"


async def test_a_super_agents_client_is_answered_from_its_pdf(tmp_path: Path) -> None:
    """`superAgentKey` beside the caller's own provider key, as that API's clients send them; another caller finds nothing."""

    def client(running: Gateway, own: str) -> AsyncOpenAI:
        headers = {"superAgentKey": KEY}
        return AsyncOpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key=own, default_headers=headers, max_retries=0)

    async def ask(caller: AsyncOpenAI) -> tuple[str, Any]:
        text, last = "", None
        stream = await caller.chat.completions.create(
            model="demo/inspect",
            messages=MESSAGES,
            stream=True,
            extra_body={"useRAG": True, "sessionId": "s1", "saveToMemory": True},
        )
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            last = chunk
        assert last is not None
        assert last.model_extra is not None
        return text, last.model_extra["penstock"]["sources"]

    auth = f"middleware:\n  - auth: {{{{keys: [{{{{name: web, key: {KEY}}}}}], pass_through: [demo]}}}}"
    config = CONFIG.replace("middleware:", auth)
    async with (
        gateway(config=config, transports={"demo": DemoTransport(sleep=at_once)}, folder=str(tmp_path)) as running,
        client(running, "sk-callers-0123456789") as caller,
        client(running, "sk-others-0123456789") as other,
    ):
        sent = await caller.files.create(file=("ulm.pdf", pdf(LINE)), purpose="assistants")
        await caller.files.wait_for_processing(sent.id, poll_interval=0.02, max_wait_seconds=15)
        text, (source,) = await ask(caller)
        check_source(source, sent.id)
        check_prompt(text)
        text, none = await ask(other)
        assert none == []
        assert json.loads(text)["messages"] == MESSAGES
        with pytest.raises(openai.NotFoundError):
            await other.files.retrieve(sent.id)


async def test_the_node_sdk(tmp_path: Path, node: Json) -> None:
    path = tmp_path / "ulm.pdf"
    path.write_bytes(pdf(LINE, "It was built in 1931."))
    async with serving(tmp_path / "data") as running:
        base = f"http://127.0.0.1:{running.port}/v1"
        out = await output(node["program"], str(NODE / "retrieval.cjs"), base, str(path), QUESTION, env=node["env"])
    found = json.loads(out)
    file = found["file"]
    assert (file["status"], file["filename"], file["bytes"]) == ("processed", "ulm.pdf", path.stat().st_size)
    assert found["names"] == ["ulm.pdf"]
    assert found["again"]
    assert found["content"]
    assert found["lastHasThem"]
    check_source(found["sources"][0], file["id"])
    check_source(found["whole"][0], file["id"])
    check_prompt(found["text"])
    assert found["deleted"] == {"id": file["id"], "object": "file", "deleted": True}
    assert found["gone"] == "file_not_found"


async def test_the_commands_of_the_docs(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (commands,) = re.findall(r"```sh\n(.*?)```", DOCS.read_text(), re.DOTALL)
    async with serving(tmp_path / "data") as running:
        script = commands.replace("127.0.0.1:8080", f"127.0.0.1:{running.port}")
        out = await output("bash", "-e", "-c", script, cwd=tmp_path)
    first, *events = out.split("data: ")
    assert json.loads(first)["filename"] == "ulm.txt"
    assert json.loads(events[-2])["penstock"]["sources"][0]["text"].startswith("The penstock of Ulm is 42 metres long")
    said = "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-2])
    assert "42 metres" in said
    assert said.index("42 metres") < said.index("How long is the penstock?")
    assert events[-1] == "[DONE]\n\n"


def test_every_figure_and_every_option_is_in_the_docs() -> None:
    words = DOCS.read_text()
    made = layer.Retrieval()
    for name in inspect.signature(layer.Retrieval).parameters:
        assert name.startswith("_") or f"`{name}`" in words, name
    for sample in made.samples():
        assert sample.name in METRICS.read_text()
        assert sample.name.replace("penstock_retrieval_", "…_") in words or sample.name in words
