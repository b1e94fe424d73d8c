"""`llama2 world`: a corpus for a machine that has none."""

import sys
from pathlib import Path


def world(*, out: Path, stories: int = 10_000, heldout: int = 1_000, seed: int = 0) -> None:
    """Write a world of little stories, in English, Spanish and Chinese, with tasks about them, as plain files.

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
    """
    from llama2.data.storyworld.files import write_world

    write_world(out, n_stories=stories, n_heldout=heldout, seed=seed)
    print(f"wrote {stories} stories and {heldout} held out, in three languages, to {out}", file=sys.stderr)
