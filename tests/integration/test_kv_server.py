"""What is stored in a pool's server, found, freed, and never published half done.

The server's parts in a process of their own, with a client's calls made directly.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

pytest.importorskip("lmcache")
pytestmark = pytest.mark.timeout(120)

SCRIPT = """
import json, os, sys
from array import array
from lmcache.v1.multiprocess.custom_types import (
    IPCCacheServerKey, RegisterEngineDrivenContextPayload)
from lmcache.v1.multiprocess.modules.engine_driven_transfer import (
    EngineDrivenTransferModule)
from aseer.kv.messages import Free, Poll, ServerSpec
from aseer.kv.server import PoolServer, _exit_now

port, name = sys.argv[1:]
spec = ServerSpec(shm_name=name, args=[
    "--host", "127.0.0.1", "--port", port, "--l1-size-gb", "0.02", "--chunk-size", "64",
    "--eviction-policy", "LRU", "--supported-transfer-mode", "engine_driven",
    "--shm-name", name, "--no-l1-use-lazy", "--disable-observability"])
server = PoolServer(spec)
module = next(m for m in server._engine._modules
              if isinstance(m, EngineDrivenTransferModule))

def register(instance_id):
    module.register_kv_cache_engine_driven_context(RegisterEngineDrivenContextPayload(
        instance_id=instance_id, model_name="m", world_size=1, block_size=32,
        num_layers=2, hidden_dim_size=16, dtype_str="float32", use_mla=False,
        num_physical_slots=64))

def key(tokens, salt):
    return IPCCacheServerKey(model_name="m", world_size=1, worker_id=0,
        token_ids=tuple(tokens), start=0, end=len(tokens) // 64 * 64,
        request_id=f"r{hash((tuple(tokens), salt))}", cache_salt=salt, num_kv_readers=1)

def store(instance_id, tokens, salt, commit=True):
    found = module.prepare_store(key(tokens, salt), instance_id)
    if commit:
        module.commit_store(key(tokens, salt), instance_id, b"")
    return len(found.context["slots"])

def state():
    counts = server.counts()
    return [counts.stored, counts.freed, counts.evicted, counts.resident,
            server._managers[0].get_memory_usage()[0]]

seen = {}
register(1)
register(2)
prompt = list(range(200))
seen["slots of a store not finished"] = store(1, prompt, "s-v1", commit=False)
module.unregister_kv_cache(1)
seen["after its death"] = state()
seen["slots of another's store"] = store(2, prompt, "s-v1")
seen["stored"] = state()
free = Free("m", 1, "s-v1", array("i", prompt).tobytes(), 70)
server.answer(Poll(free=[free]))
seen["freed from token 70 on"] = state()
store(2, prompt, "s-v2")
server.answer(Poll(drop_below=2))
seen["without version 1"] = state()
print(json.dumps(seen), flush=True)
_exit_now(spec)
"""

STRANGER = """
import os, pickle, subprocess, sys, traceback
from pathlib import Path
import msgspec, zmq
from lmcache.v1.multiprocess.custom_types import (
    IPCCacheServerKey, RegisterEngineDrivenContextPayload)
from lmcache.v1.multiprocess.transport.zmq_impl.client import ZmqMultiprocessClient
from lmcache.v1.multiprocess.transport.zmq_impl.mq import MessageQueueClient
from aseer.node.interpreter import this_interpreter
from aseer.kv.messages import Poll, ServerSpec
from aseer.node.leftovers import Leftovers
from aseer.node.lifeline import Lifeline

port, name, folder = sys.argv[1:]
mark, run_dir = Path(folder) / "mark", Path(folder) / "run"
run_dir.mkdir()
leftovers = Leftovers(run_dir)
spec = ServerSpec(shm_name=name, args=[
    "--host", "127.0.0.1", "--port", port, "--l1-size-gb", "0.02", "--chunk-size", "64",
    "--eviction-policy", "LRU", "--supported-transfer-mode", "engine_driven",
    "--shm-name", name, "--no-l1-use-lazy", "--disable-observability"])
server = subprocess.Popen(
    this_interpreter().command("aseer.kv.server"),
    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    env=os.environ | Lifeline.to_this_process(run_dir).environment(),
    start_new_session=True)

