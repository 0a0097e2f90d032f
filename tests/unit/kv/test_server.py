"""What a pool server does when it is asked, with stand-ins for LMCache.

`tests/integration/test_kv_server.py` has it with LMCache itself.
"""

from __future__ import annotations

import io
import json
from array import array
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from aseer.kv.messages import Free, PeerSpec, Poll, Prefetch, Pull, Pulled, ServerSpec
from aseer.kv.prefetches import MAX_LOADS
from aseer.transport.keys import new_keys
from tests.unit.stand_ins import imported

MODULE = "aseer.kv.server"
V1 = "lmcache.v1"
CHUNK, BYTES = 4, 10
SALT = "run-model-v{}"


class Key(NamedTuple):
    tokens: tuple[int, ...]
    cache_salt: str


class ControlError(Exception):
    """LMCache's."""


class NotFoundError(ControlError):
    """LMCache's, for a load that it does not know."""


def keys_of(hasher: Any, model: str, world_size: int, tokens: list[int], salt: str):
    """LMCache's: a key for each whole chunk of the tokens."""
    if len(tokens) > 100:
        raise ValueError("too many tokens")
    num = len(tokens) // CHUNK
    return [Key(tuple(tokens[: (i + 1) * CHUNK]), salt) for i in range(num)], num


class LMCache:
    """Its server: what is in memory and on disk, of which some is being read."""

    def __init__(self) -> None:
        self.context = SimpleNamespace(
            token_hasher=None, chunk_size=CHUNK, layout_desc_registry=None
        )
        self.storage_manager = self
        self._l1_managers_by_id = {0: self}
        self.capacity = 100 * BYTES
        self.dram: set[Key] = set()
        self.disk: set[Key] = set()
        self.locked: set[Key] = set()
        self.was_cleared = False
        self.jobs: list[list[int]] = []
        self.done: dict[str, int | None] = {}
        self.listener: Any

    def register_listener(self, listener: Any) -> None:
        self.listener = listener

    register_l2_listener = register_listener

    def l2_adapters(self) -> list[tuple[int, Any]]:
        return [(0, SimpleNamespace(delete=self.delete_on_disk))]

    def get_memory_usage(self) -> tuple[int, int]:
        return len(self.dram) * BYTES, self.capacity

    def get_object_state(self, key: Key) -> Any:
        memory = SimpleNamespace(get_size=lambda: BYTES)
        return SimpleNamespace(memory_obj=memory) if key in self.dram else None

    def clear(self) -> None:
        self.was_cleared = True

    def delete_l1_keys(self, keys: list[Key]) -> None:
        gone = [key for key in keys if key not in self.locked]
        self.dram.difference_update(gone)
        self.listener.on_l1_keys_deleted_by_manager(gone)

    def delete_on_disk(self, keys: list[Key]) -> None:
        self.disk.difference_update(keys)
        self.listener.on_l2_keys_deleted(keys)

    # What engines and LMCache's prefetch do

    def store(self, tokens: list[int], version: int = 1, *, on_disk: bool = False):
        keys, _ = keys_of(None, "m", 1, tokens, SALT.format(version))
        if on_disk:
            self.disk.update(keys)
            self.listener.on_l2_keys_stored(keys, [BYTES] * len(keys))
        else:
            self.dram.update(keys)
            self.listener.on_l1_keys_write_finished(keys)
        return keys

    def submit(self, model: str, world: int, tokens: list[int], salt: str, **_: Any):
        self.jobs.append(tokens)
        return {"request_id": len(self.jobs) - 1}

    def status(self, job: str) -> dict[str, int | None]:
        if job not in self.done:
            raise NotFoundError(job)
        return {"found_keys": self.done[job]}


class Exchange:
    """Takes from other nodes' servers."""

    def __init__(self, spec: PeerSpec, store: Any, tokens_each: int, tell: Any) -> None:
        assert tokens_each == CHUNK
        self.address, self.orders = "", []

    def start(self) -> None:
        self.address = "tcp://10.0.0.1:4711"

    def pull(self, order: Pull) -> None:
        self.orders.append(order.pull)


