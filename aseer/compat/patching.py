"""How aseer changes what other packages do: by a table of patches, and by one call.

vLLM's patches are in `aseer/instance/vllm/patches.py`, LMCache's in
`aseer/kv/patches.py`. `tests/integration/test_patches.py` and
`tests/e2e/test_patches.py` run the other package's own code without each of them, and
fail once a patch is no longer needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Iterable


class Patch(NamedTuple):
    """One change to another package, in the process that applies it.

    Attributes:
        apply: changes what it is given; returns whether there was anything to change.
        moment: of a process's life, at which it is applied.
        mends: what happens without it.
        versions: of the package, in which it was seen to be needed.
    """

    apply: Callable[..., bool]
    moment: str
    mends: str
    versions: str

    @property
    def name(self) -> str:
        """Of the function that applies it."""
        return str(getattr(self.apply, "__name__", self.apply))


def apply_patches(
    patches: Iterable[Patch], moment: str, log: logging.Logger, *targets: Any
) -> list[str]:
    """Apply the patches of a moment and log each that changed something.

    Args:
        targets: what they change, if it is not the package itself.
    Returns:
        The names of those that changed something.
    """
    applied = []
    for patch in patches:
        if patch.moment == moment and patch.apply(*targets):
            applied.append(patch.name)
            log.info("patched (%s): %s", patch.name, patch.mends)
    return applied
