"""The dirty corpus: readable by anyone, and dirty exactly where the list says."""

import gzip
import html
import json
import random
import re
from collections import Counter

import pytest

from llama2.data.storyworld.containers import ARCHIVE, LINES, PAGES, TEXT
from llama2.data.storyworld.grade import grade
from llama2.data.storyworld.raw import Dirt, edited, garble, jaccard, write_raw
from llama2.data.storyworld.stories import stories, story
from llama2.data.storyworld.words import LANGUAGES
from llama2.errors import Llama2Error

N_STORIES, N_HELDOUT = 300, 40


def read_back(raw) -> dict[str, str]:
    """Return every document by its id, with nothing but the standard library."""
    found = {f"{TEXT}:{n}": text for n, text in enumerate((raw / TEXT).read_text("utf-8").strip().split("\n\n"), 1)}
    lines = gzip.decompress((raw / LINES).read_bytes()).decode().strip().split("\n")
    found |= {f"{LINES}:{n}": json.loads(line)["text"] for n, line in enumerate(lines, 1)}
    found |= {path.name: text_of(path.read_text("utf-8")) for path in (raw / PAGES).iterdir()}
    archive = gzip.decompress((raw / ARCHIVE).read_bytes())
    bodies = [block.decode() for block in archive.split(b"\r\nWARC-Type: response\r\n")[1:]]
    return found | {f"{ARCHIVE}:{n}": text_of(body) for n, body in enumerate(bodies, 1)}


def text_of(page: str) -> str:
    article = page.partition("<article>")[2].partition("</article>")[0]
    return "\n".join(html.unescape(part) for part in re.findall(r"<p>(.*?)</p>", article))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_raw(folder / "raw", folder / "planted.jsonl", n_stories=N_STORIES, n_heldout=N_HELDOUT, seed=5)
    planted = [json.loads(line) for line in (folder / "planted.jsonl").read_text("utf-8").strip().split("\n")]
    return folder, read_back(folder / "raw"), planted


def test_every_story_is_there_once_and_clean_but_for_the_plants(world):
    _, found, planted = world
    dirty = {plant["id"] for plant in planted}
    assert dirty <= set(found)
    clean = [text for name, text in found.items() if name not in dirty]
    told = {each.text(language) for each in stories(5, N_STORIES) for language in LANGUAGES}
    assert len(set(clean)) == len(clean) and set(clean) <= told
    n_changed = sum(plant["kind"] in ("boilerplate", "personal", "mojibake") for plant in planted)
    assert len(clean) + n_changed == len(told)


def test_the_plants_are_what_the_list_says(world):
    _, found, planted = world
    counts = Counter(plant["kind"] for plant in planted)
    assert set(counts) == {"exact_duplicate", "near_duplicate", "contamination", "foreign", "boilerplate", "personal",
                           "mojibake"}  # fmt: skip
    for plant in planted:
        text = found[plant["id"]]
        match plant["kind"]:
            case "exact_duplicate":
                assert text == found[plant["of"]]
            case "near_duplicate":
                assert text != found[plant["of"]]
                assert plant["jaccard"] == pytest.approx(jaccard(text, found[plant["of"]]), abs=1e-4)
            case "contamination":
                assert text == story(5, plant["of"], split="heldout").text(plant["language"])
            case "foreign":
                assert plant["language"] in ("fr", "de") and not any(
                    grade(text, each).n_sentences for each in LANGUAGES
                )
            case "boilerplate":
                assert all(line in text.split("\n") for line in plant["lines"])
                assert story(5, plant["story"]).text(plant["language"]) in text
            case "personal":
                assert len(plant["secrets"]) >= 2 and all(secret in text for secret in plant["secrets"].values())
            case "mojibake":
                mended = text.encode(plant["encoding"]).decode("utf-8")
                assert mended != text and (plant["language"] == "en" or mended == story(5, plant["story"]).text(
                    plant["language"]))  # fmt: skip


def test_shares_are_as_asked(tmp_path):
    dirt = Dirt(
        exact_duplicates=0.5, near_duplicates=0, contamination=0, foreign=0, boilerplate=0, personal=0, mojibake=1
    )
    write_raw(tmp_path / "raw", tmp_path / "planted.jsonl", n_stories=50, n_heldout=5, dirt=dirt)
    kinds = Counter(
        json.loads(line)["kind"] for line in (tmp_path / "planted.jsonl").read_text("utf-8").strip().split("\n")
    )
    assert kinds == {"mojibake": 150}  # nothing clean is left to be copied


def test_most_near_duplicates_are_near():
    rng, far = random.Random(0), 0
    for each in stories(0, 200):
        for language in LANGUAGES:
            text = each.text(language)
            far += jaccard(text, edited(rng, text, language)) < 0.8
    assert far < 200
    assert jaccard("a b c d e f", "a b c d e f") == 1
    assert jaccard("a b c d e f", "a b c d e g") == 1 / 3


def test_card_numbers_pass_luhn():
    from llama2.data.storyworld.words import table

    for number in table("raw")["cards"]["numbers"]:
        digits = [int(digit) for digit in number if digit.isdigit()]
        doubled = [2 * digit - 9 * (digit > 4) for digit in digits[-2::-2]]
        assert (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def test_the_same_seed_gives_the_same_bytes(world, tmp_path):
    folder, *_ = world
    write_raw(tmp_path / "raw", tmp_path / "planted.jsonl", n_stories=N_STORIES, n_heldout=N_HELDOUT, seed=5)
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert len(paths) > 5
    assert all(path.read_bytes() == (tmp_path / path.relative_to(folder)).read_bytes() for path in paths)


def test_warcio_reads_the_archive(world):
    warcio = pytest.importorskip("warcio.archiveiterator")
    folder, found, _ = world
    with (folder / "raw" / ARCHIVE).open("rb") as file:
        records = [(r.rec_type, r.content_stream().read().decode()) for r in warcio.ArchiveIterator(file)]
    assert records[0][0] == "warcinfo"
    assert [text_of(page) for kind, page in records if kind == "response"] == [
        text for name, text in found.items() if name.startswith(ARCHIVE)
    ]


def test_garbling_is_undone():
    for text in ("caf\u00e9 \u00bfqu\u00e9?", "\u98ce\u7b5d", "\u201cHi\u201d"):
        garbled, encoding = garble(text)
        assert garbled != text and garbled.encode(encoding).decode() == text


def test_impossible_shares_are_refused():
    with pytest.raises(Llama2Error, match="near_duplicates=1.5"):
        Dirt(near_duplicates=1.5)
    with pytest.raises(Llama2Error, match="more than 1 together"):
        Dirt(boilerplate=0.5, personal=0.4, mojibake=0.3)
