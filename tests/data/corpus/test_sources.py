"""Every kind of raw file gives the documents that are in it, whole or damaged, in one piece or in many."""

import gzip
import io
import json
import shutil

import pytest
import zstandard

from llama2.data.corpus import plain, sources
from llama2.data.corpus.containers import require
from llama2.data.corpus.markup import decode_page
from llama2.data.corpus.sources import cut, find_files, read
from llama2.errors import DataError


class Problems(list):
    def __call__(self, reason, id, seen):
        self.append((reason, id, seen))

    def reasons(self):
        return [reason for reason, _, _ in self]


def documents(path, *, piece_bytes=1 << 30, separator=None, text_field="text"):
    """Return (id, text) of everything in a file, and the problems."""
    problems = Problems()
    found = []
    for piece in cut(path, 0, piece_bytes=piece_bytes, separator=separator):
        found += [(each.id, each.text) for each in read(piece, problems, separator=separator, text_field=text_field)]
    return found, problems


def compressed(path, data, suffix):
    """Write a file plain, .gz or .zst."""
    path = path.with_name(path.name + suffix)
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    path.write_bytes(pack(data))
    return path


SUFFIXES = ["", ".gz", ".zst"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_text_file_is_one_document_or_many_with_a_separator(tmp_path, suffix):
    path = compressed(tmp_path / "a.txt", "One\r\n\r\ntwo \u732b\n\n\n\nthree\n".encode(), suffix)
    assert documents(path) == ([(path.name, "One\r\n\r\ntwo \u732b\n\n\n\nthree\n")], [])
    texts = [text for _, text in documents(path, separator="\n\n")[0]]
    assert [text.strip() for text in texts] == ["One", "two \u732b", "three"]
    path = compressed(tmp_path / "b.md", b"One<|endoftext|>\ntwo<|endoftext|>", suffix)
    assert documents(path, separator="<|endoftext|>")[0] == [(f"{path.name}:1", "One"), (f"{path.name}:2", "\ntwo")]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_json_lines_are_documents_and_broken_ones_are_told(tmp_path, suffix):
    lines = [
        *('{"text": "one\\n"}', "", '{"text": "two \\u732b \u2028 x"}', "{broken", "[1]", '{"body": "x"}'),
        *('{"text": 3}', '{"text": "last"}'),
    ]
    path = compressed(tmp_path / "a.jsonl", "\n".join(lines).encode(), suffix)
    found, problems = documents(path)
    name = path.name
    assert found == [(f"{name}:1", "one\n"), (f"{name}:3", "two \u732b \u2028 x"), (f"{name}:8", "last")]
    assert [(reason, id) for reason, id, _ in problems] == [("broken_line", f"{name}:{n}") for n in (4, 5, 6, 7)]
    assert "body" in problems[2][2]
    assert documents(path, text_field="body")[0] == [(f"{name}:6", "x")]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_parquet_rows_are_documents(tmp_path, suffix):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"text {n}" if n % 7 else None for n in range(1000)]
    buffer = io.BytesIO()
    parquet.write_table(pa.table({"id": range(1000), "body": texts}), buffer, row_group_size=100)
    path = compressed(tmp_path / "a.parquet", buffer.getvalue(), suffix)
    found, problems = documents(path, text_field="body")
    assert found == [(f"{path.name}:{n + 1}", text) for n, text in enumerate(texts) if text]
    assert len(problems) == 143 and set(problems.reasons()) == {"broken_line"}
    if not suffix:
        pieces = cut(path, 0, piece_bytes=1000, separator=None)
        assert len(pieces) > 3
        again = documents(path, piece_bytes=1000, text_field="body")[0]
        assert [text for _, text in again] == [text for _, text in found]
        assert [id.split(":")[1] for id, _ in again] == [id.split(":")[1] for id, _ in found]
    assert documents(path, text_field="none") == (
        [],
        [("broken_file", path.name, "no column 'none'; the columns are id, body")],
    )


def test_files_cut_into_pieces_give_the_same_documents(tmp_path, assets):
    stories = assets / "pretrain/tinystories/decoding-gpt_tinystories_10k.txt"
    for path, separator in (
        (stories, "<|endoftext|>"),
        (stories, "\n\n"),
        (assets / "pretrain/web/c4_demo.jsonl", None),
    ):
        whole, _ = documents(path, separator=separator)
        assert len(whole) >= 300
        for piece_bytes in (1000, 7777, 200_000):
            pieces = cut(path, 0, piece_bytes=piece_bytes, separator=separator)
            assert sum(piece.size_bytes for piece in pieces) == path.stat().st_size and len(pieces) > 3
            found, _ = documents(path, piece_bytes=piece_bytes, separator=separator)
            assert [text.strip() for _, text in found] == [text.strip() for _, text in whole]
            assert len({id for id, _ in found}) == len(found)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", ["lines", "words", "one word", "characters"])
