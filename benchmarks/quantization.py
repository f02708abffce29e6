"""Do the losses of grouping and of quantising add up? KL to the float32 original, for both at once.

Bundled model, held-out text, windows of 256 tokens, everything evaluated in float32 by
transformers. torchao quantises the matrices of the layers (int8 by row, int4 by groups of 32 or
64, round to nearest); llama.cpp's own quantiser the whole GGUF file, embedding included, whose
weights are read back with the gguf package. "sum" is KL(grouping) + KL(quantisation); "excess" is
KL(both) minus that, with the error of the paired difference over windows.

With --positions, real llama.cpp (package xllamacpp) runs the GGUF files too, on that many positions
of held-out text: what its own arithmetic adds to the weights' loss.

What this needs is in the environment of `make test-gguf`: .venv-gguf/bin/python. Elsewhere, kinds
whose package (torchao), or whose quantiser (llama.cpp's), is missing are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from abreast.checkpoint.tensors import open_checkpoint
from abreast.convert.rewrite import convert
from abreast.data import HELD_OUT, TokenStream, load_tokens
from abreast.demo import model_folder
from abreast.engines.llamacpp.deci import lay_out_gguf
from abreast.engines.llamacpp.writer import check_quantizer, export
from abreast.errors import AbreastError
from abreast.evaluate import ratio_of_means
from abreast.evaluate.text import Comparison, compare
from abreast.model.grouping import load

PLANS = {16: "", 14: "4+5 10+11", 12: "2+3 4+5 6+7 10+11", 10: "1+2 3+4 5+6 7+8 9+10 11+12"}
Quantise = Callable[[Any, Path], None]


def with_torchao(**options: Any) -> Quantise:
    """Quantise the linear maps of a model's layers; its head, tied to the embedding, stays."""

    def quantise(model: Any, folder: Path) -> None:
        from torchao.quantization import IntxWeightOnlyConfig, quantize_

        def inside(module: torch.nn.Module, name: str) -> bool:
            return isinstance(module, torch.nn.Linear) and "lm_head" not in name

        quantize_(model, IntxWeightOnlyConfig(**options), inside)

    return quantise


def int8() -> Quantise:
    from torchao.quantization.granularity import PerAxis

    return with_torchao(weight_dtype=torch.int8, granularity=PerAxis(0))


def int4(group: int) -> Quantise:
    from torchao.quantization.granularity import PerGroup

    return with_torchao(weight_dtype=torch.int4, granularity=PerGroup(group))


def with_llama_cpp(kind: str) -> Quantise:
    def quantise(model: Any, folder: Path) -> None:
        file = folder.with_name(f"{folder.name}-{kind}.gguf")
        if not file.exists():
            export(folder, file, quantization=kind, dtype="float32")
        read_back(model, folder, file)

    return quantise


def read_back(model: Any, folder: Path, file: Path) -> None:
    """Put the weights of a GGUF file into the model that it was written from."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for piece in lay_out_gguf(open_checkpoint(folder), "float32").pieces:
            tensor = tensors[piece.name]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            rows = torch.from_numpy(values).view(piece.shape)
            if piece.head_dim:
                pairs = rows.view(-1, piece.head_dim // 2, 2, *rows.shape[1:])
                rows = pairs.transpose(1, 2).reshape(rows.shape)
            parameters[piece.source][piece.start : piece.stop] = rows


KINDS: dict[str, Callable[[], Quantise] | None] = {
    "none": None,
    "int8": int8,
    "int4 g64": lambda: int4(64),
    "int4 g32": lambda: int4(32),
    "Q8_0": lambda: with_llama_cpp("Q8_0"),
    "Q4_K_M": lambda: with_llama_cpp("Q4_K_M"),
}


def excess(both: Comparison, grouped: Comparison, quantised: Comparison) -> tuple[float, float]:
    """KL(both) - KL(grouping) - KL(quantisation), with the error of the paired difference."""
    sums = both.windows["kl"] - grouped.windows["kl"] - quantised.windows["kl"]
    return ratio_of_means(sums, both.windows["tokens"])


def serve(file: Path) -> Any:
    """A GGUF file in llama.cpp, one thread, float32 cache, 256 tokens."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 256, 1, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.no_extra_bufts = True  # repacked weights crash on CPUs with AMX
    return xllamacpp.Server(params)


