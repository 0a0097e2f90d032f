"""What SkyRL's processes do, with stand-ins for SkyRL and Ray."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from aseer.errors import ConfigError, WeightUpdateError
from tests.unit.integrations.actors import Actor, Answer, Call, Target
from tests.unit.integrations.test_skyrl_settings import SAMPLING, config_of

NAME = "aseer.integrations.skyrl"
POLICY = "aseer.integrations.skyrl_policy"


class Server(Actor):
    """As SkyRL's workers see it."""

    def __init__(self) -> None:
        super().__init__("stop", "sleep", "wake_up", "hold", "resume_generation")
        self.sample = Call(self._sample)
        self.__ray_call__ = Call(lambda function: function(self))

    def _sample(self, prompt: Any, sampling: Any, *, n: int) -> Any:
        self.told.append(("sample", tuple(prompt), n))
        return SimpleNamespace(
            token_ids=[*prompt, 9], logprobs=[-1.0, -2.0], finish_reason="stop"
        )


class Trainer:
    def __init__(self) -> None:
        self.built: Any = None

    def build_models(self, policy: Any, critic: Any, ref: Any) -> None:
        self.built = (policy, critic, ref)


class BasePPOExp:
    """SkyRL's, which asks its hooks in this order."""

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg
        self.tokenizer = SimpleNamespace(batch_decode=lambda ids: [f"{i}" for i in ids])
        self.colocate_pg: Any = None

    def get_trainer(self, **_: Any) -> Trainer:
        return Trainer()

    def run(self) -> None:
        self.client = self.get_inference_client()  # type: ignore[attr-defined]
        self.trainer = self.get_trainer()
        self.trainer.build_models("policy", "critic", "ref")
        if getattr(self.cfg, "fails", False):
            raise RuntimeError("out of memory")


class FSDPPolicyWorkerBase:
    async def init_weight_sync_state(self, client: Any, config: Any) -> None:
        weight_sync = sys.modules["skyrl.backends.skyrl_train.weight_sync"]
        strategy = weight_sync.get_transfer_strategy_cls(  # type: ignore[attr-defined]
            weight_sync_backend="nccl", colocate_all=True
        )
        info = strategy.create_init_info(config, inference_world_size=1)
        self.sender = strategy.create_sender(info, inference_client=client)


class AutoConfig:
    """Of a model with two tensors, unless its name says otherwise."""

    @staticmethod
    def from_pretrained(path: str, *, trust_remote_code: bool) -> Any:
        text = SimpleNamespace(tie_word_embeddings=path.endswith("tied"))
        return SimpleNamespace(get_text_config=lambda: text)


