"""vLLM's executor for worker processes, with drafts that come with a step's tokens.

vLLM's engine asks for drafts by a call of its own after every step, whether there are
any or not. On a CPU engine and worker share cores, and that call takes several percent
of a short step. So a worker adds its drafts to what it answers anyway
(`patches.send_drafts_along`).
"""

from __future__ import annotations

from typing import Any

from vllm.v1.executor.multiproc_executor import MultiprocExecutor


class DraftingExecutor(MultiprocExecutor):  # type: ignore[misc]
    """To be named as vLLM's `distributed_executor_backend`."""

    _last_output: Any = None

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """See vLLM's Executor."""
        self._last_output = super().sample_tokens(*args, **kwargs)
        return self._last_output

    def take_draft_token_ids(self) -> Any:
        """See vLLM's Executor; asks the worker if its last answer brought none."""
        output, self._last_output = self._last_output, None
        if hasattr(output, "aseer_drafts"):
            return output.aseer_drafts
        return super().take_draft_token_ids()