@pytest.fixture
def lmcache():
    return LMCache()


@pytest.fixture
def module(monkeypatch, lmcache):
    def nothing(*_: Any) -> None: ...

    mp = f"{V1}.multiprocess"
    run = {"run_cache_server": lambda **_: ("requests", lmcache)}
    prefetch = {"PrefetchService": lambda engine: engine}
    listeners = ("L1ManagerListener", "L2AdapterListener")
    names: dict[str, dict[str, Any]] = {
        f"{V1}.distributed.api": {"Tier": SimpleNamespace(L1=1, L2=2)},
        f"{V1}.distributed.config": dict.fromkeys(
            ("add_storage_manager_args", "parse_args_to_config"), nothing
        ),
        f"{V1}.distributed.error": {"L1Error": SimpleNamespace(SUCCESS=0)},
        f"{V1}.distributed.internal_api": {n: type(n, (), {}) for n in listeners},
        f"{V1}.mp_observability.config": dict.fromkeys(
            ("add_observability_args", "parse_args_to_observability_config"), nothing
        ),
        f"{mp}.cache_control.errors": {
            "CacheControlError": ControlError,
            "NotFound": NotFoundError,
        },
        f"{mp}.cache_control.key_resolver": {"resolve_object_keys": keys_of},
        f"{mp}.cache_control.prefetch_service": prefetch,
        f"{mp}.config": dict.fromkeys(
            ("add_mp_server_args", "add_p2p_args", "parse_args_to_mp_server_config"),
            nothing,
        ),
        f"{mp}.server": run,
    }
    module = imported(monkeypatch, MODULE, names, anew=["aseer.kv.lending"])
    monkeypatch.setattr(module.patches, "apply", lambda process: [process])
    monkeypatch.setattr(module, "Exchange", Exchange)
    return module


@pytest.fixture
def server(module):
    return module.PoolServer(ServerSpec(args=[], shm_name="x"))


def packed(tokens: list[int]) -> bytes:
    return array("i", tokens).tobytes()


def free(tokens: list[int], start: int = 0) -> Poll:
    return Poll(free=[Free("m", 1, SALT.format(1), packed(tokens), start)])


def wanted(*texts: list[int]) -> Poll:
    return Poll(prefetch=[Prefetch("m", 1, SALT.format(1), packed(t)) for t in texts])


def test_what_nobody_will_ask_for_is_freed_in_memory_and_on_disk(server, lmcache):
    text, other = [*range(12)], [7] * 8
    keys = lmcache.store(text)
    lmcache.store(text[:8], on_disk=True)
    others = lmcache.store(other)
    counts = server.answer(free([*text, 99]))
    assert (lmcache.dram, lmcache.disk) == ({*others}, set())
    assert (counts.freed, counts.evicted) == (len(keys) * BYTES, 0)
    assert (counts.resident, counts.capacity, counts.per_chunk) == (20, 1000, BYTES)


def test_a_prefix_that_others_begin_with_stays(server, lmcache):
    first, *_ = lmcache.store([*range(12)])
    server.answer(free([*range(12)], start=5))  # chunks that hold token 5, or later
    assert lmcache.dram == {first}


def test_what_is_read_is_freed_once_it_is_not(server, lmcache):
    (key,) = lmcache.store([*range(4)])
    lmcache.locked = {key}
    server.answer(free([*range(4)]))
    assert lmcache.dram == {key}
    lmcache.locked = set()
    server.answer(Poll())
    assert lmcache.dram == set()


def test_what_is_read_for_ever_is_tried_for_a_while(server, lmcache, module):
    (key,) = lmcache.store([*range(4)])
    lmcache.locked = {key}
    server.answer(free([*range(4)]))
    for _ in range(module._FREE_ROUNDS):
        server.answer(Poll())
    lmcache.locked = set()
    server.answer(Poll())
    assert lmcache.dram == {key}


def test_what_is_stored_anew_after_it_was_freed_stays(server, lmcache):
    lmcache.store([*range(4)])
    server.answer(free([*range(4)]))
    (key,) = lmcache.store([*range(4)])
    server.answer(Poll())
    assert lmcache.dram == {key}