@pytest.fixture
def world(monkeypatch):
    pytest.importorskip("torch")
    """The module as SkyRL's processes have it, and what stands for the rest."""
    state = SimpleNamespace(rank=0, node="n0", actor=Server(), options=None, given=None)

    class Remote:
        def __init__(self, what: Any) -> None:
            self.what = what

        def options(self, **options: Any) -> Any:
            state.options = options
            return self

        def remote(self, given: Any) -> Any:
            state.given = given
            if callable(self.what) and not isinstance(self.what, type):
                return Answer(self.what(given))
            return state.actor

    ray = {
        "remote": lambda *args, **_: Remote(args[0]) if args else Remote,
        "get": lambda answer, timeout=None: answer.value,
        "get_runtime_context": lambda: SimpleNamespace(get_node_id=lambda: state.node),
    }

    def parse(overrides: list[str]) -> Any:
        state.overrides = overrides
        return config_of()

    config = SimpleNamespace(from_cli_overrides=parse)

    train = "skyrl.backends.skyrl_train"
    names: dict[str, dict[str, Any]] = {
        "ray": ray,
        "ray.util": {},
        "ray.util.scheduling_strategies": {
            "NodeAffinitySchedulingStrategy": lambda node, soft: node
        },
        "skyrl": {},
        "skyrl.backends": {},
        train: {},
        f"{train}.weight_sync": {"get_transfer_strategy_cls": None},
        f"{train}.weight_sync.transfer_strategy": {
            "WeightSyncInitInfo": SimpleNamespace,
            "WeightTransferSender": object,
            "WeightTransferStrategy": object,
        },
        f"{train}.inference_servers": {},
        f"{train}.inference_servers.base": {"InferenceEngineInterface": object},
        f"{train}.inference_servers.engine_utils": {
            "get_sampling_params_for_backend": lambda backend, params: SAMPLING
        },
        f"{train}.inference_servers.utils": {
            "resolve_policy_model_name": lambda config: "policy"
        },
        f"{train}.workers": {},
        f"{train}.workers.fsdp": {},
        f"{train}.workers.fsdp.fsdp_worker": {
            "FSDPPolicyWorkerBase": FSDPPolicyWorkerBase
        },
        "skyrl.train": {},
        "skyrl.train.config": {"SkyRLTrainConfig": config},
        "skyrl.train.entrypoints": {},
        "skyrl.train.entrypoints.main_base": {"BasePPOExp": BasePPOExp},
        "skyrl.train.utils": {"validate_cfg": lambda config: None},
        "skyrl.train.utils.utils": {"initialize_ray": lambda config: None},
        "transformers": {"AutoConfig": AutoConfig},
    }
    for name, content in names.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    names_of = sys.modules[train]
    names_of.weight_sync = sys.modules[f"{train}.weight_sync"]  # type: ignore[attr-defined]
    for name in (NAME, POLICY):
        monkeypatch.delitem(sys.modules, name, raising=False)
    state.policy = importlib.import_module(POLICY)
    assert NAME not in sys.modules  # a worker of the policy must not import it
    state.module = importlib.import_module(NAME)
    dist = SimpleNamespace(get_rank=lambda: state.rank)
    monkeypatch.setattr(state.policy, "dist", dist)
    yield state
    for name in (NAME, POLICY):
        sys.modules.pop(name, None)


def client_of(world: Any, **changes: Any) -> Any:
    experiment = world.module.AseerPPOExp(config_of(**changes))
    return experiment.get_inference_client()


async def test_a_model_that_skyrl_would_untie_starts_no_engine(world):
    with pytest.raises(ConfigError, match="tie_word_embeddings=false"):
        client_of(world, trainer__policy__model__path="a-model-tied")
    assert world.given is None


async def test_a_batch_of_prompts_is_sampled_as_groups(world):
    client = client_of(world)
    batch = {"prompt_token_ids": [[1], [2], [1]], "sampling_params": SAMPLING}
    answer = await client.generate(batch, model="policy")
    assert world.actor.told[-3:] == [
        ("sample", (1,), 2),
        ("sample", (2,), 1),
        ("sample", (1,), 2),
    ]
    assert answer["response_ids"] == [[1, 9], [2, 9], [1, 9]]
    assert answer["responses"] == ["[1, 9]", "[2, 9]", "[1, 9]"]
    assert answer["response_logprobs"] == [[-1.0, -2.0]] * 3
    assert answer["stop_reasons"] == ["stop"] * 3
    assert answer["rollout_expert_indices"] is None


async def test_turns_of_an_agent_loop_wait_for_siblings_once(world):
    client = client_of(world)
    quiet = SAMPLING | {"logprobs": None}
    for _ in range(2):
        batch = {"prompt_token_ids": [[1]], "session_ids": ["a_0"]}
        answer = await client.generate(batch | {"sampling_params": quiet})
        assert answer["response_logprobs"] is None
    await client.finish_session("a_0")
    await client.generate({"prompt_token_ids": [[1]], "session_ids": ["a_0"]})
    assert [told[2] for told in world.actor.told if told[0] == "sample"] == [5, 1, 5]


async def test_what_cannot_be_sampled_is_refused(world):
    client = client_of(world)
    for batch in ({"prompts": [[]]}, {"prompt_token_ids": [[1]], "mm_features": [1]}):
        with pytest.raises(ConfigError, match="prompt_token_ids"):
            await client.generate(batch)
    for call in (client.chat_completion, client.completion):
        with pytest.raises(ConfigError, match="OpenAI endpoint"):
            await call({})
    with pytest.raises(ConfigError, match="OpenAI endpoint"):
        client.get_endpoint_url()
    with pytest.raises(ConfigError, match="no adapters"):
        await client.update_named_weights(None)


