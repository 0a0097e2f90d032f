"""What a checker must refuse: every line that is marked, and no other."""

from __future__ import annotations

import aseer

aseer.EngineConfig(model="m", num_instance=2)  # wrong: no such field
aseer.EngineConfig(model="m", policy="seer")  # wrong: no such policy
aseer.EngineConfig(model="m", chunk_size="256")  # wrong: a text
aseer.EngineConfig(model="m", speculation="telepathy")  # wrong: no such method
aseer.EngineConfig(model="m", log_dir=3)  # wrong: no path
aseer.EngineConfig(model="m").log_dir = "logs"  # wrong: settings do not change
aseer.EngineConfig()  # wrong: no model
aseer.Group(3.5)  # wrong: no prompt


async def use(engine: aseer.Engine) -> None:
    await engine.rollout(["a prompt"])  # wrong: neither groups nor to be awaited
    engine.update_weights("dir").version  # wrong: not awaited
    for response in engine.rollout([aseer.Group("?")]):  # wrong: a plain loop
        response.token_ids
    response = await engine.open_rollout().submit("?")
    response.tokens  # wrong: no such attribute