def test_kv_of_older_weights_is_freed(server, lmcache):
    lmcache.store([1] * 8, 1)
    lmcache.store([2] * 4, 2, on_disk=True)
    new = lmcache.store([1] * 8, 3)
    server.answer(Poll(drop_below=3))
    assert (lmcache.dram, lmcache.disk) == ({*new}, set())


def test_more_tokens_than_lmcache_takes_cost_only_themselves(server, lmcache):
    lmcache.store([*range(4)])
    poll = Poll(
        free=[*free([0] * 101).free, *free([*range(4)]).free],
        prefetch=wanted([0] * 101).prefetch,
    )
    server.answer(poll)
    assert (lmcache.dram, lmcache.jobs) == (set(), [])


def test_only_what_is_on_disk_alone_is_loaded(server, lmcache):
    here, there, split = [1] * 4, [2] * 4, [3] * 8
    for text in (here, split[:4]):
        lmcache.store(text)
    for text in (here, there, split):
        lmcache.store(text, on_disk=True)
    server.answer(wanted(here, [4] * 4, there, split))
    assert lmcache.jobs == [there, split]
    lmcache.done = {"0": 1, "1": 2}  # of the second, one chunk was there before
    assert server.answer(Poll()).prefetched == 2 * BYTES
    assert server.answer(Poll()).prefetched == 2 * BYTES


def test_loads_are_few_at_a_time_and_one_that_is_unknown_takes_no_place(
    server, lmcache
):
    texts = [[i] * 4 for i in range(MAX_LOADS + 2)]
    for text in texts:
        lmcache.store(text, on_disk=True)
    lmcache.done = {str(i): None for i in range(MAX_LOADS)}
    server.answer(wanted(*texts))
    assert lmcache.jobs == texts[:MAX_LOADS]
    del lmcache.done["0"]
    server.answer(wanted(*texts[MAX_LOADS:]))
    assert lmcache.jobs == texts[: MAX_LOADS + 1]


def test_nothing_is_loaded_where_it_would_push_out_what_is_wanted_too(server, lmcache):
    lmcache.store([1] * 40)
    lmcache.store([2] * 8, on_disk=True)
    lmcache.capacity = 11 * BYTES
    server.answer(wanted([2] * 8))
    assert lmcache.jobs == []
    lmcache.capacity = 100 * BYTES
    server.answer(wanted([2] * 8))
    assert lmcache.jobs == [[2] * 8]


def test_memory_is_emptied_where_that_is_asked(server, lmcache):
    server.answer(Poll())
    assert not lmcache.was_cleared
    server.answer(Poll(clear_dram=True))
    assert lmcache.was_cleared


def test_a_server_with_peers_says_where_it_is_and_takes_from_them(module):
    told: list[Any] = []
    spec = ServerSpec(args=[], shm_name="x", peers=PeerSpec("tcp://h:*", new_keys()))
    server = module.PoolServer(spec, told.append)
    assert [message.address for message in told] == ["tcp://10.0.0.1:4711"]
    server.answer(Poll(pull=[Pull(3, 0, "tcp://o:1", "m", 1, "s", b"", 1.0)]))
    assert server._exchange.orders == [3]


def test_a_server_without_peers_refuses_to_take(module):
    told: list[Any] = []
    server = module.PoolServer(ServerSpec(args=[], shm_name="x"), told.append)
    server.answer(Poll(pull=[Pull(3, 0, "tcp://o:1", "m", 1, "s", b"", 1.0)]))
    assert told == [Pulled(3, error="it takes nothing from others")]


def test_a_message_is_a_line_and_a_reader_that_is_gone_is_no_error(module):
    class Gone(io.BytesIO):
        def flush(self) -> None:
            raise BrokenPipeError

    there = io.BytesIO()
    for answers in (there, Gone()):
        module._say(answers, Pulled(3))
    (line,) = there.getvalue().splitlines()
    assert json.loads(line)["pull"] == 3
