"""Copies are found: measured against exact Jaccard indices of sets that plain Python makes."""

import json
import random

import numpy as np
import pytest

from llama2.data.corpus.clean import CHANGES, PII
from llama2.data.corpus.decontaminate import contamination_of
from llama2.data.corpus.dedup import SKETCH_SIZE, Clusters, Corpus, band_edges, bands_for, exact_edges, similarity
from llama2.data.corpus.extract import Options, extract
from llama2.data.corpus.fates import EXACT_COPY, HELDOUT, NEAR_COPY, TRAIN, decide, edge_tasks, write_edges
from llama2.data.corpus.quality import DROPS, Limits
from llama2.data.corpus.sources import cut
from llama2.data.corpus.words import Words
from llama2.errors import DataError

ALL_RULES = frozenset([*CHANGES, PII, *DROPS])
ENGLISH = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "ai") for c in "bdklmnrst"]
CHINESE = [chr(point) for point in range(0x4E00, 0x4E00 + 900)]


def written(rng, n_words, language):
    return [rng.choice(CHINESE if language == "zh" else ENGLISH) for _ in range(n_words)]


def spelled(words, language):
    return ("" if language == "zh" else " ").join(words)


def shingles(words):
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def jaccard(a, b):
    a, b = shingles(a), shingles(b)
    return len(a & b) / len(a | b)


def changed(rng, words, n_changes, language):
    """Swap, drop or insert some words."""
    words = list(words)
    for _ in range(n_changes):
        at = rng.randrange(len(words))
        new = rng.choice(CHINESE if language == "zh" else ENGLISH)
        words[at : at + 1] = rng.choice([[new], [], [words[at], new]])
    return words


