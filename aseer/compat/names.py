"""Every name of vLLM's and LMCache's that aseer uses, and what dies without it.

A row is `module  name  name  ...`; a name may be a path such as `Class.method`, and the
parameters that aseer gives follow in parentheses. `?` behind a name: aseer looks
whether it is there, and does without.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Use(NamedTuple):
    """A name that is used.

    Attributes:
        given: parameters that it must take.
        is_optional: whether aseer does without.
    """

    module: str
    path: str
    given: frozenset[str]
    is_optional: bool
    feature: str
    used_in: str

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


_ENGINES = """
vllm.engine.arg_utils  AsyncEngineArgs EngineArgs.create_engine_config(usage_context)
  EngineArgs.logprobs_mode EngineArgs.enable_prefix_caching EngineArgs.seed
  EngineArgs.disable_log_stats EngineArgs.worker_extension_cls EngineArgs.block_size
  EngineArgs.kv_cache_memory_bytes EngineArgs.kv_transfer_config EngineArgs.max_num_seqs
  EngineArgs.tensor_parallel_size EngineArgs.enforce_eager EngineArgs.stream_interval?
  EngineArgs.distributed_executor_backend EngineArgs.get_batch_defaults
  EngineArgs.numa_bind EngineArgs.numa_bind_nodes
vllm.usage.usage_lib  UsageContext.LLM_CLASS
vllm.inputs.engine  tokens_input(prompt_token_ids,cache_salt)
vllm.v1.engine.async_llm
  AsyncLLM.from_engine_args(engine_args,stat_loggers,usage_context)
  AsyncLLM.generate(prompt,sampling_params,request_id) AsyncLLM.abort(request_id)
  AsyncLLM.collective_rpc(method,args) AsyncLLM.reset_prefix_cache AsyncLLM.errored
  AsyncLLM.get_tokenizer AsyncLLM.shutdown AsyncLLM.vllm_config
  AsyncLLM.reset_encoder_cache?
vllm.v1.engine.exceptions  EngineDeadError
vllm.v1.engine.detokenizer  IncrementalDetokenizer.from_new_request(tokenizer,request)
  IncrementalDetokenizer.update(new_token_ids,stop_terminated)
  IncrementalDetokenizer.get_next_output_text(finished,delta)
  IncrementalDetokenizer.num_output_tokens FastIncrementalDetokenizer
vllm.v1.kv_cache_interface  UniformTypeKVCacheSpecs MambaSpec SlidingWindowSpec
  ChunkedLocalAttentionSpec
vllm.sampling_params  SamplingParams.flat_logprobs SamplingParams.extra_args
  SamplingParams.structured_outputs SamplingParams.output_kind
  SamplingParams.stream_interval? RequestOutputKind.DELTA RequestOutputKind.FINAL_ONLY
  StructuredOutputsParams
vllm.outputs  RequestOutput.num_cached_tokens
vllm.logprobs  FlatLogprobs.start_indices FlatLogprobs.logprobs
vllm.config.cache  CacheConfig.num_gpu_blocks CacheConfig.block_size
  CacheConfig.enable_prefix_caching CacheConfig.kv_cache_size_tokens
vllm.config.scheduler  SchedulerConfig.max_num_seqs SchedulerConfig.async_scheduling
vllm.config.model  ModelConfig.max_model_len ModelConfig.get_vocab_size
  ModelConfig.enable_sleep_mode ModelConfig.revision
vllm.config.device  DeviceConfig.device_type
vllm.config.vllm  VllmConfig._maybe_disable_dynamic_sd_for_v1? VllmConfig
vllm.platforms  current_platform
vllm.platforms.interface  Platform.import_kernels Platform.is_cpu
  Platform.register_triton_kernel_overrides?
