"""docs/formats.md promises what is served: this keeps it in step with the readers, the kernels and the fixtures."""

import re
from pathlib import Path

from engine.checkpoint.format import READERS
from kernels.linear.registry import kernels_for
from kernels.registry import families

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests/fixtures"


def table(heading: str) -> list[list[str]]:
    """The cells of each row of the table under a heading."""
    section = (ROOT / "docs/formats.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def quoted(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def test_every_reader_is_listed_and_every_listed_reader_exists() -> None:
    """A format added without its row is a format nobody knows of."""
    listed = {reader for row in table("Formats") for reader in quoted(row[1])}
    readers = {reader.__module__.rsplit(".", 1)[1] + ".py" for reader in READERS.values()}
    assert readers <= listed
    assert all((ROOT / "engine/checkpoint" / reader).is_file() for reader in listed)


def test_fixtures_are_those_that_exist() -> None:
    """A proof that is no longer there, or a fixture whose format is not told."""
    named = {fixture for row in table("Formats") for fixture in quoted(row[4])}
    assert named == {folder.name for folder in FIXTURES.iterdir() if (folder / "expected.safetensors").is_file()}


def test_families_and_kernels_are_those_of_the_registry() -> None:
    told = {row[0]: row[2].split(", ") for row in table("Families and their kernels")}
    assert told == {name: [kernel.name for kernel in kernels_for(name)] for name in families("kernels.linear")}


def test_formats_name_families_that_exist() -> None:
    for row in table("Formats"):
        assert set(row[2].split(", ")) <= set(families("kernels.linear")), row[0]


def test_the_readme_names_every_format() -> None:
    """Bug: a format that is served, and whose users never learn of it."""
    (row,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| formats |")]
    named = re.sub(r"[^a-z0-9]", "", row.lower())
    readers = {reader for row in table("Formats") for reader in quoted(row[1])} - {"dense.py", "nibble.py"}
    assert [reader for reader in sorted(readers) if re.sub(r"_|\.py", "", reader) not in named] == []
