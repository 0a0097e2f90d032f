"""The engine in the user's process: its thread, its instances, its rollouts."""