"""
_IMAGES = """
vllm.renderers.base  BaseRenderer.render_cmpl_async? BaseRenderer.get_mm_processor?
vllm.multimodal.processing.context  BaseProcessingInfo.allowed_mm_limits?
"""
_SLEEP = """
vllm.v1.engine.async_llm  AsyncLLM.sleep(level) AsyncLLM.wake_up(tags)
"""
_FIGURES = """
vllm.v1.metrics.loggers  StatLoggerBase.record(scheduler_stats,iteration_stats)
  StatLoggerBase.log_engine_initialized
vllm.v1.metrics.stats  SchedulerStats.num_running_reqs SchedulerStats.num_waiting_reqs
  SchedulerStats.kv_cache_usage SchedulerStats.kv_connector_stats
  SchedulerStats.spec_decoding_stats IterationStats.num_preempted_reqs
  IterationStats.finished_requests FinishedRequestStats.num_prompt_tokens
  FinishedRequestStats.num_cached_tokens FinishedRequestStats.prefill_time
vllm.v1.spec_decode.metrics  SpecDecodingStats.num_drafts
  SpecDecodingStats.num_draft_tokens_per_pos?
  SpecDecodingStats.num_accepted_tokens_per_pos?
"""
_WEIGHTS = """
vllm.v1.worker.gpu_worker  Worker.reload_weights Worker.model_runner
vllm.v1.worker.gpu_model_runner  GPUModelRunner.reload_weights(weights_iterator)
  GPUModelRunner.get_model
vllm.v1.worker.gpu.model_runner  GPUModelRunner.reload_weights GPUModelRunner.get_model
vllm.model_executor.model_loader.reload.layerwise  get_layerwise_info(layer)
vllm.model_executor.model_loader.reload.types  LayerReloadingInfo.loaded_weights
  LayerReloadingInfo.reset LayerReloadingInfo.restore_metadata
vllm.model_executor.model_loader.reload.meta  SKIP_TENSORS
vllm.model_executor.layers.quantization.kv_cache  BaseKVCacheMethod
vllm.config.parallel  ParallelConfig.node_rank
vllm.distributed.parallel_state  get_tensor_model_parallel_rank
vllm.model_executor.layers.vocab_parallel_embedding  ParallelLMHead
  UnquantizedEmbeddingMethod.process_weights_after_loading
"""
_SPANS = """
vllm.engine.arg_utils  EngineArgs.create_engine_config(usage_context,headless)
  EngineArgs.nnodes EngineArgs.node_rank EngineArgs.master_addr EngineArgs.master_port
vllm.v1.executor.multiproc_executor
  MultiprocExecutor.__init__(vllm_config,monitor_workers)
  MultiprocExecutor.start_worker_monitor(inline)
"""
_TEAMS = """
vllm.engine.arg_utils  EngineArgs.data_parallel_size EngineArgs.data_parallel_size_local
  EngineArgs.data_parallel_rank EngineArgs.data_parallel_address
  EngineArgs.data_parallel_rpc_port
"""
_ADAPTERS = """
vllm.engine.arg_utils  EngineArgs.enable_lora EngineArgs.max_lora_rank
  EngineArgs.max_loras
vllm.v1.engine.async_llm  AsyncLLM.add_lora(lora_request) AsyncLLM.remove_lora(lora_id)
  AsyncLLM.generate(lora_request)
vllm.lora.request  LoRARequest
vllm.config.lora  LoRAConfig.max_lora_rank
"""
_TRANSFER = """
vllm.engine.arg_utils  EngineArgs.weight_transfer_config
vllm.config.vllm  VllmConfig.weight_transfer_config
vllm.v1.engine.async_llm  AsyncLLM.init_weight_transfer_engine(request)
  AsyncLLM.start_weight_update AsyncLLM.update_weights(request)
  AsyncLLM.finish_weight_update AsyncLLM.compute_weight_checksums?
vllm.v1.worker.gpu_worker  Worker.weight_transfer_engine
vllm.distributed.weight_transfer.base  WeightTransferInitRequest.init_info
  WeightTransferUpdateRequest.update_info WeightTransferEngine.parse_init_info
  WeightTransferEngine.parse_update_info WeightTransferEngine.shutdown
