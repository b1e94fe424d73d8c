"""adapter_config.json, PEFT's description of an adapter, to and from LoraConfig. Imports no PyTorch.

What PEFT can do and this package cannot is refused by name, unknown settings that are on included.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llama2.checkpoint.weights import flag, read_json
from llama2.errors import CheckpointError, ConfigError
from llama2.model.lora_config import ALL_LINEAR, HF_NAMES, WHOLE, LoraConfig, check, targets, whole_modules

CONFIG = "adapter_config.json"

_READ = {
    "peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules",
    "modules_to_save", "base_model_name_or_path", "bias", "init_lora_weights", "ensure_weight_tying", "revision",
}  # fmt: skip
_WITHOUT_EFFECT = {
    "auto_mapping", "inference_mode", "peft_version", "megatron_core", "megatron_config", "qalora_group_size",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "layers_pattern",
}  # fmt: skip
"""Of the base's origin and of how the adapter began; nothing of what it computes now."""
_KEEP_THE_BASE = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that change no base weight; PiSSA, OLoRA, CorDA, LoftQ do."""


def base_named(path: Path) -> tuple[str, str | None]:
    """Return the base model that an adapter's folder names, and its revision on the hub."""
    values = read_json(path / CONFIG)
    base, revision = values.get("base_model_name_or_path"), values.get("revision")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{path / CONFIG}: does not say which model it adapts; put the base's path or hub name there as "
            "base_model_name_or_path, or merge it: llama2 merge BASE ADAPTER OUT"
        )
    return base, revision if isinstance(revision, str) and revision else None


def peft_json(config: LoraConfig, base: str, *, tied_embeddings: bool) -> dict[str, object]:
    """Return adapter_config.json as PEFT writes it."""
    whole = [HF_NAMES[name] for name in config.trained_modules]
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "revision": None,
        "inference_mode": True, "r": config.r, "lora_alpha": config.alpha, "lora_dropout": config.dropout,
        "use_rslora": config.rslora, "use_dora": config.dora, "bias": "none", "fan_in_fan_out": False,
        "init_lora_weights": True, "target_modules": sorted(HF_NAMES[name] for name in config.target_modules),
        "modules_to_save": whole or None, "ensure_weight_tying": bool(whole) and tied_embeddings,
        "rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": None, "layers_pattern": None,
        "auto_mapping": None,
    }  # fmt: skip


def refuse(path: Path, values: Mapping[str, Any]) -> None:
    """Raise CheckpointError for the first setting whose meaning is not computed here."""
    kind = values.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type {kind!r} is not read; LORA is (LoRA, rsLoRA, DoRA)")
    if values.get("task_type") not in (None, "CAUSAL_LM"):
        raise CheckpointError(f"{path}: task_type {values['task_type']!r} is not read; CAUSAL_LM is")
    if values.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias={values['bias']!r} is not read; only adapters that leave biases alone are")
    if values.get("init_lora_weights") not in _KEEP_THE_BASE:
        raise CheckpointError(
            f"{path}: init_lora_weights={values['init_lora_weights']!r} changed the base's weights too; merge it with "
            "PEFT, or convert it there (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for key, value in values.items():
        if value and key not in _READ | _WITHOUT_EFFECT:
            raise CheckpointError(
                f"{path}: {key}={str(value)[:80]} is not read; merge it with PEFT (merge_and_unload, save_pretrained)"
            )


def lora_config(
    path: Path, values: Mapping[str, Any], *, adapted: Iterable[str], whole: Iterable[str], tied_embeddings: bool
) -> LoraConfig:
    """Return what adapter_config.json and the tensors say together. Raises CheckpointError for what cannot be.

    adapted: the layers that there are matrices for, by the last parts of Hugging Face's names. whole: the modules
    that there are whole weights for, by ours.
    """
    named = values.get("target_modules")
    leaves = {*adapted}
    if isinstance(named, list):  # full names, as PEFT writes them for all-linear, say no more than the last part
        leaves |= {str(each).rpartition(".")[2] for each in named}
    elif named == "all-linear":
        leaves |= {HF_NAMES[each] for each in ALL_LINEAR}
    elif not isinstance(named, str):  # else a regular expression: the tensors say what it matched
        raise CheckpointError(f"{path}: target_modules={named!r} must be a list of layers' names")
    saved = values.get("modules_to_save") or []
    if not isinstance(saved, list):
        raise CheckpointError(f"{path}: modules_to_save={saved!r} must be null or a list of modules' names")
    try:
        trained = {*whole_modules(str(each).rpartition(".")[2] for each in saved), *whole}
        target_modules = targets(leaves)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if tied_embeddings:
        trained = {"tok_embeddings"} if trained else set()
    config = LoraConfig(
        r=values.get("r", 8),
        alpha=values.get("lora_alpha", 8),
        dropout=0.0 if "output" in target_modules else values.get("lora_dropout", 0.0),
        target_modules=target_modules,
        rslora=flag(path, values, "use_rslora"),
        dora=flag(path, values, "use_dora"),
        trained_modules=tuple(name for name in WHOLE if name in trained),
    )
    try:
        check(config, tied_embeddings=tied_embeddings)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return config
