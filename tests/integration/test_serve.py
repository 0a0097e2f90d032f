"""The token server with simulated engines, over real HTTP."""

from __future__ import annotations

import asyncio
import io
from contextlib import asynccontextmanager

import aiohttp
import pytest
from rich.console import Console

import aseer
from aseer.cli.main import build_parser
from aseer.cli.serve import bound_socket, check_address, make_config, serve
from tests.integration.sim_weights import SHAPES
from tests.integration.sims import config_of, groups_of

torch = pytest.importorskip("torch")
SAMPLING = {"temperature": 0.0, "max_tokens": 100, "logprobs": 1}
LONG = {"temperature": 0.0, "max_tokens": 4000, "ignore_eos": True, "n": 2}


@asynccontextmanager
async def served(key: str | None = None, **args):
    """A client session of a server in this process."""
    config = config_of(engine_args={"weights": SHAPES, **args})
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    with bound_socket("127.0.0.1", 0) as listener:
        console = Console(file=io.StringIO())
        async with asyncio.TaskGroup() as tasks:
            server = tasks.create_task(
                serve(config, listener, "m", key, console, url.set_result)
            )
            async with aiohttp.ClientSession(await url) as session:
                yield session
            server.cancel()


async def generate(session, token_ids=(5, 6, 7), sampling=SAMPLING, **fields):
    body = {"token_ids": list(token_ids), "sampling_params": sampling, **fields}
    async with session.post("/inference/v1/generate", json=body) as answer:
        return answer.status, await answer.json()


async def told(session, path, **kwargs):
    async with session.post(path, **kwargs) as answer:
        return answer.status, await answer.json()


async def info(session):
    async with session.get("/server_info") as answer:
        return await answer.json()


async def until_running(session, num):
    for _ in range(1000):
        if (await info(session))["running"] == num:
            return
        await asyncio.sleep(0.02)
    pytest.fail(f"never did {num} run")


async def test_what_is_served_is_what_a_rollout_samples(engine):
    expected = {
        r.index: (r.token_ids, r.logprobs)
        async for r in engine.rollout(groups_of(1, max_tokens=100))
    }
    async with served() as session:
        status, answer = await generate(session, sampling={**SAMPLING, "n": 4})
    assert status == 200
    choices = {choice["index"]: choice for choice in answer["choices"]}
    for index, (token_ids, logprobs) in expected.items():
        content = choices[index]["logprobs"]["content"]
        assert choices[index]["token_ids"] == token_ids
        assert [entry["token_id"] for entry in content] == token_ids
        assert [entry["logprob"] for entry in content] == logprobs


async def test_siblings_that_come_together_share_a_group_and_seeds_stay_their_own():
    seeded = {**SAMPLING, "temperature": 1.0, "seed": 3}
    async with served() as session:
        named = await asyncio.gather(
            *(
                generate(session, sampling=seeded, group="q", group_size=4)
                for _ in range(4)
            )
        )
        alike = await asyncio.gather(
            *(generate(session, sampling=seeded) for _ in range(3))
        )
        async with session.get("/v1/models") as answer:
            card = (await answer.json())["data"][0]
        counted = await info(session)
        while counted["requests"] < 7:  # it is a fraction of a second old
            counted = await info(session)
    assert counted["groups"] == 4, "one of four, and three that have equal seeds"
    # A group's members have random streams of their own; equal requests have the same.
    texts = [tuple(answer["choices"][0]["token_ids"]) for _, answer in named]
    assert len(set(texts)) == 4
    assert len({tuple(a["choices"][0]["token_ids"]) for _, a in alike}) == 1
    assert (card["id"], card["owned_by"]) == ("m", "aseer")
    assert card["max_model_len"] > 0


async def test_a_bad_request_says_what_is_wrong_and_costs_nobody_else_anything():
    async with served() as session:
        other = asyncio.gather(*(generate(session, [5, i]) for i in range(8)))
        bad = await generate(session, sampling={"temperature": 7})
        long = await generate(session, [5] * 100_000)
        model = await generate(session, model="gpt-4")
        depths = b'{"a":' * 5000 + b"1" + b"}" * 5000
        deep = b'{"token_ids": [5], "sampling_params": ' + depths + b"}"
        async with session.post("/inference/v1/generate", data=deep) as answer:
            nested = answer.status
        async with session.post("/inference/v1/generate", data=b"\xff") as answer:
            nonsense = answer.status
        async with session.get("/v1/chat/completions") as answer:
            lost = answer.status, await answer.json()
        answered = await other
    assert bad[0] == long[0] == nonsense == nested == 400
    assert "temperature=7" in bad[1]["error"]["message"]
    assert "100000" in long[1]["error"]["message"]
    assert model[0] == 404
    assert "there is no model 'gpt-4'" in model[1]["error"]["message"]
    assert lost[0] == 404
    assert [status for status, _ in answered] == [200] * 8