vllm.distributed.weight_transfer.factory
  WeightTransferEngineFactory.register_engine(name,module_path_or_cls,class_name)
vllm.distributed.weight_transfer.ipc_engine  IPCWeightTransferEngine
  IPCWeightTransferUpdateInfo.ipc_handles IPCWeightTransferUpdateInfo.tensor_sizes
  IPCWeightTransferUpdateInfo.packed? IPCWeightTransferInitInfo.packed?
vllm.distributed.weight_transfer.nccl_engine  NCCLWeightTransferEngine
  NCCLWeightTransferUpdateInfo.names NCCLWeightTransferUpdateInfo.packed?
vllm.distributed.weight_transfer.nccl_common  trainer_init(init_info)
  NCCLWeightTransferInitInfo.rank_offset NCCLWeightTransferInitInfo.packed?
vllm.distributed.weight_transfer.packed_tensor
  packed_nccl_broadcast_producer(iterator,group,src,buffer_size_bytes,num_buffers)
vllm.distributed.device_communicators.pynccl_wrapper  NCCLLibrary.ncclCommAbort
"""
_CPU = """
vllm.distributed.device_communicators.shm_broadcast
  SpinCondition.__init__(busy_loop_s)?
vllm.v1.worker.gpu_model_runner  GPUModelRunner.sample_tokens?
  GPUModelRunner.discard_request_mask? GPUModelRunner._prepare_inputs?
"""
_DRAFTS = """
vllm.config.speculative  SpeculativeConfig.num_speculative_tokens
  SpeculativeConfig.method SpeculativeConfig.num_speculative_tokens_per_batch_size?
vllm.config.compilation  CompilationConfig.cudagraph_mode CUDAGraphMode.NONE
  CompilationConfig.max_cudagraph_capture_size
vllm.v1.executor.multiproc_executor  MultiprocExecutor.sample_tokens
  MultiprocExecutor.take_draft_token_ids
vllm.v1.worker.gpu_model_runner  GPUModelRunner.take_draft_token_ids
  GPUModelRunner.input_batch GPUModelRunner.requests GPUModelRunner.sampler
  GPUModelRunner.rejection_sampler GPUModelRunner.drafter
  GPUModelRunner.num_spec_tokens GPUModelRunner.effective_drafter_max_model_len?
vllm.v1.worker.gpu_input_batch  InputBatch.req_ids InputBatch.req_id_to_index
  InputBatch.condense InputBatch.swap_states(i1,i2) InputBatch.num_reqs
  InputBatch.num_prompt_tokens InputBatch.num_tokens_no_spec InputBatch.token_ids_cpu
  InputBatch.generators InputBatch.num_reqs CachedRequestState.sampling_params
vllm.v1.spec_decode.custom_class_proposer  create_custom_proposer
vllm.v1.outputs  LogprobsTensors SamplerOutput
vllm.v1.sample.rejection_sampler
  RejectionSampler.forward(metadata,draft_probs,logits,sampling_metadata)
  RejectionSampler.apply_logits_processors expand_batch_to_tokens
vllm.v1.sample.sampler  Sampler.sample(logits,sampling_metadata)
  Sampler.gather_logprobs(logprobs,num_logprobs,token_ids)
  Sampler.apply_logits_processors
vllm.v1.sample.logits_processor  LogitsProcessors
vllm.v1.sample.metadata  SamplingMetadata
vllm.v1.spec_decode.metadata  SpecDecodeMetadata.make_dummy(draft_token_ids,device)
vllm.v1.core.sched.output  SchedulerOutput.total_num_scheduled_tokens
  SchedulerOutput.scheduled_spec_decode_tokens
