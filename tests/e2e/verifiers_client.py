"""verifiers' own client of a token server; run in an environment that has verifiers.

    python verifiers_client.py URL MODEL TOKENIZER

Two turns of some agent loops, whose first turns are siblings. Prints what each turn was
given and got, as JSON, one list of turns a loop.
"""

from __future__ import annotations

import asyncio
import json
import sys

from renderers import DefaultRendererConfig
from verifiers.v1.clients.client import resolve_client
from verifiers.v1.configs.client import TrainClientConfig
from verifiers.v1.dialects import ChatDialect
from verifiers.v1.types import SamplingConfig

LOOPS = 8


async def loop(client, model: str, number: int) -> list[dict]:
    messages = [{"role": "user", "content": "one and two is"}]
    turns = []
    for turn in range(2):
        # What the client adds where a turn extends the one before it.
        later = {"routed_experts_prompt_start": len(turns[0]["prompt"])} if turn else {}
        sampling = SamplingConfig(temperature=1.0, max_tokens=40, **later)
        response = await client.get_response(
            ChatDialect(),
            {"model": model, "messages": messages},
            sampling,
            session_id=f"loop-{number}",
        )
        tokens = response.tokens
        turns.append(
            {
                "prompt": tokens.prompt_ids,
                "ids": tokens.completion_ids,
                "logprobs": tokens.completion_logprobs,
                "finish": response.finish_reason,
            }
        )
        content = response.message.content or ""
        messages.append({"role": "assistant", "content": content})
        messages.append({"role": "user", "content": f"and {number}"})
    return turns


async def main(url: str, model: str, tokenizer: str) -> None:
    config = TrainClientConfig(
        base_url=f"{url}/v1",
        api_key_var="ASEER_API_KEY",
        renderer=DefaultRendererConfig(),
        renderer_model_name=tokenizer,
    )
    client = resolve_client(config)
    try:
        loops = await asyncio.gather(*[loop(client, model, i) for i in range(LOOPS)])
    finally:
        await client.close()
    sys.stdout.write(json.dumps(loops) + "\n")


asyncio.run(main(*sys.argv[1:]))
