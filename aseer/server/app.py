"""The HTTP routes, for aiohttp.

    POST /inference/v1/generate        sample (`aseer.server.wire`)
    GET  /v1/models                    the model, and its length
    GET  /health                       200, or 503 with the engine's failure
    POST /pause?mode=wait|abort|keep   take no requests; returns once nothing runs
    POST /resume
    GET  /is_paused
    POST /abort_requests               end early what runs
    POST /update_weights               {"weight_dir": a checkpoint's directory}
    GET  /server_info                  versions, instances, what runs

With a key every route but /health wants `Authorization: Bearer <key>`. Errors are
OpenAI's: {"error": {"message", "type", "code"}}.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import time
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from aseer.errors import AseerError, ConfigError, WeightUpdateError, describe
from aseer.server.wire import answer_to, ask_of, decode_request
from aseer.version import __version__

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aseer.server.front import EngineLike, Front, PauseMode

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_log = logging.getLogger("aseer.server")

# Of a body: ten million token ids.
MAX_BODY_BYTES = 96 << 20
_PAUSE_MODES: dict[str, PauseMode] = {"wait": "wait", "abort": "abort", "keep": "keep"}


class UpdateWeights(msgspec.Struct):
    """Body of `/update_weights`."""

    weight_dir: str
    version: int | None = None


class App:
    """The routes over one engine."""

    def __init__(
        self,
        engine: EngineLike,
        front: Front,
        *,
        model: str,
        api_key: str | None = None,
    ) -> None:
        """Make the routes.

        Args:
            model: the name that clients know the model by.
            api_key: that clients must show; None = anyone may call.
        """
        self._engine = engine
        self._front = front
        self._model = model
        self._api_key = api_key
        self._created = int(time.time())
        self.web = web.Application(
            client_max_size=MAX_BODY_BYTES,
            middlewares=[self._with_errors, self._with_key],
        )
        self.web.add_routes(
            [
                web.post("/inference/v1/generate", self._generate),
                web.get("/v1/models", self._models),
                web.get("/health", self._health),
                web.post("/pause", self._pause),
                web.post("/resume", self._resume),
                web.get("/is_paused", self._is_paused),
                web.post("/abort_requests", self._abort),
                web.post("/update_weights", self._update_weights),
                web.get("/server_info", self._server_info),
            ]
        )

    @web.middleware
    async def _with_errors(
        self, request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException as error:
            return _error(error.status, f"{request.method} {request.path}: {error}")
        except ConfigError as error:
            return _error(400, str(error))
        except WeightUpdateError as error:
            return _error(409, str(error))
        except AseerError as error:
            return _error(503, str(error))
        except Exception as error:
            _log.exception("%s %s failed", request.method, request.path)
            return _error(500, f"a fault of the server's: {describe(error)}")

    @web.middleware
    async def _with_key(
        self, request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        if self._api_key is not None and request.path != "/health":
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
            # What is no UTF-8 comes with surrogates in its place.
            shown = given.encode(errors="surrogateescape")
            if not hmac.compare_digest(shown, self._api_key.encode()):
                return _error(
                    401,
                    "a key is missing or wrong; send `Authorization: Bearer <key>` "
                    "with the key that the server was started with",
                )
        return await handler(request)

    async def _generate(self, request: web.Request) -> web.Response:
        asked = decode_request(await request.read())
        if asked.model is not None and asked.model != self._model:
            return _error(
                404, f"there is no model {asked.model!r}; {self._model!r} is served"
            )
        responses = await self._front.sample(ask_of(asked))
        failed = next((r.error for r in responses if r.finish_reason == "error"), None)
        if failed is not None:
            return _error(500, f"the request failed in an engine: {failed}")
        answer = answer_to(
            asked,
            responses,
            model=self._model,
            request_id=asked.request_id or secrets.token_hex(16),
            created=int(time.time()),
        )
        return _json(answer)

    async def _models(self, request: web.Request) -> web.Response:
        instances = self._engine.instances
        lengths = [info.max_model_len for info in instances]
        card = {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "aseer",
            "root": self._model,
            "max_model_len": min(lengths) if lengths else None,
        }
        return _json({"object": "list", "data": [card]})

    async def _health(self, request: web.Request) -> web.Response:
        if not self._engine.instances:
            return _error(503, "no engine is up")
        return _json({"status": "ok"})

    async def _pause(self, request: web.Request) -> web.Response:
        given = request.query.get("mode", "abort")
        mode = _PAUSE_MODES.get(given)
        if mode is None:
            raise ConfigError(
                f"mode={given!r} is not allowed; give one of {sorted(_PAUSE_MODES)}"
            )
        await self._front.pause(mode)
        return _json({"status": "paused"})

    async def _resume(self, request: web.Request) -> web.Response:
        await self._front.resume()
        return _json({"status": "resumed"})

    async def _is_paused(self, request: web.Request) -> web.Response:
        return _json({"is_paused": self._front.is_paused})

    async def _abort(self, request: web.Request) -> web.Response:
        await self._front.abort()
        return _json({"status": "aborted"})

    async def _update_weights(self, request: web.Request) -> web.Response:
        body = await request.read()
        try:
            asked = msgspec.json.decode(body, type=UpdateWeights)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ConfigError(
                f'the body must be {{"weight_dir": "a directory"}}: {error}'
            ) from None
        version = await self._front.update_weights(asked.weight_dir, asked.version)
        return _json({"status": "ok", "weight_version": version})

    async def _server_info(self, request: web.Request) -> web.Response:
        progress = self._front.progress()
        info = {
            "aseer": __version__,
            "model": self._model,
            "weight_version": self._engine.weight_version,
            "instances": len(self._engine.instances),
            "running": self._front.num_running,
            "is_paused": self._front.is_paused,
            # Of the rollout since the last pause: how well siblings are joined.
            "requests": progress.num_requests if progress else 0,
            "groups": progress.num_groups if progress else 0,
        }
        return _json(info)


def _json(body: Any, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(body), status=status, content_type="application/json"
    )


def _error(status: int, message: str) -> web.Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return _json({"error": {"message": message, "type": kind, "code": status}}, status)
