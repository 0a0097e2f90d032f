"""Model directories to try, test and measure aseer with, made on the user's machine.

`smollm2` prepares a small model that talks, `tiny` writes one with random weights.
Importing either loads no torch and no transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

WEIGHT_DTYPES = ("bfloat16", "float32")


def check_weight_dtype(dtype: str) -> None:
    """Reject a dtype that `save_weights` cannot write.

    Raises:
        ValueError: dtype is not one of `WEIGHT_DTYPES`.
    """
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"dtype must be one of {WEIGHT_DTYPES}, not {dtype!r}")


def save_weights(
    path: Path, tensors: dict[str, npt.NDArray[np.float32]], dtype: str
) -> None:
    """Write one safetensors file; the tensors are rounded to dtype.

    Raises:
        ValueError: dtype is not one of `WEIGHT_DTYPES`.
    """
    check_weight_dtype(dtype)
    metadata = {"format": "pt"}
    if dtype == "float32":
        from safetensors.numpy import save_file

        save_file(tensors, path, metadata=metadata)
    else:
        # NumPy has no bfloat16, so only this case pays for torch.
        import numpy as np
        import torch
        from safetensors.torch import save_file as save_torch_file

        # torch warns of arrays that it may not write to, such as mapped files.
        writable = {k: np.require(v, requirements="W") for k, v in tensors.items()}
        rounded = {k: torch.from_numpy(v).bfloat16() for k, v in writable.items()}
        save_torch_file(rounded, path, metadata=metadata)
    # safetensors lets only the owner read; a model is shared like any other file.
    path.chmod(0o644)
