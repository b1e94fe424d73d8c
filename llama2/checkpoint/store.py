"""Load, save and convert checkpoints of any format. The only file that knows how many formats there are.

Everything streams: whatever the size of the model, one tensor is converted at a time. The folder of an adapter
stands for its base with the adapter upon it.
"""

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from llama2.checkpoint import adapter, adapter_config, gguf, hf, hub, llama2c, meta
from llama2.checkpoint.weights import Checkpoint, check_shapes, default_dtype, dtype_name, fold_ntk
from llama2.errors import CheckpointError, HubError, TokenizerError, did_you_mean
from llama2.model.config import ModelConfig


class Format(Protocol):
    """What each module of FORMATS has; `write` takes options of its own besides."""

    @property
    def NAME(self) -> str: ...

    def matches(self, path: Path) -> bool: ...
    def read_config(self, path: Path) -> ModelConfig: ...
    def read(self, path: Path) -> Checkpoint: ...


FORMATS: tuple[Format, ...] = (hf, meta, gguf, llama2c)


class _AdapterFolder:
    """An adapter's folder as a format: it has a shape, but weights only together with its base."""

    NAME = "adapter"

    def matches(self, path: Path) -> bool:
        return adapter.is_adapter(path)

    def read_config(self, path: Path) -> ModelConfig:
        place, *adapters = layers(path)
        config = read_config(place)
        for each in adapters:
            config = adapter.with_vocabulary(each, config)
        return config

    def read(self, path: Path) -> Checkpoint:
        raise CheckpointError(
            f"{path} is an adapter, and its weights lie elsewhere; merge it first: llama2 merge BASE {path} OUT"
        )


_ADAPTER = _AdapterFolder()

_TOKENIZER_FILES = {"hf": "json", "meta": "model", "llama2c": "bin"}
_BLOCK_TYPES = ("q8_0", "q4_0")


def detect(path: str | Path) -> tuple[Format, Path]:
    """Return the format of a checkpoint and the folder or file that holds it.

    A folder may hold one GGUF or llama2.c file, and its config.json or params.json stands for the folder.
    Raises CheckpointError that lists what was looked for.
    """
    path = Path(path)
    if path.name in ("config.json", "params.json", adapter_config.CONFIG) and path.is_file():
        path = path.parent
    with _readable(path):
        path.stat()
        if _ADAPTER.matches(path):
            return _detect_adapter(path)
        for candidate in FORMATS:
            if candidate.matches(path):
                return candidate, path
        if path.is_dir():
            return _detect_in_folder(path)
    if path.suffix in (".safetensors", ".pth", ".json", ".pt") or path.name.startswith("pytorch_model"):
        raise CheckpointError(f"{path} is part of a checkpoint; name its folder, {path.parent}")
    if path.suffix == ".gguf":
        gguf.read(path)  # tells what is wrong with it
    if path.suffix == ".bin":
        llama2c.read(path)
    raise CheckpointError(
        f"{path} is not a checkpoint: it begins neither like GGUF nor like llama2.c's .bin; "
        "name such a file, or a folder with config.json or params.json and weights"
    )


def _detect_adapter(path: Path) -> tuple[Format, Path]:
    for candidate in FORMATS:
        if candidate.matches(path):
            raise CheckpointError(
                f"{path} holds both an adapter ({adapter_config.CONFIG}) and a model's weights; move one of them away"
            )
    return _ADAPTER, path


def layers(path: str | Path) -> list[Path]:
    """Return where the base of an adapter's folder lies, and the adapters upon it, the lowest first.

    A path that is no adapter's is its own base. A base is named by a path, from the adapter's folder or from the
    current one, or by a hub name, and may have an adapter's folder of its own.
    """
    found, place = detect(path)
    adapters: list[Path] = []
    while found is _ADAPTER:
        adapters.append(place)
        found, place = detect(_base_of(place))
        if any(place.resolve() == each.resolve() for each in adapters):
            raise CheckpointError(f"{place / adapter_config.CONFIG}: is its own base; name a checkpoint there")
    return [place, *reversed(adapters)]


