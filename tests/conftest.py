"""Shared by all tests: no network, and tiny random checkpoints as transformers saves them."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from made_experts import EXPERTS, ROUTED

# Shared machines stall, so no example has a deadline. What decides about a change must not differ
# from run to run: CI takes the same examples every time, a developer's machine new ones.
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.register_profile(
    "mutants", settings.get_profile("ci"), phases=(Phase.explicit, Phase.generate)
)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "here")
)

os.environ["HF_HUB_OFFLINE"] = "1"
# With more, torch.compile keeps a pool of processes, which can hang (pytorch #189290).
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

BIASES = ("attention_bias", "attention_out_bias", "mlp_bias", "use_bias")
OWN_HEAD_DIM = {
    "ministral",
    "hunyuan_v1_dense",
    "gpt_oss",
}  # do not derive one from the hidden size
NOT_GIVEN = {"gpt_neox": ("num_key_value_heads", "head_dim"), "stablelm": ("head_dim", "mlp_bias")}
TinyCheckpoint = Callable[..., Path]


def pytest_sessionstart() -> None:
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("runs for over ten minutes"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """A test that waits for ever fails, by name, while its process goes on.

    One that hangs outside Python ends by faulthandler_timeout (pyproject.toml), with its process,
    and so do those of real engines and models, which may take as long.
    """
    signal.alarm(0 if "/real_" in item.nodeid else 600)
    try:
        return (yield)
    finally:
        signal.alarm(0)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Threads cost tiny models far more than they give, above all on a busy machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def modules_stay() -> None:
    """A collection of garbage that visits what imports made takes 0.3 s with transformers."""
    import transformers.generation  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """A factory of random checkpoints, 6 layers of hidden size 64 unless told otherwise.

    family: any model_type that transformers knows. One folder per set of arguments, shared by the
    whole session: copy it before changing it. Gains and biases are far from 1 and 0, so that a
    wrong fold shows. biases: every bias that the family knows. sharded: several files with an
    index. tokenizer: with one that knows 128 single bytes, and no token that ends a text.
    config: any other key of the config class.
    """
    made: dict[str, Path] = {}

    def factory(
        family: str = "llama",
        *,
        dtype: str = "float32",
        tied: bool = False,
        head_dim: int | None = None,
        sharded: bool = False,
        num_layers: int = 6,
        biases: bool = False,
        seed: int = 0,
        tokenizer: bool = False,
        **config: Any,
    ) -> Path:
        arguments = (family, dtype, tied, head_dim, sharded, num_layers, biases, seed, tokenizer)
        arguments += (config,)
        key = json.dumps(arguments, sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"tiny-{family}")
            settings = {
                "vocab_size": 128,
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": num_layers,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
                "pad_token_id": None,  # some families' own is not among 128 words
                "tie_word_embeddings": tied,
                **({"head_dim": head_dim or 16} if head_dim or family in OWN_HEAD_DIM else {}),
                **(dict.fromkeys(BIASES, True) if biases else {}),
                **({**EXPERTS, **ROUTED[family]} if family in ROUTED else {}),
                **config,
            }
            for name in NOT_GIVEN.get(family, ()):
                settings.pop(name, None)
            _save(family, settings, dtype, seed, sharded, folder)
            if tokenizer:
                _save_tokenizer(folder)
            made[key] = folder
        return made[key]

    return factory


@pytest.fixture(scope="session")
def tiny_conversion(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A factory of conversions of `source` under `plan`, with the options of `convert`.

    One folder per set of arguments, shared by the whole session: copy it before changing it.
    """
    made: dict[str, Path] = {}

    def factory(source: Path, plan: str, **options: Any) -> Path:
        from abreast.convert.rewrite import convert

        key = json.dumps((str(source), plan, options), sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("conversion") / "out"
            convert(source, plan, folder, **options)
            made[key] = folder
        return made[key]

    return factory


def _save(
    family: str, settings: dict[str, Any], dtype: str, seed: int, sharded: bool, folder: Path
) -> None:
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(family, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.copy_(noise * 0.3 + (0.0 if name.endswith(".bias") else 1.0))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
    model.to(getattr(torch, dtype)).save_pretrained(
        folder, max_shard_size="100KB" if sharded else "1GB"
    )


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:128]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text("{}")


@pytest.fixture(scope="session")
def playable_run(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as `abreast plan` leaves it: six random layers, a front of two depths.

    The cheapest plan of depth 4 has a conversion, that of depth 5 has none. The model's name holds
    HTML. Copy the folder before changing it.
    """
    import numpy as np

    from abreast.convert.rewrite import convert
    from abreast.data import TokenStream
    from abreast.planner.calibration import calibrate
    from abreast.planner.find import find_plan
    from abreast.planner.front import Budget
    from abreast.planner.settings import CalibrationSettings

    root = tmp_path_factory.mktemp("play")
    model, run = root / "a <b>bold ${1+1}", root / "run"
    shutil.copytree(tiny_checkpoint(tokenizer=True), model)
    tokens = np.random.default_rng(0).integers(128, size=256)
    calibration = calibrate(
        model,
        run / "calibration",
        CalibrationSettings(num_windows=8, window=32, max_group=2, wirings=("lp",)),
        stream=TokenStream(tokens, "random", 1, 256),
    )
    plan = find_plan(calibration, run, Budget(depth=4)).plan
    (run / "plans" / "depth-4-x").mkdir(parents=True)
    convert(model, plan, run / "plans" / "depth-4-x" / "converted")
    return run


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless browser: the machine's own, else the one that scripts/need.sh installed."""
    from playwright.sync_api import sync_playwright

    own_chromium = Path(sys.executable).with_name("chromium")
    names = ("chromium", "chromium-browser", "google-chrome", str(own_chromium))
    executable = next(filter(None, map(shutil.which, names)), None)  # None: playwright's own
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def run(monkeypatch, capsys):
    """The command in this process: (exit status, stdout, stderr)."""
    from abreast.cli.main import main

    # main sets both for its own process; here they would outlive the test
    for name in ("TRANSFORMERS_VERBOSITY", "TQDM_DISABLE"):
        monkeypatch.setenv(name, {"TQDM_DISABLE": "1"}.get(name, "error"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["abreast", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call
