"""The OpenAI API over a real socket: shapes, streams, headers, errors, limits, metrics."""

from __future__ import annotations

import http.client
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from compression_worker.serving.app import BODY_LIMIT, create_app
from compression_worker.serving.engine import Engine, ErrorBudget
from compression_worker.serving.generation import Sampling
from compression_worker.serving.loading import Loader
from compression_worker.serving.variants import Resident, Variants
from tests.compression_worker.serving.client import Answer, Client, running
from tests.compression_worker.serving.conftest import POISON, handle, resident_from
from tests.compression_worker.serving.stored import Models
from tests.compression_worker.serving.test_generation import text_of

CHAT = [{"role": "user", "content": "A delta is"}]


def test_models_lists_the_alias_with_its_digest(client: Client) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert listed["data"][0] | {"id": "support", "object": "model", "digest": "a" * 64} == listed["data"][0]
    assert client.get("/v1/models/support").json() == listed["data"][0]


def test_a_completion_has_the_shape_the_text_and_the_headers(client: Client, full_precision: Resident) -> None:
    answer = client.complete("support", max_tokens=12)
    body = answer.json()
    assert answer.status == 200
    assert answer.text == text_of(full_precision, "The quick", Sampling(max_tokens=12, temperature=0.0))
    prompt_tokens = len(full_precision.tokenizer.encode("The quick"))
    assert body["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 12,
        "total_tokens": prompt_tokens + 12,
    }
    assert (body["object"], body["model"], body["choices"][0]["finish_reason"]) == (
        "text_completion",
        "support",
        "length",
    )
    assert body["system_fingerprint"] == "a" * 16
    assert answer.headers["x-deltaworks-environment"] == "production"
    assert answer.headers["x-deltaworks-generation"] == "1"
    assert answer.headers["x-deltaworks-digest"] == "a" * 64


def test_a_completion_of_token_ids_equals_that_of_their_text(client: Client, full_precision: Resident) -> None:
    ids = full_precision.tokenizer.encode("The quick")
    assert client.complete("support", ids).text == client.complete("support", "The quick").text


def test_a_chat_goes_through_the_chat_template(client: Client, full_precision: Resident) -> None:
    answer = client.post(
        "/v1/chat/completions", {"model": "support", "messages": CHAT, "temperature": 0, "max_tokens": 9}
    )
    expected = text_of(full_precision, "user: A delta is\nassistant:", Sampling(max_tokens=9, temperature=0.0))
    assert answer.json()["object"] == "chat.completion"
    assert answer.json()["choices"][0]["message"] == {"role": "assistant", "content": expected}


def test_a_chat_without_a_template_gets_plain_roles(full_precision: Resident, client: Client) -> None:
    template, full_precision.tokenizer.chat_template = full_precision.tokenizer.chat_template, None
    try:
        plain = client.post(
            "/v1/chat/completions", {"model": "support", "messages": CHAT, "temperature": 0, "max_tokens": 9}
        )
    finally:
        full_precision.tokenizer.chat_template = template
    expected = text_of(full_precision, "user: A delta is\nassistant:", Sampling(max_tokens=9, temperature=0.0))
    assert plain.text == expected


