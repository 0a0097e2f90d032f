"""What is wrong with LMCache, shown by its own code with aseer's patches and without.
Each run is a process of its own, which the patches change.

    python -m tests.integration.lmcache_faults (with | without) FOLDER NAME

prints for each patch whether its fault is there.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from aseer.kv import patches
from aseer.kv.messages import Poll, Prefetch, ServerSpec
from aseer.kv.settings import disk_adapter

TOKENS = list(range(64 * 3))


class Evil:
    """Makes a file where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self._mark,)


class Pool:
    """A pool's server in this process, and what an engine would ask of it."""

    def __init__(self, folder: Path, name: str) -> None:
        from lmcache.v1.multiprocess.custom_types import (
            IPCCacheServerKey,
            RegisterEngineDrivenContextPayload,
        )
        from lmcache.v1.multiprocess.modules.engine_driven_transfer import (
            EngineDrivenTransferModule,
        )

        from aseer.kv.server import PoolServer

        args = (
            "--host 127.0.0.1 --port 0 --l1-size-gb 0.02 --chunk-size 64 "
            "--eviction-policy LRU --supported-transfer-mode engine_driven "
            f"--shm-name {name} --no-l1-use-lazy --disable-observability"
        ).split()
        args += ["--l2-adapter", disk_adapter(folder, 64 << 20)]
        self.spec = ServerSpec(shm_name=name, args=args)
        self.server = PoolServer(self.spec)
        modules = self.server._engine._modules
        self.module = next(
            m for m in modules if isinstance(m, EngineDrivenTransferModule)
        )
        self._make_key = IPCCacheServerKey
        self._payload = RegisterEngineDrivenContextPayload(
            instance_id=1,
            model_name="m",
            world_size=1,
            block_size=32,
            num_layers=2,
            hidden_dim_size=16,
            dtype_str="float32",
            use_mla=False,
            num_physical_slots=64,
        )
        self.register()

    def key(self, tokens: list[int]) -> Any:
        """Under which an engine stores these tokens' KV."""
        return self._make_key(
            model_name="m",
            world_size=1,
            worker_id=0,
            token_ids=tuple(tokens),
            start=0,
            end=len(tokens),
            request_id=f"r{tokens[0]}",
            cache_salt="s-v1",
            num_kv_readers=1,
        )

    def register(self) -> None:
        """As engine 1."""
        self.module.register_kv_cache_engine_driven_context(self._payload)


def discard_unfilled_memory(pool: Pool) -> bool:
    """A worker that dies in a store has published memory that it never filled."""
    pool.module.prepare_store(pool.key(TOKENS), 1)
    pool.module.unregister_kv_cache(1)
    pool.register()
    return pool.server.counts().stored > 0


def check_what_the_disk_gives(pool: Pool, folder: Path) -> bool:
    """Bytes that were changed on the disk are in DRAM again, as if they were KV."""
    others = TOKENS[::-1]
    pool.module.prepare_store(pool.key(others), 1)
    pool.module.commit_store(pool.key(others), 1, b"")
    wanted = Prefetch("m", 1, "s-v1", array("i", others).tobytes())
    keys = set(pool.server._keys_of(wanted))

    def num_held() -> tuple[int, int]:
        in_dram, on_disk = pool.server._ledger.held(keys)
        return len(in_dram), len(on_disk)

    eventually(lambda: num_held()[1] == len(keys))
    for file in (path for path in folder.rglob("*") if path.is_file()):
        with file.open("r+b") as written:
            written.write(b"\x55" * 64)

    def is_cleared() -> bool:
        """What is just being written to the disk stays at first."""
        pool.server.answer(Poll(clear_dram=True))
        return num_held()[0] == 0

    eventually(is_cleared)
    pool.server.answer(Poll(prefetch=[wanted]))
    loads = pool.server._prefetches._loads
    eventually(lambda: not pool.server.answer(Poll()) or not loads)
    return num_held()[0] > 0


def refuse_pickles_in_server(mark: Path) -> bool:
    """A pickle that anybody sent has run what it names."""
    from lmcache.v1.multiprocess.modules.server_transfer import PickleTransferStrategy

    storage = SimpleNamespace(
        reserve_write=lambda *_: {}, finish_write=lambda *_, **__: None
    )
    strategy = PickleTransferStrategy(storage)
    strategy.commit_store(
        key=None,
        instance_id=1,
        cpu_data=pickle.dumps(Evil(mark)),
        context=SimpleNamespace(layout_desc=None),
        resolve_obj_keys=lambda _: [],
    )
    return mark.exists()


def refuse_pickles_in_engine(mark: Path) -> bool:
    """A pickle from whoever answers has run what it names."""
    from lmcache.v1.multiprocess.transfer_context.pickle import (
        EngineDrivenContextPickle,
    )

    answer = SimpleNamespace(success=True, data=pickle.dumps(Evil(mark)))
    future = SimpleNamespace(result=lambda timeout: answer)
    server = SimpleNamespace(prepare_retrieve=lambda *_: future)
    EngineDrivenContextPickle(None, server, 1.0).prepare_retrieve(None, 1)
    return mark.exists()


def eventually(is_so: Any) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def main(how: str, folder: Path, shm_name: str) -> None:
    if how == "without":
        patches.PATCHES = ()
    patches.apply("engine")
    (folder / "disk").mkdir()
    pool = Pool(folder / "disk", shm_name)  # which applies those of a server
    found = {
        "discard_unfilled_memory": discard_unfilled_memory(pool),
        "check_what_the_disk_gives": check_what_the_disk_gives(pool, folder / "disk"),
        "refuse_pickles_in_server": refuse_pickles_in_server(folder / "server"),
        "refuse_pickles_in_engine": refuse_pickles_in_engine(folder / "engine"),
    }
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    Path(f"/dev/shm/lmcache_l1_pool_{shm_name}").unlink(missing_ok=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
