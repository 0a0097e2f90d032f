"""The HTTP routes: who may call, what is answered, and with which status."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from aseer.errors import ConfigError, EngineError, WeightUpdateError
from aseer.version import __version__
from tests.lazy import Lazy
from tests.unit.server.test_wire import response_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

app = Lazy("aseer.server.app")
test_utils = Lazy("aiohttp.test_utils")

KEY = "a-key-of-this-test"


class Front:
    """Stands for the engine behind the routes: keeps what it is asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.error: BaseException | None = None
        self.responses: list[Any] = [response_of()]
        self.is_paused = False
        self.num_running = 3
        self.now: Any = None

    async def sample(self, ask: Any) -> list[Any]:
        self._note("sample", ask.prompt, ask.n)
        return self.responses

    async def pause(self, mode: str) -> None:
        self._note("pause", mode)
        self.is_paused = True

    async def resume(self) -> None:
        self._note("resume")
        self.is_paused = False

    async def abort(self) -> None:
        self._note("abort")

    async def update_weights(self, directory: str, version: int | None) -> int:
        self._note("update", directory, version)
        return 7 if version is None else version

    def progress(self) -> Any:
        return self.now

    def _note(self, *what: Any) -> None:
        self.asked.append(what)
        if self.error is not None:
            raise self.error


class Client:
    """Calls the routes."""

    def __init__(self, http: Any, front: Front, engine: Any) -> None:
        self._http = http
        self.front = front
        self.engine = engine

    async def get(self, path: str, **headers: Any) -> tuple[int, Any]:
        async with self._http.get(path, headers=headers) as answer:
            return answer.status, await answer.json()

    async def post(self, path: str, body: Any = b"", **headers: Any) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self._http.post(path, data=data, headers=headers) as answer:
            return answer.status, await answer.json()

    async def generate(self, **fields: Any) -> tuple[int, Any]:
        return await self.post("/inference/v1/generate", {"token_ids": [5, 6]} | fields)


@asynccontextmanager
async def serving(key: str | None = None) -> AsyncIterator[Client]:
    front: Any = Front()
    engine: Any = SimpleNamespace(
        instances=[SimpleNamespace(max_model_len=n) for n in (4096, 2048)],
        weight_version=7,
    )
    routes = app.App(engine, front, model="m", api_key=key).web
    async with test_utils.TestClient(test_utils.TestServer(routes)) as http:
        yield Client(http, front, engine)