def test_a_stream_of_text_joins_to_the_whole_answer(client: Client) -> None:
    whole = client.complete("support", max_tokens=20)
    streamed = client.complete("support", max_tokens=20, stream=True, stream_options={"include_usage": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.headers["x-deltaworks-digest"] == "a" * 64
    *events, usage = streamed.events()
    assert "".join(event["choices"][0]["text"] for event in events) == whole.text
    assert [event["choices"][0]["finish_reason"] for event in events][-2:] == [None, "length"]
    assert (usage["choices"], usage["usage"]) == ([], whole.json()["usage"])
    assert len({event["id"] for event in events}) == 1


def test_a_stream_of_a_chat_begins_with_the_role(client: Client) -> None:
    body = {"model": "support", "messages": CHAT, "temperature": 0, "max_tokens": 9}
    whole = client.post("/v1/chat/completions", body)
    events = client.post("/v1/chat/completions", body | {"stream": True}).events()
    assert events[0]["object"] == "chat.completion.chunk"
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == whole.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": 3}, "stream_options"),
        ({"n": 2}, "n"),
        ({"logprobs": 5}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"model": None}, "model"),
    ],
)
def test_a_bad_field_is_named(client: Client, fields: dict[str, Any], param: str) -> None:
    answer = client.post("/v1/completions", {"model": "support", "prompt": "The"} | fields)
    assert answer.status == 400
    assert answer.error["param"] == param
    assert set(answer.error) == {"message", "type", "param", "code"}
    assert answer.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "messages", [None, [], ["hello"], [{"role": "robot", "content": "x"}], [{"role": "user", "content": 5}],
                 [{"role": "user", "content": [{"type": "image_url"}]}]]
)  # fmt: skip
def test_bad_messages_are_refused(client: Client, messages: Any) -> None:
    answer = client.post("/v1/chat/completions", {"model": "support", "messages": messages})
    assert answer.status == 400
    assert answer.error["param"].startswith("messages")


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_refused(client: Client, raw: bytes) -> None:
    answer = client.post("/v1/completions", raw)
    assert (answer.status, answer.error["code"]) == (400, "invalid_json")


def test_an_unknown_model_is_not_found(client: Client) -> None:
    answer = client.complete("nobody")
    assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")
    assert client.get("/v1/models/nobody").status == 404


def test_a_model_that_is_not_loaded_yet_says_so(client: Client, variants: Variants) -> None:
    variants.expect("later", "staging")
    answer = client.complete("later")
    assert (answer.status, answer.error["code"]) == (503, "not_ready")
    assert "retry-after" in answer.headers


def test_a_prompt_over_the_context_is_refused_with_both_numbers(client: Client) -> None:
    answer = client.complete("support", "fox " * 400)
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    assert "256" in answer.error["message"]
    assert client.complete("support", "fox", max_tokens=300).error["code"] == "context_length_exceeded"


def test_a_chat_of_no_given_length_shrinks_to_the_context(client: Client) -> None:
    message = [{"role": "user", "content": "fox " * 50}]
    answer = client.post("/v1/chat/completions", {"model": "support", "messages": message, "temperature": 0})
    assert answer.status == 200
    assert answer.json()["usage"]["total_tokens"] <= 256


def test_a_body_over_the_limit_is_refused(client: Client) -> None:
    answer = client.post("/v1/completions", {"model": "support", "prompt": "a" * BODY_LIMIT})
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")


def test_a_body_that_says_it_is_huge_is_refused_unread(client: Client) -> None:
    answer = client.request("POST", "/v1/completions", b"{}", {"Content-Length": str(10**10)})
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")


def test_an_unknown_route_and_verb_get_an_error_of_the_same_shape(client: Client) -> None:
    assert (client.get("/v1/nothing").status, client.get("/v1/nothing").error["type"]) == (404, "invalid_request_error")
    assert client.get("/v1/completions").status == 405


def test_an_empty_prompt_begins_at_the_first_token(client: Client) -> None:
    assert client.complete("support", "").json()["usage"]["prompt_tokens"] == 1


def test_requests_beyond_the_queue_are_sent_away(client: Client) -> None:
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda _: client.complete("support", max_tokens=200), range(24)))
    assert {answer.status for answer in answers} == {200, 503}
    sent_away = [answer for answer in answers if answer.status == 503]
    assert {answer.error["code"] for answer in sent_away} == {"overloaded"}
    assert all(answer.headers["retry-after"] == "1" for answer in sent_away)
    assert client.complete("support").status == 200


def test_a_client_that_leaves_a_stream_frees_its_place(client: Client, variants: Variants) -> None:
    body = {"model": "support", "prompt": "The", "max_tokens": 250, "stream": True, "temperature": 0}
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=30)
    connection.request("POST", "/v1/completions", json.dumps(body))
    connection.getresponse().read(20)
    connection.close()
    deadline = time.monotonic() + 20
    while not variants.answers() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert variants.answers() == {("production", 1, "abandoned"): 1}


