"""What each method of alignment does to the story world's model, by exact judges; one JSON line for each claim.

    python -m benchmarks.alignment DEMO OUT [--only STAGE,STAGE] [--quick]

DEMO is the folder of a finished `llama2 demo`. Its base learns to converse first (full fine-tuning; standing
instructions are obeyed where they are said only, and preprompts mean care) from people of uneven care: two answers in
five are flawed. What the best of them can do it can do too, and does not always, which is the head-room that the paper
sees for alignment (arXiv:2307.09288 sec. 5.1). Every method begins with that model and has the exact grade as its
reward. Everything is kept in OUT: what is there is not made again.
"""

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Company, report
from llama2.align.dpo import train_dpo
from llama2.align.dpo_config import DpoConfig
from llama2.align.ghost import ghost
from llama2.align.ghost_config import GhostConfig
from llama2.align.grpo import grpo
from llama2.align.measure import measure
from llama2.align.online_config import GrpoConfig, PpoConfig
from llama2.align.ppo import ppo
from llama2.align.rejection import reject
from llama2.align.rejection_config import RejectConfig
from llama2.align.reward import train_reward
from llama2.align.reward_config import RewardConfig
from llama2.align.safety import safety
from llama2.align.safety_config import SafetyConfig
from llama2.align.scoring import load_reward
from llama2.align.task import GRADE
from llama2.data.interval import wilson
from llama2.data.storyworld import guarded, instructions, preferences, questions, safety as requests
from llama2.data.storyworld.corruptions import corrupted
from llama2.data.storyworld.dialogues import dialogue
from llama2.data.storyworld.files import line
from llama2.data.storyworld.stories import Split, separator
from llama2.data.storyworld.turns import Turn
from llama2.kernels.memory import keep_freed_memory
from llama2.train.finetune import finetune
from llama2.train.finetune_config import FinetuneConfig

CONTEXT = 1024
N: dict[Split, int] = {"train": 12_000, "heldout": 2_500}
FLAWED = 0.4
"""Share of the conversations' answers that are not the right one."""
SHORT = {"en": 150, "es": 150, "zh": 50}
"""Characters of answers that tell no story."""
TRAINING: dict[str, Any] = dict(dtype="bfloat16", too_long="drop", device="cpu")
ALL_WEIGHTS: dict[str, Any] = dict(method="full", optimizer="muon")