async def test_what_is_asked_for_is_sampled_and_answered() -> None:
    async with serving() as client:
        client.front.responses = [response_of(index=i) for i in range(2)]
        status, answer = await client.generate(
            sampling_params={"n": 2}, model="m", request_id="mine"
        )
        assert (status, client.front.asked) == (200, [("sample", [5, 6], 2)])
        assert (answer["request_id"], answer["model"]) == ("mine", "m")
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        _, first = await client.generate()
        _, second = await client.generate()
        assert first["request_id"] != second["request_id"], "each has one"


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (ConfigError("temperature=7 is not allowed"), 400, "invalid_request_error"),
        (WeightUpdateError("the weights do not fit"), 409, "invalid_request_error"),
        (EngineError("the engine has no instance left"), 503, "server_error"),
        (KeyError("a bug"), 500, "server_error"),
    ],
)
async def test_an_error_is_answered_in_openais_form_and_the_server_goes_on(
    error: Exception, status: int, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as client:
        client.front.error = error
        found, answer = await client.generate()
        assert (found, answer["error"]["code"], answer["error"]["type"]) == (
            status,
            status,
            kind,
        )
        words = "a fault of the server's: KeyError" if status == 500 else str(error)
        assert words in answer["error"]["message"]
        # A fault of ours is told in the log, with its traceback; a caller's is not.
        assert ("Traceback" in caplog.text) is (status == 500)
        client.front.error = None
        assert (await client.generate())[0] == 200


async def test_a_response_that_is_an_error_is_no_answer() -> None:
    async with serving() as client:
        failed = response_of(index=1, finish_reason="error", error="NaN logprobs")
        client.front.responses = [response_of(), failed]
        status, answer = await client.generate(sampling_params={"n": 2})
        assert status == 500
        assert "NaN logprobs" in answer["error"]["message"]
        assert "choices" not in answer


async def test_what_is_not_there_is_refused_before_it_is_sampled() -> None:
    async with serving() as client:
        status, answer = await client.generate(model="gpt-4")
        assert (status, answer["error"]["code"]) == (404, 404)
        assert "there is no model 'gpt-4'; 'm' is served" in answer["error"]["message"]
        status, answer = await client.post("/inference/v1/generate", b"\xff")
        assert status == 400
        assert "no generate request" in answer["error"]["message"]
        status, answer = await client.get("/v1/chat/completions")
        assert status == 404
        assert "GET /v1/chat/completions" in answer["error"]["message"]
        status, _ = await client.get("/pause")
        assert status == 405, "it takes POST alone"
        assert client.front.asked == []


async def test_a_body_that_is_too_large_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(app._module, "MAX_BODY_BYTES", 1000)
    async with serving() as client:
        status, _ = await client.generate(token_ids=[1] * 1000)
        assert status == 413
        assert client.front.asked == []


@pytest.mark.parametrize(
    "given",
    [None, KEY, f"Bearer {KEY}x", "Bearer ", f"Basic {KEY}", "Bearer \udce9"],
)
async def test_without_the_key_nothing_is_done(given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given}
    is_right = given == KEY  # the word `Bearer` may be left out
    async with serving(KEY) as client:
        for path in ("/pause", "/resume", "/abort_requests", "/update_weights"):
            status, answer = await client.post(path, {"weight_dir": "w"}, **headers)
            assert status == (200 if is_right else 401), path
        if not is_right:
            assert "Authorization: Bearer" in answer["error"]["message"]
            assert KEY not in json.dumps(answer)
            assert client.front.asked == []
        assert (await client.get("/health"))[0] == 200, "a probe has no key"


async def test_with_the_key_all_is_done() -> None:
    async with serving(KEY) as client:
        bearer = {"Authorization": f"Bearer {KEY}"}
        assert (await client.post("/pause", **bearer))[0] == 200
        assert (await client.get("/server_info", **bearer))[1]["is_paused"]


@pytest.mark.parametrize(
    ("query", "mode"),
    [("", "abort"), ("?mode=wait", "wait"), ("?mode=keep", "keep")],
)
async def test_a_pause_is_of_the_kind_that_is_asked_for(query: str, mode: str) -> None:
    async with serving() as client:
        assert await client.post(f"/pause{query}") == (200, {"status": "paused"})
        assert client.front.asked == [("pause", mode)]
        assert await client.get("/is_paused") == (200, {"is_paused": True})
        assert await client.post("/resume") == (200, {"status": "resumed"})
        assert await client.get("/is_paused") == (200, {"is_paused": False})


async def test_an_unknown_kind_of_pause_pauses_nothing() -> None:
    async with serving() as client:
        status, answer = await client.post("/pause?mode=now")
        assert status == 400
        assert "['abort', 'keep', 'wait']" in answer["error"]["message"]
        assert not client.front.is_paused


async def test_what_runs_is_ended_early() -> None:
    async with serving() as client:
        answer = await client.post("/abort_requests")
        assert answer == (200, {"status": "aborted"})
        assert client.front.asked == [("abort",)]


async def test_new_weights_are_taken_from_a_directory() -> None:
    async with serving() as client:
        body = {"weight_dir": "/w"}
        assert await client.post("/update_weights", body) == (
            200,
            {"status": "ok", "weight_version": 7},
        )
        _, answer = await client.post("/update_weights", body | {"version": 9})
        assert answer["weight_version"] == 9
        assert client.front.asked == [("update", "/w", None), ("update", "/w", 9)]
        for wrong in (b"", b"{}", b'{"weight_dir": 3}', b"[" * 10_000):
            status, answer = await client.post("/update_weights", wrong)
            assert status == 400, wrong[:20]
            assert "weight_dir" in answer["error"]["message"]
        assert len(client.front.asked) == 2


async def test_health_and_lengths_are_those_of_the_instances_that_are_up() -> None:
    async with serving() as client:
        assert await client.get("/health") == (200, {"status": "ok"})
        _, models = await client.get("/v1/models")
        (card,) = models["data"]
        assert (card["id"], card["max_model_len"]) == ("m", 2048), "the shortest"
        client.engine.instances = []
        status, answer = await client.get("/health")
        assert (status, answer["error"]["message"]) == (503, "no engine is up")
        (card,) = (await client.get("/v1/models"))[1]["data"]
        assert card["max_model_len"] is None


async def test_what_runs_is_told() -> None:
    async with serving() as client:
        _, info = await client.get("/server_info")
        assert info == {
            "aseer": __version__,
            "model": "m",
            "weight_version": 7,
            "instances": 2,
            "running": 3,
            "is_paused": False,
            "requests": 0,
            "groups": 0,
        }
        client.front.now = SimpleNamespace(num_requests=8, num_groups=2)
        _, info = await client.get("/server_info")
        assert (info["requests"], info["groups"]) == (8, 2)
