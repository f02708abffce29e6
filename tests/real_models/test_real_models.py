"""The fixtures themselves."""

from __future__ import annotations

import json


def test_models_are_what_their_names_say(smollm2, gemma3, gguf_files):
    families = {}
    for folder in (smollm2, gemma3):
        config = json.loads((folder / "config.json").read_text())
        families[folder.name] = (config["model_type"], config["num_hidden_layers"], config["dtype"])
    assert families == {
        "smollm2": ("llama", 30, "bfloat16"),
        "gemma3": ("gemma3_text", 18, "bfloat16"),
    }
    assert all(file.read_bytes()[:4] == b"GGUF" for file in gguf_files.values())
