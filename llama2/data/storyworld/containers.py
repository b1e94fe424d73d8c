"""The files that raw text is found in: plain text, JSON lines, web pages and web archives, written as they come.

Every document gets the name under which a reader meets it again: `file`, or `file:17` for the 17th in a file. The
same documents give the same bytes.
"""

import gzip
import hashlib
import html
import json
import uuid
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from llama2.data.storyworld.words import table

TEXT, LINES, PAGES, ARCHIVE = "notes.txt", "feed.jsonl.gz", "pages", "crawl.warc.gz"


class Containers:
    """The open files of a raw corpus; a context manager."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._counts: Counter[str] = Counter()
        self._stack = ExitStack()

    def __enter__(self) -> "Containers":
        (self._folder / PAGES).mkdir(parents=True)
        self._text = self._open(TEXT)
        # no name and no time in the header, so that the same documents give the same bytes
        lines = gzip.GzipFile("", "wb", 6, self._open(LINES), mtime=0)
        self._lines = self._stack.enter_context(lines)
        self._archive = self._open(ARCHIVE)
        self._archive.write(gzip.compress(_record("warcinfo", "", b"software: llama2 world\r\n"), mtime=0))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _open(self, name: str) -> IO[bytes]:
        return self._stack.enter_context((self._folder / name).open("wb"))

    def add(self, container: str, text: str, *, language: str, title: str) -> str:
        """Write a document and return its name."""
        self._counts[container] += 1
        number = self._counts[container]
        url = f"https://stories.example/{language}/{container[0]}{number}.html"
        if container == TEXT:
            self._text.write(f"{text}\n\n".encode())
        elif container == LINES:
            line = json.dumps({"text": text, "url": url, "title": title}, ensure_ascii=False)
            self._lines.write(f"{line}\n".encode())
        elif container == ARCHIVE:
            body = page(text, language=language, title=title).encode()
            head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: {len(body)}\r\n\r\n"
            self._archive.write(gzip.compress(_record("response", url, head.encode() + body), mtime=0))
        else:
            name = f"{number:06}.{language}.html"
            (self._folder / PAGES / name).write_text(page(text, language=language, title=title), "utf-8", newline="\n")
            return name
        return f"{container}:{number}"


def page(text: str, *, language: str, title: str) -> str:
    """Return a web page with a text in the middle of what stands around it on the web."""
    rows = table("raw")
    site, lines = rows["site"][language], rows["boilerplate"][language]
    nav = "".join(f'<li><a href="/{i}">{html.escape(item)}</a></li>' for i, item in enumerate(rows["nav"][language]))
    body = "\n".join(f"<p>{html.escape(part, quote=False)}</p>" for part in text.split("\n"))
    return f"""<!DOCTYPE html>
<html lang="{language}">
<head>
<meta charset="utf-8">
<title>{html.escape(title)} | {site}</title>
<style>.ad {{ color: red; }}</style>
<script>window.dataLayer = window.dataLayer || [];</script>
</head>
<body>
<header><nav><ul>{nav}</ul></nav></header>
<div class="ad">{html.escape(lines[4 % len(lines)])}</div>
<main><article>
{body}
</article></main>
<footer><p>{html.escape(lines[3 % len(lines)])}</p><p>{html.escape(lines[6 % len(lines)])}</p></footer>
<div id="cookie-banner" class="cookie-consent"><p>{html.escape(lines[0])}</p></div>
</body>
</html>
"""


def _record(kind: str, url: str, block: bytes) -> bytes:
    """Return one record of a web archive. Source: ISO 28500, WARC/1.0."""
    target = f"WARC-Target-URI: {url}\r\n" if url else ""
    record_id = uuid.UUID(bytes=hashlib.blake2b(url.encode() + block, digest_size=16).digest(), version=4)
    media_type = "application/http; msgtype=response" if kind == "response" else "application/warc-fields"
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\n{target}WARC-Date: 2023-07-18T00:00:00Z\r\n"
        f"WARC-Record-ID: <urn:uuid:{record_id}>\r\nContent-Type: {media_type}\r\nContent-Length: {len(block)}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"