async def test_a_key_is_wanted_where_there_is_one():
    async with served(key="secret") as session:
        without = await generate(session)
        session.headers["Authorization"] = "Bearer secret"
        with_key = await generate(session)
        session.headers["Authorization"] = "Bearer secreT"
        wrong = await generate(session)
        async with session.get("/health") as answer:
            health = answer.status
            port = answer.url.port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /is_paused HTTP/1.0\r\nAuthorization: Bearer \xff\r\n\r\n")
        no_text = await reader.read()
        writer.close()
    assert no_text.split()[1] == b"401"
    assert (without[0], with_key[0], wrong[0], health) == (401, 200, 401, 200)
    assert "Authorization: Bearer" in without[1]["error"]["message"]


async def test_requests_wait_while_paused_and_an_abort_ends_what_runs():
    async with served(step_s=0.005) as session, asyncio.TaskGroup() as tasks:
        running = tasks.create_task(generate(session, sampling=LONG))
        await until_running(session, 2)
        assert await told(session, "/pause") == (200, {"status": "paused"})
        status, answer = await running
        assert (status, answer["choices"][0]["finish_reason"]) == (200, "abort")
        waiting = tasks.create_task(generate(session))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        assert (await info(session))["is_paused"] is True
        await told(session, "/resume")
        assert (await waiting)[0] == 200
        late = tasks.create_task(generate(session, sampling=LONG))
        await until_running(session, 2)
        await told(session, "/abort_requests")
        assert (await late)[1]["choices"][0]["finish_reason"] == "abort"
        assert (await generate(session))[0] == 200


async def test_a_pause_that_keeps_lets_what_runs_finish():
    async with served() as session, asyncio.TaskGroup() as tasks:
        running = tasks.create_task(generate(session, sampling=LONG))
        await until_running(session, 2)
        await told(session, "/pause", params={"mode": "keep", "clear_cache": "false"})
        assert running.done()
        finished = (await running)[1]["choices"]
        assert [len(choice["token_ids"]) for choice in finished] == [4000, 4000]
        status, answer = await told(session, "/pause", params={"mode": "softly"})
        assert status == 400
        assert "['abort', 'keep', 'wait']" in answer["error"]["message"]


async def test_weights_are_replaced_between_requests_and_a_bad_checkpoint_is_not(
    tmp_path,
):
    from safetensors.torch import save_file

    good, bad = tmp_path / "good", tmp_path / "bad"
    for path, shapes in ((good, SHAPES), (bad, {"a": [4, 3]})):
        path.mkdir()
        tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
        save_file(tensors, path / "model.safetensors")
    async with served() as session, asyncio.TaskGroup() as tasks:
        before = tasks.create_task(generate(session, sampling=LONG))
        await until_running(session, 2)
        asked = {"weight_dir": str(good), "version": 7}
        changed = await told(session, "/update_weights", json=asked)
        after = await generate(session)
        refused = await told(session, "/update_weights", json={"weight_dir": str(bad)})
        empty = await told(session, "/update_weights", json={})
        still = await generate(session)
    assert changed == (200, {"status": "ok", "weight_version": 7})
    assert before.result()[1]["choices"][0]["weight_version"] == 0
    assert [a[1]["choices"][0]["weight_version"] for a in (after, still)] == [7, 7]
    assert refused[0] == 409
    assert "b" in refused[1]["error"]["message"]
    assert empty[0] == 400


async def test_a_client_that_hangs_up_ends_its_request():
    async with served(step_s=0.01) as session:
        running = asyncio.ensure_future(generate(session, sampling=LONG))  # noqa: TID251
        await until_running(session, 2)
        running.cancel()
        await asyncio.wait([running])
        await until_running(session, 0)
        assert (await generate(session))[0] == 200


def test_an_address_that_others_reach_needs_a_key():
    with pytest.raises(aseer.ConfigError, match=r"0.0.0.0 can be reached.*--api-key"):
        check_address("0.0.0.0", None)
    check_address("0.0.0.0", "key")
    check_address("::1", None)
    with (
        bound_socket("127.0.0.1", 0) as taken,
        pytest.raises(aseer.ConfigError, match="in use"),
    ):
        taken.listen()
        bound_socket("127.0.0.1", taken.getsockname()[1])
    for port in (99_999, -1):
        with pytest.raises(aseer.ConfigError, match=r"--port .* is not allowed"):
            bound_socket("127.0.0.1", port)


def test_options_become_settings_and_unknown_ones_are_named():
    def config_from(*argv):
        return make_config(build_parser().parse_args(["serve", "m", *argv]))

    config = config_from("--instances", "2", "--settings", '{"seed": 5}')
    assert (config.model, config.num_instances, config.seed) == ("m", 2, 5)
    with pytest.raises(aseer.ConfigError, match=r"\['kv'\], which aseer.EngineConfig"):
        config_from("--settings", '{"kv": 1}')
    with pytest.raises(aseer.ConfigError, match="for which there are options"):
        config_from("--dtype", "auto", "--settings", '{"dtype": "auto"}')
    assert build_parser().parse_args(["serve", "m", "--join-s", "2"]).join_s == 2.0
    with pytest.raises(SystemExit):
        config_from("--join-s", "nan")