"""
_DRAFTS_V2 = """
vllm.config.vllm  VllmConfig.use_v2_model_runner? VllmConfig.additional_config
vllm.v1.worker.gpu.spec_decode  init_speculator(vllm_config,device)?
vllm.v1.worker.gpu.spec_decode.ngram.speculator  NgramGPUSpeculator?
vllm.v1.worker.gpu.spec_decode.rejection_sampler  RejectionSampler.__call__(logits)?
vllm.v1.worker.gpu.model_runner
  GPUModelRunner.execute_model(scheduler_output,dummy_run)
  GPUModelRunner.sample_tokens(grammar_output) GPUModelRunner.req_states
  GPUModelRunner.speculator GPUModelRunner.sampler GPUModelRunner.rejection_sampler
  GPUModelRunner.max_num_reqs GPUModelRunner.max_model_len
  GPUModelRunner.num_speculative_steps GPUModelRunner.device
vllm.v1.worker.gpu.states  RequestState.req_id_to_index RequestState.draft_tokens
  RequestState.prefill_len
vllm.v1.worker.gpu.async_utils  AsyncOutput.copy_event AsyncOutput.sampled_token_ids
  AsyncOutput.num_sampled_tokens_np AsyncOutput.model_runner_output
vllm.v1.worker.gpu.input_batch  InputBatch.cu_num_logits InputBatch.logits_indices
  InputBatch.make_dummy(num_reqs,num_tokens,input_buffers)
  InputBatch.expanded_local_pos? InputBatch.seq_lens_cpu_upper_bound?
  InputBuffers.__init__(max_num_reqs,max_num_tokens,device)
  get_num_sampled_and_rejected?
vllm.v1.worker.gpu.sample.sampler  Sampler.__call__(logits,input_batch)
  Sampler.add_request(req_idx,sampling_params) Sampler.apply_staged_writes
  Sampler.sampling_states Sampler.req_states
vllm.v1.worker.gpu.sample.output  SamplerOutput.num_sampled SamplerOutput.num_rejected?
vllm.v1.core.sched.output  SchedulerOutput.finished_req_ids
  SchedulerOutput.preempted_req_ids SchedulerOutput.num_scheduled_tokens
  NewRequestData.prefill_token_ids NewRequestData.sampling_params
  GrammarOutput.grammar_bitmask GrammarOutput.structured_output_request_ids
  GrammarOutput.num_acceptable_drafts?
vllm.utils.torch_utils  async_tensor_h2d?
"""
_POOL_VLLM = """
vllm.distributed.kv_transfer.kv_connector.v1.base  KVConnectorRole.WORKER
  KVConnectorRole.SCHEDULER KVConnectorBase_V1.register_kv_caches
  KVConnectorBase_V1.unregister_kv_caches? KVConnectorBase_V1.restore_kv_caches?
  KVConnectorBase_V1.start_load_kv KVConnectorBase_V1.get_num_new_matched_tokens
  KVConnectorBase_V1.build_connector_meta KVConnectorBase_V1.update_connector_output
  KVConnectorBase_V1.request_finished(request,block_ids) KVConnectorBase_V1.reset_cache
  KVConnectorBase_V1.get_kv_connector_stats KVConnectorBase_V1.build_prom_metrics
  KVConnectorBase_V1.build_kv_connector_stats KVConnectorMetadata
  SupportsHMA.request_finished_all_groups(request,block_ids)
vllm.distributed.kv_transfer.kv_transfer_state  has_kv_transfer_group
  get_kv_transfer_group
vllm.distributed.kv_transfer.kv_connector.v1.metrics  KVConnectorStats
vllm.v1.request  RequestStatus.FINISHED_LENGTH_CAPPED RequestStatus.FINISHED_STOPPED
  Request.num_computed_tokens Request.num_tokens Request.status
vllm.v1.core.sched.output  SchedulerOutput.scheduled_new_reqs
  SchedulerOutput.scheduled_cached_reqs NewRequestData.num_computed_tokens
  CachedRequestData.num_computed_tokens
vllm.v1.outputs  KVConnectorOutput.finished_recving KVConnectorOutput.invalid_block_ids
vllm.config.kv_transfer  KVTransferConfig.kv_load_failure_policy
  KVTransferConfig.kv_connector_module_path
