"""transformers' own server looks a model's class up by the name in its config.json."""

import sys

from abreast import modeling
from abreast.engines.transformers import publish_classes


def test_every_architecture_is_published(monkeypatch):
    package = sys.modules["transformers"]
    for name in modeling.ARCHITECTURES:
        monkeypatch.setattr(package, name, None, raising=False)
    publish_classes()
    for name in modeling.ARCHITECTURES:
        assert getattr(package, name) is getattr(modeling, name)


def test_an_architecture_of_a_newer_transformers_does_not_hinder_others(monkeypatch):
    package = sys.modules["transformers"]
    names = ["AbreastNewerForCausalLM", "AbreastLlamaForCausalLM"]
    monkeypatch.setitem(modeling.FAMILIES, "Newer", "newer")
    monkeypatch.setattr(modeling, "ARCHITECTURES", names)
    monkeypatch.setattr(package, names[1], None, raising=False)
    publish_classes()
    assert package.AbreastLlamaForCausalLM is modeling.AbreastLlamaForCausalLM
    assert not hasattr(package, names[0])
