"""The pages' own rules, in a real browser over sample documents: width, keyboard, session, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.sync_api import Browser, Page, expect

pytestmark = pytest.mark.browser

PATHS = ("/", "/devices", "/devices/till-17", "/models", "/models/vision", "/rollouts", "/rollouts/ro-1",
         "/rollouts/new", "/groups", "/audit", "/webhooks", "/webhooks/hook-1",
         "/decisions", "/decisions/de-1", "/enrol")  # fmt: skip
Open = Callable[..., Page]


@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_never_scrolls_sideways(open_page: Open, sample_url: str, width: int) -> None:
    page = open_page("/", width=width)
    for path in PATHS:
        page.goto(sample_url + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path


def test_every_control_has_an_accessible_name(open_page: Open, sample_url: str) -> None:
    page = open_page("/")
    for path in PATHS:
        page.goto(sample_url + path)
        nameless = page.evaluate(
            """() => {
              const controls = 'a[href], button, input:not([type=hidden]), select, progress, meter';
              const named = one => one.textContent.trim() || one.ariaLabel || (one.labels && one.labels.length);
              return [...document.querySelectorAll(controls)].filter(one => !named(one)).map(one => one.outerHTML);
            }"""
        )
        assert nameless == [], path


def test_a_rollout_can_be_started_with_the_keyboard_alone(open_page: Open, sample_url: str) -> None:
    page = open_page("/")
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    _tab_to(page, "nav a[href='/rollouts']")
    page.keyboard.press("Enter")
    page.wait_for_url(sample_url + "/rollouts")
    _tab_to(page, "a[href='/rollouts/new']")
    page.keyboard.press("Enter")
    page.wait_for_url(sample_url + "/rollouts/new")
    _tab_to(page, "#start-rollout")
    page.keyboard.press("Enter")
    page.wait_for_url(sample_url + "/rollouts/ro-1")
    expect(page.locator("h1")).to_contain_text("vision 1.1.0")


def test_a_wave_that_is_not_understood_is_said_beside_the_form_and_nothing_typed_is_lost(open_page: Open) -> None:
    page = open_page("/rollouts/new")
    page.fill("#waves", "first one, then all")
    page.click("#start-rollout")
    expect(page.get_by_role("alert")).to_contain_text("'first one' is not understood")
    assert page.input_value("#waves") == "first one, then all"


def test_the_device_filter_hides_what_does_not_match_and_counts(open_page: Open) -> None:
    page = open_page("/devices")
    page.fill("#filter", "jetson online")
    expect(page.locator("#filter-count")).to_have_text("1 device")
    expect(page.locator("#device-till-17")).to_be_hidden()


def test_a_one_time_token_comes_as_a_command_and_a_code(open_page: Open) -> None:
    page = open_page("/enrol")
    page.fill("#device_id", "dock-9")
    page.keyboard.press("Enter")
    expect(page.locator(".command code")).to_contain_text("foreshore-agent enrol")
    expect(page.locator("svg.qr")).to_be_visible()


def test_scripts_cannot_read_the_session_and_without_it_every_page_leads_to_the_login(
    open_page: Open, browser: Browser, sample_url: str
) -> None:
    assert open_page("/").evaluate("document.cookie") == ""
    stranger = browser.new_page()
    stranger.goto(sample_url + "/devices")
    assert stranger.url == sample_url + "/login?next=/devices"
    stranger.close()


def test_a_wrong_token_is_refused_with_a_remedy(browser: Browser, sample_url: str) -> None:
    page = browser.new_page()
    page.goto(sample_url + "/login")
    page.fill("#token", "nonsense")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_be_visible()
    assert page.context.cookies() == []
    page.close()


def test_what_does_not_exist_says_so(open_page: Open) -> None:
    page = open_page("/devices/nowhere")
    expect(page.get_by_role("alert")).to_contain_text("nowhere does not exist")


def _tab_to(page: Page, selector: str) -> None:
    for _ in range(40):
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{selector} cannot be reached with the keyboard")
