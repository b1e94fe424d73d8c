"""Documents that are there more than once: exact copies by hash, near ones by MinHash, sorted on disk.

    extract:  text -> runs of five words -> sketch (smallest hashes) and signature -> keys of bands  (a block at a time)
    then:     all documents sorted by each band's key -> equal keys are candidates -> sketches compared -> edges
    last:     edges -> clusters -> the first document of each stays

MinHash: Broder 1997; banding: Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", sec. 3.4. A sketch holds the
2048 smallest hashes: for texts of up to 2052 words the comparison is the exact Jaccard index of their sets of runs,
for longer ones an estimate with a standard error of 0.01. One partition of one band is in memory at a time.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llama2.data.corpus.words import Words

RUN_WORDS = 5
SKETCH_SIZE = 2048
N_HASHES = 128
_RECALL = 0.995
_MAX_LEADERS = 64
"""Documents with an equal key that each start a cluster of their own before the rest of the key is given up."""
_PAIRS_AT_ONCE = 512
_STEP = 1 << 20
"""Documents whose roots are looked at together."""


def bands_for(threshold: float) -> tuple[int, int]:
    """Return how many bands of how many hashes each: as selective as they can be and still find such pairs."""
    for n_rows in range(N_HASHES, 1, -1):
        n_bands = N_HASHES // n_rows
        if 1 - (1 - threshold**n_rows) ** n_bands >= _RECALL:
            return n_bands, n_rows
    return N_HASHES, 1


@dataclass(frozen=True)
class Signatures:
    """What is kept of each document of a block to find its copies."""

    exact: np.ndarray
    """[documents 2] 128 bits of the text in lower case, spaces made one."""
    bands: np.ndarray
    """[documents bands] one 64-bit key per band."""
    sketches: np.ndarray
    """Smallest hashes of every document in order, one document after another."""
    sketch_sizes: np.ndarray


def signatures(words: Words, keep: np.ndarray, *, threshold: float) -> Signatures:
    """Return the signatures of those texts of a block whose numbers are in `keep`."""
    from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]

    n_bands, n_rows = bands_for(threshold)
    hashes, first = words.run_sets(RUN_WORDS)
    sizes = np.diff(first)[keep]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    runs = hashes[_ranges(first[keep], sizes)]
    rows = RMinHash.digest_matrix_from_flat_token_hashes(runs, offsets.astype(np.uint64), N_HASHES, 0).to_rows()
    matrix = np.array(rows, np.uint64).reshape(len(keep), N_HASHES)[:, : n_bands * n_rows].reshape(-1, n_rows)
    bands = np.zeros(len(matrix), np.uint64)
    for column in matrix.T:
        bands = (bands ^ column) * np.uint64(0x9E3779B97F4A7C15)
        bands ^= bands >> np.uint64(29)
    sketch_sizes = np.minimum(sizes, SKETCH_SIZE)
    sketches = (runs[_ranges(offsets[:-1], sketch_sizes)] >> np.uint64(16)).astype("<u4")
    exact = b"".join(
        hashlib.blake2b(" ".join(words.lowered[i].split()).encode(), digest_size=16).digest() for i in keep
    )
    return Signatures(
        np.frombuffer(exact, "<u8").reshape(-1, 2), bands.reshape(-1, n_bands), sketches, sketch_sizes.astype("<u2")
    )


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return start, start + 1, ... of each range, one range after another."""
    before = np.cumsum(sizes) - sizes
    return np.repeat(np.asarray(starts, np.int64) - before, sizes) + np.arange(int(sizes.sum()))


