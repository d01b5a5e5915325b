"""`penstock conformance`: what it prints and how it ends.

The one rule: exit status 0 all pass, 1 some fail, 2 wrong usage or no gateway there.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
from collections.abc import Callable
from typing import Any

import orjson

from proxy import __version__
from proxy.conformance import report
from proxy.conformance.client import Endpoint
from proxy.conformance.own import own_gateway
from proxy.conformance.provider import Provider
from proxy.conformance.run import Unreachable, chosen, run
from proxy.conformance.trial import Case, Setting

Json = dict[str, Any]
Say = Callable[[str], None]
# So short that a run on ourselves does not wait long for the stalls, and long for a busy machine.
OWN_BODY: Json = {"timeout": {"first_chunk_timeout": 2000, "idle_timeout": 2000}}
HELP = """\
1. Point the gateway's OpenAI base URL to the fake provider: http://{address}/v1 (any API key).
2. Start the gateway, with its timeouts for first and next chunk at a few seconds if you want the stalls judged.
3. penstock conformance --url http://HOST:PORT/v1 --model 'MODEL TEMPLATE'

The model template says how this gateway names a model of its OpenAI provider: {{model}} stands for a name that is new in every
request, such as conf-cut-fin-7-3f2a. For instance openai/{{model}}, or {{model}} alone.

On ourselves: penstock conformance --self [-c config.yaml]"""


def conformance(arguments: argparse.Namespace, say: Say = print) -> int:
    """Test a gateway against a provider that misbehaves."""
    cases = chosen(arguments.only, arguments.skip)
    if arguments.list:
        for line in report.listing(cases):
            say(line)
        return 0
    if not arguments.url and not arguments.own:
        say(HELP.format(address=arguments.provider_listen))
        return 0
    if not cases:
        return _wrong("no case has such a name; --list shows them")
    try:
        return asyncio.run(_conformance(arguments, cases, say))
    except (Unreachable, RuntimeError) as error:
        return _wrong(str(error))
    except OSError as error:
        return _wrong(f"cannot listen on {arguments.provider_listen}: {error.strerror or error}")


def _wrong(words: str) -> int:
    sys.stderr.write(f"penstock conformance: {words}\n")
    return 2


async def _conformance(arguments: argparse.Namespace, cases: list[Case], say: Say) -> int:
    host, _, port = arguments.provider_listen.rpartition(":")
    async with Provider(host, 0 if arguments.own else int(port)) as provider:
        if not arguments.own:
            return await _run(arguments, cases, provider, arguments.url, {}, say)
        async with own_gateway(provider.url, arguments.config) as url:
            return await _run(arguments, cases, provider, url, OWN_BODY, say)


async def _run(arguments: argparse.Namespace, cases: list[Case], provider: Provider, url: str, body: Json, say: Say) -> int:
    setting = Setting(
        Endpoint(url, _headers(arguments), arguments.timeout),
        provider,
        secrets.token_hex(3),
        arguments.model,
        {**body, **arguments.body},
        arguments.stall_limit,
        arguments.cancel_limit,
        arguments.wait,
        asyncio.Semaphore(arguments.at_once),
    )
    found = await run(cases, setting, _progress)
    for line in report.table(found):
        say(line)
    if provider.faults:
        say(f"the kit itself stumbled: {provider.faults[0]}")
    if arguments.json:
        about = {"penstock": __version__, "model": arguments.model}
        arguments.json.write_bytes(orjson.dumps(report.as_json(found, about), option=orjson.OPT_INDENT_2))
    return report.status(found)


def _progress(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _headers(arguments: argparse.Namespace) -> dict[str, str]:
    key = {"Authorization": f"Bearer {arguments.key}"} if arguments.key else {}
    return {**key, **dict(arguments.header)}
