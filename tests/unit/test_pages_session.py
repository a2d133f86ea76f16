"""The session's defences without a browser: cookies lend reading only, forms need their token, logins stay inside."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from cloud.control.pages.forms import parse_waves
from cloud.control.pages.session import COOKIE, CSRF_FIELD, csrf_token
from tests.browser.sample import TOKEN, sample_app
from wire.errors import InvalidInputError

RELEASE = {"release": "4f" * 32}


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(sample_app(), follow_redirects=False, cookies={COOKIE: TOKEN}) as client:
        yield client


def test_the_cookie_reads_the_api_but_never_writes(client: TestClient) -> None:
    assert client.get("/api/v1/devices").status_code == 200
    assert client.post("/api/v1/rollouts", json={}).status_code == 401


def test_a_request_that_another_site_caused_gets_no_bearer(client: TestClient) -> None:
    assert client.get("/api/v1/devices", headers={"sec-fetch-site": "cross-site"}).status_code == 401


def test_a_form_with_its_token_is_accepted(client: TestClient) -> None:
    assert client.post("/rollouts", data={CSRF_FIELD: csrf_token(TOKEN), **RELEASE}).status_code == 303


@pytest.mark.parametrize("given", [{}, {CSRF_FIELD: "0" * 64}, {CSRF_FIELD: csrf_token("another")}])
def test_a_form_without_its_sessions_token_is_refused(client: TestClient, given: dict[str, str]) -> None:
    assert client.post("/rollouts", data={**RELEASE, **given}).status_code == 403


@pytest.mark.parametrize("origin", ["https://elsewhere.example", "null", "http://testserver:81"])
def test_a_form_of_another_origin_is_refused(client: TestClient, origin: str) -> None:
    data = {CSRF_FIELD: csrf_token(TOKEN), **RELEASE}
    assert client.post("/rollouts", data=data, headers={"origin": origin}).status_code == 403


@pytest.mark.parametrize("target", ["//elsewhere.example", "https://elsewhere.example", "/\\elsewhere", "", "/\tx"])
def test_a_login_never_leads_to_another_site(client: TestClient, target: str) -> None:
    answer = client.post("/login", data={"token": TOKEN, "next": target})
    assert answer.headers["location"] == "/"
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie


def test_pages_forbid_inline_scripts_and_framing(client: TestClient) -> None:
    answer = client.get("/devices")
    policy = answer.headers["content-security-policy"]
    assert "script-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "<script>" not in answer.text
    assert answer.headers["cache-control"] == "no-store"


def test_waves_are_counts_and_percentages() -> None:
    assert parse_waves("1, 50%, 100%") == [{"count": 1}, {"percent": 50}, {"percent": 100}]


@pytest.mark.parametrize("text", ["0", "101%", "-1", "1,,2", "x"])
def test_a_wave_that_is_no_wave_is_named(text: str) -> None:
    with pytest.raises(InvalidInputError, match="not understood"):
        parse_waves(text)
