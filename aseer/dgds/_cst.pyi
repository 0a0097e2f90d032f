import numpy as np
from numpy.typing import NDArray

class SuffixForest:
    def __init__(self, *, max_match: int) -> None: ...
    def open_group(self, prompt: NDArray[np.int32]) -> int: ...
    def open_request(self, group: int) -> int: ...
    def close_group(self, group: int) -> None: ...
    def close_requests(self, requests: NDArray[np.int64]) -> None: ...
    def append(
        self,
        requests: NDArray[np.int64],
        tokens: NDArray[np.int32],
        offsets: NDArray[np.int64],
        starts: NDArray[np.int64] | None = None,
    ) -> NDArray[np.int64]: ...
    def follow(
        self,
        requests: NDArray[np.int64],
        texts: NDArray[np.int32],
        rows: NDArray[np.int64],
        starts: NDArray[np.int64],
        num_tokens: NDArray[np.int32],
    ) -> int: ...
    def draft(
        self,
        requests: NDArray[np.int64],
        max_draft_tokens: NDArray[np.int32],
        min_confidence: float,
    ) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.float32]]: ...
    def draft_tree(
        self,
        requests: NDArray[np.int64],
        max_draft_tokens: NDArray[np.int32],
        *,
        top_k: int,
        min_confidence: float,
    ) -> tuple[
        NDArray[np.int32],
        NDArray[np.int32],
        NDArray[np.int64],
        NDArray[np.float32],
    ]: ...
    def continuations(
        self, request: int
    ) -> list[tuple[int, list[tuple[int, int, int]]]]: ...
    def tokens(self, request: int, start: int = 0) -> NDArray[np.int32]: ...
    def requests(self, group: int) -> NDArray[np.int64]: ...
    @property
    def num_groups(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def memory_bytes(self) -> int: ...

def spend(
    survivals: NDArray[np.float64],
    offsets: NDArray[np.int64],
    weights: NDArray[np.float64],
    step_s: NDArray[np.float64],
    margin: float,
) -> tuple[NDArray[np.int64], float]: ...
