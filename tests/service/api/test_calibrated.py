"""What clients see of a calibration: GET /methods, a refused target, a served one."""

import asyncio

from service.models.calibration_file import load_calibrations
from service.models.loading import default_model_directory
from tests.service.fake_engine import FakeEngine, http_client

URL = "/generate?method=flash_skip_softmax&version=v2"
BODY = {"prompt": "x", "method_params": {"target_sparsity": 0.5}}


class CalibratedEngine(FakeEngine):
    def calibrated(self, method):
        (entry,) = load_calibrations(None, default_model_directory())
        return method.with_calibration(entry)


def generate(engine, body):
    async def post():
        async with http_client(engine) as client:
            return await client.post("/generate", json=body)

    return asyncio.run(post())


def ask(engine, *, body=BODY):
    async def both():
        async with http_client(engine) as client:
            page = await client.get("/methods/flash_skip_softmax?version=v2")
            return await client.post(URL, json=body), page.json()["versions"][0]

    return asyncio.run(both())


def test_a_target_without_a_calibration_is_a_bad_request():
    answer, page = ask(FakeEngine())
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "method_params"
    assert "needs a calibration" in answer.json()["error"]["message"]
    assert "sparseserve calibrate" in answer.json()["error"]["message"]
    assert (page["calibrated"], page["threshold"]["type"]) == (False, "static")


def test_a_half_of_a_hybrid_needs_a_calibration_too():
    params = {"decode": "flash_skip_softmax", "decode_params": {"decode_target_sparsity": 0.5}}
    body = {"prompt": "x", "method": "hybrid", "method_params": params}
    error = generate(FakeEngine(), body).json()["error"]
    assert (error["code"], error["param"]) == (400, "method_params")
    assert "'decode_target_sparsity' of 'flash_skip_softmax' needs a calib" in error["message"]
    assert generate(CalibratedEngine(), body).status_code == 200


def test_a_calibrated_server_shows_its_fits_and_takes_a_target():
    answer, page = ask(CalibratedEngine())
    assert answer.status_code == 200, answer.text
    threshold = answer.json()["sparsity"]["threshold"]
    assert threshold["type"] == "dynamic_calibrated"
    assert threshold["phases"]["prefill"]["target_sparsity"] == 0.5
    assert page["calibrated"]
    assert 0.9 < page["threshold"]["phases"]["prefill"]["r_squared"] <= 1


def test_a_target_out_of_reach_is_reported_as_a_fallback():
    body = {"prompt": "x", "method_params": {"target_sparsity": 0.95}}
    answer, _ = ask(CalibratedEngine(), body=body)
    assert "Prefill: 0.95" in answer.json()["sparsity"]["fallback"]["reason"]
