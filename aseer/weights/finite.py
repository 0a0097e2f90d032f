"""Whether all values are finite: found out as tensors come, and asked for once.

To ask a GPU for an answer is to wait for all that it has been given to do. So the
answers of tensors on a device stay there until the end, and are fetched together.
"""

from __future__ import annotations

from typing import Any

from aseer.errors import WeightUpdateError
from aseer.weights.checks import ROUNDABLE
from aseer.weights.files import dtype_name


class FiniteCheck:
    """Looks at every value of the tensors that it is shown."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[tuple[str, Any]]] = {}  # by device

    def add(self, name: str, values: Any) -> None:
        """Look at a tensor's values, at once or by the time of `finish`.

        Raises:
            WeightUpdateError: one is NaN or infinite; only of a tensor on a CPU.
        """
        import torch

        if dtype_name(values.dtype) not in ROUNDABLE or not values.numel():
            return
        # NaN and infinity come through as the least or the greatest value: one pass,
        # and no memory.
        ends = torch.stack(torch.aminmax(values))
        if values.device.type == "cpu":
            is_fine = bool(torch.isfinite(ends).all())
            refuse_unless(is_fine, name, dtype_name(ends.dtype))
        else:
            self._waiting.setdefault(str(values.device), []).append((name, ends))

    def finish(self) -> None:
        """Fetch what devices found, once each.

        Raises:
            WeightUpdateError: a tensor has a value that is NaN or infinite.
        """
        import torch

        waiting, self._waiting = self._waiting, {}
        for found in waiting.values():
            each = torch.stack([ends.float() for _, ends in found])
            are_fine = torch.isfinite(each).all(dim=1).tolist()
            for (name, ends), is_fine in zip(found, are_fine, strict=True):
                refuse_unless(is_fine, name, dtype_name(ends.dtype))


def refuse_unless(is_fine: bool, name: str, dtype: str) -> None:
    """Refuse a tensor that is not finite as a dtype.

    Raises:
        WeightUpdateError: it is not.
    """
    if not is_fine:
        raise WeightUpdateError(
            f"tensor {name!r} has values that are NaN or infinite as {dtype}"
        )
