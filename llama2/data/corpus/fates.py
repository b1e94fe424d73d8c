"""Second stage of preparing: what becomes of every document that was kept: train, held out, or a copy that is dropped.

dedup/  exact.npy  band-00.npy ...   edges between copies, one file per sorted key; each is a task of its own
        fates                        one byte per document
        done.json                    how much of each part stays; written last
"""

import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llama2.data.corpus.dedup import Clusters, Corpus, band_edges, bands_for, exact_edges
from llama2.data.corpus.extract import RECORD
from llama2.data.corpus.tally import MAX_EXAMPLES, Tally, excerpt
from llama2.data.corpus.tokenise import part_ids, part_texts
from llama2.files.staging import staged_file

TRAIN, HELDOUT, EXACT_COPY, NEAR_COPY = range(4)
RULES = {EXACT_COPY: "exact_copy", NEAR_COPY: "near_copy"}


def edge_tasks(work: Path, parts: Sequence[Path], threshold: float, partition: int) -> list[tuple]:
    """Return the arguments of every `write_edges`; the first must be done before the others."""
    n_bands = bands_for(threshold)[0] if threshold < 1 else 0
    return [(work, tuple(parts), band, threshold, partition) for band in (None, *range(n_bands))]


def _edges_file(work: Path, band: int | None) -> Path:
    return work / ("exact.npy" if band is None else f"band-{band:02}.npy")


def write_edges(work: Path, parts: Sequence[Path], band: int | None, threshold: float, partition: int) -> None:
    """Find the copies by one key and write them as pairs of documents."""
    path = _edges_file(work, band)
    if path.exists():
        return
    corpus = Corpus(parts)
    if band is None:
        edges = exact_edges(corpus, partition=partition)
    else:
        copies = np.zeros(len(corpus), bool)
        copies[np.load(work / "exact.npy", mmap_mode="r")[:, 1]] = True
        edges = band_edges(corpus, band, threshold=threshold, skip=copies, partition=partition)
    with staged_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, edges)


def decide(work: Path, parts: Sequence[Path], threshold: float, heldout_share: float) -> None:
    """Join the edges to clusters, keep the first of each, hold out a share by hash, and say what stays of each part."""
    if (work / "done.json").exists():
        return
    start = time.perf_counter()
    corpus = Corpus(parts)
    clusters = Clusters(len(corpus), work / "roots")
    copies = np.load(work / "exact.npy", mmap_mode="r")
    clusters.join(np.asarray(copies))
    for *_, band, _, _ in edge_tasks(work, parts, threshold, 1)[1:]:
        clusters.join(np.load(_edges_file(work, band)))
    fates = np.memmap(work / "fates", np.uint8, "w+", shape=(max(len(corpus), 1),))
    for first, last in itertools.pairwise(corpus.first.tolist()):
        fates[first:last] = np.where(clusters.roots[first:last] == np.arange(first, last), TRAIN, NEAR_COPY)
    fates[copies[:, 1]] = EXACT_COPY
    stays = []
    drops = {TRAIN: Tally(), HELDOUT: Tally(), EXACT_COPY: Tally(), NEAR_COPY: Tally()}
    for part in range(len(parts)):
        stays.append(_decide_part(corpus, part, fates, clusters, heldout_share, drops))
    fates.flush()
    done = {
        "seconds": round(time.perf_counter() - start, 3),
        "first": corpus.first.tolist(),
        "stays": stays,
        "drops": {RULES[fate]: next(iter(drops[fate].plain().values()), None) for fate in RULES},
    }
    with staged_file(work / "done.json") as path:
        path.write_text(json.dumps(done))


def _decide_part(
    corpus: Corpus, part: int, fates: np.ndarray, clusters: Clusters, heldout_share: float, drops: dict[int, Tally]
) -> dict[str, int]:
    """Hold out by hash, count what is dropped; return the bytes that stay of a part for each set."""
    own = fates[corpus.first[part] : corpus.first[part + 1]]
    records = np.fromfile(corpus.folders[part] / "documents", RECORD)
    own[(own == TRAIN) & (corpus.exact(part)[:, 1] / 2.0**64 < heldout_share)] = HELDOUT
    for fate, rule in RULES.items():
        numbers = np.flatnonzero(own == fate)
        if len(numbers):
            n_characters = int(records["n_characters"][numbers].sum(dtype=np.int64))
            shown = drops[fate].get(rule)
            room = MAX_EXAMPLES - (len(shown.examples) if shown else 0)
            examples = _examples(corpus, part, numbers[:room], records, clusters)
            drops[fate].merge({rule: dict(documents=len(numbers), characters=n_characters, examples=examples)})
    sizes = records["n_bytes"].astype(np.int64)
    return {"train": int(sizes[own == TRAIN].sum()), "heldout": int(sizes[own == HELDOUT].sum())}


def _examples(corpus: Corpus, part: int, numbers: np.ndarray, records: np.ndarray, clusters: Clusters) -> list[str]:
    wanted = set(numbers.tolist())
    found = []
    for number, text in enumerate(part_texts(corpus.folders[part], records) if wanted else ()):
        if number in wanted:
            first = int(clusters.roots[corpus.first[part] + number])
            names = [_id_of(corpus, int(corpus.first[part]) + number), _id_of(corpus, first)]
            found.append(f"{names[0]} is like {names[1]}: {excerpt(text.decode('utf-8'))}")
            if len(found) == len(wanted):
                break
    return found


def _id_of(corpus: Corpus, number: int) -> str:
    part = int(np.searchsorted(corpus.first, number, side="right")) - 1
    return part_ids(corpus.folders[part])[number - int(corpus.first[part])]