def ask(message):
    server.stdin.write(msgspec.json.encode(message) + b"\\n")
    server.stdin.flush()
    return server.stdout.readline()

class Evil:
    def __reduce__(self):
        return Path.touch, (mark,)

try:
    assert ask(spec)
    client = ZmqMultiprocessClient(
        MessageQueueClient(f"tcp://127.0.0.1:{port}", zmq.Context.instance()))
    client.register_kv_cache_engine_driven_context(RegisterEngineDrivenContextPayload(
        instance_id=1, model_name="m", world_size=1, block_size=32, num_layers=2,
        hidden_dim_size=16, dtype_str="float32", use_mla=False,
        num_physical_slots=64)).result(timeout=20)
    key = IPCCacheServerKey(model_name="m", world_size=1, worker_id=0,
        token_ids=tuple(range(64)), start=0, end=64, request_id="r", cache_salt="s",
        num_kv_readers=1)
    stored = client.commit_store(key, 1, pickle.dumps(Evil())).result(timeout=20)
    counts = ask(Poll())
    print(stored, b'"stored":0,' in counts, mark.exists(), flush=True)
    status = 0
except BaseException:
    traceback.print_exc()
    status = 1
server.terminate()
server.wait()
leftovers.remove()
os._exit(status)
"""
PICKLES = """
import os, pickle, sys
from pathlib import Path
from aseer.kv import patches

class Evil:
    def __reduce__(self):
        return Path.touch, (Path(sys.argv[1]),)

patches.apply("server")
for loads in (pickle.loads, pickle._loads):
    try:
        loads(pickle.dumps(Evil()))
    except patches.PickleRefused as error:
        print(error)
"""

STORES = """
from types import SimpleNamespace
from lmcache.v1.distributed.internal_api import L2StoreResult
from aseer.kv.disk import CheckedAdapter, NativeConnectorL2Adapter

class Disk:
    def __init__(self):
        self.tasks = 0
    def submit_store_task(self, keys, objects):
        self.tasks += 1
        return self.tasks
    def pop_completed_store_tasks(self):
        return {1: L2StoreResult(True, 4), 2: L2StoreResult(False, 0)}

NativeConnectorL2Adapter.submit_store_task = Disk.submit_store_task
NativeConnectorL2Adapter.pop_completed_store_tasks = (
    Disk.pop_completed_store_tasks)
