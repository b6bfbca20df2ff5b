"""Who may know whom: a module imports only from rows above its own."""

import ast
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[1] / "src" / "selfcompress"
ROWS: tuple[tuple[str, ...], ...] = (
    ("errors", "fusing", "mixing", "meta"),
    ("contexts", "quantizer", "attention", "recurrent", "wire", "distilling", "following", "remembering"),
    ("coder", "surroundings", "graph"),
    ("heading",),
    ("fitting", "rate", "container", "tracing", "copies", "optimizers"),
    ("operators", "activations"),
    ("axes",),
    ("converting", "shrinking", "budget", "capturing", "interpreting"),
    ("packing", "sites", "trial", "trimming", "holding", "workload"),
    ("steering", "latency_table", "widths"),
    ("costs", "thinning"),
    ("pricing",),
    ("compressor", "explaining"),
    ("replaying",),
    ("scoring", "reporting", "exporting"),
    ("measuring",),
    ("recipes", "integrations"),
    ("cli",),
    ("__main__",),
)
ROW = {name: number for number, names in enumerate(ROWS) for name in names}
FRONT_DOOR = "__init__"
FREE_OF_TORCH = ("errors", "contexts", "coder", "container", "graph", "heading", "wire")


def unit(path: Path) -> str:
    """The module or package directly under `selfcompress` that a file belongs to."""
    return path.relative_to(SOURCES).parts[0].removesuffix(".py")


def files() -> list[Path]:
    return sorted(p for p in SOURCES.rglob("*.py") if unit(p) != FRONT_DOOR)


def imports(path: Path) -> set[str]:
    """Absolute dotted names of all that a file imports, wherever in the file, also for type checking only."""
    inside = ["selfcompress", *path.relative_to(SOURCES).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{source}.{alias.name}" for alias in node.names}
    return found


def known(path: Path) -> set[str]:
    """Modules and packages of ours that a file imports; its own package is not counted."""
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("selfcompress.")}
    return {name for name in ours if (SOURCES / name).is_dir() or (SOURCES / f"{name}.py").is_file()} - {unit(path)}


def test_every_module_has_its_row() -> None:
    assert {unit(p) for p in files()} <= set(ROW)
    assert len(files()) > 10


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(SOURCES)))
def test_a_module_imports_only_from_rows_above_its_own(path: Path) -> None:
    below = {name for name in known(path) if ROW[name] >= ROW[unit(path)]}
    assert not below, f"{path.name} (row {ROW[unit(path)]}) imports {below}"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(SOURCES)))
def test_a_module_never_enters_by_the_front_door(path: Path) -> None:
    """`from selfcompress import x` would hide which module is meant, and would make circles; the command line may."""
    if unit(path) in ("cli", "__main__"):
        return
    names = {n for n in imports(path) if n == "selfcompress" or n.startswith("selfcompress.")}
    through = {n for n in names if len(n.split(".")) == 1 or n.split(".")[1] not in ROW}
    assert not through


@pytest.mark.parametrize("name", FREE_OF_TORCH)
def test_decoding_is_free_of_torch(name: str) -> None:
    path = SOURCES / f"{name}.py"
    assert not {n for n in imports(path) if n.split(".")[0] == "torch"}
    for ours in known(path):
        assert ours in FREE_OF_TORCH


def test_nothing_is_read_by_executing_it() -> None:
    """No pickle, eval or exec in what reads a `.scn` file."""
    for name in ("coder", "container", "packing", "wire", "heading", "graph", "interpreting"):
        text = (SOURCES / f"{name}.py").read_text(encoding="utf-8")
        calls = {
            n.func.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        assert not calls & {"eval", "exec", "compile", "__import__"}
        assert not {n.split(".")[0] for n in imports(SOURCES / f"{name}.py")} & {
            "pickle",
            "marshal",
            "shelve",
            "joblib",
        }
