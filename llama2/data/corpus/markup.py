"""Web pages to plain text: HTML through trafilatura, WARC archives through fastwarc.

A page's characters are read as its sender says: byte order mark, HTTP header, <meta>, UTF-8, and Windows' Latin last.
"""

import codecs
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from llama2.data.corpus.clean import mojibake
from llama2.data.corpus.containers import open_stream
from llama2.data.corpus.tally import difference, excerpt

MAX_PAGE_BYTES = 1 << 24
_META = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w:.-]+)", re.IGNORECASE)
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_MEANT = {
    "iso8859-1": "cp1252",
    "ascii": "cp1252",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
}
"""What senders mean by these names, as browsers read them (WHATWG Encoding Standard)."""

Problems = Callable[[str, str, str], None]


def decode_page(data: bytes, header_charset: str | None = None) -> str:
    """Return the characters of a page, by what it says of itself; bytes that do not fit become U+FFFD."""
    for mark, charset in _MARKS:
        if data.startswith(mark):
            return data[len(mark) :].decode(charset, "replace")
    meta = _META.search(data[:4096])
    for name in (header_charset, meta.group(1).decode("ascii", "replace") if meta else None):
        charset = _known(name)
        if charset:
            return data.decode(charset, "replace")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def _known(name: str | None) -> str | None:
    try:
        found = codecs.lookup(name or "")
    except LookupError:
        return None
    charset = _MEANT.get(found.name, found.name)
    return charset if getattr(found, "_is_text_encoding", True) else None


def page_text(page: str) -> str | None:
    """Return the main text of a page, without menus, advertisements and comments; None where there is none."""
    import trafilatura

    return trafilatura.extract(page, include_comments=False, include_formatting=False, deduplicate=False)


def read_html(path: Path, problems: Problems) -> Iterator[tuple[str, str]]:
    with open_stream(path) as stream:
        data = stream.read(MAX_PAGE_BYTES + 1)
    yield from _page(data, None, "", problems)


def read_warc(path: Path, problems: Problems) -> Iterator[tuple[str, str]]:
    """Yield the number of each answer with a page in it, and the page's text."""
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    with path.open("rb") as file:
        records = ArchiveIterator(file, record_types=WarcRecordType.response, parse_http=True, auto_decode="all")
        for number, record in enumerate(records, 1):
            status = record.http_headers.status_code if record.http_headers is not None else None
            if record.http_content_type not in ("text/html", "application/xhtml+xml"):
                problems("not_a_page", f":{number}", f"{record.http_content_type}")
            elif status != 200:
                problems("not_a_page", f":{number}", f"HTTP status {status}")
            else:
                data = record.reader.read(MAX_PAGE_BYTES + 1)
                yield from _page(data, record.http_charset, f":{number}", problems)


def _page(data: bytes, charset: str | None, suffix: str, problems: Problems) -> Iterator[tuple[str, str]]:
    if len(data) > MAX_PAGE_BYTES:
        problems("broken_page", suffix, f"a page of more than {MAX_PAGE_BYTES} bytes")
        return
    try:
        page = decode_page(data, charset)
        mended = mojibake(page)  # here, since extraction drops characters that the repair needs
        if mended != page:
            problems("mended_mojibake", suffix, excerpt(mended, difference(page, mended)))
        text = page_text(mended)
    except Exception as error:  # a stranger's page may break any parser in any way; the others go on
        problems("broken_page", suffix, f"{type(error).__name__}: {error}")
        return
    if text:
        yield suffix, text
    else:
        problems("no_main_text", suffix, f"{len(data)} bytes")
