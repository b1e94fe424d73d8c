"""Log-probabilities of whole answers: of the model as it is, and, kept on disk, of the model that a run began with.

    first weights -> answer_logprobs -> OUT/reference.safetensors      once, before the first step
                                                |
    killed, resumed: first weights again, the same key -> read         so nothing is computed twice, and never with
                                                                       weights that have learnt

The key is a digest of the weights and of the answers' ids: another model, or other data, is another key.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llama2.align.losses import per_row
from llama2.data.examples import Examples
from llama2.data.preferences.batch import lay_out
from llama2.files.staging import staged_file
from llama2.model.losses import token_logprobs
from llama2.model.transformer import Transformer
from llama2.parallel.mesh import World
from llama2.parallel.region import local_part
from llama2.parallel.shard import forget_gathered

FILE = "reference.safetensors"
HASHED_NUMBERS = 1 << 24
"""Of a weight at a time, so that no second copy of it exists on the CPU."""


@torch.no_grad()
def answer_logprobs(
    model: Transformer,
    rows: Examples,
    world: World,
    *,
    batch_size: int,
    console: Console | None = None,
    said: str = "",
) -> Float[Tensor, " N"]:
    """Return ln p of the marked tokens of each row, summed, on the CPU; every rank gets all.

    batch_size: rows at a time. The ranks share the rows out, and each calls the model equally often, since sharded
    weights are gathered by all. console: where to show progress, with what is `said`.
    """
    model.eval()
    order = np.argsort(rows.lengths, kind="stable")[::-1]
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    turns: list[int] = list(range(world.dp_rank, -(-len(batches) // world.dp) * world.dp, world.dp))
    found: list[tuple[np.ndarray, Tensor]] = []
    for turn in track(turns, description=said, console=console, disable=console is None or console.quiet):
        numbers = batches[min(turn, len(batches) - 1)]
        batch = lay_out(rows, numbers)[0].to(world.device)
        sums, _ = per_row(token_logprobs(model, batch), batch.targets)
        found.append((numbers, sums.cpu()))
    everywhere = world.gather(found)
    values = torch.zeros(len(rows), dtype=everywhere[0][1].dtype)
    for numbers, sums in everywhere:
        values[torch.from_numpy(numbers.copy())] = sums
    return values


def answer_lengths(rows: Examples) -> Float[Tensor, " N"]:
    """Return how many tokens of each row are marked."""
    return torch.tensor([float(rows.trained(i).sum()) for i in range(len(rows))])


def reference_logprobs(
    out: Path, model: Transformer, sets: Mapping[str, Examples], world: World, *, batch_size: int, console: Console
) -> dict[str, Tensor]:
    """Return `answer_logprobs` of each set: those in the folder of the run, or else computed, and put there.

    To be called while the model has the weights that the run begins with.
    """
    key = identity(model, sets, world)
    found = _read(out / FILE, key, sets)
    if not world.any(found is None):
        console.print(f"log-probabilities of the reference: read from {out / FILE}", markup=False, soft_wrap=True)
        return found or {}
    found = {
        name: answer_logprobs(
            model, rows, world, batch_size=batch_size, console=console, said=f"reference, {len(rows):,} answers, {name}"
        )
        for name, rows in sets.items()
    }
    forget_gathered(model)  # what a trainer then takes for weights must be their parts again
    if world.is_first:
        with staged_file(out / FILE) as partial:
            save_file(found, partial, {"key": key})
    return found


def identity(model: Transformer, sets: Mapping[str, Examples], world: World) -> str:
    """Return a digest of the model's weights, as they are split, and of the sets' ids and marks."""
    own = hashlib.sha256()
    for name, weight in sorted([*model.named_parameters(), *model.named_buffers()]):
        own.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        flat = local_part(weight.detach()).reshape(-1)
        for part in flat.split(HASHED_NUMBERS):
            own.update(part.cpu().view(torch.uint8).numpy().tobytes())
    digest = hashlib.sha256("".join(world.gather([own.hexdigest()])).encode())
    for name, rows in sets.items():
        digest.update(f"{name} {len(rows)}".encode())
        for array in (rows.ids, rows.marks, rows.lengths):
            digest.update(array.tobytes())
    return digest.hexdigest()


def _read(path: Path, key: str, sets: Mapping[str, Examples]) -> dict[str, Tensor] | None:
    """Return what the file holds, if it is of this key."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return {name: file.get_tensor(name).clone() for name in sets}
    except (OSError, SafetensorError):  # there is none, or it is broken: computed anew
        pass
    return None