def parts_of(texts, folder, *, threshold=0.8, n_parts=3, contamination=None):
    folder.mkdir()
    parts = []
    for part in range(n_parts):
        raw = folder / f"{part}.jsonl"
        own = texts[len(texts) * part // n_parts : len(texts) * (part + 1) // n_parts]
        raw.write_text("".join(json.dumps({"text": text}) + "\n" for text in own))
        options = Options("text", None, Limits(skip=ALL_RULES), threshold, contamination)
        extract(folder / f"part-{part}", tuple(cut(raw)), options)
        parts.append(folder / f"part-{part}")
    return parts


def fates_of(texts, folder, *, threshold=0.8, heldout_share=0.0, partition=1 << 20):
    parts = parts_of(texts, folder, threshold=threshold)
    for task in edge_tasks(folder, parts, threshold, partition):
        write_edges(*task)
    decide(folder, parts, threshold, heldout_share)
    return np.fromfile(folder / "fates", np.uint8)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_planted_near_duplicates_are_found_and_little_else(tmp_path, language):
    rng = random.Random(1)
    originals = [written(rng, int(60 * 50 ** rng.random()), language) for _ in range(1500)]
    copies = []
    for number, words in enumerate(originals[:1200]):
        # a change breaks up to five runs of five words: from none to a Jaccard index of about a half
        n_changes = int(len(words) * rng.random() / 15) + (rng.random() < 0.5)
        copies.append((number, changed(rng, words, n_changes, language)))
    indices = [jaccard(originals[number], words) for number, words in copies]
    texts = [spelled(words, language) for words in [*originals, *(words for _, words in copies)]]
    fates = fates_of(texts, tmp_path / "work")[len(originals) :]
    is_found = (fates == NEAR_COPY) | (fates == EXACT_COPY)
    is_copy = np.array(indices) >= 0.8
    recall = (is_found & is_copy).sum() / is_copy.sum()
    precision = (is_found & is_copy).sum() / is_found.sum()
    print(f"{language}: {is_copy.sum()} copies of {len(copies)}, recall {recall:.4f}, precision {precision:.4f}")
    assert is_copy.sum() > 400 and (~is_copy).sum() > 200
    assert recall >= 0.95 and precision >= 0.99


def test_no_original_is_dropped(tmp_path):
    rng = random.Random(2)
    texts = [spelled(written(rng, 80, "en"), "en") for _ in range(500)]
    assert (fates_of(texts, tmp_path / "work") == TRAIN).all()


def test_the_first_of_each_cluster_stays_even_through_a_chain(tmp_path):
    rng = random.Random(3)
    chain = [written(rng, 200, "en")]
    for _ in range(6):
        chain.append(changed(rng, chain[-1], 3, "en"))
    assert jaccard(chain[0], chain[-1]) < 0.8 <= min(map(jaccard, chain, chain[1:]))
    other = written(rng, 200, "en")
    texts = [spelled(words, "en") for words in [*chain[:3], other, *chain[3:], chain[2]]]
    fates = fates_of(texts, tmp_path / "work").tolist()
    assert fates == [TRAIN, NEAR_COPY, NEAR_COPY, TRAIN, NEAR_COPY, NEAR_COPY, NEAR_COPY, NEAR_COPY, EXACT_COPY]


def test_exact_copies_are_those_alike_but_for_case_and_space(tmp_path):
    texts = ["One two\nthree.", "one  TWO three.", "one two three", "!!!", "???", "!!!", "\u4e00", "\u4e8c"]
    fates = fates_of(texts, tmp_path / "work", threshold=1.0).tolist()
    assert fates == [TRAIN, EXACT_COPY, TRAIN, TRAIN, TRAIN, EXACT_COPY, TRAIN, TRAIN]


def test_edges_do_not_depend_on_how_many_fit_in_memory(tmp_path):
    rng = random.Random(4)
    originals = [written(rng, 100, "en") for _ in range(200)]
    words = [*originals, *(changed(rng, each, 2, "en") for each in originals), *originals[:50]]
    corpus = Corpus(parts_of([spelled(each, "en") for each in words], tmp_path / "work"))
    copies = exact_edges(corpus, partition=10**6)
    assert len(copies) >= 50
    assert sorted(map(tuple, exact_edges(corpus, partition=7))) == sorted(map(tuple, copies))
    skip = np.zeros(len(corpus), bool)
    for band in range(3):
        whole, cut_up = (
            band_edges(corpus, band, threshold=0.8, skip=skip, partition=size).tolist() for size in (10**6, 7)
        )
        assert sorted(whole) == sorted(cut_up) and whole


def test_similarity_is_the_exact_index_for_short_texts_and_near_it_for_long_ones(tmp_path):
    rng = random.Random(5)
    for n_words, tolerance in ((60, 1e-12), (SKETCH_SIZE - 200, 1e-12), (10_000, 0.04)):
        pairs = [(words := written(rng, n_words, "en"), changed(rng, words, n_words // 30, "en")) for _ in range(20)]
        corpus = Corpus(parts_of([spelled(each, "en") for pair in pairs for each in pair], tmp_path / str(n_words)))
        found = similarity(corpus, np.arange(40).reshape(20, 2))
        np.testing.assert_allclose(found, [jaccard(*pair) for pair in pairs], atol=tolerance)


def test_documents_that_all_share_a_key_are_all_compared(tmp_path):
    """Many distinct families with one frame: the first of a band's key must not hide the others."""
    rng = random.Random(6)
    frame = written(rng, 60, "en")
    families = [frame + written(rng, 60, "en") for _ in range(40)]
    words = [*families, *(changed(rng, each, 1, "en") for each in families)]
    fates = fates_of([spelled(each, "en") for each in words], tmp_path / "work")
    indices = np.array([jaccard(a, b) for a, b in zip(words[:40], words[40:], strict=True)])
    assert (fates[:40] == TRAIN).all()
    assert (fates[40:][indices >= 0.8] != TRAIN).mean() >= 0.95


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 0.95])
def test_bands_find_nearly_all_at_the_threshold(threshold):
    n_bands, n_rows = bands_for(threshold)
    assert n_bands * n_rows <= 128
    assert 1 - (1 - threshold**n_rows) ** n_bands > 0.99


def test_clusters_are_those_of_a_plain_search(tmp_path):
    rng = random.Random(7)
    edges = np.array([[rng.randrange(300), rng.randrange(300)] for _ in range(220)])
    clusters = Clusters(300, tmp_path / "roots")
    clusters.join(edges[:100])
    clusters.join(edges[100:])
    expected = list(range(300))
    for _ in range(300):
        for a, b in edges:
            expected[a] = expected[b] = min(expected[a], expected[b])
    assert clusters.roots.tolist() == expected


def test_documents_are_held_out_by_their_text_alone(tmp_path):
    rng = random.Random(8)
    texts = [spelled(written(rng, 70, "en"), "en") for _ in range(2000)]
    fates = fates_of(texts, tmp_path / "a", threshold=1.0, heldout_share=0.1)
    assert 150 < (fates == HELDOUT).sum() < 250
    backwards = fates_of(texts[::-1], tmp_path / "b", threshold=1.0, heldout_share=0.1)
    assert (fates == backwards[::-1]).all()


def plain_overlap(text, evaluation, n):
    words, theirs = text.split(), evaluation.split()
    n = min(n, len(theirs))
    runs = {tuple(theirs[i : i + n]) for i in range(len(theirs) - n + 1)}
    return any(tuple(words[i : i + n]) in runs for i in range(len(words) - n + 1))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_planted_contamination_is_all_found_and_nothing_else(tmp_path, language):
    rng = random.Random(9)
    unit = 2 if language == "zh" else 1
    n = 13 * unit
    questions = [written(rng, rng.randrange(5 * unit, 60), language) for _ in range(300)]
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_text(
        "".join(
            json.dumps({"id": n, "question": spelled(q, language) + "?", "answer": "Yes."}) + "\n"
            for n, q in enumerate(questions)
        )
    )
    found = contamination_of([evaluation])
    texts, expected = [], []
    for words in questions:
        start = rng.randrange(max(1, len(words) - n + 1))
        part = words[start : start + n] if len(words) > n else words
        around = [written(rng, 50, language), written(rng, 50, language)]
        texts.append([*around[0], *part, *around[1]])
        texts.append([*around[0], *part[:-1], *around[1]])
    expected = [plain_overlap(" ".join(words), " ".join(questions[i // 2]), n) for i, words in enumerate(texts)]
    assert all(expected[::2])
    blocks = Words([spelled(words, language) for words in texts])
    hits = found.found_in(blocks)
    assert hits[::2].all()
    assert hits.tolist() == expected


def test_short_answers_do_not_empty_the_corpus(tmp_path):
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_text(
        '{"question": "Is it?", "answer": "Yes, it is."}\n{"options": ["the big red dog ran home"]}\n'
    )
    found = contamination_of([evaluation])
    texts = ["Well yes, it is. And more.", "Yes it is!", "So THE big red dog ran home, he said.", "the big red dog"]
    assert found.found_in(Words(texts)).tolist() == [False, True, True, False]


def test_contamination_survives_other_spelling_of_the_same_words(tmp_path):
    question = "How many ducks does Janet's neighbour count on the second of March at noon today?"
    evaluation = tmp_path / "eval.txt"
    evaluation.write_text(question)
    found = contamination_of([evaluation])
    texts = [question.upper(), question.replace(" ", "\n"), question.replace("ducks", '"ducks"'), question[:40]]
    assert found.found_in(Words(texts)).tolist() == [True, True, True, False]


@pytest.mark.parametrize("content", ["", "\n\n", "not json\n"])
def test_an_evaluation_file_without_text_is_refused(tmp_path, content):
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_text(content)
    with pytest.raises(DataError, match=r"eval\.jsonl"):
        contamination_of([evaluation])


def test_words_of_a_block_are_those_of_each_text_alone():
    texts = ["The cat, the \u732b\u306f dog's", "", "...", "a b c", "\U0001f600 stra\u00dfe \u0e01\u0e02 x1y2", "a"]
    block = Words(texts)
    for number, text in enumerate(texts):
        alone = Words([text])
        own = block.hashes[block.first[number] : block.first[number + 1]]
        assert own.tolist() == alone.hashes.tolist()
        hashes, first = block.run_sets(2)
        assert hashes[first[number] : first[number + 1]].tolist() == alone.run_sets(2)[0].tolist()
    assert block.n_words.tolist() == [7, 0, 0, 3, 4, 1]
    assert block.hashes[0] == block.hashes[2]
