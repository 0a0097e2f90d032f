"""Code that the doctor runs in a Python of its own.

What imports torch or vLLM may raise, crash or hang where an installation is broken:
here that is one answer that does not come.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from aseer.errors import AseerError

PROBE_TIMEOUT_S = 300.0

TORCH = """
import json, torch
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda,
                  "hip": torch.version.hip}))
"""
TRANSFORMERS = """
import json, transformers
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedModel
print(json.dumps({"version": transformers.__version__}))
"""
PLATFORM = """
import json, sys
from pathlib import Path
from aseer.models.tiny import make_tiny
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
model = make_tiny(Path(sys.argv[1]))
config = EngineArgs(model=str(model), max_model_len=256).create_engine_config()
runner = "V2" if getattr(config, "use_v2_model_runner", False) else "V1"
print(json.dumps({"device": current_platform.device_type, "runner": runner}))
"""
SAMPLER = """
import json, torch
from vllm.platforms import current_platform
current_platform.import_kernels()
if hasattr(current_platform, "register_triton_kernel_overrides"):
    current_platform.register_triton_kernel_overrides()
from vllm.v1.sample.sampler import Sampler
from types import SimpleNamespace
from aseer.dgds.sampler import test_sampler
from aseer.dgds.verifier import DraftVerifier
from aseer.instance.vllm import patches
device = torch.device(current_platform.device_type)
verifier = DraftVerifier(Sampler("processed_logprobs"))
right, p_value, num_draws, fault = test_sampler(verifier, device)
was_mended = bool(patches.apply("sampler", SimpleNamespace(device=device)))
print(json.dumps({"is_right": bool(right), "num_draws": num_draws, "fault": fault,
                  "was_mended": was_mended, "device": device.type}))
"""
KV_POOL = """
import json, sys
import torch
if sys.argv[1] == "gpu":
    import lmcache.cuda_ops
import aseer.kv.connector
print(json.dumps({}))
"""
ARCHITECTURES = """
import json
from vllm import ModelRegistry
print(json.dumps({"names": sorted(ModelRegistry.get_supported_archs())}))
"""
PROCESSOR = """
import json, sys
from transformers import AutoProcessor
try:
    processor = AutoProcessor.from_pretrained(sys.argv[1])
    counted = processor._get_num_multimodal_tokens(image_sizes=[(224, 224)])
except Exception as error:  # some are many lines long, of which the first says what
    lines = str(error).strip().splitlines() or ["it says no more"]
    sys.exit(f"{type(error).__name__}: {lines[0].partition('. ')[0]}")
print(json.dumps({"num_tokens": int(counted["num_image_tokens"][0])}))
"""
_PROBE_ENV = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


class ProbeError(AseerError):
    """A probe's process failed; the text says how."""


def probe(code: str, *args: str, timeout_s: float = PROBE_TIMEOUT_S) -> dict[str, Any]:
    """Run code in a Python of its own; its last line of output is a JSON object.

    Raises:
        ProbeError: it failed, printed something else, or took too long.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *args],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            env={**os.environ, **_PROBE_ENV},
        )
    except subprocess.TimeoutExpired:
        raise ProbeError(f"no answer within {timeout_s:g} s") from None
    said = done.stdout.strip().splitlines()
    if done.returncode == 0 and said:
        try:
            found = json.loads(said[-1])
        except ValueError:
            found = None
        if isinstance(found, dict):
            return found
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    raise ProbeError(lines[-1] if lines else f"exit status {done.returncode}")
