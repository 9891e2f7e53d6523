"""Files behind a URL: fetched in pieces that survive an interruption, over https."""

from __future__ import annotations

import urllib.error
import urllib.request
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from time import sleep
from typing import Any
from urllib.parse import urljoin, urlsplit

from moiety.errors import InputError

BLOCK = 1 << 20  # bytes
ATTEMPTS = 5
TIMEOUT = 60.0  # seconds without a byte


class _Cut(OSError):
    """The connection ended before the file did."""


def download(url: str, folder: Path, file: str, sha256: str) -> Path:
    """Downloads to a hidden file in `folder` and returns it; the caller checks it and gives it its name.

    A file with a known checksum goes on where an earlier attempt was cut off. One without is started afresh: nothing
    would tell that the two halves belong together.

    Raises:
        InputError: an address that is not allowed, or a server that does not deliver; what came stays for the next
            attempt.
    """
    _refuse_scheme(url, sha256)
    opener = urllib.request.build_opener(_Redirects(sha256))
    path = folder / f".partial-{file}"
    if not sha256:
        path.unlink(missing_ok=True)
    for attempt in range(ATTEMPTS):
        try:
            _go_on(opener, url, path)
            return path
        except urllib.error.HTTPError as error:
            if error.code != 416:  # "range not satisfiable": the partial file is longer than the file
                raise InputError(f"{url}: the server answers {error.code} {error.reason}; {_remedy(file)}") from None
            path.unlink()
        except (OSError, HTTPException) as error:
            if not sha256:
                path.unlink(missing_ok=True)
            if attempt + 1 == ATTEMPTS:
                raise InputError(f"{url}: {error}; run again to go on, or {_remedy(file)}") from None
            sleep(0.2 * 2**attempt)
    raise InputError(f"{url}: the server refuses every range; {_remedy(file)}")


def _go_on(opener: urllib.request.OpenerDirector, url: str, path: Path) -> None:
    """One attempt: asks for what is missing and appends it."""
    start = path.stat().st_size if path.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "moiety", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    with opener.open(request, timeout=TIMEOUT) as response:
        assert isinstance(response, HTTPResponse)
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        expected = response.length
        with path.open("ab" if resumed else "wb") as out:
            before = out.tell()
            while block := response.read(BLOCK):
                out.write(block)
            arrived = out.tell() - before
    if expected is not None and arrived != expected:
        raise _Cut(f"cut off after {arrived:,} of {expected:,} bytes")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a server only to where it could have been asked directly."""

    def __init__(self, sha256: str) -> None:
        self.sha256 = sha256

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _refuse_scheme(newurl, self.sha256)
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        if target := headers.get("location"):
            _refuse_scheme(urljoin(req.full_url, target), self.sha256)
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _refuse_scheme(url: str, sha256: str) -> None:
    scheme = urlsplit(url).scheme
    if scheme != "https" and not (scheme == "http" and sha256):
        raise InputError(f"{url}: only https is fetched, and http where the recipe knows the sha256")


def _remedy(file: str) -> str:
    return f"fetch {file} yourself and give its folder with --from DIR"
