"""A journal through the whole engine, with simulated instances: what is finished is not
run again, what is not goes on, and the set is the one of an undisturbed run (I11).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import aseer
from aseer.runtime.calls import replay
from aseer.runtime.identity import Identifier
from tests.integration.sims import config_of, content, groups_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(aseer.__file__).parents[1]
LONG = {"ignore_eos": True, "max_tokens": 300}
SHAPES = {"w": [2]}
STARTS_S = 60.0


def journaled(tmp_path: Path, **settings: Any) -> aseer.EngineConfig:
    return config_of(journal_dir=tmp_path / "journals", **settings)


async def test_what_is_finished_is_not_run_again(tmp_path):
    async with aseer.Engine(journaled(tmp_path)) as engine:
        first = engine.rollout(groups_of(4), journal="step-1")
        before = [r async for r in first]
        assert not any(r.replayed for r in before)
        again = engine.rollout(groups_of(4), journal="step-1")
        after = [r async for r in again]
        assert content(after) == content(before)
        assert all(r.replayed for r in after)
        assert [r.metadata for r in after] == [None] * 16
        report = again.report
        assert (report.num_replayed, report.num_chunks) == (16, 0)
        assert report.num_output_tokens == 0
        assert report.journal_error is None
        other = [r async for r in engine.rollout(groups_of(4), journal="step-2")]
        assert not any(r.replayed for r in other)


async def test_a_rollout_that_was_left_goes_on_where_it_was(tmp_path):
    config = journaled(tmp_path, max_num_seqs=4)
    async with aseer.Engine(config) as engine:
        wanted = content([r async for r in engine.rollout(groups_of(4, **LONG))])
        seen = []
        async with engine.rollout(groups_of(4, **LONG), journal="s") as rollout:
            async for response in rollout:
                seen.append(response)
                if len(seen) == 5:
                    break
        rest = engine.rollout(groups_of(4, **LONG), journal="s")
        responses = [r async for r in rest]
        found = content(responses)
        assert found == wanted
        assert content(seen).items() <= found.items()
        report = rest.report
        assert report.num_replayed >= 5
        assert report.num_resumed_tokens > 0
        num_all = sum(len(r.token_ids) for r in responses)
        replayed = sum(len(r.token_ids) for r in responses if r.replayed)
        done = report.num_output_tokens + report.num_resumed_tokens + replayed
        assert done == num_all


async def test_decisions_of_a_rollout_that_goes_on_can_be_made_again(tmp_path):
    config = journaled(tmp_path, log_dir=tmp_path, logs_calls=True, max_num_seqs=4)
    async with aseer.Engine(config) as engine:
        async with engine.rollout(groups_of(4, **LONG), journal="s") as rollout:
            async for _ in rollout:
                break
        rollout = engine.rollout(groups_of(4, **LONG), journal="s")
        assert len([r async for r in rollout]) == 16
        assert rollout.report.num_replayed + rollout.report.num_resumed_tokens > 1
    logs = sorted(tmp_path.glob("*.calls"))
    assert len(logs) == 2
    for path in logs:
        with path.open("rb") as log:
            assert replay(log).difference == ""


async def test_groups_may_come_in_another_order_or_from_an_iterator(tmp_path):
    groups = groups_of(6)
    async with aseer.Engine(journaled(tmp_path)) as engine:
        before = [r async for r in engine.rollout(groups, journal="s")]
        for again in (groups[::-1], iter(groups[3:] + groups[:3])):
            rollout = engine.rollout(again, journal="s")
            assert content([r async for r in rollout]) == content(before)
            assert rollout.report.num_replayed == 24


async def test_groups_without_ids_are_known_by_their_content(tmp_path):
    groups = [replace(group, group_id=None) for group in groups_of(3)]
    groups += groups[:1]  # twice the same
    async with aseer.Engine(journaled(tmp_path)) as engine:
        before = [r async for r in engine.rollout(groups, journal="s")]
        rollout = engine.rollout(groups[::-1], journal="s")
        after = [r async for r in rollout]
        assert rollout.report.num_replayed == len(before) == 16
        found = sorted((r.prompt_token_ids, r.index, r.token_ids) for r in after)
        assert found == sorted(
            (r.prompt_token_ids, r.index, r.token_ids) for r in before
        )
        assert {r.group_id: r.prompt_token_ids[-1] for r in after}["group-0"] == 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda gs: gs[:-1], "it has group 'g2', which this rollout has not"),
        (lambda gs: gs + groups_of(4)[3:], "other groups than it, such as group 'g3'"),
        (lambda gs: [replace(gs[0], n=2), *gs[1:]], "'g0' has n=2 here, and n=4 there"),
        (lambda gs: [replace(gs[0], prompt=[1]), *gs[1:]], "'g0' has another prompt"),
        (lambda gs: groups_of(3, max_tokens=99), "other sampling settings here"),
        (lambda gs: groups_of(3, temperature=0.5), "other sampling settings here"),
        (lambda gs: groups_of(3, seed=3), "other sampling settings here"),
    ],
)
async def test_another_rollout_under_the_same_name_is_refused(tmp_path, change, words):
    async with aseer.Engine(journaled(tmp_path)) as engine:
        before = [r async for r in engine.rollout(groups_of(3), journal="s")]
        with pytest.raises(
            aseer.ConfigError, match=r"s\.journal was written by"
        ) as told:
            async with engine.rollout(change(groups_of(3)), journal="s"):
                pass
        assert words in str(told.value)
        assert "give another name, or remove the file" in str(told.value)
        after = [r async for r in engine.rollout(groups_of(3), journal="s")]
        assert content(after) == content(before), "the file is as it was"


async def test_a_group_of_an_iterator_that_does_not_fit_is_refused_at_its_end(tmp_path):
    async with aseer.Engine(journaled(tmp_path)) as engine:
        before = [r async for r in engine.rollout(groups_of(3), journal="s")]
        groups = [*groups_of(2), replace(groups_of(3)[2], prompt=[1])]
        seen = []
        with pytest.raises(aseer.ConfigError, match="'g2' has another prompt"):
            async for response in engine.rollout(iter(groups), journal="s"):
                seen.append(response)
        assert content(seen).items() < content(before).items()
        assert len(seen) == 8


async def test_another_model_is_refused(tmp_path):
    async with aseer.Engine(journaled(tmp_path)) as engine:
        assert [r async for r in engine.rollout(groups_of(1), journal="s")]
    async with aseer.Engine(
        journaled(tmp_path, engine_args={"vocab_size": 500})
    ) as engine:
        with pytest.raises(aseer.ConfigError, match="vocab_size=512, and this engine"):
            async with engine.rollout(groups_of(1), journal="s"):
                pass
        assert [r async for r in engine.rollout(groups_of(1))], "it serves on"


async def test_what_other_weights_generated_is_generated_anew(tmp_path, caplog):
    torch = pytest.importorskip("torch")
    config = journaled(tmp_path, engine_args={"weights": SHAPES})
    groups = groups_of(2, **LONG)
    async with aseer.Engine(config) as engine:
        await engine.update_weights({"w": torch.ones(2)}, version=5)
        before = [r async for r in engine.rollout(groups, journal="s")]
    async with aseer.Engine(config) as engine:
        await engine.update_weights({"w": torch.zeros(2)}, version=5)
        rollout = engine.rollout(groups, journal="s")
        other = [r async for r in rollout]
        assert rollout.report.num_replayed == 0
        assert content(other) != content(before)
        assert "generated with other weights (version 5" in caplog.text
    async with aseer.Engine(config) as engine:
        await engine.update_weights({"w": torch.ones(2)}, version=5)
        rollout = engine.rollout(groups, journal="s")
        assert content([r async for r in rollout]) == content(before)
        assert rollout.report.num_replayed == 8


async def test_a_journal_that_is_in_use_is_refused(tmp_path):
    async with (
        aseer.Engine(journaled(tmp_path)) as one,
        aseer.Engine(journaled(tmp_path)) as other,
        one.rollout(groups_of(1, **LONG), journal="s"),
    ):
        with pytest.raises(aseer.ConfigError, match="in use by another rollout"):
            async with other.rollout(groups_of(1, **LONG), journal="s"):
                pass


async def test_a_journal_needs_a_directory_and_a_name(engine, tmp_path):
    with pytest.raises(aseer.ConfigError, match=r"EngineConfig\(journal_dir=\.\.\.\)"):
        engine.rollout(groups_of(1), journal="s")
    for name in ("", "a/b", "..", 5, "x" * 300):
        with pytest.raises(aseer.ConfigError, match=r"journal=.*such as 'step-17'"):
            engine.rollout(groups_of(1), journal=name)


async def test_a_place_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "journals").write_text("no directory")
    async with aseer.Engine(journaled(tmp_path)) as engine:
        with pytest.raises(
            aseer.ConfigError, match=r"s\.journal cannot be used: .*Err"
        ):
            async with engine.rollout(groups_of(1), journal="s"):
                pass
        (tmp_path / "journals").unlink()
        (tmp_path / "journals/s.journal").mkdir(parents=True)
        with pytest.raises(aseer.ConfigError, match="Is a directory"):
            async with engine.rollout(groups_of(1), journal="s"):
                pass
        assert [r async for r in engine.rollout(groups_of(1), journal="t")]


async def test_a_torn_end_is_cut_off_and_damage_is_set_aside(tmp_path, caplog):
    path = tmp_path / "journals" / "s.journal"
    async with aseer.Engine(journaled(tmp_path)) as engine:
        before = [r async for r in engine.rollout(groups_of(3), journal="s")]
        with path.open("ab") as file:
            file.write(path.read_bytes()[:50])  # a frame's beginning
        rollout = engine.rollout(groups_of(3), journal="s")
        assert content([r async for r in rollout]) == content(before)
        assert rollout.report.num_replayed == 12
        assert "damaged" not in caplog.text
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes(data)
        rollout = engine.rollout(groups_of(3), journal="s")
        assert content([r async for r in rollout]) == content(before)
        assert rollout.report.num_replayed < 12
        assert f"{path} is damaged after" in caplog.text
        assert (tmp_path / "journals/s.damaged-1").read_bytes() == data
        rollout = engine.rollout(groups_of(3), journal="s")
        assert content([r async for r in rollout]) == content(before)
        assert rollout.report.num_replayed == 12


def test_plain_code_and_one_call_take_a_journal(tmp_path):
    with aseer.Engine(journaled(tmp_path)) as engine:
        before = list(engine.rollout_sync(groups_of(2), journal="s"))
        rollout = engine.rollout_sync(groups_of(2), journal="s")
        assert content(list(rollout)) == content(before)
        assert rollout.report.num_replayed == 8


async def test_one_call_takes_a_journal(tmp_path):
    async with aseer.Engine(journaled(tmp_path)):
        before = [r async for r in aseer.rollout(groups_of(1), journal="s")]
        after = [r async for r in aseer.rollout(groups_of(1), journal="s")]
        assert [r.replayed for r in before + after] == [False] * 4 + [True] * 4


async def test_calls_wait_while_a_journal_is_read_and_its_user_may_leave(
    tmp_path, monkeypatch
):
    may_read = threading.Event()
    identify = Identifier.identify

    def slow(*args: Any) -> Any:
        assert may_read.wait(20)
        return identify(*args)

    monkeypatch.setattr(Identifier, "identify", slow)
    async with aseer.Engine(journaled(tmp_path)) as engine:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                async with engine.rollout(groups_of(2, **LONG), journal="s"):
                    pass
        assert len([r async for r in engine.rollout(groups_of(1))]) == 4
        rollout = engine.rollout(groups_of(2, **LONG), journal="t")
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(anext(aiter(rollout)))
            await asyncio.sleep(0.1)
            aborting = tasks.create_task(engine.abort_rollout())
            await asyncio.sleep(0.3)
            assert not reading.done()
            assert not aborting.done()
            may_read.set()
        assert reading.result().finish_reason == "aborted"
        await rollout.aclose()
        assert [r async for r in engine.rollout(groups_of(2), journal="s")]


# -- a disk that fails -----------------------------------------------------------------


async def test_a_full_disk_ends_the_journal_and_not_the_rollout(
    tmp_path, monkeypatch, caplog
):
    write = os.write
    num_left = 3

    def fails(fd: int, data: Any) -> int:
        nonlocal num_left
        if Path(f"/proc/self/fd/{fd}").readlink().suffix != ".journal":
            return write(fd, data)
        num_left -= 1
        if num_left < 0:
            raise OSError(28, "No space left on device")
        return write(fd, data[: len(data) // 2])  # less than was asked for

    monkeypatch.setattr("aseer.journal.file.os.write", fails)
    async with aseer.Engine(journaled(tmp_path)) as engine:
        rollout = engine.rollout(groups_of(4, **LONG), journal="s")
        responses = [r async for r in rollout]
        assert len(responses) == 16
        assert "No space left" in (rollout.report.journal_error or "")
        assert caplog.text.count("goes on without it") == 1
        monkeypatch.undo()
        rollout = engine.rollout(groups_of(4, **LONG), journal="s")
        assert content([r async for r in rollout]) == content(responses)
        assert rollout.report.journal_error is None


async def test_a_disk_that_does_not_answer_ends_the_journal(
    tmp_path, monkeypatch, caplog
):
    write = os.write
    until = time.monotonic() + 4.0

    def waits(fd: int, data: Any) -> int:
        if Path(f"/proc/self/fd/{fd}").readlink().suffix == ".journal":
            time.sleep(max(0.0, until - time.monotonic()))
        return write(fd, data)

    monkeypatch.setattr("aseer.journal.file.os.write", waits)
    monkeypatch.setattr("aseer.runtime.journal.PATIENCE_S", 1.0)
    async with aseer.Engine(journaled(tmp_path)) as engine:
        rollout = engine.rollout(groups_of(2), journal="s")
        responses = [r async for r in rollout]
        assert time.monotonic() < until
        assert len(responses) == 8
        assert "has not answered for 1 s" in (rollout.report.journal_error or "")
        assert caplog.text.count("goes on without it") == 1


# -- a trainer that is killed ----------------------------------------------------------

TRAINER = """
import json, os, sys
import aseer
from tests.integration.sims import config_of, groups_of

