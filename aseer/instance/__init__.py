"""vLLM engines, each in a process of its own, and the controller's hold on them."""
