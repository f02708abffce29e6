"""A 3B model on one GPU, cell by cell: plan, heal, judge, serve. Open it as a notebook, or run it.

python examples/one_gpu_3b.py [MODEL] [--device cuda] [--max-kl 0.1] [--out shallow]

Not run on a GPU by us: the tests run it on a tiny model on a CPU. A 3B model in bfloat16 takes
6 GB, and twice that while it is judged.
"""

# %% What to work on
import argparse
import tempfile

import abreast
from abreast.data import load_tokens
from abreast.evaluate import compare
from abreast.heal import heal
from abreast.planner import Budget, CalibrationSettings, calibrate, find_plan
from abreast.speed import bench, verdict

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="Qwen/Qwen2.5-3B-Instruct")
parser.add_argument("--device", default="cuda")
parser.add_argument("--data", default="auto", help="text to plan and heal on")
parser.add_argument("--windows", type=int, default=32)
parser.add_argument("--max-kl", type=float, default=0.1, help="nats per token")
parser.add_argument("--tokens", type=int, default=65_536, help="to heal on")
parser.add_argument("--out", default="shallow")
options = parser.parse_args()

# %% Find the deepest cut within the budget. Interrupted, it goes on in the same folder.
run = tempfile.mkdtemp(prefix="plan-")
settings = CalibrationSettings(
    data=options.data, num_windows=options.windows, window=128, device=options.device
)
calibration = calibrate(options.model, run, settings, step=print)
planned = find_plan(calibration, run, Budget(max_kl=options.max_kl), step=print)
print(f"{planned.plan.label}: KL {planned.expected.kl:.4f} nats per token")

# %% Repair it: linear maps fitted in closed form. `method="both"` trains afterwards, for an hour.
healed = heal(
    options.model,
    planned.plan,
    options.out,
    method="refit",
    data=options.data,
    tokens=options.tokens,
    window=128,
    device=options.device,
)
print(f"KL {healed.kl_before:.4f} -> {healed.kl_after:.4f}")

# %% Judge it on other text, and time it
original, tokenizer = abreast.load(options.model, device=options.device)
shallow, _ = abreast.load(options.out, device=options.device, dtype=original.dtype)
text = load_tokens(tokenizer, max_tokens=4096)
cost = compare(shallow, original, text, window=128, stride=128)
print(f"loss {cost.nll_difference:+.4f} nats, same next token {cost.top1_agreement:.1%}")
models = {"original": original, "shallow": shallow}
print(verdict(bench(models, task="decode", context=64, new_tokens=16, rounds=6)))

# %% Serve it
print(f"vllm serve {options.out}")
