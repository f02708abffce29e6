"""A converted checkpoint to the Hugging Face Hub; nothing but what its manifest vouches for."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from abreast.checkpoint import MANIFEST, damaged, open_checkpoint, read_manifest
from abreast.errors import AbreastError, first_line
from abreast.report.card import card, may_write, write_card
from abreast.report.records import read_conversion


@dataclass(frozen=True)
class Upload:
    """What goes to the Hub. files: name -> bytes. left_out: what lies there and does not go."""

    repo: str
    private: bool
    files: dict[str, int]
    left_out: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bytes": self.nbytes}


def prepare(out: str | Path, repo: str, *, private: bool = False) -> Upload:
    """Check a converted folder and a name on the Hub; list what would be uploaded. No network.

    README.md is the model card as `push` will write it, or somebody's own. Raises AbreastError for
    a name that cannot be one, and for a folder that is not a whole conversion: every file that the
    manifest names must be there with its recorded hash.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo, re.ASCII):
        raise AbreastError(f"'{repo}' cannot be a repository on the Hub; write it as ORG/NAME")
    folder = Path(out)
    if not folder.is_dir():
        raise AbreastError(f"no folder '{out}'; give one that abreast converted")
    conversion = read_conversion(folder)
    files = read_manifest(folder).files
    for fault in damaged(folder, files):
        raise AbreastError(f"'{out}' is not a whole conversion: {fault}; convert again")
    open_checkpoint(folder)
    sizes = {name: (folder / name).stat().st_size for name in (*files, MANIFEST)}
    readme = folder / "README.md"
    ours = may_write(readme)
    sizes["README.md"] = len(card(conversion).encode()) if ours else readme.stat().st_size
    here = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return Upload(repo, private, dict(sorted(sizes.items())), tuple(sorted(here - set(sizes))))


def push(out: str | Path, repo: str, *, private: bool = False) -> str:
    """Create the repository where it is missing and upload the conversion; return its address.

    Arguments and errors as for `prepare`; also an AbreastError without a token or the network, and
    where the Hub refuses. An interrupted upload goes on when called again.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if constants.is_offline_mode():
        raise AbreastError("HF_HUB_OFFLINE is set; unset it to push")
    if get_token() is None:
        raise AbreastError("no token for the Hugging Face Hub; run `hf auth login` or set HF_TOKEN")
    upload = prepare(out, repo, private=private)
    write_card(read_conversion(out))
    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=out,
            allow_patterns=list(upload.files),
            commit_message="Upload a conversion made with abreast",
        )
    except OfflineModeIsEnabled:
        raise AbreastError("HF_HUB_OFFLINE is set; unset it to push") from None
    except HfHubHTTPError as error:
        raise AbreastError(f"the Hugging Face Hub refuses '{repo}': {first_line(error)}") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise AbreastError(f"'{repo}' was not uploaded: {first_line(error)}; try again") from None
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
        raise AbreastError(
            f"no connection to {endpoint} ({first_line(error)}); try again"
        ) from None
    return str(address)
