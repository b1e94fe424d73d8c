"""The README's first command: from raw text to a Llama that tells stories, on a machine with nothing at hand.

    world -> tokenizer -> prepare -> pretrain -> grade -> every format

Each stage calls what the command of its name calls, and leaves its result in the demo's folder; a stage whose result
is there is not done again, so a demo that was stopped goes on.
"""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from llama2.checkpoint import store
from llama2.data.corpus.prepare import PrepareConfig, prepare
from llama2.data.corpus.report import print_report
from llama2.data.shards import INDEX
from llama2.data.storyworld.files import write_world
from llama2.data.storyworld.grade import Grade, grade
from llama2.data.storyworld.raw import Dirt
from llama2.data.storyworld.stories import Story, stories
from llama2.data.storyworld.words import LANGUAGES, Language
from llama2.errors import Llama2Error
from llama2.evaluate.interval import wilson
from llama2.files.staging import make_parent
from llama2.llm import LLM, load
from llama2.tokenizer.formats import save_tokenizer
from llama2.tokenizer.train import train_tokenizer
from llama2.train.config import PretrainConfig
from llama2.train.pretrain import pretrain

LANGUAGE_NAMES = {"en": "English", "es": "Spanish", "zh": "Chinese"}
FORMATS = (("gguf", "story.gguf"), ("meta", "story-meta"))
"""Besides Hugging Face's; llama2.c's knows one rope_theta only, and not this model's."""

DIRT = Dirt(
    near_duplicates=0.01, exact_duplicates=0.02, foreign=0.02, boilerplate=0.1, personal=0.004, mojibake=0.01,
    contamination=0.005,
)  # fmt: skip
"""Enough to see every rule at work; what no rule takes away, as edited words, is learnt like the rest."""


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    n_stories: int
    vocab_size: int
    training: dict[str, object]
    n_graded: int
    """Held-out stories begun and judged, per language."""


FULL = Size(
    n_stories=12_000,
    vocab_size=2048,
    training=dict(
        dim=160, n_layers=3, n_heads=4, ffn_dim=448, tied_embeddings=True, rope_theta=1000.0, sequence_length=256,
        batch_size=16, max_steps=1400, optimizer="muon", learning_rate=1.5e-2, lr_scheduler="wsd", decay_share=0.6,
        min_lr_share=0.02, warmup_steps=20, dtype="bfloat16", eval_every=350, save_every=350, eval_tokens=30_000,
    ),
    n_graded=100,
)  # fmt: skip
QUICK = Size(
    n_stories=300,
    vocab_size=1024,
    training={
        **FULL.training,
        "dim": 64,
        "n_layers": 2,
        "ffn_dim": 192,
        "max_steps": 60,
        "eval_every": 0,
        "save_every": 0,
    },
    n_graded=4,
)


def demo(out: Path = Path("llama2-demo"), *, size: Size = FULL) -> Path:
    """Do every stage; return the folder of the trained model."""
    console = Console(highlight=False)
    began = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[bold][{time.monotonic() - began:4.0f} s] {text}[/bold]")

    world, tokenizer, run = out / "world", out / "tokenizer", out / "run"
    claim(out, size)
    if not world.exists():
        say(f"1. A world of {size.n_stories:,} little stories in three languages, and a dirty raw corpus: {world}")
        write_world(world, n_stories=size.n_stories, n_heldout=max(500, size.n_graded), dirt=DIRT)
    if not (tokenizer / "tokenizer.json").exists():
        say(f"2. A vocabulary of {size.vocab_size:,} pieces: {tokenizer}")
        vocabulary = train_tokenizer(some_text(world), vocab_size=size.vocab_size)
        for format in ("model", "json"):
            save_tokenizer(vocabulary, tokenizer, format=format)
    if not (out / "shards" / INDEX).exists():
        say(f"3. The raw corpus, cleaned, deduplicated and tokenised: {out / 'shards'}")
        prepare_data(world, tokenizer, out)
    if not (run / "model").exists():
        say(f"4. Pretraining: {run}")
        train(out, size)
    say("5. Held-out stories, begun by the world and finished by the model")
    llm = load(str(run / "model"), device="cpu", max_batch=64)
    show(llm, console, size.n_graded)
    say("6. The same model in every format")
    walk(run / "model", out, console)
    console.print(f"\nAll of it is in {out}. See {run / 'report.html'}, and go on:\n")
    console.print(f'  llama2 generate {run / "model"} --prompt "One morning, Mia the rabbit"')
    console.print(f"  llama2 chat {out / 'story.gguf'}       it only tells stories so far")
    return run / "model"


