"""A model name leads to the right targets, or to a refusal that helps."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.call import Provider, Route, Target
from proxy.errors import Refused
from proxy.routing import LONGEST_NAME, MOST_KNOWN, Directory, well_formed

OPENAI = Provider("openai", "openai", "https://api.openai.com/v1", models=("gpt-4o", "gpt-4o-mini"))
GROQ = Provider("groq", "openai", "https://api.groq.com/openai/v1", missing="GROQ_API_KEY", models=("llama-3.3",))
PROVIDERS = {"openai": OPENAI, "groq": GROQ}
FAST = Route("fast", (Target(OPENAI, "gpt-4o-mini"), Target(GROQ, "llama-3.3")))


def directory(default: str | None = "openai") -> Directory:
    return Directory(PROVIDERS, {"fast": FAST}, default, created=1700000000)


def refusal(model: str, default: str | None = "openai") -> Refused:
    with pytest.raises(Refused) as caught:
        directory(default).resolve(model)
    return caught.value


def test_a_targets_name_follows_what_it_is_made_of() -> None:
    target = Target(OPENAI, "gpt-4o")
    assert (target.name, str(target)) == ("openai/gpt-4o", "openai/gpt-4o")
    assert replace(target, provider=GROQ).name == "groq/gpt-4o"
    assert replace(target, model="x/y").name == "openai/x/y"


def test_a_route_leads_to_its_targets_in_order() -> None:
    assert [str(target) for target in directory().resolve("fast")] == ["openai/gpt-4o-mini", "groq/llama-3.3"]


def test_the_model_part_may_contain_slashes() -> None:
    assert directory().resolve("groq/openai/gpt-oss-20b") == (Target(GROQ, "openai/gpt-oss-20b"),)


def test_a_bare_name_goes_to_the_default_provider() -> None:
    assert directory().resolve("gpt-5") == (Target(OPENAI, "gpt-5"),)


def test_a_disabled_provider_resolves_like_any_other() -> None:
    assert directory().resolve("groq/x")[0].provider.missing == "GROQ_API_KEY"


@pytest.mark.parametrize("model", ["fast", "gpt-5", "groq/openai/gpt-oss-20b"])
def test_a_name_that_comes_again_leads_to_the_same_route(model: str) -> None:
    here = directory()
    assert here.route(model) is here.route(model)
    assert here.route(model) == directory().route(model)


def test_names_that_clients_think_of_do_not_pile_up_and_refused_ones_are_not_kept() -> None:
    here = directory()
    for number in range(3 * MOST_KNOWN):
        assert here.route(f"openai/m{number}").targets == (Target(OPENAI, f"m{number}"),)
    assert len(here._known) <= MOST_KNOWN
    before = set(here._known)
    for model in ("nobody/m", "..", "nobody/m"):
        with pytest.raises(Refused):
            here.route(model)
    assert set(here._known) == before


@pytest.mark.parametrize(
    "model", ["", "/", "a/", "/a", "a//b", "a/../b", "..", "./a", "a b", "é", "a?b", "a%2e", "a\n", "x" * 257]
)
def test_a_malformed_name_is_refused_as_400(model: str) -> None:
    error = refusal(model)
    assert (error.status, error.param, error.type) == (400, "model", "invalid_request_error")


@pytest.mark.parametrize("model", ["a..b", "...", "gpt-4o", "ft:gpt-4o:org::id", "@cf/meta/llama", "a+b@2", "x" * LONGEST_NAME])
def test_a_name_with_dots_colons_and_signs_is_well_formed(model: str) -> None:
    assert well_formed(model)


@given(st.text(alphabet="ab./:@ é\n", max_size=12))
def test_a_well_formed_name_has_only_plain_segments(model: str) -> None:
    if well_formed(model):
        assert all(segment not in ("", ".", "..") for segment in model.split("/"))
        assert model.isascii()
        assert not any(character.isspace() for character in model)


def test_an_unknown_provider_is_404_with_the_close_one() -> None:
    error = refusal("opnai/gpt-4o")
    assert (error.status, error.code, error.type, error.param) == (404, "model_not_found", "invalid_request_error", "model")
    assert "There is no provider 'opnai'." in error.message
    assert "Did you mean 'openai/gpt-4o'" in error.message


def test_a_bare_name_without_default_provider_names_the_providers_that_have_it() -> None:
    message = refusal("gpt-4o", default=None).message
    assert "write it as provider/model" in message
    assert "Did you mean 'openai/gpt-4o'?" in message


def test_a_misspelled_route_is_found_among_close_matches() -> None:
    assert "Did you mean 'fast'?" in refusal("fsat", default=None).message


def test_nothing_close_gives_no_hint() -> None:
    assert "Did you mean" not in refusal("zzzzzz", default=None).message


def test_the_listing_has_routes_and_the_models_of_enabled_providers() -> None:
    assert directory().listing() == [
        {"id": "fast", "object": "model", "created": 1700000000, "owned_by": "penstock"},
        {"id": "openai/gpt-4o", "object": "model", "created": 1700000000, "owned_by": "openai"},
        {"id": "openai/gpt-4o-mini", "object": "model", "created": 1700000000, "owned_by": "openai"},
    ]


@pytest.mark.parametrize(("model", "owner"), [("fast", "penstock"), ("openai/gpt-4o", "openai"), ("gpt-4o", "openai")])
def test_an_entry_is_found_under_the_name_that_was_asked_for(model: str, owner: str) -> None:
    assert directory().find(model) == {"id": model, "object": "model", "created": 1700000000, "owned_by": owner}


@pytest.mark.parametrize("model", ["groq/llama-3.3", "openai/unlisted", "nobody/x"])
def test_what_is_not_listed_is_not_found(model: str) -> None:
    with pytest.raises(Refused) as caught:
        directory().find(model)
    assert caught.value.status == 404