def _base_of(path: Path) -> Path:
    base, revision = adapter_config.base_named(path)
    with _readable(path):
        for place in (path / Path(base).expanduser(), Path(base).expanduser()):
            if place.exists():
                return place
    try:
        return hub.resolve(base, revision=revision)
    except HubError as error:
        raise CheckpointError(
            f"{path / adapter_config.CONFIG}: its base {base!r} is not found, neither from there nor from the current "
            f"folder ({error}); set base_model_name_or_path there, or merge: llama2 merge BASE {path} OUT"
        ) from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what the file system says into one error."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; give a checkpoint's folder or file") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _detect_in_folder(path: Path) -> tuple[Format, Path]:
    files = [file for file in sorted(path.glob("*.gguf")) if file.is_file()]
    files += [file for file in sorted(path.glob("*.bin")) if llama2c.matches(file)]
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{path} holds several checkpoints: {names}; name one of them")
    if files:
        return (gguf if files[0].suffix == ".gguf" else llama2c), files[0]
    if (path / "config.json").is_file():
        return hf, path
    if (path / "params.json").is_file():
        return meta, path
    raise CheckpointError(
        f"{path} holds no checkpoint; looked for config.json with {' or '.join(hf.WEIGHT_FILES[::2])}, params.json "
        "with consolidated.00.pth, one *.gguf, one llama2.c *.bin"
    )


def read_config(path: str | Path) -> ModelConfig:
    """Read a checkpoint's shape; PyTorch is not imported but for a params.json without vocab_size."""
    found, place = detect(path)
    with _readable(place):
        return found.read_config(place)


def read(path: str | Path) -> Checkpoint:
    """Open a checkpoint: shape and tensors are checked, numbers are read when asked for."""
    found, place = detect(path)
    with _readable(place):
        return found.read(place)


def load(path: str | Path, *, dtype: str | None = None, device: str = "cpu") -> Any:
    """Return the Transformer in a checkpoint, ready to run; of an adapter's folder the base with the adapter upon it.

    dtype: float32, bfloat16 or float16; the stored one if not given (for quantised files float32, from a
    billion parameters on bfloat16). Weights that need no change stay mapped from the file, which must
    then not be altered while the model lives (replaced or deleted it may be). Adapters are called default,
    default2 and so on, the lowest first; their dropout is off (the model is in eval mode).
    """
    place, *adapters = layers(path)
    checkpoint = read(place)
    if checkpoint.heads:
        raise CheckpointError(f"{place} is a reward model: it scores answers and writes none; name a language model")
    model = _load_plain(checkpoint, dtype, device)
    for each in adapters:
        put_on(model, each).eval()
    return model


def load_scored(path: str | Path, *, dtype: str | None = None, device: str = "cpu") -> Any:
    """Return the Transformer in a reward model's folder, with its heads (`model.heads`)."""
    from llama2.model.heads import add_heads

    place, *adapters = layers(path)
    checkpoint = read(place)
    if not checkpoint.heads or adapters:
        raise CheckpointError(f"{path} is no reward model: it holds no score head; llama2 reward trains one")
    model = _load_plain(checkpoint, dtype, device)
    add_heads(model, *checkpoint.heads)
    for name, head in checkpoint.heads.items():
        model.heads[name].weight.data.copy_(head())
    return model


def put_on(model: Any, path: str | Path, *, name: str | None = None) -> Any:
    """Put the adapter in a folder upon a loaded Transformer, in place, and return it.

    name: default if not given, or default2 and so on upon others. The base that the folder names is not looked at:
    what must fit is the shape.
    """
    from llama2.model.lora import adapter_names

    if not adapter.is_adapter(path):
        raise CheckpointError(f"{path} is not an adapter's folder: it holds no {adapter_config.CONFIG}")
    n_present = len(adapter_names(model))
    name = name or ("default" if not n_present else f"default{n_present + 1}")
    return adapter.put_on(model, adapter.read_adapter(path, model=model.config, name=name), name=name)


def _load_plain(checkpoint: Checkpoint, dtype: str | None, device: str) -> Any:
    import torch

    from llama2.checkpoint.tensors import Unfilled, cast
    from llama2.model.transformer import Transformer

    target = getattr(torch, dtype_name(dtype or default_dtype(checkpoint)))
    with torch.device("meta"), Unfilled():
        model = Transformer(checkpoint.config)
    parameters = dict(model.named_parameters())
    weights = {}
    # The largest first: while one is converted it exists twice, which matters least when little is loaded.
    for name in sorted(parameters, key=lambda name: -parameters[name].numel()):
        weights[name] = cast(name, checkpoint.tensors[name](), target).contiguous().to(device)
    model.load_state_dict(weights, assign=True)
    return model


