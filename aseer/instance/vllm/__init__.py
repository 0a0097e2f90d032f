"""vLLM behind the instance contract: all that runs inside its processes."""

# What vLLM is given to import: names, so that whoever plans an engine need not have it.
WORKER_EXTENSION = "aseer.instance.vllm.worker.WorkerExtension"
EXECUTOR = "aseer.instance.vllm.executor.DraftingExecutor"
