"""The `llama2` command: one table of verbs, each imported only when it is called.

A user's mistake is one line on standard error and exit code 2; `--debug` shows the traceback.
Standard output carries results only.
"""

import io
import os
import sys

from cyclopts import App, CycloptsError

from llama2 import __version__
from llama2.errors import Llama2Error
from llama2.kernels.memory import keep_freed_memory

COMMANDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "info": (
        "llama2.cli.models:info",
        "Show what a model is: shape, parameters, memory per token.",
        ("llama2 info llama2-70b", "llama2 info stories15M.bin --json"),
    ),
    "generate": (
        "llama2.cli.generate:generate",
        "Continue a text, or every prompt of a file.",
        (
            'llama2 generate stories15M.bin --prompt "Once upon a time" --temperature 0',
            "llama2 generate ./Llama-3.2-1B --prompts in.jsonl --out out.jsonl",
        ),
    ),
    "chat": (
        "llama2.cli.chat:chat",
        "Talk to a model in the terminal.",
        ('llama2 chat meta-llama/Llama-2-7b-chat-hf --system "Answer in one sentence."',),
    ),
    "serve": (
        "llama2.cli.serve:serve",
        "Serve models behind OpenAI's protocol.",
        (
            "llama2 serve stories15M.bin --port 8000",
            "llama2 serve chat=./Llama-3.2-1B-Instruct base=./Llama-3.2-1B --host 0.0.0.0 --api-keys keys.txt",
        ),
    ),
    "bench": (
        "llama2.cli.bench:bench",
        "Measure how fast a model reads and writes here.",
        ("llama2 bench stories15M.bin", "llama2 bench tinyllama-1.1b --dtype bfloat16 --batch 1 --batch 8"),
    ),
    "convert": (
        "llama2.cli.models:convert",
        "Write a checkpoint in another format.",
        (
            "llama2 convert stories15M.bin stories15M-hf --to hf",
            "llama2 convert ./Llama-2-7b-hf llama-2-7b.gguf --to gguf --dtype q8_0",
        ),
    ),
    "pull": (
        "llama2.cli.models:pull",
        "Fetch a model from the Hugging Face hub into its usual cache.",
        ("llama2 pull NousResearch/Llama-2-7b-chat-hf",),
    ),
    "tokenize": (
        "llama2.cli.models:tokenize",
        "Show the tokens of a text.",
        ('llama2 tokenize tokenizer.model "Hello world"',),
    ),
    "world": (
        "llama2.cli.world:world",
        "Write a generated world of little stories to train on.",
        ("llama2 world --stories 10000 --out world",),
    ),
    "train-tokenizer": (
        "llama2.cli.train_tokenizer:train_tokenizer",
        "Train a vocabulary from text.",
        ("llama2 train-tokenizer world/train/stories.en.txt --vocab-size 2048 --out tokenizer",),
    ),
    "prepare": (
        "llama2.cli.prepare:prepare",
        "Make token shards from raw text: clean, deduplicate, tokenise.",
        (
            "llama2 prepare world/train/stories.jsonl --tokenizer tokenizer --out shards",
            "llama2 prepare books pages.warc.gz --tokenizer tokenizer --languages en,es --out shards",
            "llama2 prepare /share/raw --config prepare.toml --rank 1 --world-size 4",
        ),
    ),
    "pretrain": (
        "llama2.cli.pretrain:pretrain",
        "Train a Llama on token shards, from nothing or from a checkpoint.",
        (
            "llama2 pretrain --data shards --dim 128 --n-layers 4 --n-heads 4 --max-steps 500 --out run",
            "llama2 pretrain --config run.toml --resume",
            "torchrun --nproc-per-node 8 -m llama2 pretrain --config run.toml",
        ),
    ),
    "finetune": (
        "llama2.cli.finetune:finetune",
        "Adapt a model to examples: all of it, or a small adapter.",
        (
            "llama2 finetune ./Llama-2-7b-hf --data chats.jsonl --method qlora --out run",
            "llama2 finetune llama2-demo/run/model --data llama2-demo/world/train/tasks.jsonl --show 3 --dry-run",
        ),
    ),
    "reward": (
        "llama2.cli.reward:reward",
        "Train a reward model on preference pairs.",
        ("llama2 reward ./my-chat-model --data pairs.jsonl --out reward",),
    ),
    "dpo": (
        "llama2.cli.dpo:dpo",
        "Learn from preference pairs directly: DPO, IPO, KTO, ORPO, SimPO.",
        (
            "llama2 dpo ./my-chat-model --data pairs.jsonl --out dpo",
            "llama2 dpo ./my-chat-model --data labelled.jsonl --loss kto --out kto",
        ),
    ),
    "ppo": (
        "llama2.cli.ppo:ppo",
        "Align a model by PPO with a reward model.",
        (
            "llama2 ppo ./my-chat-model --prompts pairs.jsonl --reward reward/model --out ppo",
            "llama2 ppo ./my-chat-model --prompts world/train/questions.jsonl --reward grade --out ppo",
        ),
    ),
    "grpo": (
        "llama2.cli.grpo:grpo",
        "Align a model by GRPO: answers to one prompt are measured by each other.",
        ("llama2 grpo ./my-chat-model --prompts sums.jsonl --reward my_module:is_right --out grpo",),
    ),
    "reject": (
        "llama2.cli.reject:reject",
        "Learn the best of K sampled answers, in rounds.",
        (
            "llama2 reject ./my-chat-model --prompts pairs.jsonl --reward reward/model --out reject",
            "llama2 reject ./my-chat-model --prompts pairs.jsonl --reward reward/model --n-rounds 5 --out reject",
        ),
    ),
    "ghost": (
        "llama2.cli.ghost:ghost",
        "Teach a model to keep in mind what it was told first: Ghost Attention.",
        (
            "llama2 ghost ./my-chat-model --dialogues world/train/dialogues.jsonl"
            " --instructions world/train/instructions.jsonl --out ghost",
            "llama2 ghost ./my-chat-model --dialogues chats.jsonl --instructions said.jsonl --judge my_module:obeys"
            " --out ghost",
        ),
    ),
    "safety": (
        "llama2.cli.safety:safety",
        "Make a model safer by distilled answers and demonstrations.",
        (
            "llama2 safety ./my-chat-model --prompts unsafe.jsonl --safety-reward reward-safety/model --out safety",
            "llama2 safety ./my-chat-model --prompts world/train/safety.jsonl --safety-reward grade"
            " --demonstrations world/train/safety.jsonl --amounts 10 --amounts 100 --out safety",
        ),
    ),
    "compare": (
        "llama2.cli.compare:compare",
        "Rate two models' answers blindly, or let a reward decide which wins.",
        (
            "llama2 compare ./my-chat-model dpo/model --prompts pairs.jsonl --out ratings.jsonl",
            "llama2 compare ./my-chat-model dpo/model --prompts pairs.jsonl --n 200 --reward reward/model",
        ),
    ),
    "extend-vocabulary": (
        "llama2.cli.extend_vocabulary:extend_vocabulary",
        "Add pieces for another language or domain to a checkpoint.",
        ("llama2 extend-vocabulary stories15M-hf world/train/stories.es.txt --add 1000 --out stories15M-es",),
    ),
    "merge": (
        "llama2.cli.merge:merge",
        "Merge an adapter into its base, and see what the rounding costs.",
        ("llama2 merge ./Llama-2-7b-hf ./adapter ./merged --text heldout.txt",),
    ),
    "task": (
        "llama2.cli.task:app",
        "Label, translate, summarise, answer or title a text; score a model on a labelled file.",
        (
            'llama2 task sentiment ./my-model "In the end Mia found her kite."',
            "llama2 task translate ./my-model @story.txt --to es",
            "llama2 task evaluate ./my-model world/heldout/tasks.jsonl --limit 200",
        ),
    ),
    "demo": (
        "llama2.cli.demo:demo",
        "See the package at work; with a model, chat with it.",
        ("llama2 demo", "llama2 demo --quick --out quick", "llama2 demo meta-llama/Llama-2-7b-chat-hf"),
    ),
}
"""Name -> (where its function is, one line of help, examples)."""