groups, settings, seen, out = json.loads(sys.argv[1])
config = config_of(**settings)
with aseer.Engine(config) as engine, open(seen, "a") as file:
    print("open", flush=True)
    rollout = engine.rollout_sync(groups_of(**groups), journal="step-0")
    found = []
    for r in rollout:
        found.append([r.request_id, r.token_ids, r.logprobs, r.text, r.finish_reason])
        file.write(json.dumps(found[-1]) + "\\n")
        file.flush()
    report = rollout.report
    told = [found, report.num_replayed, report.num_resumed_tokens]
open(out + ".part", "w").write(json.dumps(told))
os.replace(out + ".part", out)  # whole, or not there
"""


class Trainer:
    """A trainer that can be started again and again, each time in a process."""

    def __init__(self, folder: Path, groups: dict[str, Any], **settings: Any) -> None:
        self.seen, self.out = folder / "seen", folder / "out"
        settings["journal_dir"] = str(folder / "journals")
        self._args = json.dumps([groups, settings, str(self.seen), str(self.out)])

    def run(self, wait: Callable[[], None] | None) -> bool:
        """Start it, and kill it after `wait`; whether it had finished before."""
        with subprocess.Popen(
            [sys.executable, "-c", TRAINER, self._args],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        ) as process:
            assert process.stdout is not None
            try:
                assert process.stdout.readline() == "open\n"
                if wait is None:
                    assert process.wait(STARTS_S) == 0
                else:
                    wait()
            finally:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
                process.wait()
        return self.out.exists()

    def rows(self) -> Iterator[list[Any]]:
        """What any of its lives has seen; a line may be half written."""
        for line in self.seen.read_text().splitlines():
            with suppress(json.JSONDecodeError):
                yield json.loads(line)


def finishes(trainer: Trainer, chance: random.Random) -> tuple[list[Any], int, int]:
    """Kill it at random moments until it has done something, then let it finish."""
    num_kills = 0
    while not trainer.run(lambda: time.sleep(chance.uniform(0.0, 0.8))):
        num_kills += 1
        if num_kills == 4:
            assert trainer.run(None)
    responses, *told = json.loads(trainer.out.read_text())
    return responses, *told


SEEDS = [
    pytest.param(seed, marks=[pytest.mark.slow] if seed >= 2 else [])
    for seed in range(20)
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_trainer_killed_at_random_moments_ends_with_the_undisturbed_set(
    tmp_path, seed
):
    """Greedy: whatever was lost is generated as it was."""
    groups = {"num": 12, "n": 4, "max_tokens": 400, "ignore_eos": seed % 2 == 0}
    engine = {"max_num_seqs": 8}
    with aseer.Engine(config_of(**engine)) as undisturbed:
        wanted = content(list(undisturbed.rollout_sync(groups_of(**groups))))
    trainer = Trainer(tmp_path, groups, **engine)
    responses, *_ = finishes(trainer, random.Random(seed))
    assert len(responses) == len(wanted) == 48
    assert {r[0]: tuple(r[1:4]) for r in responses} == wanted


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", SEEDS)
def test_what_a_user_has_seen_is_what_every_later_life_sees(tmp_path, seed):
    """Sampled with seeds: a request that goes on draws other numbers than it would."""
    groups = {"num": 12, "n": 4, "max_tokens": 400, "temperature": 1.0, "seed": seed}
    trainer = Trainer(tmp_path, groups, max_num_seqs=8)
    responses, *_ = finishes(trainer, random.Random(100 + seed))
    final = {row[0]: row for row in responses}
    assert len(final) == len(responses) == 48
    for row in trainer.rows():
        assert row == final[row[0]]
