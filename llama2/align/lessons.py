"""What methods share that write their own examples: a folder to resume in, files of records, a fine-tuning on them.

Several processes sample and judge a share each and know all that came of it, so that the files are those of one
process. The first alone looks what is there, and writes; the others wait.

OUT/ settings.json                what the folder was begun with
     data.jsonl ...               {"prompt": messages, "completion": text}; the completion alone is learnt
     run/model                    what `finetune` made of them
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from llama2.data.dialogues.files import find, records
from llama2.data.dialogues.formats import Record
from llama2.errors import ConfigError, DataError, Llama2Error, TrainingError
from llama2.files.staging import make_parent, staged_file
from llama2.llm import LLM, load
from llama2.parallel.mesh import World, start
from llama2.train.adapt_config import AdaptConfig
from llama2.train.finetune import finetune
from llama2.train.finetune_config import FinetuneConfig
from llama2.train.pretrain import out_of

ENOUGH_TO_JUDGE = 100
"""With fewer examples none are set aside."""


@contextmanager
def together(config: AdaptConfig) -> Iterator[tuple[World, Console]]:
    """Yield the processes that torchrun started, and the console of the first. Where one dies the others end.

    Raises ConfigError for a batch or a model that cannot be split so.
    """
    if config.tensor_parallel > 1:
        raise ConfigError(
            f"tensor_parallel={config.tensor_parallel} is not for a command that samples with whole models; leave it "
            "out: several processes then share the prompts, and in training the data and the weights (FSDP)"
        )
    world = start(device=config.device, timeout_s=config.timeout_s)
    config.micro_batch(world.dp)
    with world.together():
        yield world, Console(stderr=True, highlight=False, soft_wrap=True, quiet=not world.is_first)


def by_first(world: World, work: Callable[[], object]) -> None:
    """Let the first process do something for all, and wait for it. Raises its Llama2Error, in the others another."""
    error = None
    if world.is_first:
        try:
            work()
        except Llama2Error as problem:
            error = problem
    if world.any(error is not None):
        raise error or TrainingError("rank 0 could not go on; its own message says why")


def is_there(path: Path, world: World) -> bool:
    """Return whether the first process finds a file or folder; the others may look too early or too late."""
    return world.any(world.is_first and path.exists())


def claim(config: AdaptConfig, world: World) -> Path:
    """Return the folder of a run, new or taken over. Raises TrainingError where it is another's, ConfigError."""
    out = out_of(config)
    by_first(world, lambda: _take(config, out))
    return out


def _take(config: AdaptConfig, out: Path) -> None:
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
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrainingError(f"out={out} is not empty; name a new folder")
    make_parent(path)
    path.write_text(json.dumps(said, indent=1) + "\n")


def model_of(config: AdaptConfig, place: str | Path, world: World) -> LLM:
    """Return a whole model, loaded where the settings say; of several processes each has its own device."""
    return load(place, device=None if config.device == "auto" and world.size == 1 else world.device)


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
        temporary.write_text("".join(map(line, found)), encoding="utf-8")


def line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def taught(
    config: AdaptConfig,
    data: Sequence[Path],
    run: Path,
    world: World,
    *,
    replay: tuple[Path, ...] = (),
    replay_share: float = 0.0,
) -> Path:
    """Fine-tune the model on files of examples; return the folder of what came out, unless it is there already."""
    if not is_there(run / "model", world):
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
