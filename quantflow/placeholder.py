"""What lies in a file's place where a download or a clone left something else under its name."""

from __future__ import annotations

import re
import stat
from pathlib import Path

from quantflow.errors import Problem
from quantflow.paths import absent

HEAD_BYTES = 1024  # of a file, that are looked at
_LFS = (
    b"version https://git-lfs.github.com/spec/",
    b"version https://hawser.github.com/spec/",
    b"version http://git-media.io/v/",
)
_AGAIN = "Download the file again"


def no_file(path: Path) -> tuple[str, str]:
    """What is in the place of a file that is read more than once, and what to do about it; two
    empty texts where it is a file."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return absent(path, "file"), ""
    if stat.S_ISREG(mode):
        return "", ""
    if stat.S_ISDIR(mode):
        return "a directory", ""
    what = {
        stat.S_IFIFO: "a pipe",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
    }
    return (
        what.get(stat.S_IFMT(mode), "no regular file"),
        "It is read more than once: write it into a file first",
    )


def placeholder(
    path: Path, head: bytes, *, binary: bool = False, page: bool = True
) -> Problem | None:
    """What is wrong where a file begins with the bytes `head` (at most HEAD_BYTES of them, all of a
    shorter file) and they are no file of its kind's at all: a Git LFS, Xet or git-annex pointer, a
    web page, or nothing. None for everything else.

    binary: the file has no business to be text, such as the words in which a server said no. page:
    nor to be a web page.
    """
    where, expected = str(path), "the file itself"
    if not head:
        return Problem(where, "an empty file (0 bytes)", expected, _AGAIN)
    if head.startswith(_LFS):
        size = re.search(rb"^size (\d{1,20})\s*$", head, re.MULTILINE)
        whole = f" (of {int(size[1])} bytes)" if size else ""
        hint = "Run `git lfs pull` where it was cloned, or download the file"
        return Problem(where, "a Git LFS pointer, not the file", f"{expected}{whole}", hint)
    if head.startswith(b"# xet version "):
        return Problem(
            where,
            "a Xet pointer, not the file",
            expected,
            "Run `git xet checkout` where it was cloned, or download the file",
        )
    if re.match(rb"(\.\./)*(\.git)?/?annex/objects/", head):
        return Problem(
            where,
            "a git-annex pointer, not the file",
            expected,
            f"Run `git annex get {path.name}` where it was cloned",
        )
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if page and start.startswith((b"<!doctype html", b"<html", b"<?xml")):
        hint = (
            "A server's answer, such as a page to log in, was saved under its name: download it"
            " again, with access to it"
        )
        return Problem(where, "a web page, not the file", expected, hint)
    if not any(head):
        return Problem(
            where,
            "nothing but zeros where it begins",
            expected,
            f"The download was not finished. {_AGAIN}",
        )
    if binary and (text := _text(head)):
        return Problem(where, f"a text that begins {text[:60]!r}", expected, _AGAIN)
    return None


def placeholder_at(path: Path, *, binary: bool = False, page: bool = True) -> Problem | None:
    """`placeholder`, of a regular file that is there. None where it cannot be read either, which is
    for its reader to say."""
    try:
        with open(path, "rb") as file:
            return placeholder(path, file.read(HEAD_BYTES), binary=binary, page=page)
    except OSError:
        return None


def _text(head: bytes) -> str:
    """What the bytes say where they are plain text, "" where they are not. The last letter may be
    cut."""
    words = head.decode("utf-8", "ignore").strip()
    plain = (
        len(head) - len(words.encode()) <= 8
        and words.replace("\n", "").replace("\r", "").replace("\t", "").isprintable()
    )
    return words if plain else ""