class Corpus:
    """The signatures of all parts on disk; a document's number counts through all parts in order."""

    def __init__(self, folders: Sequence[Path]):
        self.folders = folders
        sizes = [(folder / "exact").stat().st_size // 16 for folder in folders]
        self.first = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return int(self.first[-1])

    def exact(self, part: int) -> np.ndarray:
        return _mapped(self.folders[part] / "exact", "<u8").reshape(-1, 2)

    def band(self, part: int, band: int) -> np.ndarray:
        n = int(self.first[part + 1] - self.first[part])
        return _mapped(self.folders[part] / "bands", "<u8").reshape(-1, n)[band] if n else np.zeros(0, "<u8")

    def sketches(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the hashes in the sketches of some documents, and for each hash whose it is: a place in `numbers`."""
        parts = np.searchsorted(self.first, numbers, side="right") - 1
        found = []
        for part in np.unique(parts):
            places = np.flatnonzero(parts == part)
            local = numbers[places] - self.first[part]
            ends, values = self._sketch(int(part))
            starts = np.where(local > 0, ends[np.maximum(local - 1, 0)], 0).astype(np.int64)
            sizes = ends[local].astype(np.int64) - starts
            found.append((values[_ranges(starts, sizes)], np.repeat(places, sizes)))
        return np.concatenate([hashes for hashes, _ in found]), np.concatenate([whose for _, whose in found])

    def _sketch(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        if part not in self._open:
            if len(self._open) >= 256:
                self._open.pop(next(iter(self._open)))
            folder = self.folders[part]
            self._open[part] = (_mapped(folder / "sketch_ends", "<u8"), _mapped(folder / "sketches", "<u4"))
        return self._open[part]


def _mapped(path: Path, dtype: str) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def exact_edges(corpus: Corpus, *, partition: int) -> np.ndarray:
    """Return [first copy, later copy] for every document whose text was there before."""

    def keys(part: int) -> np.ndarray:
        return corpus.exact(part)[:, 0]

    edges = [np.zeros((0, 2), np.int64)]
    for found, numbers in _sorted_partitions(corpus, keys, None, partition):
        begins = np.concatenate([[True], found[1:] != found[:-1]])
        leaders = numbers[np.maximum.accumulate(np.where(begins, np.arange(len(numbers)), 0))]
        edges.append(np.stack([leaders, numbers], 1)[~begins])
    return np.concatenate(edges)


def band_edges(corpus: Corpus, band: int, *, threshold: float, skip: np.ndarray, partition: int) -> np.ndarray:
    """Return pairs of near-duplicates among documents with an equal key in one band, those in `skip` left out.

    The first document of a key leads: what is like it joins it, and the first of those left leads in the next round.
    """
    edges = [np.zeros((0, 2), np.int64)]
    for keys, numbers in _sorted_partitions(corpus, lambda part: corpus.band(part, band), skip, partition):
        for _ in range(_MAX_LEADERS):
            begins = np.concatenate([[True], keys[1:] != keys[:-1]]) if len(keys) else np.zeros(0, bool)
            alone = begins & np.append(begins[1:], True)
            begins, keys, numbers = begins[~alone], keys[~alone], numbers[~alone]
            if not len(keys):
                break
            leaders = numbers[np.maximum.accumulate(np.where(begins, np.arange(len(numbers)), 0))]
            pairs = np.stack([leaders, numbers], 1)[~begins]
            alike = similarity(corpus, pairs) >= threshold
            edges.append(pairs[alike])
            keys, numbers = keys[~begins][~alike], numbers[~begins][~alike]
    return np.concatenate(edges)


def _sorted_partitions(corpus: Corpus, keys_of, skip: np.ndarray | None, partition: int) -> Iterator:
    """Yield keys and documents sorted by both, in as many partitions of the keys' range as fit in memory."""
    n_partitions = -(-len(corpus) // partition)
    for which in range(n_partitions):
        found = [(np.zeros(0, np.uint64), np.zeros(0, np.int64))]
        for part in range(len(corpus.folders)):
            keys = keys_of(part)
            wanted = keys % np.uint64(n_partitions) == which
            if skip is not None:
                wanted &= ~skip[corpus.first[part] : corpus.first[part + 1]].astype(bool)
            at = np.flatnonzero(wanted)
            found.append((keys[at], at + corpus.first[part]))
        keys, numbers = (np.concatenate(each) for each in zip(*found, strict=True))
        order = np.argsort(keys, kind="stable")
        yield keys[order], numbers[order]


def similarity(corpus: Corpus, pairs: np.ndarray) -> np.ndarray:
    """Return the Jaccard index of each pair's runs of words, by their sketches."""
    parts = [_similarity(corpus, pairs[at : at + _PAIRS_AT_ONCE]) for at in range(0, len(pairs), _PAIRS_AT_ONCE)]
    return np.concatenate([np.zeros(0), *parts])


def _similarity(corpus: Corpus, pairs: np.ndarray) -> np.ndarray:
    """Compare below the lower of the two sketches' ends, where both are complete."""
    n = len(pairs)
    hashes, whose = corpus.sketches(pairs.T.reshape(-1))
    sizes = np.bincount(whose, minlength=2 * n)
    last = np.zeros(2 * n, np.uint64)
    np.maximum.at(last, whose, hashes)
    limits = np.where(sizes < SKETCH_SIZE, np.uint64(2**32), last).reshape(2, n).min(0)
    pair_ids = whose % n
    inside = hashes <= limits[pair_ids]
    keys = np.sort(pair_ids[inside].astype(np.uint64) << np.uint64(32) | hashes[inside])
    shared = np.bincount((keys[1:][keys[1:] == keys[:-1]] >> np.uint64(32)).astype(np.int64), minlength=n)
    total = np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=n)
    return shared / np.maximum(total - shared, 1)


class Clusters:
    """Union of documents over edges; every document's root is the first of its cluster."""

    def __init__(self, n: int, file: Path):
        self.roots = np.memmap(file, np.int64, "w+", shape=(max(n, 1),))
        for at in range(0, n, _STEP):
            self.roots[at : at + _STEP] = np.arange(at, min(at + _STEP, n))

    def join(self, edges: np.ndarray) -> None:
        """Take the lower root on both ends of every edge until nothing changes."""
        while len(edges):
            ends = self.roots[edges]
            lower = ends.min(1)
            edges, ends, lower = (each[ends[:, 0] != ends[:, 1]] for each in (edges, ends, lower))
            np.minimum.at(self.roots, ends[:, 0], lower)
            np.minimum.at(self.roots, ends[:, 1], lower)
            self._flatten()

    def _flatten(self) -> None:
        changed = True
        while changed:
            changed = False
            for at in range(0, len(self.roots), _STEP):
                below = self.roots[at : at + _STEP]
                above = self.roots[below]
                if not np.array_equal(below, above):
                    self.roots[at : at + _STEP], changed = above, True
