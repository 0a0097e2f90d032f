"""A pool's server on a host of its own, without engines: it says where others find it,
and then does what it is told, a line each, and answers each with a line of JSON.
"""

from __future__ import annotations

import json
import queue
import sys
import time
import zlib
from array import array
from typing import Any

from aseer.kv.messages import PeerSpec, Poll, Pull, Pulled, ServerSpec, Serves
from aseer.kv.server import PoolServer, _exit_now
from aseer.transport.keys import derive_keys

PIECE = 64  # tokens


def tokens_of(seed: int, num_pieces: int) -> bytes:
    return array("i", range(seed, seed + num_pieces * PIECE + 1)).tobytes()


class Host:
    def __init__(self, bind: str, name: str, megabytes: int, key: str) -> None:
        from lmcache.v1.multiprocess.custom_types import (
            RegisterEngineDrivenContextPayload,
        )
        from lmcache.v1.multiprocess.modules.engine_driven_transfer import (
            EngineDrivenTransferModule,
        )
        from lmcache.v1.multiprocess.modules.lookup import LookupModule

        self.said: queue.Queue[Any] = queue.Queue()
        self.spec = ServerSpec(
            shm_name=name,
            peers=PeerSpec(bind, derive_keys(key.encode())),
            args=[
                *("--host", "127.0.0.1", "--port", "0"),
                *("--l1-size-gb", str(megabytes / 1024), "--chunk-size", str(PIECE)),
                *("--eviction-policy", "LRU", "--shm-name", name),
                *("--eviction-trigger-watermark", "1.0"),
                *("--supported-transfer-mode", "engine_driven"),
                *("--no-l1-use-lazy", "--disable-observability"),
            ],
        )
        self.server = PoolServer(self.spec, self.said.put)
        serves = self.said.get()
        assert isinstance(serves, Serves)
        self.address = serves.address
        self._module = next(
            module
            for module in self.server._engine._modules
            if isinstance(module, EngineDrivenTransferModule)
        )
        self._lookup = next(
            module
            for module in self.server._engine._modules
            if isinstance(module, LookupModule)
        )
        self._payload = RegisterEngineDrivenContextPayload
        self._num_pulls = 0

    def register(self, hidden: int, instance_id: int = 1) -> None:
        """An engine, whose pieces have 16 layers x 2 x `hidden` x 64 x 4 bytes."""
        self._module.register_kv_cache_engine_driven_context(
            self._payload(
                instance_id=instance_id,
                model_name="m",
                world_size=1,
                block_size=32,
                num_layers=16,
                hidden_dim_size=hidden,
                dtype_str="float32",
                use_mla=False,
                num_physical_slots=64,
            )
        )

    def store(self, seed: int, num_pieces: int) -> int:
        """KV of some tokens, of which each piece has other bytes."""
        key = self._key(seed, num_pieces, worker_id=0)
        found = self._module.prepare_store(key, 1)
        self._module.commit_store(key, 1, b"")
        for i, memory in self._pieces(seed, num_pieces):
            pattern = bytes((seed + i + k) % 251 for k in range(251))
            whole = pattern * (len(memory) // 251 + 1)
            memory[:] = whole[: len(memory)]
        return len(found.context["slots"])

    def find(self, seed: int, num_pieces: int) -> int:
        """How many pieces an engine that asks for them finds and is given."""
        key = self._key(seed, num_pieces, worker_id=None)
        self._lookup.lookup(key, 1)
        found = None
        while found is None:
            found = self._lookup.query_prefetch_status(key.request_id)
            time.sleep(0.01)
        if found:
            key = self._key(seed, found, worker_id=0)
            given = self._module.prepare_retrieve(key, 1)
            assert given.success
            assert len(given.context["slots"]) == found
            self._module.commit_retrieve(key, 1)
        return found

    def _key(self, seed: int, num_pieces: int, worker_id: int | None) -> Any:
        from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey

        tokens = array("i")
        tokens.frombytes(tokens_of(seed, num_pieces))
        return IPCCacheServerKey(
            model_name="m",
            world_size=1,
            worker_id=worker_id,
            token_ids=tuple(tokens),
            start=0,
            end=num_pieces * PIECE,
            request_id=f"r{seed}",
            cache_salt="s-v1",
            num_kv_readers=1,
        )

    def _order(self, source: str, seed: int, num: int, timeout_s: float) -> Pull:
        self._num_pulls += 1
        tokens = tokens_of(seed, num)
        return Pull(self._num_pulls, 0, source, "m", 1, "s-v1", tokens, timeout_s)

    def _pieces(self, seed: int, num_pieces: int) -> list[tuple[int, memoryview]]:
        store = self.server._exchange._store
        keys = store.keys(self._order("", seed, num_pieces, 0.0))
        found = store.lend(keys)
        store.take_back([keys[i] for i in found])
        return sorted(found.items())

    def sums(self, seed: int, num_pieces: int) -> list[int]:
        """Checksums of the pieces that are here."""
        return [zlib.crc32(memory) for _, memory in self._pieces(seed, num_pieces)]

    def begin(self, source: str, seed: int, num: int, timeout_s: float) -> None:
        """Begin to pull."""
        order = self._order(source, seed, num, timeout_s)
        self.server.answer(Poll(pull=[order]))

    def wait(self) -> dict[str, Any]:
        """How the pull that began ended."""
        pulled = self.said.get(timeout=30)
        assert isinstance(pulled, Pulled)
        return {
            "tokens": pulled.num_tokens,
            "bytes": pulled.num_bytes,
            "seconds": pulled.seconds,
            "error": pulled.error,
        }

    def state(self) -> dict[str, int]:
        """What there is."""
        counts = self.server.counts()
        used, _ = self.server._managers[0].get_memory_usage()
        loans = [
            key
            for key in self.server._ledger._dram
            if self.server._managers[0].get_object_state(key).read_lock.is_locked()
        ]
        return {
            "stored": counts.stored,
            "pulled": counts.pulled,
            "resident": counts.resident,
            "used": used,
            "lent": len(loans),
        }


def say(answer: Any) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    bind, name, megabytes, key = sys.argv[1:]
    host = Host(bind, name, int(megabytes), key)
    say(host.address)
    for line in sys.stdin:
        method, *args = json.loads(line)
        say(getattr(host, method)(*args))
    _exit_now(host.spec)


if __name__ == "__main__":
    main()
