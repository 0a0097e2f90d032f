"""The engine's settings: frozen, checked when made, each with a default and a unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path  # noqa: TC003 -- annotations are resolved at run time, too
from typing import Any, Literal, get_args

from aseer.inputs.engine_args import check_engine_args, has_drafter
from aseer.inputs.fields import (
    check_directory,
    check_host_and_port,
    check_int,
    check_seconds,
    gpu_ids,
    model_name,
    one_of,
    refusal,
    set_field,
    variable,
)
from aseer.inputs.kv_pool import KvPoolConfig, KvPoolMode, check_kv_pool
from aseer.inputs.nodes import check_nodes
from aseer.inputs.plain import (
    INT64_MAX,
    as_bool,
    as_data,
    as_text,
    can_be_sent,
)
from aseer.inputs.speculation import (
    SpeculationConfig,
    SpeculationMethod,
    check_speculation,
)
from aseer.sampling import SamplingParams

PolicyName = Literal[
    "context-aware",
    "fcfs",
    "group-round-robin",
    "least-loaded",
    "group-least-unfinished",
    "longest-first",
]
POLICY_NAMES: tuple[PolicyName, ...] = get_args(PolicyName)

MAX_LORA_RANK = 512  # vLLM's


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of an `aseer.Engine`.

    Attributes:
        model: a Hugging Face model name or a directory, as vLLM takes it. Relative
            paths, here and in other fields, are resolved when the settings are made.
        tokenizer: name or directory; None = the model's.
        num_instances: vLLM engines to start on this machine; None = one for every
            `gpus_per_instance` of the GPUs, or on a CPU one a core, at most 2. 0 = none
            here, only on the nodes that join (`listen`, `min_nodes`). With `nodes`, on
            each of the hosts that are taken.
        gpus: ids of the GPUs to use, as CUDA_VISIBLE_DEVICES names them, whatever the
            trainer itself may see; None = those that are visible.
        gpus_per_instance: GPUs of one engine (tensor parallel), on each of its hosts.
            On a CPU as many workers share the engine's cores, which no one needs but
            tests.
        nodes_per_instance: hosts that one engine spans; tensor parallelism is then over
            all its GPUs, `gpus_per_instance` on each. For models that no host has
            memory for. Such engines run on nodes alone, none of them on this host
            (`listen`, and as many `min_nodes` or more). See docs/cluster.md.
        device: "auto" (GPUs if this machine has any and vLLM is built for them),
            "cuda" (AMD's, too, where it is untried), "cpu"; "sim" starts simulated
            instances without vLLM (for tests).
        dtype: weights and KV, as vLLM names it; "auto" = vLLM's choice (the
            checkpoint's, but bfloat16 for one in float32), or float32 on a CPU that
            has no bfloat16 of its own.
        max_model_len: the most tokens of prompt and response together; None = the
            model's.
        max_num_seqs: the most requests that an engine runs at once; None = what vLLM's
            `LLM` takes: 1,024 on a GPU of 70 GB or more (an A100 excepted), otherwise
            256. Only as many run as the KV cache holds, so a high limit costs little:
            rows of the sampler's tensors, and the capture of CUDA graphs.
        kv_cache_bytes: KV cache of one engine, on all its GPUs together; None = what
            vLLM takes of a GPU, or on a CPU a share of the free memory, at most 4 GiB.
        max_lora_rank: of adapters (LoRA) that engines compute with: `update_weights`
            of a `peft.PeftModel` then sends its adapters alone. None = engines have
            none, and adapters are merged into the weights that are sent.
        seed: seed of the engines' random streams (each engine has a stream of its own,
            derived from it); None = a fresh one. To repeat samples exactly, give groups
            a `seed` instead.
        sampling: sampling settings of groups that bring none.
        chunk_size: the most tokens a request generates before it is scheduled anew; 0 =
            requests are not divided. Chunks end just past the end of a KV block, where
            a resume computes one token.
        policy: which request runs next, and where. "context-aware" is Seer's; "fcfs"
            takes requests in the order in which they come; "longest-first" goes by
            `Group.known_lengths`, which all groups must have. Baselines that divide
            nothing, whatever `chunk_size` is: "least-loaded", "group-round-robin",
            "group-least-unfinished".
        speculation: how tokens are drafted: a method's name ("off", "dgds", "suffix",
            "ngram"), a `SpeculationConfig` or a mapping of its fields; kept as one.
        kv_pool: where KV is kept that other engines can load: a mode of
            `KvPoolConfig`, a `KvPoolConfig` or a mapping of its fields; kept as one.
        kv_transfer_config: another KV connector of vLLM's, with its settings, as vLLM
            takes them; aseer then has no pool of its own.
        length_priors: whether a group starts with the length of the longest response
            that its prompt had in an earlier rollout of this engine. Such a group needs
            no probe. For training that comes back to a prompt after few updates.
        starvation_interval: once in so many decisions the request that has waited
            longest goes first, whatever the policy; 0 = never.
        max_pending_requests: groups are taken from an iterator only while fewer
            requests than this are unfinished (a list is taken whole).
        report_interval_s: seconds between an engine's reports of its running chunks.
        start_timeout_s: the most seconds that an engine takes to come up, the loading
            of the model included.
        heartbeat_timeout_s: an engine that is silent for so many seconds is taken for
            dead, and killed. This and the next count only time in which this process
            runs.
        stall_timeout_s: an engine that has work but makes no token for so many seconds
            is killed.
        shutdown_timeout_s: seconds for an orderly end; what is left then is killed.
        max_restarts: how often dead instances are started again, all of a host's
            together, over the engine's life. Restarts that a single request has cost
            are given back.
        max_request_retries: how many instances may die of a request; if one more does,
            the request ends as an error.
        engine_args: further arguments of vLLM's AsyncEngineArgs, as plain data. Those
            that change what aseer counts or needs are refused by name; a
            `worker_extension_cls` is joined with aseer's own.
        env: environment variables of the engines' processes, beside this one's.
        python: path of the interpreter that engines and the KV pool's servers run on,
            for a vLLM in an environment of its own; aseer of the same release is
            installed there, and vLLM need not be here. None = the one that runs this.
        log_dir: where the engines' logs go and stay; None = in the directory of the
            sockets, which is removed when the engine closes.
        logs_calls: whether every rollout's decisions are written to `log_dir`, one file
            each, as large as what is generated; `aseer replay-log` makes them again.
        journal_dir: where `Engine.rollout(journal=...)` keeps journals, a file each; it
            is made when it is needed. Files there are the user's to remove.
        metrics_address: host and port, such as "127.0.0.1:9464", where Prometheus finds
            the engine's figures (`/metrics`); None = nowhere. Port 0 is any that is
            free: `Engine.metrics_url` has it.
        listen: address at which nodes on other hosts may join this engine, such as
            "tcp://0.0.0.0:5557"; None = this machine alone, or with `nodes` any free
            port. Connections are encrypted, with a key that all hosts share; without a
            key only an address of this machine is allowed. See docs/cluster.md.
        nodes: what starts the nodes; None = you do, by `aseer node`. "ray" has Ray
            place them, one a host, with the GPUs reserved that their engines use; then
            all engines run there. See docs/cluster.md.
        min_nodes: nodes of other hosts that must be up before the engine is open; more
            may join at any time. With `nodes`, how many hosts are taken; 0 = all that
            have the GPUs.
        node_timeout_s: a node of which nothing is heard for so many seconds is lost,
            and its work goes on elsewhere.
        key_file: path of the file with the key; None = what ASEER_KEY or ASEER_KEY_FILE
            in the environment say, or ~/.config/aseer/key.
        controller_file: a file that is written while the engine listens, with its
            address, for `aseer node --controller-file`; None = none.
        weights: how new weights go to nodes of other hosts: "full", or as what has
            changed since the last update ("delta"), which costs both ends some CPU time
            and is a small part of the bytes after a step of training. What a node has
            in the end is the same, byte for byte, and checked. See docs/cluster.md.
        weights_dir: where `update_weights` puts tensors for the engines, as large as
            the model, twice that once there was an update, if as much again is free
            then, and in any case during one; None = shared memory (/dev/shm).
    """

    model: Path | str
    tokenizer: Path | str | None = None
    num_instances: int | None = None
    gpus: Sequence[int | str] | None = None
    gpus_per_instance: int = 1
    nodes_per_instance: int = 1
    device: Literal["auto", "cuda", "cpu", "sim"] = "auto"
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    kv_cache_bytes: int | None = None
    max_lora_rank: int | None = None
    seed: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    chunk_size: int = 2048
    policy: PolicyName = "context-aware"
    speculation: SpeculationConfig | SpeculationMethod | Mapping[str, Any] = "off"
    kv_pool: KvPoolConfig | KvPoolMode | Mapping[str, Any] = "auto"
    kv_transfer_config: Mapping[str, Any] | None = None
    length_priors: bool = False
    starvation_interval: int = 256
    max_pending_requests: int = 65_536
    report_interval_s: float = 0.25
    start_timeout_s: float = 1200.0
    heartbeat_timeout_s: float = 60.0
    stall_timeout_s: float = 300.0
    shutdown_timeout_s: float = 20.0
    max_restarts: int = 3
    max_request_retries: int = 3
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    python: Path | str | None = None
    log_dir: Path | str | None = None
    logs_calls: bool = False
    journal_dir: Path | str | None = None
    metrics_address: str | None = None
    listen: str | None = None
    nodes: Literal["ray"] | None = None
    min_nodes: int = 0
    node_timeout_s: float = 30.0
    key_file: Path | str | None = None
    controller_file: Path | str | None = None
    weights: Literal["full", "delta"] = "full"
    weights_dir: Path | str | None = None

    def __post_init__(self) -> None:
        set_field(self, "model", model_name("model", self.model))
        if self.tokenizer is not None:
            set_field(self, "tokenizer", model_name("tokenizer", self.tokenizer))
        dtype = as_text(self.dtype)
        if not dtype or not can_be_sent(dtype):
            raise refusal("dtype", self.dtype, 'a name, such as "bfloat16"')
        set_field(self, "dtype", dtype)
        least = 0 if self.listen is not None and self.nodes is None else 1
        check_int(self, "num_instances", least, optional=True)
        for name in ("max_model_len", "max_num_seqs"):
            check_int(self, name, 1, optional=True)
        check_int(self, "kv_cache_bytes", 1, INT64_MAX, optional=True)
        check_int(self, "max_lora_rank", 1, MAX_LORA_RANK, optional=True)
        check_int(self, "seed", 0, INT64_MAX, optional=True)
        if self.gpus is not None:
            set_field(self, "gpus", gpu_ids(self.gpus))
        check_int(self, "gpus_per_instance", 1)
        check_int(self, "chunk_size", 0)
        check_int(self, "starvation_interval", 0, INT64_MAX)
        check_int(self, "max_pending_requests", 1, INT64_MAX)
        check_int(self, "max_restarts", 0)
        check_int(self, "max_request_retries", 0)
        for name in ("report_interval_s", "start_timeout_s", "heartbeat_timeout_s"):
            check_seconds(self, name)
        for name in ("stall_timeout_s", "shutdown_timeout_s"):
            check_seconds(self, name)
        if self.heartbeat_timeout_s < 4 * self.report_interval_s:
            raise refusal(
                "heartbeat_timeout_s",
                self.heartbeat_timeout_s,
                f"at least 4 reports, of report_interval_s={self.report_interval_s:g}",
            )
        devices = ("auto", "cuda", "cpu", "sim")
        set_field(self, "device", one_of("device", self.device, devices))
        set_field(self, "policy", check_policy(self.policy))
        priors = as_bool(self.length_priors)
        if priors is None:
            raise refusal("length_priors", self.length_priors, "True or False")
        set_field(self, "length_priors", priors)
        set_field(self, "speculation", check_speculation(self.speculation))
        set_field(self, "kv_pool", check_kv_pool(self.kv_pool))
        if not isinstance(self.sampling, SamplingParams):
            raise refusal("sampling", self.sampling, "an aseer.SamplingParams")
        for name in ("engine_args", "env"):
            if not isinstance(getattr(self, name), Mapping):
                raise refusal(name, getattr(self, name), "a mapping")
        for name in ("engine_args", "kv_transfer_config"):
            set_field(self, name, as_data(getattr(self, name), name))
        method = check_speculation(self.speculation).method
        check_engine_args(self.engine_args, method)
        set_field(self, "env", dict(variable(*item) for item in self.env.items()))
        check_directory(self, "python", "an interpreter's path")
        check_directory(self, "log_dir")
        logs_calls = as_bool(self.logs_calls)
        if logs_calls is None:
            raise refusal("logs_calls", self.logs_calls, "True or False")
        set_field(self, "logs_calls", logs_calls)
        if self.logs_calls and self.log_dir is None:
            raise refusal("log_dir", None, "a directory, since logs_calls is True")
        check_directory(self, "journal_dir")
        check_directory(self, "weights_dir")
        check_host_and_port(self, "metrics_address", "127.0.0.1:9464")
        set_field(self, "weights", one_of("weights", self.weights, ("full", "delta")))
        check_nodes(self)


def takes_nodes(config: EngineConfig) -> bool:
    """Whether nodes on other hosts may join the engine."""
    return config.listen is not None or config.nodes is not None


def check_policy(policy: object) -> PolicyName:
    """The policy's name.

    Raises:
        ConfigError: there is none of that name.
    """
    found = one_of("policy", policy, POLICY_NAMES)
    return next(name for name in POLICY_NAMES if name == found)


def is_speculating(config: EngineConfig) -> bool:
    """Whether engines draft, by aseer's methods or by a drafter of the user's."""
    method = check_speculation(config.speculation).method
    return method != "off" or has_drafter(config.engine_args)
