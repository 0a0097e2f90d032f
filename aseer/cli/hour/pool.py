"""Step 6: requests that move find their KV in the pool, and do without if it dies."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from aseer.cli.findings import Finding, fail, ok, warn
from aseer.cli.hour.exact import UNDIVIDED
from aseer.cli.hour.rolling import (
    Compared,
    compare,
    greedy_groups,
    judge_equal,
    moving,
    sample,
    until,
)
from aseer.cli.hour.steps import REPORT_IT
from aseer.errors import EngineError
from aseer.inputs.kv_pool import KvPoolConfig
from aseer.runtime.engine import Engine

if TYPE_CHECKING:
    from aseer.cli.hour.rolling import Sampled
    from aseer.cli.hour.site import Site
    from aseer.kv.pool import KvPool
    from aseer.report import KvReport

_CHUNK_TOKENS = 128
_MAX_TOKENS = 400
# A server that is stopped is noticed after twice this, and answers are waited for once.
_TIMEOUT_S = 2.0
_RESTART_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooled:
    """A rollout whose requests move at every chunk, over the pool.

    Attributes:
        num_found: moves that computed one token. num_recomputed: that computed more.
        tokens_a_move: computed at a move, on average; None = nothing moved.
        load_p50_s: from an engine's question to the last byte.
        num_restarts: of the pool's servers.
        lost_engines: engines that did not survive.
        wall_s: of the rollout.
    """

    compared: Compared
    num_found: int
    num_recomputed: int
    tokens_a_move: float | None
    num_loads: int
    load_p50_s: float
    num_restarts: int
    lost_engines: int
    wall_s: float


async def pooled(site: Site) -> list[Pooled]:
    """Undisturbed, with the server killed, and with it stopped but not dead."""
    config = site.tiny_config(
        "pool",
        num_instances=2,
        chunk_size=_CHUNK_TOKENS,
        max_num_seqs=8,
        kv_pool=KvPoolConfig(
            mode="lmcache",
            chunk_tokens=_CHUNK_TOKENS,
            dram_bytes=256 << 20,
            timeout_s=_TIMEOUT_S,
        ),
    )
    async with Engine(config) as engine:
        whole = await sample(engine, greedy_groups(_MAX_TOKENS), **UNDIVIDED)
        return [
            await _pooled(site, engine, "moves", whole),
            await _pooled(site, engine, "server killed", whole, signal.SIGKILL),
            await _pooled(site, engine, "server stopped", whole, signal.SIGSTOP),
        ]


async def _pooled(
    site: Site,
    engine: Engine,
    what: str,
    whole: Sampled,
    kind: signal.Signals | None = None,
) -> Pooled:
    """One rollout.

    Args:
        kind: of signal that the pool's server gets midway; None = none.
    """
    pool = engine._host.kv_pool
    if pool is None:
        raise EngineError("the engine has no KV pool, though it was told to have one")
    await until(lambda: bool(pool.pids), _RESTART_S)
    # Weights of another version: what was computed so far is not found again.
    await engine.update_weights(site.tiny())
    pids = {info.pid for info in engine.instances}
    restarts = pool.num_restarts
    attack = None if kind is None else partial(_send, pool, kind)
    with moving():
        moved = await sample(engine, greedy_groups(_MAX_TOKENS), midway=attack)
    if kind is not None:
        await until(lambda: pool.num_restarts > restarts, _RESTART_S)
    assert moved.report.kv is not None  # there is a pool
    return pooled_of(
        compare(what, whole, moved),
        moved.report.kv,
        num_restarts=pool.num_restarts - restarts,
        lost_engines=len(pids - {info.pid for info in engine.instances}),
        wall_s=moved.report.wall_s,
    )


def pooled_of(
    compared: Compared,
    kv: KvReport,
    *,
    num_restarts: int,
    lost_engines: int,
    wall_s: float,
) -> Pooled:
    """The figures of one rollout."""
    moves = kv.num_moves_found + kv.num_moves_recomputed
    # A move computes one token at least, which is not counted as computed again.
    a_move = 1 + compared.num_recomputed_tokens / moves if moves else None
    return Pooled(
        compared=compared,
        num_found=kv.num_moves_found,
        num_recomputed=kv.num_moves_recomputed,
        tokens_a_move=None if a_move is None else round(a_move, 1),
        num_loads=kv.num_loads,
        load_p50_s=kv.load_p50_s,
        num_restarts=num_restarts,
        lost_engines=lost_engines,
        wall_s=round(wall_s, 2),
    )


def judge_pooled(found: list[Pooled]) -> Finding:
    """Nothing differs and no engine dies; a move should compute one token."""
    if wrong := judge_equal([each.compared for each in found], "set kv_pool='off'"):
        return wrong
    calm, *disturbed = found
    for each in found:
        if each.lost_engines:
            return fail(
                f"{each.compared.what}: {each.lost_engines} engines died", REPORT_IT
            )
    for each in disturbed:
        if not each.num_restarts:
            what = f"{each.compared.what}: it did not come back in {_RESTART_S:.0f} s"
            return fail(what, REPORT_IT)
    if calm.tokens_a_move is None:
        return fail("no request moved, so that nothing was shown", REPORT_IT)
    detail = (
        f"a move computes {calm.tokens_a_move:g} tokens ({calm.num_found} moves found "
        f"their KV, {calm.num_recomputed} did not); nothing differs, also with the "
        "server killed and with it stopped"
    )
    if calm.num_recomputed:
        return warn(
            detail,
            f"it should be 1; {_CHUNK_TOKENS + 1} would be that the last tokens of a "
            f"chunk are not stored: {REPORT_IT}",
        )
    return ok(detail)


def _send(pool: KvPool, kind: signal.Signals) -> None:
    for pid in pool.pids:
        os.kill(pid, kind)
