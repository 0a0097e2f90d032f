"""Stands in for flash-attn, which SkyRL imports wherever it runs."""
