"""Requests made from the API's own OpenAPI document, right and wrong ones: never a 5xx, refusals as problem details."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from starlette.testclient import TestClient

from tests.contracts.test_control_guards import DEVICE, MAY_CALL, OPEN
from tests.fakes.control_app import LADDER, ControlApp, control_app
from tests.fakes.control_seed import seed

EXAMPLES = 200 if os.environ.get("FORESHORE_FAULTS") == "all" else 4
ROLES = (OPEN, *LADDER, "worker", "gateway", DEVICE)


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlApp]:
    with control_app(tmp_path_factory.mktemp("schema")) as app:
        yield app


@pytest.fixture(scope="module")
def seeded(control: ControlApp) -> dict[str, str]:
    return seed(control, "default")


@pytest.fixture(scope="module")
def schema(control: ControlApp) -> Any:
    return schemathesis.openapi.from_dict(control.app.openapi())


def client_of(control: ControlApp, role: str) -> TestClient:
    """A client with the role's token or certificate."""
    if role == DEVICE:
        return control.device_client(control.enrol(f"schema-{len(control.plane.fleet.all_access())}")["serial"])
    return control.client(role)


def send(client: TestClient, case: Any) -> Any:
    """The case as a request of our own client; what HTTP itself cannot carry is left out."""
    arguments = case.as_transport_kwargs(base_url="http://testserver")
    headers = {
        name: value for name, value in dict(arguments.get("headers") or {}).items() if name.lower() != "authorization"
    }
    headers = {name: str(value).encode("latin-1", "replace") for name, value in headers.items()}
    body = {name: arguments[name] for name in ("json", "data", "content") if arguments.get(name) is not None}
    cookies = arguments.get("cookies") or {}
    assert not cookies
    if "data" in body and not isinstance(body["data"], dict):
        body["content"] = body.pop("data")
    return client.request(
        arguments["method"], arguments["url"], params=arguments.get("params"), headers=headers, **body
    )


def fault_of(answer: Any) -> str | None:
    """What is wrong with an answer: a server error, or a refusal that does not say what and why."""
    if answer.status_code >= 500:
        return f"{answer.status_code} {answer.text[:300]}"
    if answer.status_code < 400 or answer.request.method == "HEAD":
        return None
    is_problem = answer.headers["content-type"] == "application/problem+json"
    whole = is_problem and {"type", "title", "status", "detail", "code", "remedy"} <= answer.json().keys()
    return None if whole else f"no problem details: {answer.status_code} {answer.text[:300]}"


def explore(strategy: Any, num_examples: int, act: Callable[[Any], None]) -> None:
    """Call `act` with examples of the strategy, the same ones every time."""

    @hypothesis.seed(20261124)
    @settings(
        max_examples=num_examples, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=strategy)
    def run(case: Any) -> None:
        act(case)

    with contextlib.suppress(Unsatisfiable):  # an operation without inputs cannot be asked wrongly
        run()


@pytest.mark.parametrize("role", ROLES)
def test_nothing_that_the_schema_can_say_breaks_the_server(
    control: ControlApp, schema: Any, seeded: dict[str, str], role: str
) -> None:
    client, faults = client_of(control, role), set[str]()
    for result in schema.get_all_operations():
        operation = result.ok()
        name = f"{operation.method.upper()} {operation.path}"
        if role != next(one for one in ROLES if one in MAY_CALL[name]):
            continue  # whom it refuses is what test_control_guards asks

        def act(case: Any, name: str = name) -> None:
            if fault := fault_of(send(client, case)):
                faults.add(f"{name}: {fault}")

        def act_on_what_exists(case: Any, act: Callable[[Any], None] = act) -> None:
            case.path_parameters = {name: seeded.get(name, value) for name, value in case.path_parameters.items()}
            act(case)

        explore(operation.as_strategy(generation_mode=GenerationMode.NEGATIVE), EXAMPLES, act)
        explore(operation.as_strategy(generation_mode=GenerationMode.POSITIVE), EXAMPLES, act)
        if operation.path_parameters:
            explore(operation.as_strategy(generation_mode=GenerationMode.POSITIVE), EXAMPLES, act_on_what_exists)
    assert not faults
