"""The house keeps its shape: who may import whom, what never appears in product code, how files are named."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("dashboard", "compression_worker", "kernels", "deploy")
PRODUCT = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
HOLDALLS = {"utils", "util", "common", "helpers", "helper", "base", "core", "misc"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal", "tarfile", "zipfile"}
WHEELS_ARE_ZIP_FILES = {"deploy/demo/smollm2.py": ["zipfile"]}
"""The one place that reads an archive: one named member of a wheel that pip has checked, and nothing is unpacked."""
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "numpy.load", "np.load", "os.system"}

BLOCK_TORCH = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {'torch', 'transformers', 'triton', 'safetensors', 'lm_eval', 'numpy'}:
            raise ImportError(f'the web process tried to import {name}')
sys.meta_path.insert(0, Block())
import django
django.setup()
import importlib, pkgutil, dashboard
for module in pkgutil.walk_packages(dashboard.__path__, 'dashboard.'):
    importlib.import_module(module.name)
from compression_worker import catalog
for method in catalog.METHODS.values():
    method.config_class()
print('torch' in sys.modules)
"""


def test_imports_keep_their_contracts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert lint_imports(config_filename="pyproject.toml") == EXIT_STATUS_SUCCESS


def test_the_whole_dashboard_imports_on_a_machine_without_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCK_TORCH], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


def test_the_words_of_the_worker_need_no_torch_and_no_django() -> None:
    code = "import sys; from compression_worker import catalog, contracts, launcher, samples; " + (
        "[m.config_class() for m in catalog.METHODS.values()]; print({'torch', 'django', 'celery'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr


def test_the_kernels_package_is_ours_alone() -> None:
    """transformers looks for a distribution of that name and would take ours for it."""
    locked = (ROOT / "requirements.lock").read_text().lower().splitlines()
    assert not [line for line in locked if line.startswith("kernels=")]
    assert "__version__" not in (ROOT / "kernels" / "__init__.py").read_text()


def test_every_line_of_the_lock_is_an_exact_pin_that_installs_anywhere() -> None:
    lines = [
        line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert "torch==2.13.0" in lines
    assert not [line for line in lines if "==" not in line or "+" in line or "@" in line]


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return f"{_dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def _dangers(tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            found.append(node.module or "")
        elif isinstance(node, ast.Call):
            found += [name for name in [_dotted(node.func)] if name in FORBIDDEN_CALLS]
            found += [str(word.arg) for word in node.keywords if _opens_a_door(word)]
    return found


def _opens_a_door(word: ast.keyword) -> bool:
    """``shell=True`` and its like: a value other than a plain False."""
    closed = isinstance(word.value, ast.Constant) and word.value.value is False
    return word.arg in {"trust_remote_code", "shell"} and not closed


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_product_code_runs_what_it_reads(path: Path) -> None:
    assert _dangers(ast.parse(path.read_text())) == WHEELS_ARE_ZIP_FILES.get(str(path.relative_to(ROOT)), [])


def test_the_search_for_dangers_finds_them() -> None:
    code = "import pickle\nfrom joblib import load\ntorch.load(f)\neval(x)\nm(trust_remote_code=True)\nrun(c, shell=s)"
    assert _dangers(ast.parse(code)) == ["pickle", "joblib", "torch.load", "eval", "trust_remote_code", "shell"]


def test_no_file_is_a_holdall() -> None:
    assert [path for path in PRODUCT if path.stem in HOLDALLS or path.parent.name in HOLDALLS] == []


def test_every_module_says_what_lives_here() -> None:
    silent = [path for path in PRODUCT if "migrations" not in path.parts and path.read_text().strip()]
    assert [str(path) for path in silent if not ast.get_docstring(ast.parse(path.read_text()))] == []


REMOVERS = {
    "compression_worker/store.py",
    "compression_worker/bucket.py",
    "dashboard/services/blobs.py",
    "dashboard/services/storage_sweep.py",
}
"""The store, and the two services that have looked for what needs a blob before they ask it to remove one."""
REMOVE_A_FILE = {"unlink", "rmtree", "removedirs", "rmdir", "rm_file"}
REMOVE_A_BLOB = {"discard_leftovers", "delete_object"}
REMOVE_BY = {("store", "remove"), ("store", "discard"), ("os", "remove"), ("fs", "rm")}
"""Receiver and method, where sets and lists have a method of that name, too."""
OTHER_FOLDERS = {"compression_worker/artifact.py", "compression_worker/commands.py"}
"""They clean up a folder that they have just made at a place which the person named."""


def _removals(tree: ast.Module) -> list[str]:
    calls = [_dotted(node.func).split(".") for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        words[-1]
        for words in calls
        if words[-1] in REMOVE_A_FILE | REMOVE_A_BLOB
        or (len(words) > 1 and (words[-2].lstrip("_"), words[-1]) in REMOVE_BY)
    ]


def test_nothing_but_the_store_removes_blobs() -> None:
    found = {
        str(path.relative_to(ROOT)): removals
        for path in PRODUCT
        if path.parts[len(ROOT.parts)] in ("dashboard", "compression_worker")
        if (removals := _removals(ast.parse(path.read_text())))
    }
    assert found.keys() - OTHER_FOLDERS == REMOVERS
    assert not {name for path in OTHER_FOLDERS & found.keys() for name in found[path]} & REMOVE_A_BLOB


def test_the_search_for_removals_finds_them() -> None:
    code = "path.unlink()\nself._store.remove(x)\nnames.remove(x)\nshutil.rmtree(f)\nseen.discard(x)\nstore.discard(x)"
    assert _removals(ast.parse(code)) == ["unlink", "remove", "rmtree", "discard"]


def test_only_the_bucket_store_speaks_to_s3() -> None:
    speakers = [
        str(path.relative_to(ROOT))
        for path in PRODUCT
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        if name.split(".")[0] in {"fsspec", "s3fs", "boto3", "botocore", "aiobotocore"}
    ]
    assert set(speakers) == {"compression_worker/bucket.py"}


def test_nothing_prints_below_the_doors() -> None:
    doors = {"__main__.py", "train.py"}
    talkers = [
        str(path.relative_to(ROOT))
        for path in PRODUCT
        if path.name not in doors and "deploy" not in path.parts
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and _dotted(node.func) == "print"
    ]
    assert talkers == []
