"""The house itself: which way imports go, what an import does, what the repository holds and what the wheel does."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
ARROWS = ("app", "search", "pipelines", "attention", "kernels")  # each imports from those to its right alone
FOLDERS = (*ARROWS, "assets")
FOREIGN = {  # what a folder's own knowledge excludes, wherever in it the import stands
    "kernels": {"diffusers", "transformers", "accelerate", "pydantic", "gradio"},
    "attention": {"diffusers", "transformers", "accelerate", "gradio"},
    "pipelines": {"gradio"},
    "search": {"gradio"},
}
NOT_OURS = {"runs", "outputs", "build", "__pycache__"}
PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".joblib"}
MEGABYTE = 1 << 20


def repository_files() -> list[Path]:
    """Every file that belongs to the repository, relative to its root."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if name not in NOT_OURS and not name.endswith(".egg-info") and (name == ".ci" or name[0] != ".")
        ]
        found += [(Path(folder) / name).relative_to(ROOT) for name in names]
    return sorted(found)


def package_sources() -> list[Path]:
    return [path for path in repository_files() if path.parts[0] in FOLDERS and path.suffix == ".py"]


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(("ziggurat", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def imported(source: str, path: Path) -> Iterator[str]:
    """The full names that a file of the package imports, relative imports resolved, at any depth of its code."""
    package = ("ziggurat", *path.parent.parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            if node.level > len(package):
                raise ValueError(f"{path}:{node.lineno} imports from above the package")
            yield from (".".join((*base, *filter(None, [node.module]), alias.name)) for alias in node.names)


def wrong_imports(source: str, path: Path) -> list[str]:
    """The imports of a file that its folder may not make."""
    folder = path.parts[0]
    allowed = {folder, "assets", *ARROWS[ARROWS.index(folder) :]} if folder in ARROWS else {folder}
    wrong = []
    for name in imported(source, path):
        first, *rest = name.split(".")
        if first == "ziggurat":
            if not rest or rest[0] not in allowed:
                wrong.append(name)
        elif first in FOREIGN.get(folder, ()) or first in FOLDERS:
            wrong.append(name)
    return wrong


def run_python(code: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python -c`, which puts `cwd` first on the path."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("kernels/planted.py", "from ..attention.plan import Plan"),
        ("kernels/planted.py", "from ..attention import plan"),
        ("kernels/planted.py", "def late():\n    import diffusers.models"),
        ("attention/planted.py", "from .. import pipelines"),
        ("attention/planted.py", "from transformers import AutoModel"),
        ("attention/planted.py", "import ziggurat.search.solver as solver"),
        ("pipelines/shapes/planted.py", "from ...search import cost"),
        ("pipelines/shapes/planted.py", "if True:\n    from ziggurat.app.cli import main"),
        ("pipelines/planted.py", "from ziggurat import app"),
        ("search/planted.py", "from app.cli import main"),
        ("assets/planted.py", "from ..kernels import attend"),
    ],
)
def test_a_planted_violation_of_the_arrows_is_found(path: str, code: str):
    assert wrong_imports(code, Path(path))


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("app/planted.py", "from ..search import solver\nimport gradio"),
        ("pipelines/shapes/planted.py", "from ..loading import load\nfrom .scenes import GRAMMAR\nimport diffusers"),
        ("pipelines/planted.py", "from ..kernels.attend import attend\nfrom ziggurat.attention import plan"),
        ("attention/planted.py", "from . import rows\nimport torch"),
    ],
)
def test_imports_along_the_arrows_are_allowed(path: str, code: str):
    assert not wrong_imports(code, Path(path))


def test_imports_follow_the_arrows():
    sources = package_sources()
    assert {path.parts[0] for path in sources} == set(FOLDERS)
    wrong = {str(path): wrong_imports((ROOT / path).read_text(), path) for path in sources}
    assert not {path: names for path, names in wrong.items() if names}


FIND_KERNELS = """
import importlib.util
spec = importlib.util.find_spec("kernels")
print(spec.origin if spec else None)
"""


def kernels_origin(cwd: Path) -> Path | None:
    """The file that `import kernels` would run with `cwd` first on the path."""
    done = run_python(FIND_KERNELS, cwd=cwd)
    assert done.returncode == 0, done.stderr
    origin = done.stdout.strip()
    return None if origin == "None" else Path(origin)


def test_our_kernels_folder_is_never_taken_for_hugging_faces_package():
    assert not (ROOT / "kernels/__init__.py").exists()
    origin = kernels_origin(ROOT)
    assert origin is None or not origin.is_relative_to(ROOT / "kernels")


def test_a_kernels_package_in_the_working_directory_would_be_noticed(tmp_path: Path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").touch()
    assert kernels_origin(tmp_path) == tmp_path / "kernels/__init__.py"


IMPORT_ALL = """
import importlib, importlib.metadata, json, sys, traceback
from pathlib import Path

HEAVY = {"triton", "gradio", "ray"}
root, report, *names = sys.argv[1:]
asked = []

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            files = (frame.f_code.co_filename for frame, _ in traceback.walk_stack(None))
            asker = next((file for file in files if "importlib" not in file and file != "<string>"), "")
            if Path(asker).is_relative_to(root) and ".venv" not in asker:
                asked.append(f"{asker} imports {name}")

sys.meta_path.insert(0, Watch())
for name in names:
    importlib.import_module(name)
# Where Triton is installed, PyTorch imports it for diffusers, which imports torch._dynamo.
loaded = sorted((HEAVY - {"triton"}) & set(sys.modules))

from diffusers.utils import is_kernels_available as diffusers_finds
from transformers.utils import is_kernels_available as transformers_finds

installed = any(found.name == "kernels" for found in importlib.metadata.distributions())
found = [bool(diffusers_finds()), bool(transformers_finds())]
Path(report).write_text(json.dumps({"asked": asked, "loaded": loaded, "installed": installed, "found": found}))
"""


@pytest.fixture(scope="module")
def all_imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process saw that imported every module, with the repository's root first on its path."""
    report = tmp_path_factory.mktemp("imports") / "report.json"
    # Folders that are loaded only when they are asked for: Triton's code itself, and Gradio's pages.
    late = (("kernels", "triton_backend"), ("app", "studio", "pages"))
    sources = [path for path in package_sources() if path.parent.parts not in late]
    names = [module_name(path) for path in sources if path.stem != "__main__"]
    done = run_python(IMPORT_ALL, str(ROOT), str(report), *names)
    assert done.returncode == 0, done.stderr
    return {**json.loads(report.read_text()), "said": done.stdout + done.stderr}


def test_importing_any_module_prints_nothing_and_pulls_in_no_triton_gradio_or_ray(all_imported: dict[str, Any]):
    seen = {name: all_imported[name] for name in ("said", "asked", "loaded")}
    assert seen == {"said": "", "asked": [], "loaded": []}


def test_hugging_faces_libraries_do_not_take_our_kernels_folder_for_theirs(all_imported: dict[str, Any]):
    assert all_imported["found"] == [all_imported["installed"]] * 2


@pytest.mark.parametrize("name", ["ziggurat.pipelines", "ziggurat.app.cli"])
def test_importing_leaves_torch_for_later(name: str):
    done = run_python(f"import sys, {name}; print(sorted({{'torch', 'diffusers', 'transformers'}} & set(sys.modules)))")
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_files_keep_to_their_lengths():
    lengths = {
        str(path): len((ROOT / path).read_text().splitlines()) for path in repository_files() if path.suffix == ".py"
    }
    assert lengths
    assert not {path: lines for path, lines in lengths.items() if lines > 500}
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_assets_stay_small_and_no_model_is_pickled():
    files = repository_files()
    assert not [str(path) for path in files if path.suffix in PICKLED]
    size = sum((ROOT / path).stat().st_size for path in files if path.parts[0] == "assets")
    assert size < 16 * MEGABYTE, f"assets hold {size / MEGABYTE:.1f} MB"


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_everything_depended_on_is_pinned_within_its_range():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all([term.operator for term in pin.specifier] == ["=="] for pin in pins)
    versions = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    table = project()["project"]
    wanted = [Requirement(text) for text in table["dependencies"] + table["optional-dependencies"]["dev"]]
    unfit = [str(item) for item in wanted if versions.get(canonicalize_name(item.name), "0") not in item.specifier]
    assert not unfit


def test_every_folder_of_code_is_listed_for_packaging():
    settings = project()["tool"]["setuptools"]
    folders = {module_name(path.parent / "__init__.py") for path in package_sources()}
    assert set(settings["packages"]) == folders
    assert set(settings["package-dir"].values()) == set(FOLDERS)


def test_the_wheel_holds_all_of_the_package_and_nothing_else(tmp_path: Path):
    # From a copy: a build leaves folders behind, and takes up what an earlier one left.
    sources = [
        path
        for path in repository_files()
        if path.parts[0] in FOLDERS or str(path) in ("pyproject.toml", "README.md", "LICENSE")
    ]
    for path in sources:
        (tmp_path / "tree" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, tmp_path / "tree" / path)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(tmp_path), str(tmp_path / "tree")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == {f"ziggurat/{path}" for path in sources if path.parts[0] in FOLDERS}
