"""The README's first command: from raw text to a Llama that tells stories and answers, with nothing at hand.

    world -> tokenizer -> prepare -> pretrain -> grade -> finetune -> score -> merge -> every format
                                                                           -> reward model -> align -> grade

Each stage calls what the command of its name calls, and leaves its result in the demo's folder; a stage whose result
is there is not done again, so a demo that was stopped goes on.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from llama2.align.dpo import train_dpo
from llama2.align.dpo_config import DpoConfig
from llama2.align.reward import train_reward
from llama2.align.reward_config import RewardConfig
from llama2.checkpoint import store
from llama2.compress.merge import merge
from llama2.data.corpus.prepare import PrepareConfig, prepare
from llama2.data.corpus.report import print_report
from llama2.data.shards import INDEX
from llama2.data.storyworld.files import usual_workers, write_world
from llama2.data.storyworld.stories import stories
from llama2.data.storyworld.words import LANGUAGES
from llama2.demo.judge import show_alignment, show_stories, show_tasks
from llama2.demo.size import DIRT, FULL, Size
from llama2.errors import Llama2Error
from llama2.files.staging import make_parent
from llama2.llm import load
from llama2.tasks.items import read_items
from llama2.tokenizer.formats import save_tokenizer
from llama2.tokenizer.train import train_tokenizer
from llama2.train.config import PretrainConfig
from llama2.train.finetune import finetune
from llama2.train.finetune_config import FinetuneConfig
from llama2.train.pretrain import pretrain
from llama2.train.run import Outcome

FORMATS = (("gguf", "story.gguf"), ("meta", "story-meta"))
"""Besides Hugging Face's; llama2.c's knows one rope_theta only, and not this model's."""


def demo(out: Path = Path("llama2-demo"), *, size: Size = FULL) -> Path:
    """Do every stage; return the folder of the model that can do most."""
    console = Console(highlight=False)
    began = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[bold][{time.monotonic() - began:4.0f} s] {text}[/bold]")

    world, tokenizer, run, tuned, chat = (out / name for name in ("world", "tokenizer", "run", "tuned", "chat"))
    claim(out, size)
    if not world.exists():
        say(f"1. A world of {size.n_stories:,} little stories in three languages, and a dirty raw corpus: {world}")
        n_heldout, n_workers = max(500, size.n_graded), usual_workers(size.n_stories)
        write_world(world, n_stories=size.n_stories, n_heldout=n_heldout, dirt=DIRT, n_workers=n_workers)
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
        check(train(out, size))
    say("5. Held-out stories, begun by the world and finished by the model")
    show_stories(load(str(run / "model"), device="cpu", max_batch=64), console, size.n_graded)
    if not (tuned / "model").exists():
        say(f"6. Taught to answer, by an adapter of rank {size.finetuning['lora_r']}: {tuned}")
        check(finetune(taught(out, size.finetuning)))
    say("7. Held-out tasks, done by the adapted model")
    items = read_items(world / "heldout" / "tasks.jsonl", limit=size.n_tasks)
    show_tasks(load(str(tuned / "model"), device="cpu", max_batch=64), console, items)
    say(f"8. The adapter merged into the model, and every format: {chat}")
    if not chat.exists():
        merge(str(run / "model"), str(tuned / "model"), chat, dtype="float32")
    walk(chat, out, console)
    aligned = align(out, size, chat, say, console)
    console.print(f"\nAll of it is in {out}. See {run / 'report.html'}, {tuned / 'report.html'}, and go on:\n")
    console.print(f'  llama2 generate {run / "model"} --prompt "One morning, Mia the little rabbit"')
    console.print(f"  llama2 chat {out / 'story.gguf'}")
    console.print(f"  llama2 serve {aligned}    # and open http://127.0.0.1:8000 in a browser")
    return chat


def align(out: Path, size: Size, chat: Path, say: Callable[[str], None], console: Console) -> Path:
    """Train a reward model, align the chat model, and print what that changed; return the aligned model's folder."""
    pairs = dict(data=(out / "world" / "train" / "preferences.jsonl",), model=str(chat), resume=True)
    reward, aligned = out / "reward", out / "aligned"
    if not (reward / "model").exists():
        say(f"9. Of two answers the better one: a reward model: {reward}")
        check(train_reward(RewardConfig(**{**pairs, **size.reward, "out": reward})))
    if not (aligned / "model").exists():
        say(f"10. Aligned to what is preferred, by ORPO: {aligned}")
        check(train_dpo(DpoConfig(**{**pairs, **size.aligning, "out": aligned})))
    say("11. Held-out questions, answered before and after")
    show_alignment(str(chat), str(aligned / "model"), str(reward / "model"), console, size.n_asked)
    return aligned / "model"


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
    plain = dict(tokenizer=tokenizer, document_separator="\n\n")
    both = dict(**plain, min_words=20, skip_rules=("top_run",))
    prepare(PrepareConfig(raw=held_out, out=out / "heldout", dedup_threshold=1.0, **both))  # pyright: ignore[reportArgumentType]
    # Sentences of the story world come again, so that runs of 13 words in common do not mean a leak; 30 do.
    judged_by = dict(decontaminate=held_out, decontamination_words=30, languages=LANGUAGES)
    readers = PrepareConfig(raw=(world / "train" / "readers.txt",), out=out / "readers", verbatim=True, **plain)  # pyright: ignore[reportArgumentType]
    prepare(readers)
    report = prepare(PrepareConfig(raw=(world / "raw",), out=out / "shards", **both, **judged_by))  # pyright: ignore[reportArgumentType]
    print_report(report)


def train(out: Path, size: Size) -> Outcome:
    """Pretrain on the stories, and on readers: exercises, phrase books and vocabularies."""
    settings = dict(data=(out / "shards", out / "readers"), eval_data=out / "heldout", out=out / "run", resume=True)
    prompts = tuple(next(stories(0, 1, split="heldout")).opening(language) for language in LANGUAGES)
    return pretrain(PretrainConfig(**settings, **size.pretraining, sample_prompts=prompts))  # pyright: ignore[reportArgumentType]


def taught(out: Path, settings: Mapping[str, Any]) -> FinetuneConfig:
    """Return how an adapter learns tasks and conversations, beside some of the stories, lest they be forgotten."""
    world = out / "world" / "train"
    data = (world / "tasks.jsonl", world / "dialogues.jsonl")
    replay = dict(replay=(out / "shards",), replay_eval=out / "heldout")
    usual = dict(model=str(out / "run" / "model"), data=data, out=out / "tuned", resume=True)
    return FinetuneConfig(**{**usual, **replay, **settings})


def check(outcome: Outcome) -> None:
    if outcome.stopped_by:
        raise Llama2Error("the demo was stopped; the same command goes on where it was")


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
