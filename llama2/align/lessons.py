"""What methods share that write their own examples: a folder to resume in, files of records, a fine-tuning on them.

OUT/ settings.json                what the folder was begun with
     data.jsonl ...               {"prompt": messages, "completion": text}; the completion alone is learnt
     run/model                    what `finetune` made of them
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llama2.data.dialogues.files import find, records
from llama2.data.dialogues.formats import Record
from llama2.errors import ConfigError, DataError, TrainingError
from llama2.files.staging import make_parent, staged_file
from llama2.llm import LLM, load
from llama2.train.adapt_config import AdaptConfig
from llama2.train.finetune import finetune
from llama2.train.finetune_config import FinetuneConfig
from llama2.train.pretrain import out_of

ENOUGH_TO_JUDGE = 100
"""With fewer examples none are set aside."""


def claim(config: AdaptConfig, command: str) -> Path:
    """Return the folder of a run, new or taken over. Raises TrainingError where it is another's, ConfigError."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(f"llama2 {command} runs as one process; its fine-tuning alone can be split: llama2 finetune")
    out = out_of(config)
    usual = config.model_dump(mode="json")
    said = {name: usual[name] for name in config.KEPT}
    path = out / "settings.json"
    if path.exists():
        before = json.loads(path.read_text())
        differing = next((name for name in said if before.get(name) != said[name]), None)
        if not config.resume:
            raise TrainingError(f"out={out} holds a run already; add --resume to go on with it, or name a new folder")
        if differing is not None:
            raise TrainingError(
                f"out={out} was begun with {differing}={before.get(differing)}, not {said[differing]}; set it back, or "
                "name a new folder"
            )
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrainingError(f"out={out} is not empty; name a new folder")
    make_parent(path)
    path.write_text(json.dumps(said, indent=1) + "\n")
    return out


def model_of(config: AdaptConfig, place: str | Path) -> LLM:
    """Return a model, loaded where the settings say."""
    return load(place, device=None if config.device == "auto" else config.device)


def read_records(path: Path) -> Iterator[tuple[str, Record]]:
    """Yield where each record of a file or folder stands, and the record. Raises DataError for a broken one."""
    for file, name in find(path)[0]:
        for where, record in records(file, name, ()):
            if isinstance(record, DataError):
                raise DataError(f"{where}: {record}")
            yield where, record


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return what `write_lines` wrote."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_lines(path: Path, found: Sequence[Record]) -> None:
    """Write a file of records; it has its name only once it is whole."""
    with staged_file(path) as temporary:
        text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in found)
        temporary.write_text(text, encoding="utf-8")


def taught(
    config: AdaptConfig, data: Sequence[Path], run: Path, *, replay: tuple[Path, ...] = (), replay_share: float = 0.0
) -> Path:
    """Fine-tune the model on files of examples; return the folder of what came out, unless it is there already."""
    if not (run / "model").exists():
        shared = {name: getattr(config, name) for name in AdaptConfig.model_fields if name in config.model_fields_set}
        shared |= dict(batch_size=config.batch_size, n_epochs=config.n_epochs) if config.max_steps is None else {}
        own: dict[str, Any] = dict(data=(*data,), out=run, resume=True, data_format="prompt-completion")
        own["too_long"] = "drop"
        if min(len(read_lines(each)) for each in data) < ENOUGH_TO_JUDGE:
            own["eval_share"] = 0.0
        if replay and replay_share:
            own |= dict(replay=replay, replay_share=replay_share)
        outcome = finetune(FinetuneConfig(**{**shared, **own}))
        if outcome.stopped_by:
            raise TrainingError(f"stopped while {run} was trained; the same command with --resume goes on")
    return run / "model"
