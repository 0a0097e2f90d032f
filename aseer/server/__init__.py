"""Tokens in, tokens out, over HTTP: an engine for trainers that speak vLLM's wire."""
