"""What other programs need to run converted checkpoints."""
