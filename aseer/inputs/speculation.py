"""`EngineConfig.speculation`: how engines draft tokens."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Annotated, Literal, get_args

from aseer.inputs.fields import number, one_of, refusal, seconds, whole
from aseer.inputs.settings import check_fields, documented

SpeculationMethod = Literal["off", "dgds", "suffix", "ngram"]
BudgetPolicy = Literal["adaptive", "fixed", "paper"]


def _method(_: str, given: object) -> str:
    return one_of("speculation", given, get_args(SpeculationMethod))


@documented
@dataclass(frozen=True, kw_only=True)
class SpeculationConfig:
    """How engines draft tokens that the model then verifies, several a step.

    Whatever is drafted, the distribution of the samples stays the same: each engine
    tests its sampler for drafts when it starts, and an engine whose test fails says so
    and does not speculate. On vLLM's model runner V1 requests with a seed are not
    repeatable with speculation: the random numbers that a step takes depend on what was
    drafted. On GPUs "dgds" is on V2 where vLLM can (docs/drafts-on-v2.md); the log says
    where it is not, and what that costs.
    """

    method: Annotated[
        SpeculationMethod,
        _method,
        """"dgds" drafts from what the whole group has generated so far, on every
        engine; "suffix" and "ngram" are vLLM's own, with drafts of up to
        `max_draft_tokens`; "off" drafts nothing. The other fields are for "dgds".""",
    ] = "dgds"
    max_draft_tokens: Annotated[
        int,
        whole(1),
        "the most tokens drafted for a request in a step.",
    ] = 8
    tail_draft_tokens: Annotated[
        int,
        whole(1),
        "the same when few requests are left, since their steps have room for more.",
    ] = 16
    budget: Annotated[
        BudgetPolicy,
        """how many tokens a step drafts. "adaptive" spends on the likeliest tokens
        while the gain pays for the time a longer step takes, as measured; "fixed"
        drafts all it can; "paper" is the rule of Seer's Algorithm 1.""",
    ] = "adaptive"
    probe_weight: Annotated[
        float,
        number(1, inf, "a number >= 1"),
        "how much more a token of a group's first request is worth.",
    ] = 2.0
    after_weight_update: Annotated[
        Literal["drop", "keep"],
        """"keep" lets responses of older weights serve as drafts for later groups
        with the same prompt; "drop" forgets them.""",
    ] = "drop"
    group_ttl_s: Annotated[
        float,
        seconds,
        """seconds after which the drafts of a group are forgotten that no engine
        has asked for.""",
    ] = 600.0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.tail_draft_tokens < self.max_draft_tokens:
            allowed = f"an int >= {self.max_draft_tokens}"
            raise refusal("tail_draft_tokens", self.tail_draft_tokens, allowed)
