"""`llama2 merge`: base and adapter as one checkpoint."""

import sys
from itertools import islice
from pathlib import Path

from llama2.cli.options import DType
from llama2.cli.train_tokenizer import read_texts


def merge(
    base: str,
    adapter: Path,
    out: Path,
    /,
    *,
    text: Path | None = None,
    dtype: DType | None = None,
    accept_loss: bool = False,
    revision: str | None = None,
) -> None:
    """Write a model with an adapter merged into its weights, and say what the rounding cost.

    The sum is made in float32 and rounded once. Adapted and merged model are compared first, in float32; where more
    than half of the adapter's effect, or more than 1.0 of a logit, would be lost, nothing is written.

    Parameters
    ----------
    base
        Folder, file or hub name of the model that the adapter is for; an adapter's folder is merged too.
    adapter
        Folder of adapter_config.json and adapter_model.safetensors.
    out
        A new folder, in Hugging Face's format, with the tokenizer.
    text
        Text file, or .jsonl file with a "text" in each line, to compare on; a built-in sample if not given.
    dtype
        Precision to store; the base's if not given.
    accept_loss
        Write it whatever is lost.
    revision
        Branch, tag or commit of a hub repository.
    """
    from llama2.checkpoint import hub
    from llama2.compress.merge import MAX_TOKENS, merge as merged

    path = hub.resolve(base, revision=revision)
    texts = None if text is None else read_texts((text,))
    if text is not None and texts is not None and text.suffix != ".jsonl":
        texts = ["".join(islice(texts, MAX_TOKENS))]  # a text is one whole; every line has a token
    report = merged(path, adapter, out, text=texts, dtype=dtype, accept_loss=accept_loss)
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"wrote {out}", file=sys.stderr)
    print(
        f"{report.dtype}: logits differ from the adapted model's by at most {report.largest_logit_difference:.3g}, "
        f"{report.lost:.2%} of its effect; on {report.n_tokens} tokens of {report.compared} perplexity is "
        f"{report.perplexity_base:.4f} without the adapter, {report.perplexity_adapted:.4f} adapted, "
        f"{report.perplexity_merged:.4f} merged"
    )
