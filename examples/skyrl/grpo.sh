#!/bin/bash
# GRPO by SkyRL, with rollouts by aseer.
#
#   MODEL=Qwen/Qwen3-8B TRAIN=train.parquet VAL=val.parquet GPUS=8 examples/skyrl/grpo.sh
#
# More of SkyRL's settings may follow, which take precedence. PYTHON is the interpreter of
# SkyRL's environment, ENGINE_PYTHON that of an environment with vLLM (and the same aseer),
# if that is another one: SkyRL and vLLM pin different versions of the same packages.
set -eu
: "${MODEL:?the name or directory of the model}"
: "${TRAIN:?a parquet or jsonl file of prompts, as SkyRL reads them}"
: "${VAL:=$TRAIN}"
: "${GPUS:=1}"
: "${TENSOR_PARALLEL:=1}"
: "${PYTHON:=python}"

engine=()
if [ -n "${ENGINE_PYTHON:-}" ]; then
  engine=("generator.inference_engine.engine_init_kwargs.aseer.python=$ENGINE_PYTHON")
fi

exec "$PYTHON" -m skyrl.train.entrypoints.main_base \
  trainer.override_entrypoint=aseer.integrations.skyrl \
  trainer.policy.model.path="$MODEL" \
  data.train_data="['$TRAIN']" data.val_data="['$VAL']" \
  trainer.strategy=fsdp \
  trainer.algorithm.advantage_estimator=grpo \
  trainer.algorithm.use_kl_loss=false \
  trainer.placement.colocate_all=true \
  trainer.placement.policy_num_gpus_per_node="$GPUS" \
  trainer.train_batch_size=256 trainer.policy_mini_batch_size=128 \
  trainer.max_prompt_length=1024 \
  trainer.policy.optimizer_config.lr=1e-6 \
  generator.n_samples_per_prompt=8 \
  generator.sampling_params.max_generate_length=8192 \
  generator.inference_engine.num_engines="$((GPUS / TENSOR_PARALLEL))" \
  generator.inference_engine.tensor_parallel_size="$TENSOR_PARALLEL" \
  generator.inference_engine.gpu_memory_utilization=0.7 \
  "${engine[@]}" "$@"
