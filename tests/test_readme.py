"""The README keeps its word: its example runs, its table is that of the records, its files exist."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def load_table_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("table", ROOT / "bench" / "table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "bench"))  # for the scripts that it takes its tables from
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "bench"))
    return module


def test_python_example_runs_and_shrinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    size_bytes, small = names["size_bytes"], names["small"]
    assert isinstance(small, torch.nn.Module)
    assert size_bytes == (tmp_path / "net.scn").stat().st_size
    float_bytes = 4 * sum(
        p.numel() for p in torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Linear(64, 3)).parameters()
    )
    assert size_bytes < float_bytes / 4
    assert small(torch.zeros(1, 20)).shape == (1, 3)


def test_tables_are_those_of_the_records() -> None:
    module = load_table_module()
    for name, (file, text) in module.tables().items():
        page = (ROOT / file).read_text()
        assert module.START.format(name) + text + module.END in page, "run `python bench/table.py --write`"


def test_the_picture_shows_the_points_of_the_records() -> None:
    module = load_table_module()
    picture = (ROOT / module.PICTURE).read_text()
    assert f"points {module.digest(module.points())}" in picture, "run `python bench/table.py --write`"
    assert module.NETWORKS["lenet5"] in picture


def test_files_that_it_names_exist() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    for name in re.findall(r"`([a-z_]+(?:\.py|/))`", README):
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "src" / "selfcompress")), name
