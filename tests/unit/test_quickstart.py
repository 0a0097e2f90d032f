"""The quick start's table of calls is the one that decides (`runtime/activity.py`)."""

from __future__ import annotations

from pathlib import Path

from aseer.runtime.activity import Activity, Call, Verdict, decide

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "quickstart.md").read_text()
COLUMNS = (Call.ROLLOUT, Call.UPDATE, Call.SLEEP, Call.WAKE, Call.ABORT)
WORDS = {
    Verdict.TAKE: "begins",
    Verdict.WAIT: "waits",
    Verdict.END: "waits",
    Verdict.DONE: "nothing to do",
    Verdict.ABORT: "ends the rollout",
    Verdict.BUSY: "`RolloutInProgressError`",
    Verdict.SLEEPS: "`EngineError`",
    Verdict.CLOSED: "`EngineClosedError`",
}


def test_the_table_of_calls_says_what_is_decided():
    table = TEXT[TEXT.index("| the engine is |") :].partition("\n\n")[0]
    _, _, *rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert len(rows) == len(Activity)
    for activity, (_, *cells) in zip(Activity, rows, strict=True):
        for call, cell in zip(COLUMNS, cells, strict=True):
            if (activity, call) == (Activity.CLOSING, Call.ABORT):
                assert "nothing to do, then `EngineClosedError`" in cell
            else:
                assert cell.startswith(WORDS[decide(activity, call)])
