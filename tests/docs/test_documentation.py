"""What README and docs/ name exists: commands and their flags, cards, files, links."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from querydet_jax.cli.main import SUMMARIES, load

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], key=str)
NOW = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which also names what is gone
GROUPS = ("prepare", "score", "benchmark")  # the next word is a command of its own
_COMMAND = re.compile(r"(?:querydet|(?:\S*python )(?:train|eval|predict|export|benchmark)\.py)(?= )")
_ROOMS = "querydet_jax|benchmarks|configs|docs|tests|examples"
_PATH = re.compile(
    rf"(?:{_ROOMS})/[\w./*-]*|requirements[\w-]*\.txt|[A-Z]+\.md|(?:train|eval|predict|export|benchmark)\.py"
)


def quoted(text: str) -> Iterator[str]:
    """Yield each line of code blocks, continuation lines joined, and each span of inline code."""
    joined = text.replace("\\\n", " ")
    prose = re.sub(r"^(```|    ).*$", "", joined, flags=re.MULTILINE)
    yield from (line.strip() for line in joined.splitlines() if line.startswith("    "))
    yield from (span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose))


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of every command of this package, from the command's name on."""
    for code in quoted(text):
        if found := _COMMAND.search(code):
            words = shlex.split(code[found.end() :].rstrip('"'), comments=True)
            script = re.search(r"(\w+)\.py$", found.group())
            words = [script.group(1), *words] if script else words
            if words and words[0] != "--help" and words[0] != "COMMAND":
                yield words


@functools.cache
def help_of(name: str, *words: str) -> str:
    """Return what a command prints for --help."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("COLUMNS", "200")
        try:
            load(name)([*words, "--help"], f"querydet {name}")
        except SystemExit as ended:
            assert ended.code in (0, None), f"querydet {name} {' '.join(words)}"
    return printed.getvalue()


def flags_of(*words: str) -> set[str]:
    return set(re.findall(r"--[a-z][\w.-]*", help_of(*words)))


@pytest.mark.parametrize("page", NOW, ids=lambda page: page.name)
def test_commands_and_flags_exist(page: Path):
    for words in commands(page.read_text()):
        assert words[0] in SUMMARIES, f"{page.name}: {' '.join(words)}"
        name = words[:2] if words[0] in GROUPS and len(words) > 1 and not words[1].startswith("-") else words[:1]
        if name[-1] in ("NAME", "TASK"):
            continue
        known = flags_of(*name)
        for word in words:
            flag = word.split("=")[0]
            if re.fullmatch(r"--[a-z][\w.-]*", flag):
                assert flag in known, f"{page.name}: {' '.join(words)}: {flag} is no flag of {' '.join(name)}"


@pytest.mark.parametrize("page", NOW, ids=lambda page: page.name)
def test_cards_exist(page: Path):
    for command, *rest in commands(page.read_text()):
        if command in ("train", "report", "cards") and rest and re.fullmatch(r"[a-z]\w*", rest[0]):
            assert (ROOT / "configs" / f"{rest[0]}.py").exists(), f"{page.name}: {command} {rest[0]}"


@pytest.mark.parametrize("page", NOW, ids=lambda page: page.name)
def test_files_exist(page: Path):
    for code in quoted(page.read_text()):
        for path in _PATH.findall(code) if " " in code else [code] if _PATH.fullmatch(code) else []:
            if not path.startswith("docs/_build"):
                assert list(ROOT.glob(path.rstrip("/"))), f"{page.name}: {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not re.match(r"https?:|#", target):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", ["reliability.md", "files.md"])
def test_every_test_of_the_fault_tables_exists(page: str):
    names = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / page).read_text()))
    source = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert names and not [name for name in sorted(names) if f"def {name}(" not in source]


def test_every_equation_and_table_of_the_paper_is_found():
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert all(f"| eq. {n} |" in page for n in range(1, 5))
    source = "\n".join(path.read_text() for path in (ROOT / "querydet_jax").rglob("*.py"))
    assert all(f"QueryDet eq. {n}" in source for n in range(1, 5))
    assert all(f"| Table {n}," in page for n in range(1, 10))


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100
