"""`llama2 world`: a corpus for a machine that has none."""

import sys
from pathlib import Path


def world(
    *,
    out: Path,
    stories: int = 10_000,
    heldout: int = 1_000,
    seed: int = 0,
    turns: int | None = None,
    raw: bool = True,
    near_duplicates: float = 0.05,
    contamination: float = 0.01,
) -> None:
    """Write a world of little stories, in English, Spanish and Chinese, and what can be learnt from it, as plain files.

    train/ and heldout/ hold stories, tasks, dialogues, preference pairs and unsafe requests; raw/ holds the training
    stories as they would be found on the web, dirty, and planted.jsonl says what is wrong with them.

    Parameters
    ----------
    out
        A new folder.
    stories
        Stories to train on; each is told in all three languages.
    heldout
        Stories to judge by: no hero meets the same thing in the same place as in those to train on.
    seed
        Another seed, another world.
    turns
        Questions in each dialogue, 1 to 40 [default: 2 to 6].
    raw
        Write the dirty corpus too.
    near_duplicates
        Nearly equal copies in raw/, per story told in a language.
    contamination
        Held-out stories in raw/, per story told in a language.
    """
    from llama2.data.storyworld.files import usual_workers, write_world
    from llama2.data.storyworld.raw import Dirt

    dirt = Dirt(near_duplicates=near_duplicates, contamination=contamination)
    sizes = dict(n_stories=stories, n_heldout=heldout, n_turns=turns, n_workers=usual_workers(stories))
    write_world(out, seed=seed, raw=raw, dirt=dirt, **sizes)  # pyright: ignore[reportArgumentType]
    print(f"wrote {stories} stories and {heldout} held out, in three languages, to {out}", file=sys.stderr)
