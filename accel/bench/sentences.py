"""Real text: the standard library's docstrings, as sentences for the embedding rows and as whole passages."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MIN_TOKENS, MAX_TOKENS = 5, 250
MIN_CHARACTERS = 80  # of a docstring that is a passage: shorter ones are a line without context
MODULES = """
    argparse ast asyncio/base_events asyncio/streams asyncio/tasks calendar codecs collections/__init__
    concurrent/futures/_base configparser contextlib csv datetime dataclasses decimal difflib doctest email/message
    email/header fractions ftplib functools gettext glob gzip heapq html/parser http/client http/cookiejar imaplib
    inspect ipaddress json/__init__ locale logging/__init__ logging/handlers mailbox mimetypes
    multiprocessing/managers nntplib ntpath numbers optparse os pathlib pdb pickle pickletools platform plistlib
    poplib posixpath pprint profile pydoc queue random sched shelve shlex shutil smtplib socket socketserver
    sqlite3/dbapi2 ssl statistics string subprocess symtable tarfile tempfile textwrap threading timeit trace
    traceback types typing unittest/case unittest/mock urllib/parse urllib/request uuid warnings wave weakref
    webbrowser xml/dom/minidom xml/etree/ElementTree xmlrpc/client zipfile
"""


def load_sentences(root: Path, count: int, count_tokens: Callable[[str], int]) -> list[str]:
    """Returns ``count`` sentences, chosen once and kept in ``root/sentences.json``.

    Lengths (counted by ``count_tokens``, special tokens included) are spread evenly on a logarithmic scale between
    5 and 250 tokens, in random order: short sentences are the most frequent, long ones are there.
    """
    path = root / "sentences.json"
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if len(kept) == count:
            return kept
    passages = sorted(set(_passages()))
    chosen = choose_by_length(passages, [count_tokens(text) for text in passages], count)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(chosen, indent=0, ensure_ascii=False), encoding="utf-8")
    return chosen


def docstring_passages(count: int | None = None) -> list[str]:
    """The standard library's docstrings, whole: prose, lists and examples as their authors wrote them.

    Each once, of at least ``MIN_CHARACTERS``, spread over the modules in an order that is always the same (that of
    their sha256), so that any first part of the list is a sample of all. Which there are depends on Python's version.

    Args:
        count: How many; None: all.
    """
    found = {text for source in _sources() for text in _docstrings(source) if len(text) >= MIN_CHARACTERS}
    ordered = sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())
    return ordered[:count]


def fingerprint(sentences: list[str]) -> str:
    """The first 16 hex digits of the sentences' sha256: equal fingerprints, equal work."""
    return hashlib.sha256("\n".join(sentences).encode()).hexdigest()[:16]


def choose_by_length(passages: list[str], tokens: list[int], count: int) -> list[str]:
    """Takes, for each of ``count`` log-spaced target lengths, an unused passage of the nearest length; shuffled."""
    generator = np.random.default_rng(0)
    order = generator.permutation(len(passages))
    usable = [index for index in order if MIN_TOKENS <= tokens[index] <= MAX_TOKENS]
    if len(usable) < count:
        raise ValueError(f"only {len(usable)} passages of {MIN_TOKENS} to {MAX_TOKENS} tokens for {count} sentences")
    lengths = np.array([tokens[index] for index in usable], dtype=np.float64)
    chosen = []
    for target in np.geomspace(MIN_TOKENS, MAX_TOKENS, count)[::-1]:  # long ones first: they are scarce
        nearest = int(np.argmin(np.abs(lengths - target)))
        chosen.append(passages[usable[nearest]])
        lengths[nearest] = np.inf
    return [chosen[index] for index in generator.permutation(count)]


def _passages() -> Iterator[str]:
    """Single sentences and whole paragraphs of all docstrings; sources are parsed, never imported."""
    for source in _sources():
        for docstring in _docstrings(source):
            for paragraph in re.split(r"\n\s*\n", docstring):
                text = " ".join(paragraph.split())
                if ">>>" in text or not re.match(r"[A-Z][a-z]", text):
                    continue
                yield text
                yield from re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)


def _sources() -> Iterator[Path]:
    """The modules that this Python has: some left the library in later versions."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return (path for module in MODULES.split() if (path := library / f"{module}.py").exists())


def _docstrings(source: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def tokenize(folder: Path, texts: list[str]) -> dict[str, NDArray[np.int64]]:
    """Tokenizes a padded batch with the model's own ``tokenizer.json``.

    Returns:
        ``input_ids``, ``attention_mask`` (0 on padding), ``token_type_ids``, int64 [B, longest].
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    rows = tokenizer.encode_batch(texts)
    ids = np.array([row.ids for row in rows], np.int64)
    mask = np.array([row.attention_mask for row in rows], np.int64)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def mean_pool(hidden: NDArray[np.float32], mask: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sentence vectors: the mean of the hidden states [B, S, H] where ``mask`` [B, S] is 1, scaled to unit length."""
    weights = mask[..., None].astype(np.float64)
    vectors = (hidden * weights).sum(axis=1) / weights.sum(axis=1)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
