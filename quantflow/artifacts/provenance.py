"""Where an artifact comes from, as an in-toto Statement v1 with SLSA's provenance predicate v1,
ready to be signed; and SHA256SUMS.

Statement: https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md. Predicate:
https://slsa.dev/spec/v1.0/provenance. Everything in it is determined by the build but `runDetails`,
who built, with which versions, when; and the address of the source's remote.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:quantflow:recipe:v1"  # what it means: docs/releases.md
LOCAL_BUILDER = "urn:quantflow:builder:local"
SUFFIX = ".intoto.json"
SUMS = "SHA256SUMS"
_URI = re.compile(r"[a-z][a-z0-9+.-]*:\S+")
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Invocation:
    """Who builds, and in which run. Both are stated by whoever builds, and as trustworthy as the
    signature that is put on them."""

    builder_id: str
    invocation_id: str


def is_uri(text: str) -> bool:
    """Whether `text` is a URI with a scheme in lower case, which is all that in-toto's TypeURI asks
    for."""
    return _URI.fullmatch(text) is not None


def statement(
    subjects: Mapping[str, str],
    external: Mapping[str, Any],
    internal: Mapping[str, Any],
    dependencies: Iterable[Mapping[str, Any]],
    invocation: Invocation,
    record: Mapping[str, Any],
) -> dict[str, Any]:
    """The statement. subjects: name -> sha256. external, internal: the build's parameters, those
    that its user set and the others.
    dependencies: `resource`s. record: the artifact's run.json, which has the times and versions."""
    finished = datetime.strptime(record["finished"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    started = finished - timedelta(seconds=round(sum(record["seconds"].values())))
    return {
        "_type": STATEMENT_TYPE,
        "subject": [
            {"name": name, "digest": {"sha256": sha256}}
            for name, sha256 in sorted(subjects.items())
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": dict(external),
                "internalParameters": dict(internal),
                "resolvedDependencies": [dict(dependency) for dependency in dependencies],
            },
            "runDetails": {
                "builder": {
                    "id": invocation.builder_id,
                    "version": {name: record[name] for name in ("python", "torch")},
                },
                "metadata": {
                    "invocationId": invocation.invocation_id,
                    "startedOn": started.strftime("%Y-%m-%dT%H:%M:%SZ"),
                    "finishedOn": record["finished"],
                },
            },
        },
    }


def resource(
    name: str, role: str, *, uri: str | None = None, sha256: str | None = None, **notes: Any
) -> dict[str, Any]:
    """A ResourceDescriptor: something that the build has read. role: what for. notes: annotations,
    empty ones left out."""
    descriptor: dict[str, Any] = {"name": name}
    if uri:
        descriptor["uri"] = uri
    if sha256:
        descriptor["digest"] = {"sha256": sha256}
    return {
        **descriptor,
        "annotations": {
            "role": role,
            **{key: value for key, value in notes.items() if value is not None},
        },
    }


def own_source(package: Path = _PACKAGE) -> dict[str, Any] | None:
    """The git commit that this program's source is of, as a resource; None where it is not in a git
    checkout, or there is no git.

    The address of the remote is left out where it is a place on this machine; a name or password in
    it always is, but for ssh's `git`.
    `modified`: a tracked file of the package, or of the kernels beside it, is not the commit's.
    """
    # An environment inside somebody's checkout is no part of it: the package's own file must be
    # tracked.
    if (
        _git(package, "ls-files", "--error-unmatch", "__init__.py") is None
        or (commit := _git(package, "rev-parse", "HEAD")) is None
    ):
        return None
    descriptor = resource(
        "quantflow", "source", uri=_public(_git(package, "remote", "get-url", "origin"))
    )
    descriptor["digest"] = {"gitCommit": commit}
    if _git(package, "status", "--porcelain", "--untracked-files=no", "--", ".", "../kernels"):
        descriptor["annotations"]["modified"] = True
    return descriptor


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _public(remote: str | None) -> str | None:
    """As a URI, of which pip and SPDX have the form; git@example.org:a/b is ssh's short form."""
    short = re.fullmatch(r"([\w.-]+)@([\w.-]+):/?(.+)", remote or "")
    parts = urlsplit(f"ssh://{short[1]}@{short[2]}/{short[3]}" if short else remote or "")
    if parts.scheme not in ("https", "ssh") or not parts.hostname:
        return None
    user = "git@" if (parts.scheme, parts.username) == ("ssh", "git") else ""
    port = f":{parts.port}" if parts.port else ""
    return f"git+{parts.scheme}://{user}{parts.hostname}{port}{parts.path}"


def checksums(digests: Mapping[str, str]) -> str:
    """The text of SHA256SUMS for name -> sha256, as `sha256sum -c` reads it. Raises ValueError for
    a name that would need escapes."""
    if odd := [name for name in digests if re.search(r"[\\\n\r]", name)]:
        raise ValueError(f"{odd[0]!r} cannot be listed in {SUMS}")
    return "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(digests.items()))