TRAINING = ("pretrain", "finetune", "reward", "dpo", "ppo", "grpo", "reject", "ghost", "safety", "demo")
"""Commands that train for a while."""


def make_app() -> App:
    app = App(
        name="llama2",
        help="Run any Llama, and train your own: continue texts, chat, serve, convert, pretrain, fine-tune, align.",
        help_epilogue="Put --debug at the end of a command for the full traceback of an error.",
        help_format="plaintext",  # Markdown would double the time that --help takes
        version=__version__,
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
    )
    for name, (where, summary, _) in COMMANDS.items():
        # a command that has commands of its own says how it ends where it is defined
        own = {} if where.endswith(":app") else {"help_epilogue": epilogue(name)}
        app.command(where, name=name, help=summary, **own)
    return app


def epilogue(command: str) -> str:
    """Return the examples of a command."""
    return "\n".join(["Examples:", *(f"  {example}" for example in COMMANDS[command][2])])


def main() -> None:
    """Run the command line and leave with its exit code."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in TRAINING and "OMP_WAIT_POLICY" not in os.environ:
        # Before PyTorch is loaded. By default its threads wait for each other in a busy loop, and then training on two
        # cores that one other process shares is ten times slower than on one core alone; to sleep at once costs a
        # quarter of the speed where nothing else runs. So they turn a short while (docs/log.md).
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    if arguments and arguments[0] in TRAINING:
        keep_freed_memory()
    is_debug = arguments[-1:] == ["--debug"]  # last, since elsewhere it may be somebody's text
    if is_debug:
        arguments = arguments[:-1]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character is no error
    try:
        make_app()(arguments or ["--help"])
    except (Llama2Error, CycloptsError, OSError, UnicodeError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output (head, less) left: nothing is wrong
            sys.stderr.close()
            sys.exit(0)
        if is_debug:
            raise
        fail(explain(error))
    except KeyboardInterrupt:
        print("llama2: stopped", file=sys.stderr)
        sys.exit(130)


def explain(error: Exception) -> str:
    """Return what to tell the user; of a flag's value that pydantic refused, the flag, the value and why."""
    errors = getattr(error.__cause__, "errors", None)
    if not isinstance(error, CycloptsError) or errors is None:
        return str(error)
    first = errors()[0]
    return f"--{str(first['loc'][0]).replace('_', '-')} {first['input']}: {first['msg'][:1].lower()}{first['msg'][1:]}"


def fail(message: str) -> None:
    """Print one line on standard error and leave with exit code 2."""
    line = " ".join(message.split()).encode("utf-8", "backslashreplace").decode()
    rank = os.environ.get("RANK")  # of several processes each speaks for itself
    print(f"llama2: error: {line}" if rank is None else f"llama2: error (rank {rank}): {line}", file=sys.stderr)
    sys.exit(2)
