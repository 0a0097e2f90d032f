"""`EngineConfig.speculation`: how engines draft tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from aseer.inputs.fields import (
    check_int,
    check_seconds,
    one_of,
    refusal,
    set_field,
    settings_of,
)
from aseer.inputs.plain import as_float

if TYPE_CHECKING:
    from collections.abc import Mapping

SpeculationMethod = Literal["off", "dgds", "suffix", "ngram"]
BudgetPolicy = Literal["adaptive", "fixed", "paper"]


@dataclass(frozen=True, kw_only=True)
class SpeculationConfig:
    """How engines draft tokens that the model then verifies, several a step.

    Whatever is drafted, the distribution of the samples stays the same: each engine
    tests its sampler for drafts when it starts, and an engine whose test fails says so
    and does not speculate. On vLLM's model runner V1 requests with a seed are not
    repeatable with speculation: the random numbers that a step takes depend on what was
    drafted. On GPUs "dgds" is on V2 where vLLM can (docs/drafts-on-v2.md); the log says
    where it is not, and what that costs.

    Attributes:
        method: "dgds" drafts from what the whole group has generated so far, on every
            engine; "suffix" and "ngram" are vLLM's own, with drafts of up to
            `max_draft_tokens`; "off" drafts nothing. The other fields are for "dgds".
        max_draft_tokens: the most tokens drafted for a request in a step.
        tail_draft_tokens: the same when few requests are left, since their steps have
            room for more.
        budget: how many tokens a step drafts. "adaptive" spends on the likeliest tokens
            while the gain pays for the time a longer step takes, as measured; "fixed"
            drafts all it can; "paper" is the rule of Seer's Algorithm 1.
        probe_weight: how much more a token of a group's first request is worth.
        after_weight_update: "keep" lets responses of older weights serve as drafts for
            later groups with the same prompt; "drop" forgets them.
        group_ttl_s: seconds after which the drafts of a group are forgotten that no
            engine has asked for.
    """

    method: SpeculationMethod = "dgds"
    max_draft_tokens: int = 8
    tail_draft_tokens: int = 16
    budget: BudgetPolicy = "adaptive"
    probe_weight: float = 2.0
    after_weight_update: Literal["drop", "keep"] = "drop"
    group_ttl_s: float = 600.0

    def __post_init__(self) -> None:
        methods = get_args(SpeculationMethod)
        set_field(self, "method", one_of("speculation", self.method, methods))
        set_field(self, "budget", one_of("budget", self.budget, get_args(BudgetPolicy)))
        after = one_of(
            "after_weight_update", self.after_weight_update, ("drop", "keep")
        )
        set_field(self, "after_weight_update", after)
        check_int(self, "max_draft_tokens", 1)
        check_int(self, "tail_draft_tokens", self.max_draft_tokens)
        check_seconds(self, "group_ttl_s")
        weight = as_float(self.probe_weight)
        if weight is None or weight < 1:
            raise refusal("probe_weight", self.probe_weight, "a number >= 1")
        set_field(self, "probe_weight", weight)


def check_speculation(
    speculation: SpeculationConfig | SpeculationMethod | Mapping[str, Any],
) -> SpeculationConfig:
    """The settings that a method's name, or a mapping of their fields, stands for.

    Raises:
        ConfigError: there is no such method.
    """
    return settings_of(SpeculationConfig, "speculation", speculation, short="method")