async def test_memory_and_pauses_are_the_engines(world):
    client = client_of(world)
    world.actor.told.clear()
    await client.sleep()
    await client.wake_up(tags=["weights"])
    await client.pause_generation()
    await client.resume_generation()
    await client.reset_prefix_cache(reset_running_requests=True)
    await client.init_weight_update_communicator(None)
    client.increment_weight_version()
    assert client.weight_version == 1
    assert client.model_name == "policy"
    assert await client.get_world_size() == (8, 2)
    await client.teardown()
    assert world.actor.told == [
        ("sleep",),
        ("wake_up", ["weights"]),
        ("hold",),
        ("resume_generation",),
        ("stop",),
    ]


def test_an_engine_that_shares_gpus_begins_asleep_and_where_they_are(world):
    experiment = world.module.AseerPPOExp(config_of())
    assert not experiment.cfg.generator.inference_engine.enable_ray_prometheus_stats
    experiment.colocate_pg = SimpleNamespace(
        bundle_node_ids=["n0", "n0"], bundle_gpu_ids=[3, 2]
    )
    experiment.run()
    assert world.given.engine["gpus"] == ["3", "2"]
    assert world.options["num_gpus"] == 0
    assert world.options["scheduling_strategy"] == "n0"
    assert world.actor.told == [("start",), ("sleep",), ("stop",)]
    worker, *others = experiment.trainer.built
    assert issubclass(worker.what, FSDPPolicyWorkerBase)
    assert others == ["critic", "ref"]
    experiment.colocate_pg.bundle_node_ids = ["n0", "n1"]
    with pytest.raises(ConfigError, match="are on 2; use one node"):
        experiment.get_inference_client()


def test_an_engine_with_gpus_of_its_own_asks_ray_for_them(world):
    experiment = world.module.AseerPPOExp(
        config_of(trainer__placement__colocate_all=False)
    )
    experiment.cfg.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        experiment.run()
    assert "gpus" not in world.given.engine
    assert world.options["num_gpus"] == 8
    assert world.actor.told == [("start",), ("stop",)], "also after an error"


async def sender_of(world: Any, client: Any) -> Any:
    worker = world.module.policy_worker("fsdp")()
    await worker.init_weight_sync_state(client, None)
    return worker.sender


def chunks(taken: list[str]) -> Any:
    for name in "abc":
        taken.append(name)
        yield SimpleNamespace(names=[name, f"{name}2"], tensors=[0, 1])


async def test_rank_0_sends_and_the_others_gather_with_it(world):
    client = client_of(world)
    world.actor.told.clear()
    for rank in (1, 0):
        world.rank, taken = rank, []
        sender = await sender_of(world, client)
        await sender.send_chunks(chunks(taken), weight_metadata={})
        assert taken == ["a", "b", "c"]
    assert world.actor.target.sent == ["a", "a2", "b", "b2", "c", "c2"]
    assert [told[0] for told in world.actor.told] == ["finish_update"]


async def test_refused_weights_leave_no_rank_waiting(world):
    client = client_of(world)
    sender = await sender_of(world, client)
    world.actor.target = Target(refuses=True)
    taken: list[str] = []
    with pytest.raises(WeightUpdateError, match="no such tensor"):
        await sender.send_chunks(chunks(taken))
    assert taken == ["a", "b", "c"]
    assert world.actor.told[-1][0] == "abandon_update"


async def test_a_policy_on_another_node_is_refused_at_the_start(world):
    client = client_of(world)
    world.node, world.rank = "n1", 1
    await sender_of(world, client)
    world.rank = 0
    with pytest.raises(ConfigError, match="different nodes"):
        await sender_of(world, client)


def test_the_entry_point_trains(world, monkeypatch):
    override = "trainer.override_entrypoint=aseer.integrations.skyrl"
    monkeypatch.setattr(sys, "argv", ["main_base", override, "trainer.seed=1"])
    world.module.main()
    assert world.overrides == ["trainer.seed=1"], "SkyRL knows no such key"
    assert world.actor.told == [("start",), ("stop",)]
