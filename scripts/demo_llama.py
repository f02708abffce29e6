"""The demonstration model: a Llama for training, and its export as a Hugging Face checkpoint."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from demo_corpus import VOCAB
from torch import Tensor, nn

SIZES = ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "context")


@dataclass
class Model:
    """The shape of the model: the defaults give 19 M parameters."""

    vocab: int = VOCAB
    hidden: int = 256
    layers: int = 16
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    ffn: int = 1024
    context: int = 1024
    eps: float = 1e-6
    theta: float = 10_000.0

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ValueError("--heads must be a multiple of --kv-heads, and --head-dim even")


class Linear(nn.Linear):
    """float32 master weights, computed in the dtype of the input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Norm(nn.Module):
    def __init__(self, m: Model) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(m.hidden))
        self.eps = m.eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, m: Model) -> None:
        super().__init__()
        self.m, self.native_gqa = m, True
        self.q_proj = Linear(m.hidden, m.heads * m.head_dim)
        self.k_proj = Linear(m.hidden, m.kv_heads * m.head_dim)
        self.v_proj = Linear(m.hidden, m.kv_heads * m.head_dim)
        self.o_proj = Linear(m.heads * m.head_dim, m.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape = (*x.shape[:2], -1, self.m.head_dim)
        q = rotate(self.q_proj(x).view(shape).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(shape).transpose(1, 2), cos, sin)
        y = attend(q, k, self.v_proj(x).view(shape).transpose(1, 2), self.native_gqa)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def attend(q: Tensor, k: Tensor, v: Tensor, native_gqa: bool) -> Tensor:
    if not native_gqa:
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=native_gqa)


class Mlp(nn.Module):
    def __init__(self, m: Model) -> None:
        super().__init__()
        self.gate_proj = Linear(m.hidden, m.ffn)
        self.up_proj = Linear(m.hidden, m.ffn)
        self.down_proj = Linear(m.ffn, m.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, m: Model) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = Norm(m), Attention(m)
        self.post_attention_layernorm, self.mlp = Norm(m), Mlp(m)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Its parameters carry the names transformers uses, less the leading "model."."""

    cos: Tensor
    sin: Tensor

    def __init__(self, m: Model, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.m, self.dtype = m, dtype
        self.embed_tokens = nn.Embedding(m.vocab, m.hidden)
        self.layers = nn.ModuleList(Layer(m) for _ in range(m.layers))
        self.norm = Norm(m)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * m.layers) if residual else 1))
        rate = m.theta ** (-torch.arange(0, m.head_dim, 2).float() / m.head_dim)
        angle = torch.outer(torch.arange(m.context).float(), rate).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def logits(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids).to(self.dtype)
        cos, sin = (t[: ids.shape[1]].to(self.dtype) for t in (self.cos, self.sin))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight.to(self.dtype))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The summed cross entropy; targets of -100 do not count."""
        logits = self.logits(ids).flatten(0, 1).float()
        return F.cross_entropy(logits, targets.flatten(), reduction="sum")


def export(model: Llama, tokenizer: Path, out: Path, check: bool = False) -> None:
    """Write a Hugging Face checkpoint; `check` compares transformers' logits with ours."""
    import transformers
    from safetensors.torch import save_file

    m = model.m
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        f"model.{k}": v.detach().to("cpu", torch.bfloat16).contiguous()
        for k, v in model.state_dict().items()
    }
    save_file(weights, out / "model.new", metadata={"format": "pt"})
    (out / "model.new").chmod(0o644)
    (out / "model.new").replace(out / "model.safetensors")
    shared: dict[str, Any] = {
        "bos_token_id": 0,
        "eos_token_id": 0,
        "use_cache": True,
        "transformers_version": transformers.__version__,
    }
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "head_dim": m.head_dim,
        "hidden_size": m.hidden,
        "intermediate_size": m.ffn,
        "initializer_range": 0.02,
        "max_position_embeddings": m.context,
        "mlp_bias": False,
        "num_attention_heads": m.heads,
        "num_hidden_layers": m.layers,
        "num_key_value_heads": m.kv_heads,
        "pad_token_id": None,
        "pretraining_tp": 1,
        "rms_norm_eps": m.eps,
        "tie_word_embeddings": True,
        "vocab_size": m.vocab,
        "rope_parameters": {"rope_theta": m.theta, "rope_type": "default"},
    }
    for name, content in (("config", config), ("generation_config", {"do_sample": False})):
        text = json.dumps(dict(sorted({**content, **shared}.items())), indent=2)
        (out / f"{name}.json").write_text(text + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, out / name)
    if check:
        theirs = transformers.LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        ours = Llama(m)
        ours.load_state_dict({k.removeprefix("model."): v.float() for k, v in weights.items()})
        ids = torch.randint(m.vocab, (2, 257), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            worst = (theirs(ids).logits - ours.logits(ids)).abs().max().item()
            size = ours.logits(ids).abs().max().item()
        print(f"export check: logits differ by {worst:.1e} of at most {size:.2f}", flush=True)
        assert worst < 1e-4 * max(1.0, size), worst
