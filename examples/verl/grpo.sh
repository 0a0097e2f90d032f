#!/bin/bash
# GRPO by verl, with rollouts by aseer.
#
#   MODEL=Qwen/Qwen3-8B TRAIN=train.parquet VAL=val.parquet GPUS=8 examples/verl/grpo.sh
#
# More of verl's settings may follow, which take precedence. PYTHON is the interpreter of
# verl's environment, ENGINE_PYTHON that of an environment with vLLM (and the same aseer),
# if that is another one: verl and vLLM pin different versions of the same packages.
set -eu
: "${MODEL:?the name or directory of the model}"
: "${TRAIN:?a parquet file of prompts, as verl reads them}"
: "${VAL:=$TRAIN}"
: "${GPUS:=1}"
: "${TENSOR_PARALLEL:=1}"
: "${PYTHON:=python}"

engine=()
if [ -n "${ENGINE_PYTHON:-}" ]; then
  engine=("+actor_rollout_ref.rollout.engine_kwargs.aseer.python=$ENGINE_PYTHON")
fi

exec "$PYTHON" -m verl.trainer.main_ppo \
  actor_rollout_ref.rollout.name=aseer \
  algorithm.adv_estimator=grpo \
  data.train_files="$TRAIN" data.val_files="$VAL" \
  data.train_batch_size=256 data.max_prompt_length=1024 data.max_response_length=8192 \
  actor_rollout_ref.model.path="$MODEL" \
  actor_rollout_ref.actor.strategy=fsdp2 \
  actor_rollout_ref.actor.ppo_mini_batch_size=128 \
  actor_rollout_ref.actor.use_dynamic_bsz=True \
  actor_rollout_ref.actor.use_kl_loss=False \
  actor_rollout_ref.actor.fsdp_config.param_offload=True \
  actor_rollout_ref.actor.fsdp_config.optimizer_offload=True \
  actor_rollout_ref.actor.optim.lr=1e-6 \
  actor_rollout_ref.rollout.n=8 \
  actor_rollout_ref.rollout.tensor_model_parallel_size="$TENSOR_PARALLEL" \
  actor_rollout_ref.rollout.gpu_memory_utilization=0.7 \
  actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True \
  actor_rollout_ref.rollout.calculate_log_probs=True \
  trainer.n_gpus_per_node="$GPUS" trainer.nnodes=1 \
  trainer.logger='[console,file]' trainer.total_epochs=1 \
  "${engine[@]}" "$@"
