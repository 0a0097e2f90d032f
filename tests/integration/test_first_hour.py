"""Steps of the first hour on simulated engines: real processes that move and die."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from aseer.cli.hour import load
from aseer.cli.hour.exact import exactness, exactness_of, judge_exactness
from aseer.cli.hour.site import Site
from aseer.cli.hour.sleeping import judge_slept, slept
from tests.integration.sim_weights import SHAPES
from tests.integration.sims import config_of, groups_of
from tests.lazy import Lazy

if TYPE_CHECKING:
    from pathlib import Path

    import aseer

torch = Lazy("torch")


class SimSite(Site):
    """A machine whose engines are simulated."""

    def tiny(self, seed: int = 0, *, wide: bool = False) -> Path:
        from safetensors.torch import save_file

        folder = self.scratch / str(seed)
        folder.mkdir(exist_ok=True)
        tensors = {name: torch.full(s, float(seed)) for name, s in SHAPES.items()}
        save_file(tensors, folder / "model.safetensors")
        return folder

    def tiny_config(self, what: str, **settings: Any) -> aseer.EngineConfig:
        taken = {k: v for k, v in settings.items() if k in ("num_instances",)}
        sim = {"weights": SHAPES, "step_s": 0.004}
        return config_of(chunk_size=32, engine_args=sim, **taken)

    def real_config(self, what: str, **settings: Any) -> aseer.EngineConfig:
        return config_of(chunk_size=16, engine_args={"step_s": 0.01})


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return SimSite(scratch=tmp_path, logs=tmp_path, gpus=(), model=None, checkout=None)


async def test_chunks_of_one_engine_are_found_equal(site: Site) -> None:
    found = await exactness(site, 1)
    assert len(found) == 1, "nothing differs, so that nothing needs a cause"
    finding = judge_exactness(found)
    assert finding.status == "ok", finding
    assert finding.detail.startswith("equal on sim: chunks;")


async def test_what_differs_is_found_and_everything_was_tried(site: Site) -> None:
    """An update changes a simulated engine, whose first weights are no checkpoint's."""
    found = await exactness_of(site, 2, "as ever", {})
    chunks, moves, killed = found.compared
    assert not chunks.difference
    assert moves.num_migrations > 10
    assert moves.difference.startswith("the tokens of g")
    assert killed.num_retries > 0
    assert killed.difference.startswith("the tokens of g")
    finding = judge_exactness([found, found])
    assert finding.status == "fail"
    assert finding.detail.startswith("chunks that move: the tokens of g")


async def test_engines_that_wake_with_other_weights_are_found(site: Site) -> None:
    found = await slept(site)
    assert found.after_level_1 == ""
    finding = judge_slept(found)
    assert finding.status == "fail"
    assert finding.detail.startswith("after sleep, waking by tags: the tokens of g")


async def test_the_death_of_an_engine_costs_no_response(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def groups_with_ids(num: int, site: Site) -> list[aseer.Group]:
        return groups_of(num, max_tokens=site.sizes.max_tokens, ignore_eos=True)

    monkeypatch.setattr(load, "real_groups", groups_with_ids)  # there is no tokenizer
    found = await load.loads(site)
    assert [each.what for each in found][::2] == ["default limits", "an engine killed"]
    assert [each.num_responses for each in found] == [24, 24, 8]
    assert found[-1].num_retries > 0
    assert all(each.controller_cpu > 0 for each in found)
    finding = load.judge_loads(found)
    assert finding.status == "ok", finding