def test_metrics_count_answers_by_environment_and_generation(client: Client, variants: Variants) -> None:
    client.complete("support", max_tokens=2)
    client.complete("support", "fox " * 400)
    text = client.get("/metrics").body.decode()
    assert 'deltaworks_answers_total{environment="production",generation="1",outcome="ok"} 1' in text
    assert 'deltaworks_answers_total{environment="production",generation="1",outcome="refused"} 1' in text
    assert 'deltaworks_generation{environment="production"} 1' in text
    assert f"deltaworks_resident_bytes {variants.resident_bytes()}" in text


def test_health_tells_alive_from_ready(variants: Variants) -> None:
    engine = Engine(variants)
    with running(create_app(variants, engine, lambda: (False, {"why": "loading"}))) as client:
        assert client.get("/livez").status == 200
        assert (client.get("/readyz").status, client.get("/readyz").json()) == (503, {"ready": False, "why": "loading"})
    engine.close()


def test_the_third_answer_that_is_not_finite_brings_full_precision(
    client: Client, variants: Variants, poisoned: Resident, full_precision: Resident
) -> None:
    variants.swap(handle(poisoned, 2, fallback=full_precision))
    for _ in range(3):
        answer = client.complete("support", [5, POISON])
        assert (answer.status, answer.error["code"]) == (500, "non_finite")
    answer = client.complete("support", [5, POISON])
    assert (answer.status, answer.headers["x-deltaworks-generation"]) == (200, "2")
    assert answer.headers["x-deltaworks-digest"] == full_precision.digest
    assert "not finite" in variants.active("production").fell_back
    assert poisoned.digest not in variants.resident_digests()


def test_a_stream_that_cannot_begin_has_a_status_of_its_own(
    client: Client, variants: Variants, poisoned: Resident
) -> None:
    variants.swap(handle(poisoned, 2))
    answer = client.complete("support", [5, POISON], stream=True)
    assert (answer.status, answer.error["code"]) == (500, "non_finite")


def test_a_stream_that_breaks_in_the_middle_says_so(
    tiny_folders: tuple[Path, Path], client: Client, variants: Variants
) -> None:
    """The model's own fourth token is made infinite: the answer runs into it."""
    breaking = resident_from(tiny_folders[0], "d" * 64)
    ids = breaking.tokenizer.encode("The quick")
    tokens = breaking.model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0, len(ids) :].tolist()
    with torch.no_grad():
        breaking.model.get_input_embeddings().weight[tokens[3]] = float("inf")
    variants.swap(handle(breaking, 2))
    answer = client.complete("support", "The quick", stream=True, max_tokens=20)
    assert answer.status == 200
    assert answer.events()[-1]["error"]["code"] == "non_finite"
    assert variants.answers() == {("production", 2, "non_finite"): 1}


def test_a_thousand_swaps_under_load_mix_no_answer(models: Models, variants: Variants, client: Client) -> None:
    loader = Loader(models.store)
    full = loader.full_precision(models.variant_digest, lambda: False)
    small = loader.compressed(models.artifact_digest, models.base_digest, lambda: False)
    variants.swap(handle(full, 2))
    stop, seen = threading.Event(), list[Answer]()

    def load() -> None:
        while not stop.is_set():
            seen.append(client.complete("support", models.prompt, max_tokens=24))

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(load) for _ in range(3)]
        for generation in range(3, 1003):
            variants.swap(handle(full, generation) if generation % 2 else handle(small, generation, fallback=full))
            time.sleep(0.004)
        stop.set()
        for one in running:
            one.result()
    assert {answer.status for answer in seen} == {200}
    for answer in seen:
        digest, generation = answer.headers["x-deltaworks-digest"], int(answer.headers["x-deltaworks-generation"])
        assert answer.text == models.answers[digest]
        assert digest == (full if generation % 2 or generation == 2 else small).digest
    assert len({answer.headers["x-deltaworks-digest"] for answer in seen}) == 2


def test_the_error_budget_forgets_after_its_window(poisoned: Resident) -> None:
    now = [0.0]
    budget, broken = ErrorBudget(lambda: now[0]), handle(poisoned)
    struck = []
    for at in (0.0, 20.0, 40.0, 49.0):
        now[0] = at
        struck.append(budget.strike(broken))
    assert struck == [False, False, False, True]
