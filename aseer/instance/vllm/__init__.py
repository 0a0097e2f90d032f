"""vLLM behind the instance contract: all that runs inside its processes."""
