"""The house rules that can be counted."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("server", "engine", "kvcache", "kernels", "demo", "benchmarks")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
MAX_KERNEL_LINES = 80


def python_files() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


def test_files_and_functions_stay_small() -> None:
    """Bug: the slow growth of a file nobody can read in one sitting."""
    too_long = []
    for path in python_files():
        source = path.read_text()
        name = path.relative_to(ROOT)
        if (num_lines := source.count("\n")) > MAX_FILE_LINES:
            too_long.append(f"{name}: {num_lines} lines")
        limit = MAX_KERNEL_LINES if path.is_relative_to(ROOT / "kernels") else MAX_FUNCTION_LINES
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > limit:
                    too_long.append(f"{name}:{node.lineno} {node.name}: {length} lines")
    assert not too_long


def test_one_file_per_architecture_under_150_lines() -> None:
    for name in ("llama", "mistral", "qwen2", "qwen3"):
        assert (ROOT / "engine/models" / f"{name}.py").read_text().count("\n") < 150


def test_modules_hold_no_mutable_state() -> None:
    """Bug: a dict filled at run time makes two engines in one process share what they should not."""
    offenders = []
    for path in python_files():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.List | ast.Set | ast.Call):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
                is_call_of_container = (
                    isinstance(node.value, ast.Call)
                    and isinstance(node.value.func, ast.Name)
                    and node.value.func.id in ("dict", "list", "set", "defaultdict", "OrderedDict", "deque")
                )
                if isinstance(node.value, ast.List | ast.Set) or is_call_of_container:
                    offenders += [f"{path.relative_to(ROOT)}: {name}" for name in names if name != "__all__"]
    assert not offenders


@pytest.mark.parametrize("package", PACKAGES[:4])
def test_documentation_names_every_package(package: str) -> None:
    assert f"`{package}/`" in (ROOT / "docs/architecture.md").read_text()


def test_documentation_names_every_weight_family() -> None:
    """Bug: a family that is served but that no reader of the documentation can find."""
    text = (ROOT / "docs/architecture.md").read_text()
    for folder in sorted((ROOT / "kernels/linear").iterdir()):
        if (folder / "layout.py").is_file():
            assert f"`{folder.name}`" in text


def test_environment_is_read_in_one_place() -> None:
    """Bug: a setting that appears in no --help."""
    readers = [
        str(path.relative_to(ROOT))
        for path in python_files()
        if path.is_relative_to(ROOT / "server") or path.is_relative_to(ROOT / "engine")
        if "os.environ" in path.read_text() or "getenv" in path.read_text()
    ]
    assert set(readers) <= {"server/config.py"}


def test_committed_files_are_small() -> None:
    """Bug: a checkpoint committed by accident stays in everybody's clone for ever. 13 MB is the demo model's limit."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]
    assert not [path for path in paths if path.stat().st_size > 13_000_000]
