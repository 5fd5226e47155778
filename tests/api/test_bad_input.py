"""Bad input gets a clear error in OpenAI's shape, and the server works afterwards (any mesh)."""

import asyncio
import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.gateway.protocol import ChatRequest, CompletionRequest
from services.gateway.unsupported import NEUTRAL

JSON = {"content-type": "application/json"}
GOOD = {"prompt": "x", "max_tokens": 1}


@pytest.fixture
def http(api_url: str):
    with httpx.Client(base_url=api_url, timeout=60) as client:
        yield client


def error_of(response: httpx.Response) -> dict:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"]
    return error


def still_works(http: httpx.Client) -> None:
    assert http.post("/v1/completions", json=GOOD).status_code == 200


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [("/nope", "GET", 404), ("/v1/nope", "POST", 404), ("/v1/completions", "GET", 405), ("/v1/models", "POST", 405),
     ("/v1/models/other/model", "GET", 404), ("/v1/completions/", "POST", 404)],
)  # fmt: skip
def test_wrong_paths_and_methods(http, path, method, status):
    response = http.request(method, path)
    assert response.status_code == status
    error_of(response)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"null", b'{"prompt": "\xff\xfe"}', b'{"prompt": "\\udc00"}', b'{"prompt": NaN}', b"[" * 50_000,
     b'{"prompt": ' + b'{"a":' * 3000 + b"1" + b"}" * 3001, b'{"prompt": "x", "temperature": 1e999}'],
)  # fmt: skip
def test_bodies_that_are_no_good_json(http, body):
    response = http.post("/v1/completions", content=body, headers=JSON)
    assert response.status_code == 400
    error_of(response)
    still_works(http)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_other_content_types_are_refused(http, kind):
    response = http.post("/v1/completions", content=json.dumps(GOOD), headers={"content-type": kind})
    assert response.status_code == 400
    assert "content type" in error_of(response)["message"]


def test_content_type_may_have_parameters(http):
    headers = {"content-type": "application/json; charset=utf-8"}
    assert http.post("/v1/completions", content=json.dumps(GOOD), headers=headers).status_code == 200


def test_a_prompt_over_the_context(http):
    limit = http.get("/v1/models").json()["data"][0]["max_model_len"]
    for body, param in (
        ({"prompt": [5] * limit}, "prompt"),
        ({"prompt": [5] * (limit - 4), "max_tokens": 5}, "max_tokens"),
    ):
        response = http.post("/v1/completions", json=body)
        assert response.status_code == 400
        error = error_of(response)
        assert (error["param"], error["code"]) == (param, "context_length_exceeded")
    assert http.post("/v1/completions", json={"prompt": [5] * (limit - 4), "max_tokens": 4}).status_code == 200


@pytest.mark.parametrize("ids", [[4096], [-1], [2**40]])
def test_ids_that_do_not_exist(http, ids):
    assert http.post("/v1/completions", json={"prompt": ids}).status_code == 400
    assert http.post("/v1/completions", json=GOOD | {"stop_token_ids": ids}).status_code == 400
    assert http.post("/v1/completions", json=GOOD | {"logit_bias": {str(ids[0]): 1}}).status_code == 400
    assert http.post("/detokenize", json={"tokens": ids}).status_code == 400


def test_an_empty_chat_prompt(http):
    body = {"messages": [{"role": "user", "content": ""}]}
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert error_of(response)["param"] == "messages"


def test_tokenize_and_detokenize(http):
    text = "héllo 漢字 😀"
    found = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": text}]}).json()
    assert chat["tokens"] == found["tokens"]
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    for body in ({}, {"prompt": "a", "messages": []}, {"prompt": "a", "model": "other"}):
        assert http.post("/tokenize", json=body).status_code in (400, 404)


def test_operations(http):
    assert http.get("/health").json() == {"status": "alive"}
    assert http.get("/ready").status_code == 200
    assert http.get("/version").json()["version"]
    still_works(http)
    assert http.post("/v1/completions", json={}).status_code == 400
    text = http.get("/metrics").text
    for name in (
        "running", "waiting", "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket",
        "e2e_request_latency_seconds_bucket", "prompt_tokens_total", "generated_tokens_total",
        'requests_total{outcome="length"}', "refused_total",
    ):  # fmt: skip
        assert f"moemesh_{name}" in text, name
    counted = [line for line in text.splitlines() if line.startswith("moemesh_prompt_tokens_total")]
    assert float(counted[0].split()[1]) > 0


async def test_a_client_that_stops_in_the_middle_of_its_body(api_url):
    url = httpx.URL(api_url)
    for cut in (b"", b'{"prompt": "x'):
        _, writer = await asyncio.open_connection(url.host, url.port)
        head = b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n"
        writer.write(head + cut)
        await writer.drain()
        writer.transport.abort()
    async with httpx.AsyncClient(base_url=api_url) as client:
        assert (await client.post("/v1/completions", json=GOOD)).status_code == 200


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from(
    sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, *NEUTRAL, "x"} - {"prompt", "messages"})
)
plausible = json_values | st.sampled_from([0, 1, 2, 0.5, True, "a", ["a"], {"5": 1}, {"include_usage": True}, {}])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(fields, plausible, max_size=4), st.booleans(), json_values, st.booleans())
def test_no_body_makes_a_500(http, body, chat, prompt, sane):
    body = {k: v for k, v in body.items() if k not in ("max_tokens", "max_completion_tokens")} | {"max_tokens": 2}
    if chat:
        body["messages"] = [{"role": "user", "content": "hi"}] if sane else prompt
    else:
        body["prompt"] = "hi" if sane else prompt
    path = "/v1/chat/completions" if chat else "/v1/completions"
    response = http.post(path, content=json.dumps(body), headers=JSON)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error_of(response)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]), st.binary(max_size=60))
def test_no_bytes_make_a_500(http, path, body):
    response = http.post(path, content=body, headers=JSON)
    assert response.status_code == 400
    error_of(response)
