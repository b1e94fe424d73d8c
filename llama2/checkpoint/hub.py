"""Names to paths: fetch a repository from the Hugging Face hub, or a mirror, into its usual cache.

Knows which files of a repository make a checkpoint, not what is in them. HF_ENDPOINT, HF_TOKEN, HF_HOME
and HF_HUB_OFFLINE are huggingface_hub's and work as everywhere else.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from llama2.checkpoint import hf, meta
from llama2.errors import CheckpointError, HubError, did_you_mean
from llama2.model.family import FAMILY

_NAME = r"[A-Za-z0-9][\w.-]*"
_HUB_NAME = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:[/:](?P<file>[^:\\]+\.gguf))?")
_BESIDE = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.jinja",
    "params.json",
    "llama2.json",
)
_WEIGHTS = (
    ("model*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
    ("consolidated.*.pth",),
)
"""The first kind of which a repository has any is fetched, the others are left."""
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
"""Fetched where there are no weights of a model; its base has a repository of its own."""


def resolve(name_or_path: str | Path, *, revision: str | None = None) -> Path:
    """Return the path of a checkpoint: the path itself, or where `org/name` lies in the cache, fetched if need be.

    `org/name/file.gguf` or `org/name:file.gguf` names one file of a repository. Raises HubError that says
    what to do. A name that is also a path is the path.
    """
    path = _existing_path(name_or_path)
    if path is not None:
        if revision is not None:
            raise HubError(f"revision={revision!r} is of no use for {path}, which is a path; leave it away")
        return path
    repo, file = _parse(str(name_or_path))
    return _cached(repo, file, revision) or _fetch(repo, file, revision)


def _existing_path(name: str | Path) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if str(name) and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a zero byte
        return None


def pull(name: str, *, revision: str | None = None) -> Path:
    """Fetch a repository, asking the hub whether it changed; return its path in the cache."""
    repo, file = _parse(name)
    return _fetch(repo, file, revision)


def _parse(name: str) -> tuple[str, str | None]:
    if name.lower() in FAMILY:
        raise HubError(
            f"{name!r} is the shape of a model, not its weights: fetch them with `llama2 pull ORG/NAME` "
            "(such as meta-llama/Llama-2-7b-hf), or give the path of a checkpoint"
        )
    first, _, rest = name.partition("/")
    if rest and first not in ("", ".", "..") and Path(first).is_dir():
        siblings = [path.name for path in Path(name).parent.glob("*")]
        raise HubError(f"there is no {name} in the folder {first}{did_you_mean(Path(name).name, siblings)}")
    match = _HUB_NAME.fullmatch(name)
    if not match or ".." in name or "--" in name:
        raise HubError(
            f"{name!r} is neither an existing path nor a hub name like meta-llama/Llama-2-7b-hf"
            f"{did_you_mean(name, FAMILY)}"
        )
    return match["repo"], match["file"]


def _cached(repo: str, file: str | None, revision: str | None) -> Path | None:
    """Return the path of a complete checkpoint in the cache, without asking the hub."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        if file:
            return Path(hf_hub_download(repo, file, revision=revision, local_files_only=True))
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[*_BESIDE]))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None
    return _checkpoint_in(folder)


def _checkpoint_in(folder: Path) -> Path | None:
    """Return the checkpoint in a snapshot, or None: other programs and interrupted ones cache single files."""
    try:
        if (folder / "config.json").is_file() and hf.weight_paths(folder):
            return folder if any(folder.glob("tokenizer*")) else None
    except CheckpointError:
        return None
    if meta.matches(folder) or all((folder / name).is_file() for name in _ADAPTER):
        return folder
    files = list(folder.glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def _fetch(repo: str, file: str | None, revision: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    with _explained(repo, revision):
        names = [entry.rfilename for entry in HfApi().model_info(repo, revision=revision).siblings or []]
    wanted = [file] if file else _wanted(repo, names)
    if file and file not in names:
        raise HubError(f"{repo} has no file {file!r}{_listed(_ggufs(names)) or did_you_mean(file, names)}")
    with _explained(repo, revision):
        if len(wanted) == 1:
            return Path(hf_hub_download(repo, wanted[0], revision=revision))
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[_literally(name) for name in wanted]))


def _wanted(repo: str, names: Sequence[str]) -> list[str]:
    """Return the files that make a checkpoint, or the only GGUF file. Raises HubError where there is no such choice."""
    at_root = [name for name in names if "/" not in name]
    for patterns in _WEIGHTS:
        weights = [name for name in at_root if any(fnmatch(name, pattern) for pattern in patterns)]
        if weights:
            return weights + [name for name in at_root if any(fnmatch(name, pattern) for pattern in _BESIDE)]
    if {*_ADAPTER} <= {*at_root}:
        return [*_ADAPTER, *(name for name in at_root if any(fnmatch(name, pattern) for pattern in _BESIDE))]
    ggufs = _ggufs(names)
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        raise HubError(f"{repo} holds several GGUF files; name one, e.g. {repo}:{ggufs[0]}{_listed(ggufs)}")
    hint = f"an adapter without {_ADAPTER[1]}" if _ADAPTER[0] in names else "no model that is read"
    raise HubError(f"{repo} holds {hint}: looked for model.safetensors, pytorch_model.bin, consolidated.00.pth, *.gguf")


def _ggufs(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.endswith(".gguf")]


def _listed(names: Sequence[str]) -> str:
    return f"; it has {', '.join(names[:12])}{' ...' if len(names) > 12 else ''}" if names else ""


def _literally(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Turn each way in which fetching fails into one HubError that says what to do."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.HFValidationError as error:
        raise HubError(f"{repo!r} cannot be the name of a repository: {error}") from error
    except errors.GatedRepoError as error:
        raise HubError(
            f"{repo} is gated: accept its licence at {constants.ENDPOINT}/{repo}, then set HF_TOKEN to a token of "
            "your account, from the hub's settings"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repo} has no revision {revision!r}; leave it away for the newest") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{repo} was not found at {constants.ENDPOINT}: check the spelling; if it is private, set HF_TOKEN"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise HubError(f"{repo} is not in the cache and HF_HUB_OFFLINE is set; unset it and try again") from error
    except Exception as error:
        # whatever the HTTP client raises: no route, a time-out, a refused certificate, a full disk
        raise HubError(
            f"{repo} could not be fetched from {constants.ENDPOINT}: {_first_line(error)}; try again"
        ) from error


def _first_line(error: Any) -> str:
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