def test_long_texts_are_cut_at_line_ends_and_nothing_is_lost(tmp_path, monkeypatch, suffix, kind):
    for module in (plain, sources):
        monkeypatch.setattr(module, "MAX_CHARS", 10_000)
    unit = {"lines": "a line of it\n", "words": "word ", "one word": "x", "characters": "\u732b"}[kind]
    text = unit * (2_500_000 // len(unit))
    path = compressed(tmp_path / "a.txt", text.encode(), suffix)
    found, problems = documents(path)
    assert "".join(each for _, each in found) == text
    assert max(len(each) for _, each in found) <= 1 << 21
    assert len(found) > 10 and len(problems) > 10 and set(problems.reasons()) == {"cut_long_document"}
    if kind == "lines":
        assert all(each.endswith("\n") for _, each in found)
    assert len({id for id, _ in found}) == len(found)
    lines = compressed(tmp_path / "a.jsonl", json.dumps({"text": text}).encode(), suffix)
    found, problems = documents(lines)
    assert "".join(each for _, each in found) == text and max(len(each) for _, each in found) <= 10_000
    assert problems.reasons() == ["cut_long_document"]


def test_a_line_too_long_to_hold_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(plain, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "before"}\n' + json.dumps({"text": "x" * 5000}) + '\n{"text": "after"}\n')
    found, problems = documents(path)
    assert [text for _, text in found] == ["before", "after"]
    assert [(reason, id) for reason, id, _ in problems] == [("broken_line", "a.jsonl:2")]


def test_charsets_of_text_files(tmp_path):
    for charset in ("utf-8-sig", "utf-16"):
        path = tmp_path / f"{charset}.txt"
        path.write_bytes("caf\u00e9 \u732b".encode(charset))
        assert documents(path) == ([(path.name, "caf\u00e9 \u732b")], [])
    path.write_bytes(b"caf\xe9")
    found, problems = documents(path)
    assert found == [(path.name, "caf\ufffd")] and problems.reasons() == ["not_utf8"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "no such format"])
def test_a_damaged_file_gives_what_stands_before_and_is_told(tmp_path, suffix, damage):
    data = "".join(json.dumps({"text": f"{n} {n * n}"}) + "\n" for n in range(60_000)).encode()
    path = compressed(tmp_path / "a.jsonl", data, suffix)
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {"cut": whole[:middle], "flipped": whole[:middle] + bytes(64) + whole[middle + 64 :], "no such format": data}[
            damage
        ]
    )
    found, problems = documents(path)
    assert "broken_file" in problems.reasons()
    assert len(found) < 60_000
    if damage == "cut":
        assert len(found) > 10_000 and found[:2] == [
            ("a.jsonl" + suffix + ":1", "0 0"),
            ("a.jsonl" + suffix + ":2", "1 1"),
        ]