CheckedAdapter.__bases__[0].__init__ = lambda self: Disk.__init__(self)
CheckedAdapter.__del__ = lambda self: None
adapter = CheckedAdapter()
memory = SimpleNamespace(byte_array=b"kv")
adapter.submit_store_task(["a", "b"], [memory, memory])
adapter.submit_store_task(["c"], [memory])
adapter.pop_completed_store_tasks()
print(sorted(adapter._sums), adapter._storing)
"""


def output_of(script: str, *arguments: str) -> list[str]:
    """Of a script in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"LMCACHE_TRACK_USAGE": "false"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_a_pickle_sent_to_a_server_is_refused_and_runs_nothing(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    name = f"aseer-test-{os.getpid()}"
    lines = output_of(STRANGER, port, name, str(tmp_path))
    assert lines[-1] == "False True False"


def test_no_pickle_in_a_servers_process_can_name_a_thing(tmp_path):
    lines = output_of(PICKLES, str(tmp_path / "mark"))
    assert lines == ["a pickle asks for pathlib.Path.touch; none is loaded here"] * 2
    assert not list(tmp_path.iterdir())


def test_storing_freeing_and_dying_in_between():
    name = f"aseer-test-{os.getpid()}"
    lines = output_of(SCRIPT, "0", name)
    seen = json.loads(lines[-1])
    chunk = 2 * 2 * 64 * 16 * 4
    assert seen == {
        "slots of a store not finished": 3,
        "after its death": [0, 0, 0, 0, 0],
        "slots of another's store": 3,
        "stored": [3 * chunk, 0, 0, 3 * chunk, 3 * chunk],
        "freed from token 70 on": [3 * chunk, 2 * chunk, 0, chunk, chunk],
        "without version 1": [6 * chunk, 3 * chunk, 0, 3 * chunk, 3 * chunk],
    }
    assert not [n for n in os.listdir("/dev/shm") if name in n]


SHARED = (
    SCRIPT.split("seen = {}")[0]
    + """
import asyncio
from types import SimpleNamespace
from aseer.kv.messages import Prefetch
from aseer.runtime.calls import Settings
from aseer.runtime.session import Session
from aseer.types import InstanceLoad
from tests.unit.builders import info_of, report_of, task_of

CHUNK = 64

def held(tokens):
    "Which chunks of these tokens are there."
    data = array("i", tokens).tobytes()
    keys = server._keys_of(Prefetch("m", 1, "s-v1", data))
    there, _ = server._ledger.held(set(keys))
    return [key in there for key in keys]

def free(info, version, tokens, start, instances):
    "As the real pool's `free`, with a poll at once."
    server.answer(Poll(free=[Free("m", 1, "s-v1", tokens, start)]))

class Instances:
    "Those of a session: it remembers which request's chunk is which."
    def __init__(self):
        self.chunks = {}
    def run_chunk(self, instance_id, run, after):
        self.chunks[run.chunk.request_id] = run.chunk.chunk_id
    def num_restarts(self, instance_id):
        return 0

async def begin(instances):
    pool = SimpleNamespace(granularity=CHUNK, server_of=lambda _: 0, free=free,
                           prefetches=False, num_restarts=0, counts=server.counts())
    mailbox = SimpleNamespace(put=lambda _: None, close=lambda _: None, is_closed=False)
    settings = Settings(policy="context-aware", chunk_size=1000,
        starvation_interval=100, weight_version=1, granularity=CHUNK)
    session = Session(pool=instances, mailbox=mailbox, settings=settings, kv_pool=pool,
        post=lambda do: (do(), True)[1])
    session.instance_up(info_of(block_size=32, num_kv_blocks=1000),
        InstanceLoad(num_running=0, num_waiting=0, kv_used=0.0))
    return session

def report(session, request, tokens, **end):
    progress = report_of(instances.chunks[request], tokens, **end)
    session._carry_out(session._controller.progress([progress], session._now()))

def finish(session, request, tokens, start=0):
    report(session, request, tokens, start=start, end="stop", stop_reason=0)

def task(name, prompt, num_requests=1):
    from dataclasses import replace
    made = task_of(name, num_requests=num_requests, max_tokens=1000)
    data = array("i", prompt).tobytes()
    return replace(made, prompt=data, num_prompt_tokens=len(prompt))

register(1)
system = list(range(128))
a, b = [system + [n + i for i in range(90)] for n in (1000, 2000)]
opening = [5] * 40                 # all of A's siblings begin so: it fills a chunk
a0 = opening + [30] * 100
a1 = opening + [31] * 100
b0 = [40] * 200
seen = {}
instances = Instances()
session = asyncio.new_event_loop().run_until_complete(begin(instances))
session.offer([task("a", a, 2), task("b", b)])
for tokens in (a + a0, a + a1, b + b0):
    store(1, tokens, "s-v1")
seen["stored"] = [held(a + a1), held(b + b0)]
report(session, "a/1", a1[:50])
finish(session, "a/0", a0)
seen["a/0 is finished"] = [held(a + a0), held(a + a1), held(b + b0)]
finish(session, "a/1", a1[50:], start=50)
seen["group a is finished"] = [held(a + a1), held(b + b0)]
finish(session, "b/0", b0)
seen["group b is finished"] = [held(b + b0), state()[3]]
print(json.dumps(seen), flush=True)
_exit_now(spec)
"""
)


def test_a_prefix_is_freed_with_the_last_that_begins_so():
    """A system prompt that two groups have, and an opening that two siblings have."""
    name = f"aseer-test-{os.getpid()}"
    lines = output_of(SHARED, "0", name)
    seen = json.loads(lines[-1])
    yes, no = [True], [False]
    assert seen == {
        "stored": [5 * yes, 6 * yes],
        "a/0 is finished": [4 * yes + no, 5 * yes, 6 * yes],
        "group a is finished": [2 * yes + 3 * no, 6 * yes],
        "group b is finished": [6 * no, 0],
    }


def test_a_store_that_the_disk_refused_leaves_no_checksum():
    assert output_of(STORES)[-1] == "['a', 'b'] {}"
