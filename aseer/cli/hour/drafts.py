"""Steps 7 and 8: drafts change no token, and what they gain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aseer.cli.findings import Finding, ok, warn
from aseer.cli.hour.load import real_groups
from aseer.cli.hour.rolling import (
    RANKS_ROUNDING,
    ROUNDING,
    compare,
    greedy_groups,
    judge_equal,
    sample,
)
from aseer.cli.hour.steps import REPORT_IT
from aseer.groups import Group
from aseer.inputs.speculation import SpeculationConfig
from aseer.runtime.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aseer.cli.hour.rolling import Compared, Sampled
    from aseer.cli.hour.site import Site
    from aseer.report import SpeculationReport

_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
_DEFAULT: Mapping[str, str] = {}
#: Model runners by name; on a CPU vLLM has one.
GPU_RUNNERS: Mapping[str, Mapping[str, str]] = {
    "v2": {_RUNNER: "1"},
    "v1": {_RUNNER: "0"},
}
CPU_RUNNERS: Mapping[str, Mapping[str, str]] = {"v1": _DEFAULT}
# Drafts are made as often as they can be, whether they pay or not.
_EAGER = SpeculationConfig(method="dgds", budget="fixed")
# Siblings follow one another, so that the later ones have what to draft from.
_SIBLINGS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafted:
    """A rollout with drafts beside one without.

    Attributes:
        acceptance_length: tokens a step with a draft yields.
    """

    compared: Compared
    num_drafts: int
    num_accepted: int
    acceptance_length: float


async def drafted(site: Site) -> list[Drafted]:
    """Drafts of groups, on each model runner that the device has."""
    found = []
    for runner, env in runners_of(site).items():
        plain = await _rolled(site, f"drafts-{runner}-off", env=env)
        eager = await _rolled(
            site, f"drafts-{runner}-dgds", env=env, speculation=_EAGER
        )
        found.append(drafted_of(f"dgds on {runner.upper()}", plain, eager, ROUNDING))
    return found


async def drafted_by_ranks(site: Site) -> list[Drafted]:
    """Drafts of groups by an engine of two workers, beside one of one worker."""
    one = await _rolled(site, "drafts-tp-1", speculation=_EAGER)
    two = await _rolled(site, "drafts-tp-2", speculation=_EAGER, gpus_per_instance=2)
    return [drafted_of("dgds on two workers", one, two, RANKS_ROUNDING)]


async def ngrams(site: Site) -> list[Drafted]:
    """vLLM's own drafts from a request's text, on the runner that vLLM chooses.

    They are found where a text repeats itself, as these prompts do.
    """
    again = [[5, 6, 7] * 12, [8, 9] * 16, [30, 31, 32, 33] * 8]
    sampling = {"temperature": 0.0, "max_tokens": 96, "ignore_eos": True}
    groups = [Group(p, n=1, group_id=f"n{p[0]}", sampling=sampling) for p in again]
    plain = await _rolled(site, "ngram-off", groups)
    ngram = await _rolled(site, "ngram", groups, speculation="ngram")
    return [drafted_of("ngram", plain, ngram, ROUNDING)]


async def _rolled(
    site: Site, what: str, groups: Sequence[Group] | None = None, **settings: Any
) -> Sampled:
    async with Engine(site.tiny_config(what, **settings)) as engine:
        return await sample(engine, groups or greedy_groups(n=_SIBLINGS))


def runners_of(site: Site) -> Mapping[str, Mapping[str, str]]:
    """The model runners to try here, and the environment that chooses each."""
    return GPU_RUNNERS if site.on_gpu else CPU_RUNNERS


def drafted_of(what: str, plain: Sampled, eager: Sampled, rounding: float) -> Drafted:
    """The figures of a rollout with drafts."""
    drafts = eager.report.speculation
    return Drafted(
        compared=compare(what, plain, eager, rounding),
        num_drafts=drafts.num_drafts if drafts else 0,
        num_accepted=sum(drafts.accepted) if drafts else 0,
        acceptance_length=round(_acceptance(drafts), 2),
    )


def _acceptance(drafts: SpeculationReport | None) -> float:
    return drafts.acceptance_length if drafts else 1.0


def judge_drafted(found: Sequence[Drafted]) -> Finding:
    """Equal; an engine that does not draft only costs what drafts would gain."""
    compared = [each.compared for each in found]
    if wrong := judge_equal(compared, f"set speculation='off', and {REPORT_IT}"):
        return wrong
    detail = "; ".join(
        f"{each.compared.what}: equal, {each.num_drafts} drafts, "
        f"{each.acceptance_length:.2f} tokens a draft"
        for each in found
    )
    if idle := [each.compared.what for each in found if not each.num_drafts]:
        return warn(
            detail,
            f"nothing was drafted by {', '.join(idle)}; the engine's log says why",
        )
    return ok(detail)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """A rollout of so many requests at once, on one engine of the real model.

    Attributes:
        arm: model runner and method.
        tokens_a_step: of a request. drafting_share: of the engine's step time.
    """

    arm: str
    batch: int
    tokens_per_s: float
    tokens_a_step: float
    acceptance_length: float
    drafting_share: float


async def speeds(site: Site) -> list[Speed]:
    """With drafts and without, on each runner, by the number of requests."""
    found = []
    for runner, env in runners_of(site).items():
        for method in ("off", "dgds"):
            found += await _speeds(site, f"{runner}-{method}", method, env)
    return found


async def _speeds(
    site: Site, arm: str, method: str, env: Mapping[str, str]
) -> list[Speed]:
    sizes = site.sizes
    config = site.real_config(
        f"speeds-{arm}",
        num_instances=1,
        max_num_seqs=max(sizes.batches),
        speculation=method,
        env=env,
    )
    found = []
    async with Engine(config) as engine:
        # The first steps of a process are slow; these texts do not come again.
        await sample(engine, _batch(site, max(sizes.batches), "warm up: "))
        for batch in sizes.batches:
            rolled = await sample(engine, _batch(site, batch, f"{batch} at once: "))
            drafts = rolled.report.speculation
            accepted = sum(drafts.accepted) if drafts else 0
            num_tokens = rolled.report.num_output_tokens
            found.append(
                Speed(
                    arm=arm,
                    batch=batch,
                    tokens_per_s=round(rolled.report.throughput_tok_s, 1),
                    tokens_a_step=round(num_tokens / max(1, num_tokens - accepted), 3),
                    acceptance_length=round(_acceptance(drafts), 3),
                    drafting_share=round(drafts.drafting_share if drafts else 0.0, 4),
                )
            )
    return found


def _batch(site: Site, num_requests: int, prefix: str) -> list[Group]:
    """As many requests, in groups of at most eight siblings."""
    n = min(8, num_requests)
    num_groups = num_requests // n
    return real_groups(
        num_groups, site, n=n, max_tokens=site.sizes.draft_tokens, prefix=prefix
    )


def judge_speeds(found: Sequence[Speed]) -> Finding:
    """Never a failure: this says what drafts gain, and on which runner."""
    arms = dict.fromkeys(each.arm for each in found)
    batches = dict.fromkeys(each.batch for each in found)
    rows = []
    for arm in arms:
        own = {each.batch: each.tokens_per_s for each in found if each.arm == arm}
        rows.append(f"{arm} {' / '.join(f'{own[b]:,.0f}' for b in batches)}")
    at_once = "/".join(map(str, batches))
    return ok(f"tokens/s with {at_once} requests at once: {'; '.join(rows)}")
