"""An engine's death is told by its cause, not by what followed from it."""

from __future__ import annotations

from aseer.node.logs import Log, cause_from_log
from aseer.node.process import describe_exit

LOG = """\
(EngineCore pid=7) ERROR 11-21 22:00:00 [core.py:1] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-21 22:00:00 [core.py:1]   File "x.py", line 1, in load
(EngineCore pid=7) ERROR 11-21 22:00:00 [core.py:1] ValueError: No available memory
Exception: WorkerProc initialization failed due to an exception in a background process.
Traceback (most recent call last):
  File "y.py", line 2, in start
RuntimeError: Engine core initialization failed. See root cause above.
"""


def test_the_cause_is_the_last_error_that_is_not_a_consequence():
    assert cause_from_log(LOG) == "ValueError: No available memory"


def test_a_qualified_error_is_a_cause():
    log = "vllm.exceptions.VLLMValidationError: max_model_len is too large\n"
    assert cause_from_log(log) == (
        "vllm.exceptions.VLLMValidationError: max_model_len is too large"
    )


def test_a_log_without_an_error_has_no_cause():
    assert cause_from_log("INFO all is well\n") is None


def test_what_an_earlier_process_wrote_is_no_cause(tmp_path):
    path = tmp_path / "log"
    path.write_text(LOG + "OSError: disk full\n")
    first, second = Log(path, 0), Log(path, len(LOG))
    third = Log(path, path.stat().st_size)
    causes = [cause_from_log(log.text()) for log in (first, second, third)]
    assert causes == ["OSError: disk full"] * 2 + [None]
    assert (second.tail(9), third.tail(9)) == ("OSError: disk full", "")
    assert Log(tmp_path / "gone", 0).tail(9) == ""


def test_exits_are_told_in_words():
    assert describe_exit(1) == "exited with status 1"
    assert (
        describe_exit(-9) == "was killed by SIGKILL (was the machine short of memory?)"
    )
    assert describe_exit(-11) == "was killed by SIGSEGV"
    assert describe_exit(-40) == "was killed by signal 40", "it has no name"


def test_of_a_long_log_the_end_is_read(tmp_path, monkeypatch):
    path = tmp_path / "log"
    path.write_bytes(b"before" + b"x" * 100 + b"end")
    assert Log(path, 6).text() == "x" * 100 + "end"
    monkeypatch.setattr("aseer.node.logs._LOG_BYTES", 5)
    assert Log(path, 6).text() == "xxend"
    assert Log(path, path.stat().st_size).text() == ""
