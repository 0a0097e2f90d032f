"""The engine's settings: frozen, checked when made, each with a default and a unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from aseer.inputs.addresses import check_address
from aseer.inputs.engine_args import (
    check_engine_args,
    check_variables,
    has_drafter,
)
from aseer.inputs.fields import (
    directory,
    dtype_name,
    file_path,
    gpu_ids,
    host_and_port,
    model_name,
    one_of,
    path_of,
    refusal,
    seconds,
    variables,
    whole,
)
from aseer.inputs.kv_pool import KvPoolConfig, KvPoolMode
from aseer.inputs.nodes import NUM_INSTANCES, check_nodes, launcher_name
from aseer.inputs.plain import INT64_MAX
from aseer.inputs.settings import (
    AnyPath,
    Resolved,
    check_fields,
    default,
    documented,
    settings_of,
)
from aseer.inputs.speculation import SpeculationConfig, SpeculationMethod
from aseer.sampling import SamplingParams, check_is_sampling

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


@documented
@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of an `aseer.Engine`."""

    model: Annotated[
        Path | str,
        model_name,
        """a Hugging Face model name or a directory, as vLLM takes it. Relative
        paths, here and in other fields, are resolved when the settings are made.""",
    ]
    tokenizer: Annotated[
        Resolved[Path | str | None, str | None],
        model_name,
        "name or directory; None = the model's.",
    ] = default(None)
    num_instances: Annotated[
        int | None,
        whole(0, allowed=NUM_INSTANCES),
        """vLLM engines to start on this machine; None = one for every
        `gpus_per_instance` of the GPUs, or on a CPU one a core, at most 2. 0 = none
        here, only on the nodes that join (`listen`, `min_nodes`). With `nodes`, on
        each of the hosts that are taken.""",
    ] = None
    gpus: Annotated[
        Resolved[Sequence[int | str] | None, tuple[str, ...] | None],
        gpu_ids,
        """ids of the GPUs to use, as CUDA_VISIBLE_DEVICES names them, whatever the
        trainer itself may see; None = those that are visible.""",
    ] = default(None)
    gpus_per_instance: Annotated[
        int,
        whole(1),
        """GPUs of one engine (tensor parallel), on each of its hosts. On a CPU as
        many workers share the engine's cores, which no one needs but tests.""",
    ] = 1
    nodes_per_instance: Annotated[
        int,
        whole(1),
        """hosts that one engine spans; tensor parallelism is then over all its
        GPUs, `gpus_per_instance` on each. For models that no host has memory for.
        Such engines run on nodes alone, none of them on this host (`listen`, and as
        many `min_nodes` or more). See docs/cluster.md.""",
    ] = 1
    data_parallel_size: Annotated[
        int,
        whole(1),
        """engines that compute a mixture of experts together, as vLLM's
        data-parallel ranks: each has its own requests and KV, and all share out the
        experts (over whole ones with `engine_args={"enable_expert_parallel": True}`,
        else over parts of each). They are counted one by one (`num_instances`, a
        multiple), start and end as one, and may be on several nodes. See
        docs/cluster.md.""",
    ] = 1
    device: Annotated[
        Literal["auto", "cuda", "cpu", "sim"],
        """"auto" (GPUs if this machine has any and vLLM is built for them), "cuda"
        (AMD's, too, where it is untried), "cpu"; "sim" starts simulated instances
        without vLLM (for tests).""",
    ] = "auto"
    dtype: Annotated[
        str,
        dtype_name,
        """weights and KV, as vLLM names it; "auto" = vLLM's choice (the
        checkpoint's, but bfloat16 for one in float32), or float32 on a CPU that has
        no bfloat16 of its own.""",
    ] = "auto"
    max_model_len: Annotated[
        int | None,
        whole(1, optional=True),
        "the most tokens of prompt and response together; None = the model's.",
    ] = None
    max_num_seqs: Annotated[
        int | None,
        whole(1, optional=True),
        """the most requests that an engine runs at once; None = what vLLM's `LLM`
        takes: 1,024 on a GPU of 70 GB or more (an A100 excepted), otherwise 256.
        Only as many run as the KV cache holds, so a high limit costs little: rows
        of the sampler's tensors, and the capture of CUDA graphs.""",
    ] = None
    kv_cache_bytes: Annotated[
        int | None,
        whole(1, INT64_MAX, optional=True),
        """KV cache of one engine, on all its GPUs together; None = what vLLM takes
        of a GPU, or on a CPU a share of the free memory, at most 4 GiB.""",
    ] = None
    max_lora_rank: Annotated[
        int | None,
        whole(1, MAX_LORA_RANK, optional=True),
        """of adapters (LoRA) that engines compute with: `update_weights` of a
        `peft.PeftModel` then sends its adapters alone. None = engines have none,
        and adapters are merged into the weights that are sent.""",
    ] = None
    seed: Annotated[
        int | None,
        whole(0, INT64_MAX, optional=True),
        """seed of the engines' random streams (each engine has a stream of its own,
        derived from it); None = a fresh one. To repeat samples exactly, give groups
        a `seed` instead.""",
    ] = None
    sampling: Annotated[
        SamplingParams,
        check_is_sampling,
        "sampling settings of groups that bring none.",
    ] = field(default_factory=SamplingParams)
    chunk_size: Annotated[
        int,
        whole(0),
        """the most tokens a request generates before it is scheduled anew; 0 =
        requests are not divided. Chunks end just past the end of a KV block, where
        a resume computes one token.""",
    ] = 2048
    policy: Annotated[
        PolicyName,
        """which request runs next, and where. "context-aware" is Seer's; "fcfs"
        takes requests in the order in which they come; "longest-first" goes by
        `Group.known_lengths`, which all groups must have. Baselines that divide
        nothing, whatever `chunk_size` is: "least-loaded", "group-round-robin",
        "group-least-unfinished".""",
    ] = "context-aware"
    speculation: Annotated[
        Resolved[
            SpeculationConfig | SpeculationMethod | Mapping[str, Any], SpeculationConfig
        ],
        settings_of(SpeculationConfig, short="method"),
        """how tokens are drafted: a method's name ("off", "dgds", "suffix",
        "ngram"), a `SpeculationConfig` or a mapping of its fields; kept as one.""",
    ] = default("off")
    kv_pool: Annotated[
        Resolved[KvPoolConfig | KvPoolMode | Mapping[str, Any], KvPoolConfig],
        settings_of(KvPoolConfig, short="mode"),
        """where KV is kept that other engines can load: a mode of `KvPoolConfig`, a
        `KvPoolConfig` or a mapping of its fields; kept as one.""",
    ] = default("auto")
    kv_transfer_config: Annotated[
        Mapping[str, Any] | None,
        """another KV connector of vLLM's, with its settings, as vLLM takes them;
        aseer then has no pool of its own.""",
    ] = None
    length_priors: Annotated[
        bool,
        """whether a group starts with the length of the longest response that its
        prompt had in an earlier rollout of this engine. Such a group needs no
        probe. For training that comes back to a prompt after few updates.""",
    ] = False
    starvation_interval: Annotated[
        int,
        whole(0, INT64_MAX),
        """once in so many decisions the request that has waited longest goes first,
        whatever the policy; 0 = never.""",
    ] = 256
    max_pending_requests: Annotated[
        int,
        whole(1, INT64_MAX),
        """groups are taken from an iterator only while fewer requests than this are
        unfinished (a list is taken whole).""",
    ] = 65536
    report_interval_s: Annotated[
        float,
        seconds,
        "seconds between an engine's reports of its running chunks.",
    ] = 0.25
    start_timeout_s: Annotated[
        float,
        seconds,
        """the most seconds that an engine takes to come up, the loading of the
        model included.""",
    ] = 1200.0
    heartbeat_timeout_s: Annotated[
        float,
        seconds,
        """an engine that is silent for so many seconds is taken for dead, and
        killed. This and the next count only time in which this process runs.""",
    ] = 60.0
    stall_timeout_s: Annotated[
        float,
        seconds,
        "an engine that has work but makes no token for so many seconds is killed.",
    ] = 300.0
    shutdown_timeout_s: Annotated[
        float,
        seconds,
        "seconds for an orderly end; what is left then is killed.",
    ] = 20.0
    max_restarts: Annotated[
        int,
        whole(0),
        """how often dead instances are started again, all of a host's together,
        over the engine's life. Restarts that a single request has cost are given
        back.""",
    ] = 3
    max_request_retries: Annotated[
        int,
        whole(0),
        """how many instances may die of a request; if one more does, the request
        ends as an error.""",
    ] = 3
    engine_args: Annotated[
        Mapping[str, Any],
        """further arguments of vLLM's AsyncEngineArgs, as plain data. Those that
        change what aseer counts or needs are refused by name; a
        `worker_extension_cls` is joined with aseer's own.""",
    ] = field(default_factory=dict)
    env: Annotated[
        Mapping[str, str],
        variables,
        "environment variables of the engines' processes, beside this one's.",
    ] = field(default_factory=dict)
    python: Annotated[
        AnyPath,
        path_of("an interpreter's path"),
        """path of the interpreter that engines and the KV pool's servers run on,
        for a vLLM in an environment of its own; aseer of the same release is
        installed there, and vLLM need not be here. None = the one that runs this.""",
    ] = default(None)
    log_dir: Annotated[
        AnyPath,
        directory,
        """where the engines' logs go and stay; None = in the directory of the
        sockets, which is removed when the engine closes.""",
    ] = default(None)
    logs_calls: Annotated[
        bool,
        """whether every rollout's decisions are written to `log_dir`, one file
        each, as large as what is generated; `aseer replay-log` makes them again.""",
    ] = False
    journal_dir: Annotated[
        AnyPath,
        directory,
        """where `Engine.rollout(journal=...)` keeps journals, a file each; it is
        made when it is needed. Files there are the user's to remove.""",
    ] = default(None)
    metrics_address: Annotated[
        str | None,
        host_and_port,
        """host and port, such as "127.0.0.1:9464", where Prometheus finds the
        engine's figures (`/metrics`); None = nowhere. Port 0 is any that is free:
        `Engine.metrics_url` has it.""",
    ] = None
    listen: Annotated[
        str | None,
        check_address,
        """address at which nodes on other hosts may join this engine, such as
        "tcp://0.0.0.0:5557"; None = this machine alone, or with `nodes` any free
        port. Connections are encrypted, with a key that all hosts share; without a
        key only an address of this machine is allowed. See docs/cluster.md.""",
    ] = None
    nodes: Annotated[
        Literal["ray"] | None,
        launcher_name,
        """what starts the nodes; None = you do, by `aseer node`. "ray" has Ray
        place them, one a host, with the GPUs reserved that their engines use; then
        all engines run there. See docs/cluster.md.""",
    ] = None
    min_nodes: Annotated[
        int,
        whole(0),
        """nodes of other hosts that must be up before the engine is open; more may
        join at any time. With `nodes`, how many hosts are taken; 0 = all that have
        the GPUs, also those that join Ray later.""",
    ] = 0
    node_timeout_s: Annotated[
        float,
        seconds,
        """a node of which nothing is heard for so many seconds is lost, and its
        work goes on elsewhere.""",
    ] = 30.0
    key_file: Annotated[
        AnyPath,
        file_path,
        """path of the file with the key; None = what ASEER_KEY or ASEER_KEY_FILE in
        the environment say, or ~/.config/aseer/key.""",
    ] = default(None)
    controller_file: Annotated[
        AnyPath,
        file_path,
        """a file that is written while the engine listens, with its address, for
        `aseer node --controller-file`; None = none.""",
    ] = default(None)
    weights: Annotated[
        Literal["full", "delta"],
        """how new weights go to nodes of other hosts: "full", or as what has
        changed since the last update ("delta"), which costs both ends some CPU time
        and is a small part of the bytes after a step of training. What a node has
        in the end is the same, byte for byte, and checked. See docs/cluster.md.""",
    ] = "full"
    weights_dir: Annotated[
        AnyPath,
        directory,
        """where `update_weights` puts tensors for the engines, as large as the
        model, twice that once there was an update, if as much again is free then,
        and in any case during one; None = shared memory (/dev/shm).""",
    ] = default(None)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.heartbeat_timeout_s < 4 * self.report_interval_s:
            raise refusal(
                "heartbeat_timeout_s",
                self.heartbeat_timeout_s,
                f"at least 4 reports, of report_interval_s={self.report_interval_s:g}",
            )
        if self.logs_calls and self.log_dir is None:
            raise refusal("log_dir", None, "a directory, since logs_calls is True")
        check_engine_args(self.engine_args, self.speculation.method)
        check_variables(self.env)
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
    return config.speculation.method != "off" or has_drafter(config.engine_args)
