"""Text that a model writes in vLLM, in a process that gives its memory back when it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from abreast.engines.vllm.bench import VllmFailure, last_error

_SHARE = 0.8  # of the device's free memory
_SURROUNDINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine ends with the process
    "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB; else nearly all memory, where there is no GPU
}


@dataclass(frozen=True)
class Sampling:
    """How texts are continued. nucleus: the probability from which tokens are drawn (top p).

    most, least: tokens of a continuation; ends: tokens that end it once it has `least`.
    """

    seed: int
    most: int
    least: int
    nucleus: float
    ends: tuple[int, ...]


Continue = Callable[[Sequence[Sequence[int]], Sequence[Sampling]], list[list[int]]]


@contextmanager
def writer(
    folder: Path, *, length: int, at_once: int, device: str, dtype: str
) -> Iterator[Continue]:
    """A function from prompts (token ids) and a sampling for each to what the model goes on with.

    folder: a checkpoint that vLLM serves without our plugin. length: tokens of prompt and
    continuation together. at_once: most texts that it goes on with together. device: "cpu" or
    "cuda", which vLLM must be built for. vLLM starts when the context is entered, and the first
    call waits for it. Raises VllmFailure, from the function, with vLLM's last error.
    """
    settings: dict[str, str | int] = {"model": str(folder), "device": device, "dtype": dtype}
    settings |= {"max_model_len": length, "max_num_seqs": at_once}
    replies, theirs = os.pipe()
    with tempfile.TemporaryFile("w+") as log, os.fdopen(replies) as lines:
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, json.dumps(settings), str(theirs)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(theirs,),
                text=True,
                env={**_SURROUNDINGS, **os.environ},
            )
        finally:
            os.close(theirs)

        def go_on(
            prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]
        ) -> list[list[int]]:
            job = {"prompts": prompts, "samplings": [asdict(sampling) for sampling in samplings]}
            try:
                print(json.dumps(job), file=process.stdin, flush=True)
                reply = lines.readline()
            except BrokenPipeError:
                reply = ""
            if not reply:
                process.wait()
                log.seek(0)
                raise VllmFailure(f"vLLM cannot write: {last_error(log.read())}")
            texts: list[list[int]] = json.loads(reply)
            return texts

        try:
            yield go_on
        finally:
            process.kill()
            process.wait()


def _main() -> None:
    settings, out = json.loads(sys.argv[1]), os.fdopen(int(sys.argv[2]), "w")
    import torch
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    device = settings.pop("device")
    if current_platform.device_type != device:
        sys.exit(f"ValueError: it is built for {current_platform.device_type}, not for {device}")
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        settings["gpu_memory_utilization"] = _SHARE * free / total
    engine = LLM(
        **settings,
        skip_tokenizer_init=True,
        enforce_eager=True,  # compiling takes longer than it saves here
    )
    for line in sys.stdin:
        job = json.loads(line)
        outputs = engine.generate(
            [{"prompt_token_ids": prompt} for prompt in job["prompts"]],
            [
                SamplingParams(
                    temperature=1.0,
                    top_p=of["nucleus"],
                    seed=of["seed"],
                    max_tokens=of["most"],
                    min_tokens=of["least"],
                    stop_token_ids=of["ends"],
                    detokenize=False,
                )
                for of in job["samplings"]
            ],
            use_tqdm=False,
        )
        print(json.dumps([[*output.outputs[0].token_ids] for output in outputs]), file=out)
        out.flush()


if __name__ == "__main__":
    _main()