"""
_POOL_LMCACHE = """
lmcache.integration.vllm.lmcache_mp_connector
  get_group_tokens_per_block(vllm_config,kv_cache_config)
  LMCacheMPConnector.register_kv_caches(kv_caches) LMCacheMPConnector.start_load_kv
  LMCacheMPConnector.request_finished LMCacheMPConnector.reset_cache
  LMCacheMPConnector.worker_adapter LMCacheMPConnector.scheduler_adapter
  LMCacheMPConnector.request_trackers LMCacheMPConnector._can_store
  LMCacheMPConnector._save_decode_cache LMCacheMPConnector._group_tokens_per_block
  LMCacheMPConnector._report_block_allocation_deltas
  LMCacheMPConnector._get_connector_metadata
lmcache.integration.vllm.lmcache_mp_metadata
  LMCacheMPRequestState.BYPASS_LMCACHE LMCacheMPRequestTracker.num_scheduled_tokens
  LMCacheMPRequestTracker.num_vllm_hit_tokens
  LMCacheMPRequestTracker.num_lmcache_hit_tokens LMCacheMPConnectorMetadata.requests
  LMCacheMPRequestMetadata.GetStoreMetadata(save_decode_cache)
lmcache.integration.vllm.vllm_multi_process_adapter
  LMCacheMPWorkerAdapter.submit_store_request LMCacheMPWorkerAdapter.get_finished
  LMCacheMPWorkerAdapter.submit_retrieve_request
  LMCacheMPWorkerAdapter.create_recorded_event
  LMCacheMPWorkerAdapter.handle_preemptions(need_flush_before_forward)
  LMCacheMPWorkerAdapter._send_register_kv_caches_request
  LMCacheMPWorkerAdapter._health_event LMCacheMPWorkerAdapter._mq_timeout
  LMCacheMPWorkerAdapter.transfer_ctx LMCacheMPWorkerAdapter.store_futures
  LMCacheMPWorkerAdapter.finished_stores LMCacheMPWorkerAdapter._returned_finished
  LMCacheMPWorkerAdapter.error_block_ids LMCacheMPWorkerAdapter._failed_request_ids
  LMCacheMPWorkerAdapter._dropped_retrieves LMCacheMPSchedulerAdapter._health_events
  LMCacheMPSchedulerAdapter._mq_timeout LMCacheMPSchedulerAdapter.cleanup_lookup_result
  LMCacheMPSchedulerAdapter.maybe_submit_lookup_request
  LMCacheMPSchedulerAdapter.check_lookup_result
  LMCacheMPSchedulerAdapter.free_lookup_locks LMCacheMPSchedulerAdapter.end_session
  LoadStoreOp.flat_block_ids
lmcache.v1.multiprocess.transfer_context.worker_transfer
  EngineDrivenTransferContext._engine_driven_context
  EngineDrivenTransferContext.submit_store EngineDrivenTransferContext.unregister
  EngineDrivenTransferContext.close
lmcache.v1.multiprocess.transfer_context.async_engine_driven
  AsyncEngineDrivenTransferContext.flush_inflight_stores
lmcache.v1.multiprocess.transfer_context.base
  EngineDrivenContext.prepare_store(key,instance_id)
  EngineDrivenContext.commit_store(key,instance_id,chunks)
  EngineDrivenContext.mq_timeout
lmcache.v1.multiprocess.transfer_context.pickle  EngineDrivenContextPickle.commit_store
"""
_SERVER = """
lmcache.v1.distributed.api  Tier.L1 Tier.L2
lmcache.v1.distributed.config  add_storage_manager_args parse_args_to_config
lmcache.v1.distributed.internal_api  L1ManagerListener L2AdapterListener
lmcache.v1.distributed.error  L1Error.SUCCESS
lmcache.v1.distributed.l1_manager  L1Manager.reserve_read(keys)
  L1Manager.finish_read(keys) L1Manager.finish_write(keys,tag)
  L1Manager.finish_write_and_delete(keys,tag)
  L1Manager.reserve_write(keys,is_temporary,layout_desc,tag)
  L1Manager.get_memory_usage L1Manager.get_object_state