def llama_cpp_kl(file: Path, reference: Any, stream: TokenStream, positions: int) -> tuple:
    """KL of what llama.cpp itself predicts at the ends of prefixes of the text; mean, error."""
    server = serve(file)
    rows = []
    size = reference.config.vocab_size
    for start in np.linspace(0, len(stream) - 256, positions).astype(int):
        ids = stream.tokens[start : start + 200].tolist()
        request = {"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": size}
        answer = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
        if not answer:  # the server gives no candidates for half a letter
            continue
        theirs = torch.full((size,), -torch.inf)
        for candidate in answer[0]["top_logprobs"]:
            theirs[candidate["id"]] = candidate["logprob"]
        with torch.inference_mode():
            ours = torch.log_softmax(reference(torch.tensor([ids])).logits[0, -1].float(), -1)
        rows.append(float((ours.exp() * (ours - theirs)).sum()))
    return float(np.mean(rows)), float(np.std(rows, ddof=1) / math.sqrt(len(rows))), len(rows)


def same_positions(model: Any, reference: Any, stream: TokenStream, positions: int) -> float:
    """The KL that the weights alone account for, at the positions of `llama_cpp_kl`."""
    rows = []
    for start in np.linspace(0, len(stream) - 256, positions).astype(int):
        ids = torch.from_numpy(stream.tokens[start : start + 200])[None]
        with torch.inference_mode():
            ours, theirs = (
                torch.log_softmax(m(ids).logits[0, -1].float(), -1) for m in (reference, model)
            )
        rows.append(float((ours.exp() * (ours - theirs)).sum()))
    return float(np.mean(rows))


def available() -> list[str]:
    """The kinds that this environment can make."""
    left = dict(KINDS)
    if importlib.util.find_spec("torchao") is None:
        left = {kind: make for kind, make in left.items() if not kind.startswith("int")}
        print("left out for want of torchao: int8, int4", file=sys.stderr)
    try:
        check_quantizer("Q8_0")
    except AbreastError as error:
        left = {kind: make for kind, make in left.items() if not kind.startswith("Q")}
        print(f"left out: Q8_0, Q4_K_M; {error}", file=sys.stderr)
    return list(left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--depths", type=int, nargs="+", default=list(PLANS))
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--positions", type=int, default=0)
    arguments = parser.parse_args()
    kinds = [kind for kind in available() if kind in arguments.kinds]
    warnings.filterwarnings("ignore")
    reference, tokenizer = load(model_folder(), dtype="float32")
    stream = load_tokens(tokenizer, HELD_OUT, max_tokens=arguments.tokens, seed=0)
    results: dict[tuple[int, str], Comparison] = {}
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for depth in arguments.depths:
            folder = model_folder()
            if PLANS[depth]:
                folder = Path(temporary) / f"depth-{depth}"
                convert(model_folder(), PLANS[depth], folder, dtype="float32")
            else:
                folder = Path(temporary) / "original"
                folder.symlink_to(model_folder())
            for kind in kinds:
                if depth == 16 and kind == "none":
                    continue
                model, _ = load(folder, dtype="float32")
                make = KINDS[kind]
                if make is not None:
                    make()(model, folder)
                result = compare(model, reference, stream, window=256, stride=256, batch_size=8)
                results[depth, kind] = result
                row = {
                    "depth": depth,
                    "quantisation": kind,
                    "kl": result.kl,
                    "kl_stderr": result.kl_stderr,
                    "loss_increase": result.nll_difference,
                    "loss_increase_stderr": result.nll_difference_stderr,
                }
                grouped, quantised = results.get((depth, "none")), results.get((16, kind))
                if grouped and quantised and kind != "none":
                    more, error = excess(result, grouped, quantised)
                    row |= {"sum": grouped.kl + quantised.kl, "excess": more}
                    row |= {"excess_stderr": error}
                file = folder.with_name(f"{folder.name}-{kind}.gguf")
                if arguments.positions and file.exists():
                    count = arguments.positions
                    kl, error, done = llama_cpp_kl(file, reference, stream, count)
                    weights = same_positions(model, reference, stream, count)
                    row |= {"positions": done, "llama_cpp_kl": kl, "llama_cpp_kl_stderr": error}
                    row |= {"weights_kl_there": weights}
                rows.append(row)
                print(json.dumps(row), file=sys.stderr)
    show(rows)
    print(json.dumps({"benchmark": "quantization", "tokens": len(stream), "rows": rows}))


def show(rows: list[dict[str, Any]]) -> None:
    print("| depth | quantisation | KL | sum | excess | KL / sum |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        text = (
            f"| {row['depth']} | {row['quantisation']} | {row['kl']:.5f} ± {row['kl_stderr']:.5f}"
        )
        if "sum" in row:
            text += f" | {row['sum']:.5f} | {row['excess']:+.5f} ± {row['excess_stderr']:.5f}"
            text += f" | {row['kl'] / row['sum']:.2f} |"
        else:
            text += " | | | |"
        print(text)


if __name__ == "__main__":
    main()