def save(
    model: Any,
    path: str | Path,
    *,
    format: str = "hf",
    dtype: str | None = None,
    tokenizer: Any = None,
    generation: Mapping[str, object] | None = None,
) -> list[str]:
    """Write a model in any format; return notes on what the format could not keep.

    dtype: the model's own if not given; for gguf also q8_0 and q4_0. generation: what generation_config.json is to
    say. Nothing is left behind on failure.
    """
    weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    check_shapes(Path(path), model.config, {name: tuple(weight.shape) for name, weight in weights.items()})
    own = str(weights["tok_embeddings.weight"].dtype).removeprefix("torch.").replace("float64", "float32")
    tensors = {name: (lambda weight=weight: weight) for name, weight in weights.items()}
    checkpoint = Checkpoint(model.config, tensors, dtype=own, path=Path(path), generation=generation or {})
    return _write(Path(path), checkpoint, to=format, dtype=dtype, tokenizer=tokenizer, options={})


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: str,
    dtype: str | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> list[str]:
    """Write the checkpoint at src anew at dst in format `to`: hf, meta, gguf or llama2c; return notes.

    dtype: the stored one if not given. tokenizer: the one beside src if not given.
    options: shard_bytes (hf), shards (meta), version and group_size (llama2c).
    """
    checkpoint = read(src)
    notes: list[str] = []
    if tokenizer is None:
        tokenizer, notes = _tokenizer_beside(checkpoint, to)
    return notes + _write(Path(dst), checkpoint, to=to, dtype=dtype, tokenizer=tokenizer, options=options)


def _tokenizer_beside(checkpoint: Checkpoint, to: str) -> tuple[Any, list[str]]:
    """Return the tokenizer that lies by a checkpoint, or None and a note why it is not written."""
    from llama2.tokenizer.formats import load_tokenizer

    try:
        tokenizer = load_tokenizer(checkpoint.path)
        _check_tokenizer(tokenizer, checkpoint.config, to)
    except (TokenizerError, CheckpointError) as error:
        return None, [f"no tokenizer was written: {error}"]
    return tokenizer, []


def _check_tokenizer(tokenizer: Any, config: ModelConfig, to: str) -> None:
    """Raise unless the format can hold this tokenizer: better before the weights are written than after."""
    from llama2.tokenizer.formats import save_tokenizer
    from llama2.tokenizer.gguf import to_gguf_metadata

    n_pieces = len(tokenizer.vocabulary.pieces)
    if n_pieces > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {n_pieces} pieces, the model vocab_size={config.vocab_size}; they belong to different "
            "models"
        )
    if to in _TOKENIZER_FILES:
        with TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said again, and heard, when it is written
            save_tokenizer(tokenizer, folder, format=_TOKENIZER_FILES[to])
    else:
        to_gguf_metadata(tokenizer.vocabulary)


def _write(
    path: Path, checkpoint: Checkpoint, *, to: str, dtype: str | None, tokenizer: Any, options: Mapping[str, Any]
) -> list[str]:
    by_name = {"hf": hf.write, "meta": meta.write, "gguf": gguf.write, "llama2c": llama2c.write}
    if to not in by_name:
        raise CheckpointError(
            f"format {to!r} is not written{did_you_mean(to, by_name)}; written are {', '.join(by_name)}"
        )
    write = by_name[to]
    known = [name for name in inspect.signature(write).parameters if name not in ("path", "checkpoint")]
    for option in options:
        if option not in known:
            own = ", ".join(name for name in known if name not in ("tokenizer", "dtype")) or "none"
            raise CheckpointError(f"option {option!r} is not one of format {to!r}; its options: {own}")
    _refuse_existing(path, checkpoint, to)
    if tokenizer is not None:
        _check_tokenizer(tokenizer, checkpoint.config, to)
    folded = replace(checkpoint, config=fold_ntk(checkpoint.config))
    with warnings.catch_warnings(record=True) as caught:  # e.g. what tokenizer.bin cannot say: a note like others
        warnings.simplefilter("always")
        notes = write(path, folded, tokenizer=tokenizer, dtype=_target_dtype(checkpoint, to, dtype), **options)
    return notes + list(dict.fromkeys(str(warning.message) for warning in caught))


def _target_dtype(checkpoint: Checkpoint, to: str, dtype: str | None) -> str:
    if to == "llama2c":
        return dtype_name(dtype or "float32")
    if dtype is not None and dtype.lower() in _BLOCK_TYPES:
        if to != "gguf":
            raise CheckpointError(
                f"dtype {dtype!r} is a GGUF block type; format {to!r} holds float32, bfloat16, float16"
            )
        return dtype.lower()
    return dtype_name(dtype or default_dtype(checkpoint))


def _refuse_existing(path: Path, checkpoint: Checkpoint, to: str) -> None:
    if path.exists() and checkpoint.path.exists() and path.resolve() == checkpoint.path.resolve():
        raise CheckpointError(f"{path} is the checkpoint being read; name a new place")
    is_used = path.is_dir() and any(path.iterdir()) if path.is_dir() else path.exists() and path.stat().st_size > 0
    if is_used:
        raise CheckpointError(f"{path} exists and is not empty; name a new place, nothing is overwritten")
    if to in ("gguf", "llama2c") and path.is_dir():
        raise CheckpointError(f"{path} is a folder; format {to!r} is one file: name it, e.g. {path / 'model'}")
