"""Code, tests and documentation use the standard terms of the field; CHANGELOG.md may name what was renamed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUFFIXES = {".c", ".css", ".js", ".md", ".py", ".sh", ".toml", ".yaml", ""}
PARTS = ["raycluster", "jobs", "configs", "docs", "tests", "README.md", "CONTRIBUTING.md", "Makefile", "Dockerfile"]

# Refused, and the term to use instead. An underscore ends a word: `_mistakes` is refused, `heartbeat` is not.
REFUSED = {
    "pictures?": "image",
    "lanes?": "stream",
    "crews?": "feature pool",
    "helpings?": "batches",
    "lookouts?": "checkpoint policy",
    "harvest(s|ed|ing)?": "online features",
    "chronicles?": "status tracker",
    "storeys?": "layer",
    "rooms": "packages",
    "nouns?": "data types",
    "wish(es|ed)?": "request",
    "mistakes?": "error",
    "whoever": "the process that",
    "meanwhile": "(say when)",
    "beats?": "heartbeat",
    "hearts?": "heartbeat",
    "appoint(s|ed)?": "set",
    "in office": "active",
    "looks? around": "poll",
    "victims?": "random process",
    "quarter turns?": "rotation",
    "swings": "momentum mask",
    "movers": "moved centroids",
    "donors": "split clusters",
    "tally": "running sums",
    "bottle": "bottleneck",
    "goes on (from|where|with)": "resumes",
    "command goes on": "command resumes",
    "the same bits": "bitwise identical",
    "to the bit": "bitwise",
    "bit for bit": "bitwise",
}
REFUSED_NAMES = {  # as written, since the words have other uses
    "Sight": "ClusterObservation",
    "Verdict": "RestartDecision",
    "Claim": "LeaseObservation",
    "Noted": "StatusNote",
    "Speaker": "WorkerClient",
    "Shelf": "FeatureCache",
    "Forgiving": "RetryFailurePolicy",
    "SavingFirst": "CheckpointBeforeResizePolicy",
}


WORDS = {f"(?i:{word.replace(' ', '[ _]')})": term for word, term in REFUSED.items()} | REFUSED_NAMES
ANY = re.compile(f"(?<![a-zA-Z])({'|'.join(WORDS)})(?![a-zA-Z])")


def hits(path: Path) -> Iterator[str]:
    """`file:line: word (term to use)` of each refused word; line 0 is the name of the file."""
    name = str(path.relative_to(ROOT))
    for number, line in enumerate([name, *path.read_text(encoding="utf-8").splitlines()]):
        for match in ANY.finditer(line):
            if path.suffix == ".c" and match[0].lower() in ("lane", "lanes"):  # of a vector register
                continue
            term = next(term for word, term in WORDS.items() if re.fullmatch(word, match[0]))
            yield f"{name}:{number}: {match[0]} (use: {term})"


@pytest.mark.parametrize("part", PARTS)
def test_standard_terms(part: str) -> None:
    start = ROOT / part
    files = [start] if start.is_file() else [path for path in sorted(start.rglob("*")) if path.is_file()]
    assert files, f"there is no {part}"
    texts = [path for path in files if path.suffix in SUFFIXES and path != Path(__file__)]
    found = [hit for path in texts for hit in hits(path)]
    assert not found, "\n".join([f"{len(found)} words to replace", *found])


@pytest.mark.parametrize("line", ["a Picture of", "_mistakes(self)", "crew.size", "The command goes on.", "Verdict()"])
def test_refused_words_are_found(line: str) -> None:
    assert ANY.search(line)


@pytest.mark.parametrize("line", ["heartbeat", "planes", "a verdict", "the histories", "hearth", "0-dimensional"])
def test_other_words_are_not(line: str) -> None:
    assert not ANY.search(line)