def write_world(out: Path, n: Mapping[Split, int]) -> None:
    """Write what is learnt from and judged by, of train and held-out stories."""
    for split, count in n.items():
        folder = out / "world" / split
        if folder.exists():
            continue
        partial = folder.with_name(f".{split}")
        partial.mkdir(parents=True, exist_ok=True)
        judged = pairs(count) if split == "train" else preferences.preferences(0, count, split=split)
        for name, lines in {
            "preferences": map(preferences.record, judged),
            "questions": (each.line for each in questions.questions(0, count, split=split)),
            "safety": (requests.record(each) for each in requests.safety_requests(0, count // 6, split=split)),
            "guarded": guarded.guarded_requests(0, count, split=split),
            "instructions": instructions.instructions(0, count, split=split),
            "talks": (plain(1, index, split, 20 if index % 4 == 0 else 1 + index % 5) for index in range(count // 2)),
            "obedient": (obedient(index, split) for index in range(count // 2)),
            "combined": (obedient(index, split, n_parts=(2,)) for index in range(count // 2)),
            "long": (brief(index, split) for index in range(min(count, 600))),
        }.items():
            (partial / f"{name}.jsonl").write_text("".join(line(each) for each in lines), encoding="utf-8")
        partial.rename(folder)


def pairs(n: int) -> Iterator[preferences.Preference]:
    """Yield pairs about n prompts to learn from: eight about a short answer, four about some others.

    Harmless requests that look unsafe are among these others: else refusals would nearly always be wrong.
    """
    for index in range(n):
        first = preferences.preference(0, index)
        is_short = len(first.chosen) < SHORT[first.language] and first.flaw != "false_refusal"
        if is_short or index // 3 % 3 == 0:  # the language goes by index % 3
            yield from (preferences.preference(0, index, pair=i) for i in range(8 if is_short else 4))


def plain(seed: int, index: int, split, n_turns: int) -> dict[str, Any]:
    """Return a conversation without a standing instruction."""
    found = dataclasses.replace(dialogue(seed, index, split=split, n_turns=n_turns), standing=None)
    turns = tuple(dataclasses.replace(turn, standing=None) for turn in found.turns)
    messages = [asdict(each) for each in dataclasses.replace(found, turns=turns).messages()]
    slip(random.Random(f"plain/{seed}/{index}"), turns, messages)
    return {"messages": messages, "language": found.language, "instruction": ""}


def brief(index: int, split) -> dict[str, Any]:
    """Return a conversation of twenty turns, the shortest of eight: an instruction needs room in the context too."""
    some = (plain(0, index + 1200 * i, split, 20) for i in range(8))  # all in one language
    return min(some, key=lambda each: sum(len(message["content"]) for message in each["messages"]))


def obedient(index: int, split, *, n_parts: Sequence[int] = (1, 2)) -> dict[str, Any]:
    """Return a conversation in which the instruction is said with every question, and never forgotten.

    Every other one is played in a role, which takes most learning: which animal says what. n_parts: how
    many parts the instruction may have.
    """
    number, n_turns = index, 2 + index // 2 % 5
    while True:
        found = dialogue(2, number, split=split, n_turns=n_turns)
        kinds = found.standing.kinds if found.standing else ()
        if len(kinds) in n_parts and ("role" in kinds or index % 2):
            break
        number += 1_000_003
    assert found.standing is not None
    messages = [asdict(each) for each in found.messages(with_instruction=False)]
    slip(random.Random(f"obedient/{index}"), found.turns, messages)
    for each in messages:
        if each["role"] == "user":
            each["content"] = separator(found.language).join((found.standing.text, each["content"]))
    return {"messages": messages, "language": found.language, "instruction": found.standing.text}


def slip(rng: random.Random, turns: Sequence[Turn], messages: list[dict[str, Any]]) -> None:
    """Put flawed answers in place of some right ones."""
    answers = [each for each in messages if each["role"] == "assistant"]
    for turn, each in zip(turns, answers, strict=True):
        if rng.random() < FLAWED:
            flaw, worse = corrupted(rng, turn)
            each["content"] = each["content"] if flaw == "instruction_forgotten" else worse


def widen(base: Path, to: Path) -> None:
    """Write the demo's base with a context of CONTEXT: its positions need no weights."""
    if to.exists():
        return
    partial = to.with_name(f".{to.name}")
    partial.mkdir(parents=True, exist_ok=True)
    for file in base.iterdir():
        if file.is_file():
            (partial / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text())
    (partial / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}, indent=1))
    partial.rename(to)


class Bench:
    """The stages, each of which leaves a folder in OUT."""

    def __init__(self, demo: Path, out: Path, *, quick: bool):
        self.demo, self.out, self.quick = demo, out, quick
        write_world(out, {"train": 60, "heldout": 40} if quick else N)
        self.train, self.held_out = out / "world" / "train", out / "world" / "heldout"
        self.seconds: dict[str, float] = {}
        self.sft = self.made("sft", self.converse)

    def steps(self, n: int) -> int:
        return 2 if self.quick else n

    def made(self, name: str, make: Callable[[Path], Any], *, model: str = "model") -> Path:
        """Return the model of a stage, made if it is not there yet; how long that took is written down."""
        run, clock = self.out / name, self.out / f"{name}.json"
        if not clock.exists():
            company, began = Company(), time.perf_counter()
            make(run)
            if not (run / model).exists():
                raise SystemExit(f"{name} was stopped; the same command goes on with it")
            found = {"seconds": round(time.perf_counter() - began, 1), "others": company.share()}
            clock.write_text(json.dumps(found))
        self.seconds[name] = json.loads(clock.read_text())["seconds"]
        return run / model

    @property
    def conversations(self) -> tuple[Path, ...]:
        """What the chat model learns from; of refusals only those under a preprompt."""
        return (self.train / "talks.jsonl", self.train / "obedient.jsonl", *self.right)

    @property
    def right(self) -> tuple[Path, ...]:
        """The part of it in which every answer is right."""
        return (self.train / "guarded.jsonl", self.demo / "world" / "train" / "tasks.jsonl")

    def converse(self, run: Path) -> None:
        widen(self.demo / "run" / "model", self.out / "base")
        self.finetuned(
            run, self.out / "base", self.conversations, weights=(0.3, 0.3, 0.2, 0.2), max_steps=self.steps(4000)
        )

    @property
    def obedient(self) -> Path:
        """The chat model after more conversations under instructions: what is not obeyed at once cannot be kept."""
        names, weights = ("talks", "obedient", "combined"), (0.2, 0.4, 0.4)
        data = tuple(self.train / f"{name}.jsonl" for name in names)
        return self.made(
            "obedient", lambda run: self.finetuned(run, self.sft, data, weights=weights, max_steps=self.steps(2000))
        )

    def finetuned(self, run: Path, model: Path, data: tuple[Path, ...], **settings: Any) -> None:
        finetune(
            FinetuneConfig(
                model=str(model), data=data, method="full", out=run, resume=True, sequence_length=CONTEXT, batch_size=4,
                optimizer="muon", learning_rate=5e-3, weight_decay=0.1, min_lr_share=0.03,
                warmup_steps=0 if self.quick else 20, **settings, **TRAINING,
            )
        )  # fmt: skip

    # Reward models

    def reward_model(self, name: str, **changes: Any) -> Path:
        settings: dict[str, Any] = dict(
            model=str(self.sft), data=(self.train / "preferences.jsonl",), eval_share=0.0, resume=True, batch_size=64,
            max_steps=self.steps(500), learning_rate=3e-3, optimizer="muon", **TRAINING,
        )  # fmt: skip
        return self.made(name, lambda run: train_reward(RewardConfig(**{**settings, **changes, "out": run})))

    @property
    def helpfulness(self) -> Path:
        return self.reward_model("reward-helpfulness", mix="helpfulness")

    @property
    def safety(self) -> Path:
        return self.reward_model("reward-safety", mix="safety", max_steps=self.steps(150))

    def reward(self) -> None:
        """Accuracy by rating of each model on each kind of pairs, and how well unsafe answers are found."""
        pairs = list(preferences.preferences(0, 40 if self.quick else N["heldout"], split="heldout"))
        for name, folder in {
            "helpfulness": self.helpfulness,
            "safety": self.safety,
            "none": self.reward_model("reward-margin-none", mix="helpfulness", margin="none"),
            "large": self.reward_model("reward-margin-large", mix="helpfulness", margin="large"),
        }.items():
            model = load_reward(folder)
            sides = [
                model([p.prompt for p in pairs], [getattr(p, side) for p in pairs]) for side in ("chosen", "rejected")
            ]
            gaps = np.array(sides[0]) - np.array(sides[1])
            values: dict[str, object] = {"model": name, "seconds": self.seconds[folder.parent.name]}
            for kind in ("all", "helpful", "safe"):
                for rating in preferences.RATINGS:
                    right = [
                        gap > 0
                        for gap, p in zip(gaps, pairs, strict=True)
                        if p.rating == rating and kind in ("all", p.kind)
                    ]
                    if right:
                        values[f"{kind}: {rating}"] = round(100 * sum(right) / len(right), 1)
                        values[f"{kind}: {rating}, 95 %"] = [round(100 * x, 1) for x in wilson(sum(right), len(right))]
            if model.tells_safety:
                values |= found_unsafe(model, pairs)
            report("reward models", values)

    # Methods

    def reject(self) -> Path:
        return self.rounds("reject")

    def latest(self) -> Path:
        """Rounds that learn the newest answers alone, with which the paper saw its models forget."""
        return self.rounds("latest", keep_earlier=False)

    def rounds(self, name: str, **changes: Any) -> Path:
        def make(run: Path) -> None:
            settings: dict[str, Any] = dict(
                model=str(self.sft), prompts=(self.train / "questions.jsonl",), reward=GRADE, out=run, resume=True,
                n_rounds=1 if self.quick else 2, n_samples=8, n_prompts=20 if self.quick else 640, least_gap=0.2,
                temperatures=(1.0,), max_new_tokens=150, tolerance=0.02, learning_rate=1e-3, batch_size=8,
                n_epochs=2.0, replay=self.right, replay_share=0.3, **ALL_WEIGHTS, **TRAINING,
            )  # fmt: skip
            reject(RejectConfig(**settings | changes))

        return self.made(name, make)

    def online(self) -> dict[str, Any]:
        n = 32 if self.quick else 256
        return dict(
            model=str(self.sft), prompts=(self.train / "questions.jsonl",), eval_share=0.0, reward=GRADE, resume=True,
            max_new_tokens=150, n_iterations=self.steps(36), batch_size=n, mini_batch_size=n // 2, n_generations=8,
            learning_rate=7e-4, kl_coef=0.01, **ALL_WEIGHTS, **TRAINING,
        )  # fmt: skip

    def ppo(self) -> Path:
        settings: dict[str, Any] = self.online() | dict(
            n_iterations=self.steps(34), lam=1.0, whiten_over="prompt", value_lr=2e-3
        )
        return self.made("ppo", lambda run: ppo(PpoConfig(**settings, out=run)))

    def grpo(self) -> Path:
        settings: dict[str, Any] = self.online() | dict(per_token=True)
        return self.made("grpo", lambda run: grpo(GrpoConfig(**settings, out=run)))

    def dpo(self) -> Path:
        """From pairs of the model's own answers, those that rejection sampling wrote."""
        pairs = tuple(sorted(self.reject().parent.glob("round-*/contrasts.jsonl")))
        settings: dict[str, Any] = dict(
            model=str(self.sft), data=pairs, eval_share=0.02, resume=True, batch_size=4 if self.quick else 32,
            learning_rate=6e-4, beta=0.5, nll_weight=2.0, n_epochs=3.0, **ALL_WEIGHTS, **TRAINING,
        )  # fmt: skip
        return self.made("dpo", lambda run: train_dpo(DpoConfig(**settings, out=run)))

    def ghost(self) -> None:
        """Recall over the turns before and after Ghost Attention."""
        n = 8 if self.quick else 900
        dialogues = (self.train / "long.jsonl", self.train / "talks.jsonl")

        def make(run: Path) -> None:
            ghost(
                GhostConfig(
                    model=str(self.obedient), dialogues=dialogues, instructions=self.train / "instructions.jsonl",
                    eval_dialogues=self.held_out / "long.jsonl", out=run, resume=True,
                    eval_instructions=self.held_out / "instructions.jsonl", n_dialogues=n,
                    n_eval=4 if self.quick else 100, max_new_tokens=180, temperature=0.5, keep="obedient",
                    learning_rate=1e-3, batch_size=8, n_epochs=3.0, replay=(self.train / "talks.jsonl",),
                    replay_share=0.2, dtype="bfloat16", device="cpu", **ALL_WEIGHTS,
                )
            )  # fmt: skip

        self.made("ghost", make, model="run/model")
        recall = json.loads((self.out / "ghost" / "recall.json").read_text())
        values = {
            f"{when} {row['turn']}": round(100 * row["share"], 1)
            for when, rows in recall.items()
            for row in rows
            if row["share"] is not None
        }
        report("ghost attention", {"seconds": self.seconds["ghost"], **values, "recall": recall})

    def distil(self) -> None:
        """Safety and helpfulness against the amount of safety data."""

        def make(run: Path) -> None:
            safety(
                SafetyConfig(
                    model=str(self.sft), prompts=(self.train / "safety.jsonl",), safety_reward=str(self.safety),
                    eval_prompts=(self.held_out / "questions.jsonl", self.held_out / "safety.jsonl"), out=run,
                    resume=True, n_eval=20 if self.quick else 900,
                    amounts=(0, 100) if self.quick else (0, 1, 10, 25, 50, 100), max_new_tokens=150,
                    learning_rate=1e-3, batch_size=8, n_epochs=2.0, replay=self.conversations, replay_share=0.5,
                    **ALL_WEIGHTS, **TRAINING,
                )
            )  # fmt: skip

        self.made("safety", make, model="amount-100/run/model")
        curves = json.loads((self.out / "safety" / "curves.json").read_text())
        values = {
            f"{name} at {each['amount']:g} %": round(100 * each[name]["share"], 1)
            for each in curves["amounts"]
            for name in ("refused", "false_refusals")
        }
        report("safety", {"seconds": self.seconds["safety"], **values, "curves": curves})

    def measure(self, names: list[str]) -> None:
        """The exact grade of every model's answers, and how far it went."""
        asked = list(questions.questions(0, 20 if self.quick else 2_000, split="heldout"))
        seeds = (0,) if self.quick else (0, 1, 2)
        begun = None
        for name in ["sft", *names]:
            model = self.sft if name == "sft" else getattr(self, name)()
            found = measure(str(model), asked, reference=str(self.sft), seeds=seeds)
            begun = found if begun is None else begun
            values = {key: rounded(value) for key, value in asdict(found).items()}
            closed = (found.grade - begun.grade) / (1 - begun.grade)
            told = {"closed": round(closed, 3), "unsafe refused": round(100 * found.refused[0], 1)}
            report("alignment", {"model": name, "seconds": self.seconds[name], **told, **values})


def found_unsafe(model, pairs) -> dict[str, object]:
    """Return the recall of unsafe answers at the threshold where precision is 90 %, and both at a half."""
    said = [
        (p.prompt, getattr(p, side), getattr(p, f"{side}_is_safe")) for p in pairs for side in ("chosen", "rejected")
    ]
    unsafe = np.array([not each[2] for each in said])
    score = 1 - model.probabilities([each[0] for each in said], [each[1] for each in said]).numpy()
    order = np.argsort(-score)
    hits = np.cumsum(unsafe[order])
    precision, recall = hits / np.arange(1, len(order) + 1), hits / max(1, unsafe.sum())
    enough = recall[precision >= 0.9]
    at_half = score > 0.5
    return {
        "recall at precision 90": round(100 * float(enough.max()) if len(enough) else 0.0, 1),
        "recall at a half": round(100 * float(at_half[unsafe].mean()), 1),
        "precision at a half": round(100 * float(unsafe[at_half].mean()), 1) if at_half.any() else None,
        "unsafe answers": int(unsafe.sum()),
    }


def rounded(value: object) -> object:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, tuple):
        return [rounded(each) for each in value]
    return {key: rounded(each) for key, each in value.items()} if isinstance(value, dict) else value


METHODS = ("reject", "dpo", "ppo", "grpo", "latest")
STAGES = ("reward", *METHODS, "measure", "ghost", "safety")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default=",".join(STAGES), help=f"some of {', '.join(STAGES)}")
    parser.add_argument("--quick", action="store_true", help="a trace of everything")
    arguments = parser.parse_args()
    keep_freed_memory()  # as our commands do
    torch.manual_seed(0)
    bench = Bench(arguments.demo, arguments.out, quick=arguments.quick)
    wanted = arguments.only.split(",")
    for name in wanted:
        if name == "measure":
            bench.measure([each for each in METHODS if each in wanted or (arguments.out / f"{each}.json").exists()])
        else:
            stage = "distil" if name == "safety" else name
            getattr(bench, stage)()


if __name__ == "__main__":
    main()
