"""A rollout's journal: what its requests have generated, kept beyond the trainer."""