lmcache.v1.distributed.l2_adapters.native_connector_l2_adapter
  NativeConnectorL2Adapter.submit_store_task(keys,objects)
  NativeConnectorL2Adapter.submit_load_task(keys,objects)
  NativeConnectorL2Adapter.query_load_result(task_id)
  NativeConnectorL2Adapter.delete(keys)
lmcache.v1.distributed.storage_manager  _L1_WRITE_TAG
  StorageManager._l1_managers_by_id StorageManager.delete_l1_keys
lmcache.v1.mp_observability.config  add_observability_args
  parse_args_to_observability_config
lmcache.v1.multiprocess.cache_control.errors  CacheControlError NotFound
lmcache.v1.multiprocess.cache_control.key_resolver  resolve_object_keys
lmcache.v1.multiprocess.cache_control.prefetch_service  PrefetchService.submit
  PrefetchService.status
lmcache.v1.multiprocess.custom_types  PrepareRetrieveResponse
lmcache.v1.multiprocess.config  add_mp_server_args add_p2p_args
  parse_args_to_mp_server_config
lmcache.v1.multiprocess.modules.engine_driven_transfer
  EngineDrivenTransferModule._release_entry(instance_id,entry)
  EngineDrivenTransferModule._pending_shm_writes
  EngineDrivenTransferModule._pending_shm_lock
lmcache.v1.multiprocess.modules.server_transfer  PickleTransferStrategy.commit_store
lmcache.v1.multiprocess.server
  run_cache_server(mp_config,storage_manager_config,obs_config,return_engine)
"""
_TABLES = (
    (_ENGINES, "engines", "instance/vllm/backend.py, asking.py"),
    (_IMAGES, "prompts with images", "instance/vllm/images.py"),
    (_SLEEP, "Engine.sleep and wake", "instance/vllm/backend.py"),
    (_FIGURES, "figures in reports", "instance/vllm/stats.py"),
    (_WEIGHTS, "Engine.update_weights", "instance/vllm/worker.py, patches.py"),
    (_SPANS, "EngineConfig.nodes_per_instance", "instance/vllm/follower.py"),
    (_TEAMS, "EngineConfig.data_parallel_size", "runtime/launch.py"),
    (_ADAPTERS, "EngineConfig.max_lora_rank", "instance/vllm/weights.py"),
    (
        _TRANSFER,
        "update_weights(transfer=...)",
        "instance/vllm/transfer.py, receivers.py, weights/carriers.py",
    ),
    (_CPU, "engines on CPUs", "instance/vllm/patches.py"),
    (_DRAFTS, "speculation", "dgds/, instance/vllm/speculation.py"),
    (_DRAFTS_V2, "speculation on GPUs", "dgds/speculator.py, dgds/ahead.py"),
    (_POOL_VLLM, "the KV pool", "kv/connector.py, idle.py"),
    (_POOL_LMCACHE, "the KV pool", "kv/connector.py, kv/guard.py"),
    (_SERVER, "the KV pool", "kv/server.py, lending.py, patches.py, disk.py"),
)
_NAME = re.compile(r"([\w.]+)(?:\(([\w,]*)\))?(\?)?")


def uses(package: str) -> list[Use]:
    """What aseer uses of a package."""
    found = []
    for table, feature, used_in in _TABLES:
        module = ""
        for line in table.strip().splitlines():
            words = line.split()
            if not line.startswith(" "):
                module = words.pop(0)
            for word in words:
                match = _NAME.fullmatch(word)
                assert match is not None, word
                path, given, optional = match.groups()
                names = frozenset(given.split(",")) if given else frozenset()
                use = Use(module, path, names, bool(optional), feature, used_in)
                found.append(use)
    return [use for use in found if use.package == package]
