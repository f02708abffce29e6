"""Serving engines: what they need to run converted checkpoints."""
