"""An adapter becomes part of its base's weights, and what the rounding cost is measured first.

    W' = round(W + s B A)       summed in float32 (DoRA: m / |W + s B A| * (W + s B A)), rounded once

In float32 the merged model is the adapted one. In 16 bits a small change may fall below the last bit of the weights:
then it is refused. One model is held in memory, in float32.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama2.checkpoint import store
from llama2.checkpoint.tensors import cast
from llama2.checkpoint.weights import default_dtype, dtype_name
from llama2.errors import CheckpointError, TokenizerMissing
from llama2.model.lora import adapter_names, merge_into, set_active
from llama2.model.transformer import Transformer
from llama2.tokenizer.formats import load_tokenizer

MAX_TOKENS = 4096
"""Of the text so many tokens are compared: their logits are kept, 500 MB of them for Llama 2."""
ROW_TOKENS = 512
MAX_LOST = 0.5
"""The rounding may move the logits by half as much as the adapter does, in the root mean square. Beyond that the
merged model could be nearer to the base than to the adapted one; below it, it never is (triangle inequality)."""
MAX_DIFFERENCE = 1.0
"""No logit may move by more. Merged into bfloat16, those of stories260K move by up to 0.12, of tinystories-656K by up
to 0.08, whatever the adapter; in float32 by 3e-5."""

SAMPLE = (
    "Once upon a time there was a little girl named Lily. She loved to play outside in the park with her friends.",
    "The capital of France is Paris. Water boils at 100 degrees Celsius, and two times three is six.",
    "User: Can you tell me how to bake bread? Assistant: Mix flour, water, salt and yeast, and let the dough rest.",
)
"""What is compared where no text is given."""


@dataclass(frozen=True)
class MergeReport:
    """How far the merged model is from the adapted one, both run in float32."""

    dtype: str
    """What the weights were rounded to."""
    compared: str
    """Upon what: the text given, a built-in sample, or random tokens where there is no tokenizer."""
    n_tokens: int
    largest_logit_difference: float
    lost: float
    """Root mean square of that difference over the one between adapted and base; 0 is nothing, 1 everything."""
    perplexity_base: float
    """Of the model without the adapter's matrices (but with modules that it brought whole)."""
    perplexity_adapted: float
    perplexity_merged: float
    notes: tuple[str, ...] = ()


def merge(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    text: Iterable[str] | None = None,
    dtype: str | None = None,
    accept_loss: bool = False,
) -> MergeReport:
    """Write base and adapter as one model, a Hugging Face folder with the tokenizer, and return what it cost.

    base: a checkpoint of any format, or an adapter's folder, which is then merged too. text: its first MAX_TOKENS
    tokens are compared. dtype: what to store; the base's stored type if not given. Raises CheckpointError, before
    anything is written, where they do not belong together or, without accept_loss, where more than MAX_LOST of the
    adapter's effect or more than MAX_DIFFERENCE of a logit would be lost.
    """
    base, adapter, out = Path(base), Path(adapter), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not empty; name a new place, nothing is overwritten")
    below = store.layers(base)
    stored = store.read(below[0])
    target = dtype_name(dtype or default_dtype(stored))
    model: Transformer = store.put_on(store.load(base, dtype="float32"), adapter).eval()
    tokenizer = _tokenizer([adapter, *reversed(below)])
    compared, rows = _rows(model, tokenizer, text)
    report = _round_and_compare(model, rows, target, compared)
    if not accept_loss:
        _refuse_loss(report)
    notes = store.save(model, out, dtype=target, tokenizer=tokenizer, generation=stored.generation)
    if tokenizer is None:
        notes.append(f"no tokenizer was written: there is none in {adapter} or {base}")
    return MergeReport(**{**vars(report), "notes": tuple(notes)})


def _tokenizer(places: list[Path]) -> Any:
    for place in places:
        try:
            return load_tokenizer(place)
        except TokenizerMissing:
            continue
    return None


def _rows(model: Transformer, tokenizer: Any, text: Iterable[str] | None) -> tuple[str, list[list[int]]]:
    """Return what is compared, in words and as rows of token ids."""
    length = min(ROW_TOKENS, model.config.context_length)
    if tokenizer is None:
        if text is not None:
            raise CheckpointError("a text needs a tokenizer, and there is none beside adapter or base; put one there")
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (4, min(length, 64)), generator=generator)
        return "random tokens (there is no tokenizer)", ids.tolist()
    every = _cut(tokenizer, SAMPLE if text is None else text, length)
    rows, n_left = [], MAX_TOKENS
    while n_left > 1 and (row := next(every, None)):
        rows.append(row[:n_left])
        n_left -= len(rows[-1])
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise CheckpointError("the text has no two tokens to compare on; give a longer one")
    return "a built-in sample (no text was given)" if text is None else "the text", rows


def _cut(tokenizer: Any, texts: Iterable[str], length: int) -> Iterator[list[int]]:
    for text in texts:
        ids = iter(tokenizer.encode(text, bos=tokenizer.bos_id is not None))
        while row := list(islice(ids, length)):
            yield row


def _round_and_compare(model: Transformer, rows: list[list[int]], dtype: str, compared: str) -> MergeReport:
    """Merge all adapters of a float32 model, round its weights, and compare before and after."""
    adapted = [_logits(model, row) for row in rows]
    names = adapter_names(model)
    set_active(model, names[:-1])
    unadapted = [_logits(model, row) for row in rows]
    set_active(model, names)
    effect = _square(adapted, unadapted)
    perplexity_base = _perplexity(rows, unadapted)
    del unadapted
    for name in names:
        merge_into(model, name)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(cast(name, weight, getattr(torch, dtype)))
    merged = [_logits(model, row) for row in rows]
    error = _square(adapted, merged)
    return MergeReport(
        dtype=dtype,
        compared=compared,
        n_tokens=sum(map(len, rows)),
        largest_logit_difference=max(float((a - b).abs().max()) for a, b in zip(adapted, merged, strict=True)),
        lost=math.sqrt(error / effect) if effect else 0.0,
        perplexity_base=perplexity_base,
        perplexity_adapted=_perplexity(rows, adapted),
        perplexity_merged=_perplexity(rows, merged),
    )


@torch.no_grad()
def _logits(model: Transformer, row: list[int]) -> Tensor:
    return model(torch.tensor([row]))[0]


def _square(one: list[Tensor], other: list[Tensor]) -> float:
    return sum(float((a - b).double().square().sum()) for a, b in zip(one, other, strict=True))


def _perplexity(rows: list[list[int]], logits: list[Tensor]) -> float:
    """Return exp of the mean of -ln p(token | those before it in its row)."""
    total = sum(
        float(torch.nn.functional.cross_entropy(each[:-1], torch.tensor(row[1:]), reduction="sum"))
        for row, each in zip(rows, logits, strict=True)
    )
    return math.exp(min(total / sum(len(row) - 1 for row in rows), 700.0))


def _refuse_loss(report: MergeReport) -> None:
    if report.lost > MAX_LOST or report.largest_logit_difference > MAX_DIFFERENCE:
        raise CheckpointError(
            f"rounded to {report.dtype}, the merged model would lose {report.lost:.0%} of what the adapter changes "
            f"(at most {MAX_LOST:.0%}), its logits off by up to {report.largest_logit_difference:.3g} (at most "
            f"{MAX_DIFFERENCE:g}), its perplexity {report.perplexity_merged:.4g} where the adapted model has "
            f"{report.perplexity_adapted:.4g} and the base {report.perplexity_base:.4g}; nothing was written: store it "
            "with --dtype float32, or take it as it is with --accept-loss"
        )
