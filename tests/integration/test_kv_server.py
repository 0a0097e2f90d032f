"""What is stored in a pool's server, found, freed, and never published half done.

The server's parts in a process of their own, with a client's calls made directly.
"""

from __future__ import annotations

import json
import os
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
        request_id="r", cache_salt=salt, num_kv_readers=1)

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


def test_storing_freeing_and_dying_in_between():
    name = f"aseer-test-{os.getpid()}"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "0", name],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"LMCACHE_TRACK_USAGE": "false"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
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