def test_several_compressed_members_are_one_file(tmp_path):
    parts = [f'{{"text": "{n}"}}\n'.encode() for n in range(5)]
    for suffix, pack in ((".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress)):
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(b"".join(map(pack, parts)))
        assert [text for _, text in documents(path)[0]] == list("01234")


@pytest.mark.parametrize("data", [b"PAR1 no parquet PAR1", b"", b"PAR1"])
def test_a_broken_parquet_file_is_told(tmp_path, data):
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    path.write_bytes(data)
    assert documents(path)[1].reasons() == ["broken_file"]


def test_pages_become_their_main_text(assets):
    pytest.importorskip("trafilatura")
    files, _ = find_files([assets / "web/html"])
    assert len(files) == 18
    texts = [text for path, _ in files for _, text in documents(path)[0]]
    assert len(texts) == 18 and all(len(text) > 200 and "<div" not in text for text in texts)
    assert any("\uc785\ub825" in text for text in texts)  # Korean


def test_archives_give_their_pages_and_broken_ones_what_they_can(tmp_path, assets):
    pytest.importorskip("fastwarc")
    pytest.importorskip("trafilatura")
    found, problems = documents(assets / "web/warc/sample-0000.warc.gz")
    assert len(found) == 22 and problems == []
    assert found[0][0] == "sample-0000.warc.gz:1" and all(len(text) > 100 for _, text in found)
    found, problems = documents(assets / "web/warc/example-trunc.warc")
    assert len(found) == 1 and problems.reasons() == ["broken_file"]
    for name in ("example-bad.warc.gz.bad", "example-iana.org-chunked.warc"):
        path = tmp_path / name.removesuffix(".bad")
        shutil.copy(assets / "web/warc" / name, path)
        assert documents(path)[0]
    for data in (b"", b"no archive at all" * 100, b"\x1f\x8b" + bytes(100)):
        path = tmp_path / "broken.warc.gz"
        path.write_bytes(data)
        assert documents(path)[0] == []


def record(status, kind, data):
    """Return a WARC record of an answer over HTTP."""
    http = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n\r\n".encode() + data
    head = "WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://example.com/\r\n"
    head += "Content-Type: application/http; msgtype=response\r\nWARC-Record-ID: <urn:uuid:1>\r\n"
    return f"{head}Content-Length: {len(http)}\r\n\r\n".encode() + http + b"\r\n\r\n"


def test_of_an_archive_only_pages_that_were_found_count(tmp_path):
    pytest.importorskip("fastwarc")
    pytest.importorskip("trafilatura")
    page = (
        "<html><body><article><p>"
        + "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440. " * 30
        + "</p></article></body></html>"
    )
    answers = [
        ("200 OK", "text/html; charset=windows-1251", page.encode("cp1251")),
        ("404 Not Found", "text/html", b"<p>gone</p>"),
        ("200 OK", "image/png", b"\x89PNG"),
        ("200 OK", "text/html", page.encode("utf-8")),
    ]
    path = tmp_path / "a.warc.gz"
    path.write_bytes(b"".join(gzip.compress(record(*answer)) for answer in answers))
    found, problems = documents(path)
    assert [id for id, _ in found] == ["a.warc.gz:1", "a.warc.gz:4"]
    assert all("\u041f\u0440\u0438\u0432\u0435\u0442" in text for _, text in found)
    assert [(reason, seen) for reason, _, seen in problems] == [
        ("not_a_page", "HTTP status 404"),
        ("not_a_page", "image/png"),
    ]


@pytest.mark.parametrize(
    ("data", "header", "expected"),
    [
        ("\u732b".encode(), None, "\u732b"),
        (b"\xef\xbb\xbf" + "\u732b".encode(), "latin-1", "\u732b"),
        ("\u732b".encode("gb18030"), "gb2312", "\u732b"),
        (b'<meta charset="shift_jis">' + "\u732b".encode("cp932"), None, '<meta charset="shift_jis">\u732b'),
        (b"caf\xe9 \x93q\x94", "iso-8859-1", "caf\u00e9 \u201cq\u201d"),
        (b"caf\xe9", None, "caf\u00e9"),
        (b"caf\xe9", "no-such-charset", "caf\u00e9"),
        (b"abc", "base64", "abc"),
    ],
)
def test_a_page_is_read_in_the_charset_it_names(data, header, expected):
    assert decode_page(data, header) == expected


def test_folders_are_searched_in_a_stable_order(tmp_path):
    for name in (
        "b/2.txt",
        "b/10.txt",
        "a.jsonl",
        "b/c/1.md",
        ".hidden/x.txt",
        "b/.x.txt",
        "b/picture.png",
        "Z.TXT.GZ",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    files, n_others = find_files([tmp_path])
    assert [str(path.relative_to(tmp_path)) for path, _ in files] == [
        "Z.TXT.GZ",
        "a.jsonl",
        "b/10.txt",
        "b/2.txt",
        "b/c/1.md",
    ]
    assert n_others == 1
    files, _ = find_files([tmp_path / "b", tmp_path])
    assert [source for _, source in files] == [0, 0, 0, 1, 1]


def test_what_a_user_can_mend_is_refused_at_once(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "a.jsn").write_text("x")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "folder").mkdir()
    refused = {
        "does not exist": [tmp_path / "none.txt"],
        r"a\.pdf is of an unknown kind \(\.pdf": [tmp_path / "a.pdf"],
        r"did you mean '\.jsonl'": [tmp_path / "a.jsn"],
        "nothing but empty files": [tmp_path / "empty.txt"],
        "no file of a known kind": [tmp_path / "folder"],
        "no raw text": [],
    }
    for said, raw in refused.items():
        with pytest.raises(DataError, match=said):
            find_files(raw)


def test_a_missing_library_is_named_with_its_remedy(tmp_path):
    with pytest.raises(DataError, match=r"a\.warc needs no_such_library.*pip install 'llama2\[data\]'"):
        require("no_such_library", tmp_path / "a.warc")


def test_a_page_in_the_wrong_charset_is_mended_before_its_text_is_taken(tmp_path):
    pytest.importorskip("trafilatura")
    text = "Hab\u00eda una vez una coneja que viv\u00eda aqu\u00ed, y jugaba en el jard\u00edn. " * 6
    path = tmp_path / "a.html"
    path.write_text(f"<html><body><article><p>{text.encode().decode('cp1252')}</p></article></body></html>", "utf-8")
    found, problems = documents(path)
    assert found[0][1].strip() == text.strip() and problems.reasons() == ["mended_mojibake"]
