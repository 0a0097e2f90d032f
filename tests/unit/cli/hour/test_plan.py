"""Which steps there are, what each machine skips, and what the command does of them."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aseer.cli import doctor
from aseer.cli.findings import Status, fail, ok, warn
from aseer.cli.hour import plan, report
from aseer.cli.hour.load import real_groups
from aseer.cli.hour.plan import all_steps
from aseer.cli.hour.site import Site, sizes_for, too_few_gpus
from aseer.cli.hour.steps import Seen, Step
from aseer.cli.hour.training import TRAIN, obstacle, train_options
from aseer.cli.main import build_parser
from aseer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

NAMES = (
    "machine one-engine two-engines bf16 load weights weights-direct weights-size "
    "sleep pool drafts drafts-ranks drafts-speed ngram replay grpo"
).split()
CHECKOUT = Path(__file__).parents[4]


def site(num_gpus: int, checkout: Path | None = CHECKOUT) -> Site:
    gpus = tuple(map(str, range(num_gpus)))
    folder = Path("nowhere")
    return Site(scratch=folder, logs=folder, gpus=gpus, model=None, checkout=checkout)


@pytest.mark.parametrize(
    ("num_gpus", "skipped"),
    [
        (0, ["weights-direct", "sleep"]),
        (1, ["two-engines", "pool", "drafts-ranks", "grpo"]),
        (2, []),
        (8, []),
    ],
)
def test_what_a_machine_cannot_show_is_skipped_with_a_reason(
    num_gpus: int, skipped: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Programs of the checkout need packages that this Python may not have.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    steps = all_steps(site(num_gpus))
    assert [each.name for each in steps] == NAMES
    assert [each.name for each in steps if each.skip] == skipped
    assert all(each.about for each in steps)


def test_without_a_checkout_its_programs_are_named() -> None:
    steps = {each.name: each.skip for each in all_steps(site(8, checkout=None))}
    assert "run `python bench/bench_rollout_vllm.py --quick" in steps["replay"]
    assert "run `python examples/grpo/train.py --iterations 1" in steps["grpo"]


def test_a_program_whose_module_is_missing_is_skipped() -> None:
    why = obstacle(site(2), TRAIN, [], "json", "no_such_module")
    assert why == "examples/grpo/train.py needs no_such_module"
    assert not obstacle(site(2), TRAIN, [], "json")


@pytest.mark.parametrize(("num_gpus", "gpus"), [(8, "4,5"), (4, "2,3"), (2, "0,1")])
def test_a_trainer_and_its_engines_have_gpus_of_their_own(num_gpus, gpus) -> None:
    options = train_options(site(num_gpus))
    assert options[-4:] == ["--device", "cuda:0", "--gpus", gpus]


def test_sizes_shrink_on_a_cpu_and_grow_with_gpus() -> None:
    cpu, one, eight = (sizes_for(n) for n in (0, 1, 8))
    assert cpu.groups * cpu.siblings * cpu.max_tokens < 10_000
    assert eight.groups * eight.siblings == 2048
    assert (eight.rows, eight.step_tokens) == (1024, 16_384)
    assert (cpu.ranks, one.ranks, eight.ranks) == ((1, 2), (1,), (1, 2, 8))
    assert sizes_for(6).ranks == (1, 2, 4), "heads are shared out among ranks"
    assert too_few_gpus(site(1), 2) == "it takes 2 GPUs, and this machine has 1"
    assert not too_few_gpus(site(0), 2), "a CPU has room for two small engines"


def test_questions_of_two_rollouts_share_no_beginning() -> None:
    once, again = (real_groups(70, site(0), n=2, prefix=f"{i}: ") for i in "ab")
    assert not {group.prompt for group in once} & {group.prompt for group in again}
    assert len({group.group_id for group in once}) == 70
    assert {group.n for group in once} == {2}
    assert all(isinstance(group.prompt, str) and group.prompt[3:] for group in once)


# The command


def step(name: str, status: Status) -> Step:
    finding = {"ok": ok("seen"), "warn": warn("slow", "x"), "fail": fail("no", "x")}
    return Step(name=name, about="it", see=lambda: Seen(finding[status], {"n": 1}))


def run(monkeypatch: pytest.MonkeyPatch, steps: Sequence[Step], *argv: str) -> int:
    monkeypatch.setattr(doctor, "all_steps", lambda _: steps)
    monkeypatch.setattr(plan, "check_kv_pool", lambda: ok(""))
    return doctor.run(build_parser().parse_args(["doctor", *argv]))


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_the_command_writes_both_and_fails_with_a_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: Status, code: int
) -> None:
    steps = [step("a", status), step("b", "ok")]
    assert run(monkeypatch, steps, "--gpu", str(tmp_path / "out")) == code
    written = json.loads((tmp_path / "out" / "first-hour.json").read_text())
    statuses = [each["status"] for each in written["steps"]]
    assert statuses == [status, "skip" if code else "ok"]
    assert (tmp_path / "out" / "first-hour.md").exists()


def test_what_is_logged_meanwhile_is_in_a_file_and_not_among_the_findings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def killing() -> Seen:
        logging.getLogger("aseer").error("instance 0 is lost")
        return Seen(ok("killed"))

    steps = [Step(name="a", about="", see=killing)]
    assert run(monkeypatch, steps, "--gpu", str(tmp_path)) == 0
    assert "ERROR instance 0 is lost" in (tmp_path / "logs/aseer.log").read_text()
    assert not logging.getLogger("aseer").handlers
    assert "lost" not in "".join(capsys.readouterr())


def test_what_was_found_before_an_interrupt_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted() -> Seen:
        raise KeyboardInterrupt

    steps = [step("a", "ok"), Step(name="b", about="", see=interrupted)]
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, steps, "--gpu", str(tmp_path))
    written = json.loads((tmp_path / "first-hour.json").read_text())
    assert [each["name"] for each in written["steps"]] == ["a"]


@pytest.mark.parametrize(
    ("options", "names"),
    [(["--steps", "c", "a"], "ac"), (["--from", "b"], "bc")],
)
def test_steps_can_be_chosen(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    names: str,
) -> None:
    steps = [step(name, "ok") for name in "abc"]
    argv = ["--gpu", str(tmp_path), "--json", *options]
    assert run(monkeypatch, steps, *argv) == 0
    told = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in told["steps"]] == list(names)


def test_a_run_that_goes_on_keeps_the_earlier_steps_of_the_same_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def written() -> list[tuple[str, str]]:
        data = json.loads((tmp_path / "first-hour.json").read_text())
        assert data["ok"] is all(each["status"] != "fail" for each in data["steps"])
        return [(each["name"], each["status"]) for each in data["steps"]]

    out = ["--gpu", str(tmp_path)]
    assert run(
        monkeypatch, [step("a", "warn"), step("b", "fail"), step("c", "ok")], *out
    )
    assert written() == [("a", "warn"), ("b", "fail"), ("c", "skip")]
    mended = [step("a", "ok"), step("b", "ok"), step("c", "ok")]
    assert run(monkeypatch, mended, *out, "--from", "b") == 0
    assert written() == [("a", "warn"), ("b", "ok"), ("c", "ok")]

    monkeypatch.setattr(report, "installed_packages", lambda: {"vllm": "99"})
    assert run(monkeypatch, mended, *out, "--from", "c") == 0
    assert written() == [("c", "ok")], "others say nothing of these packages"
    assert run(monkeypatch, mended, *out) == 0
    assert written() == [("a", "ok"), ("b", "ok"), ("c", "ok")]


@pytest.mark.parametrize("text", ["{", "[]", '{"steps": [{}]}', '{"steps": 3}'])
def test_a_file_that_is_no_report_is_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    (tmp_path / "first-hour.json").write_text(text)
    steps = [step("a", "ok"), step("b", "ok")]
    assert run(monkeypatch, steps, "--gpu", str(tmp_path), "--from", "b") == 0
    data = json.loads((tmp_path / "first-hour.json").read_text())
    assert [each["name"] for each in data["steps"]] == ["b"]


def test_steps_are_chosen_of_the_list_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--gpu DIR"):
        run(monkeypatch, [], "--steps", "a")


def test_steps_can_be_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [step("a", "ok"), Step(name="b", about="more", see=None, skip="no GPU")]  # type: ignore[arg-type]
    assert run(monkeypatch, steps, "--list-steps") == 0
    assert capsys.readouterr().out == "a: it\nb: more (skipped here: no GPU)\n"


def test_a_folder_that_cannot_be_written_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to"):
        run(monkeypatch, [step("a", "ok")], "--gpu", str(tmp_path / "file"))
