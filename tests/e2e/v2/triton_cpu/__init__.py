"""A backend for Triton on machines without GPUs: kernels run in Triton's interpreter.

Found by Triton through `aseer_v2-1.dist-info`; `tests/e2e/v2/README.md` says how.
"""
