"""What the OpenAPI document promises, asked of a server by schemathesis."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.service.fake_engine import FakeEngine, fake_app, running_server

pytestmark = pytest.mark.timeout(300)
DOCUMENT = schemathesis.openapi.from_dict(fake_app(FakeEngine()).openapi())
OPERATIONS = [result.ok() for result in DOCUMENT.get_all_operations() if isinstance(result, Ok)]
FITTING, UNFITTING = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
CASES = [
    pytest.param(operation, mode, id=f"{operation.label} {mode.value}")
    for operation in OPERATIONS
    for mode in (FITTING, UNFITTING)
    if mode is FITTING or operation.body  # what takes no body takes anything
]


@pytest.fixture(scope="module")
def address():
    with running_server(FakeEngine()) as one:
        yield one


@pytest.mark.parametrize(("operation", "mode"), CASES)
def test_every_route_keeps_the_promises_of_the_document(operation, mode, address):
    """Statuses, content types and bodies are those documented; what does not fit is refused.

    That what fits is taken holds of no schema here: none can say which methods there are, or that
    two fields exclude each other.
    """

    @settings(
        max_examples=20,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case):
        if operation.label == "POST /generate" and mode is FITTING:
            case.body = {"prompt": "p", **case.body}  # exactly one of two: no schema says so here
            case.body["prompt_token_ids"] = None if case.body["prompt"] else [5]
            case.body["prompt"] = case.body["prompt"] or None
        case.call_and_validate(base_url=address, excluded_checks=[positive_data_acceptance])

    ask()


def test_every_route_is_documented():
    labels = {operation.label for operation in OPERATIONS}
    assert {
        "POST /generate",
        "POST /v1/completions",
        "POST /v1/chat/completions",
        "GET /v1/models",
        "GET /v1/models/{model_id}",
        "POST /tokenize",
        "POST /detokenize",
        "POST /requests/{request_id}/cancel",
        "GET /methods",
        "GET /methods/{name}",
        "GET /version",
        "GET /server_info",
    } <= labels