def claim(out: Path, size: Size) -> None:
    """Write down which demo this folder is of. Raises Llama2Error if it is another's."""
    make_parent(out / "size.json")
    path, said = out / "size.json", json.dumps(asdict(size), indent=1)
    if not path.exists():
        path.write_text(said)
    elif path.read_text() != said:
        raise Llama2Error(f"{out} holds a demo of another size; name another folder by --out, or remove it")


def some_text(world: Path) -> Iterator[str]:
    """Yield lines to learn the vocabulary from: words of English and Spanish become pieces, in Chinese characters do.

    As in Llama 2's vocabulary, which saw little Chinese; names and things of one piece each are easier to repeat, but
    where nothing is between words, pieces learnt from much text would run across them.
    """
    for language, n_lines in (("en", 8_000), ("es", 8_000), ("zh", 300)):
        with (world / "train" / f"stories.{language}.txt").open(encoding="utf-8") as file:
            yield from islice(file, n_lines)


def prepare_data(world: Path, tokenizer: Path, out: Path) -> None:
    """Prepare the raw corpus to train on and the held-out stories to judge by."""
    held_out = tuple(world / "heldout" / f"stories.{language}.txt" for language in LANGUAGES)
    both = dict(tokenizer=tokenizer, document_separator="\n\n", min_words=20, skip_rules=("top_run",))
    prepare(PrepareConfig(raw=held_out, out=out / "heldout", dedup_threshold=1.0, **both))  # pyright: ignore[reportArgumentType]
    # Sentences of the story world come again, so that runs of 13 words in common do not mean a leak; 30 do.
    judged_by = dict(decontaminate=held_out, decontamination_words=30, languages=LANGUAGES)
    report = prepare(PrepareConfig(raw=(world / "raw",), out=out / "shards", **both, **judged_by))  # pyright: ignore[reportArgumentType]
    print_report(report)


def train(out: Path, size: Size) -> None:
    settings = dict(data=(out / "shards",), eval_data=out / "heldout", out=out / "run", resume=True)
    prompts = tuple(next(stories(0, 1, split="heldout")).opening(language) for language in LANGUAGES)
    outcome = pretrain(PretrainConfig(**settings, **size.training, sample_prompts=prompts))  # pyright: ignore[reportArgumentType]
    if outcome.stopped_by:
        raise Llama2Error("the demo was stopped; the same command goes on where it was")


def show(llm: LLM, console: Console, n: int) -> None:
    """Print a story of each language, and how good all of them are."""
    table = Table("language", "stories", "well formed", "and consistent", box=None, header_style="bold", pad_edge=False)
    for language in LANGUAGES:
        told = tell(llm, language, n)
        text, _ = next(((text, found) for text, found in told if found.is_consistent), told[0])
        console.print(f"\n{text}", markup=False)
        shares = [sum(each) for each in zip(*((g.is_well_formed, g.is_consistent) for _, g in told), strict=True)]
        table.add_row(LANGUAGE_NAMES[language], str(n), *(percent(share, n) for share in shares))
    console.print("\nOf such stories, by the exact judge of the story world (95 % intervals):\n")
    console.print(table)


def tell(llm: LLM, language: Language, n: int, *, seed: int = 1) -> list[tuple[str, Grade]]:
    """Let the model finish n held-out stories at temperature 0.8, and judge each, its opening included."""
    begun: list[Story] = list(stories(0, n, split="heldout"))
    openings = [each.opening(language) for each in begun]
    room = llm.config.context_length - max(len(llm.prompt_ids(text)) for text in openings)
    ends = llm.generate(openings, max_new_tokens=room, temperature=0.8, top_p=1.0, seed=seed)
    texts = [opening + end for opening, end in zip(openings, ends, strict=True)]
    grades = [grade(text, language) for text in texts]
    return [
        (text, Grade(g.is_well_formed, g.is_well_formed and g.is_consistent, g.n_sentences, g.problem))
        for text, g in zip(texts, grades, strict=True)
    ]


def percent(k: int, n: int) -> str:
    low, high = wilson(k, n)
    return f"{100 * k / n:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def walk(model: Path, out: Path, console: Console) -> None:
    """Write the model in every other format; each must tell the same story."""
    opening = next(stories(0, 1, split="heldout")).opening("en")
    expected = load(str(model), dtype="float32", device="cpu").generate(opening, max_new_tokens=60, temperature=0)
    for format, name in FORMATS:
        place = out / name
        if place.exists():
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        store.convert(model, place, to=format)
        text = load(str(place), dtype="float32", device="cpu").generate(opening, max_new_tokens=60, temperature=0)
        if text != expected:
            raise Llama2Error(f"{place} writes {text!r}, the model it came from {expected!r}: this is a bug")
        console.print(f"   {format:8} {place}: the same story")
