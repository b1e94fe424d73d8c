"""The README's first command: what the package does, shown on a machine with nothing at hand.

There is no trained model to show yet, so a pocket Llama with random weights walks through every format
and must write the same text from each.
"""

import shutil
import tempfile
from pathlib import Path

from llama2.checkpoint import store
from llama2.errors import Llama2Error
from llama2.llm import LLM, load
from llama2.model.config import ModelConfig
from llama2.model.transformer import build
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.tokenizer.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, Vocabulary

PROMPT = "Once upon a time"
POCKET = ModelConfig(dim=64, n_layers=2, n_heads=4, vocab_size=260, ffn_dim=172, n_kv_heads=2, context_length=256)
WALK = (
    ("hf", "pocket-hf", "safetensors, config.json"),
    ("meta", "pocket-meta", "consolidated.00.pth, params.json"),
    ("gguf", "pocket.gguf", "llama.cpp's single file"),
    ("llama2c", "pocket.bin", "karpathy/llama2.c's single file"),
    ("hf", "pocket-hf-again", "and back"),
)


def pocket_tokenizer() -> Tokenizer:
    """Return the smallest Llama 2 vocabulary: unknown, begin, end, the 256 bytes, and the space."""
    pieces = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581")
    types = (UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, NORMAL)
    return Tokenizer(
        Vocabulary("spm", pieces, types, scores=(0.0,) * 260, bos_id=1, eos_id=2, unk_id=0, add_dummy_prefix=True)
    )


def demo(out: Path | None = None) -> None:
    """Build the pocket Llama, convert it from format to format and compare; files are kept only if `out` is given."""
    folder = out or Path(tempfile.mkdtemp(prefix="llama2-demo-"))
    try:
        _walk(folder)
    finally:
        if out is None:
            shutil.rmtree(folder)


def _walk(folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(
        "Nothing trained is at hand, so this shows the path instead of the goal: a pocket Llama with random weights "
        f"({POCKET.n_parameters:,} parameters) is written in every format, read back from each, and asked to go on "
        f"from {PROMPT!r}. Its words are noise; what counts is that they are the same noise everywhere.\n"
    )
    table = Table("format", "place", "what it is", "bytes", "text", box=None, header_style="bold", pad_edge=False)
    table.columns[3].justify = "right"
    source, expected = None, None
    for name, place, what in WALK:
        target = folder / place
        if source is None:
            store.save(build(POCKET, seed=0), target, format=name, tokenizer=pocket_tokenizer())
        else:
            store.convert(source, target, to=name)
        llm = load(target, device="cpu")
        text = _answer(llm)
        expected = expected or text
        if text != expected:
            raise Llama2Error(f"{target} writes {text!r}, the model it came from {expected!r}: this is a bug")
        table.add_row(name, target.name, what, f"{_bytes(target):,}", "the same" if source else "the first")
        source = target
    console.print(table)
    console.print("\nWith a real checkpoint, in any of these formats or by its hub name:\n")
    console.print("  make demo MODEL=path-or-hub-name      chat with it")
    console.print('  llama2 generate MODEL --prompt "..."  continue a text')
    console.print("  llama2 info MODEL                     what it is")


def _answer(llm: LLM) -> str:
    return llm.generate(PROMPT, max_new_tokens=24, temperature=0)


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
