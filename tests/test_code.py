"""Which modules some code brings in, on packages of a few lines."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from smaflib.files import PROJECT_ROOT
from smaflib.runs.code import code_only, imported_modules, is_around, library_hash
from smaflib.runs.inputs import notebook_cells

FILES = {
    "__init__": "",
    "alone": "",
    "cams": "from box.files import write\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import box.typed",
    "files": "def write(): import box.alone\ndef read(): import box.never",
    "never": "",
    "typed": "",
    "teacher": "",
    "student": "",
    "helper": "",
    "pipeline": """
def train_teacher():
    from box.teacher import train
def train_student():
    from box.student import train
    _help()
def _help(): from box import helper
""",
    "data.__init__": "from box.data.voc import load",
    "data.voc": "from . import labels\ndef load(): return labels.read()",
    "data.labels": "def read(): from ..files import read",
    "classes": """
@decorate
def decorated(): import box.alone
class Run:
    def samples(self):
        from box.data import load
        return load()
    def masks(self):
        from box import never
    kind = table["x"]
class Parser(Run):
    def called_by_its_base(self): import box.never
table = {"x": chosen}
def chosen(): import box.helper
def not_chosen(): import box.never
def open_run(): return Run()
""",
    "twice": """
try:
    from box.teacher import train
except ImportError:
    from box.student import train
rules = {}
rules["help"] = help_me
def help_me(): from box import helper
""",
    "ring": "from box import ring2\ndef f(): return ring2",
    "ring2": "from box import ring\ndef f(): return ring",
    "lazy.__init__": """
import importlib
_HOMES = {"train": "cams", "write": "box.files"}
if not TYPE_CHECKING:
    def __getattr__(name): return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
""",
    "lazy.cams": "def train(): import box.teacher",
    "lazy.other": "",
}


@pytest.fixture
def box(tmp_path: Path) -> Path:
    for name, code in FILES.items():
        path = tmp_path.joinpath("box", *name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    return tmp_path / "box"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import numpy", ""),
        ("import box.alone", "alone"),
        ("import box.alone as a\na.x", "alone"),
        ("from box.cams import fuse", "cams files"),  # nothing calls write, and only type checkers see box.typed
        ("from box.files import write\nwrite()", "alone files"),
        ("from box import files\nfiles.write()", "alone files"),
        ("from box import files\nlist(map(str, [files]))", "alone files never"),  # it may be any function of it
        ("from box.files import *", "alone files never"),
        ("from box.pipeline import train_teacher\ntrain_teacher()", "pipeline teacher"),
        ("from box.pipeline import train_student\ntrain_student()", "helper pipeline student"),
        ("def f():\n    from box.data import load\n    load()", "data data.labels data.voc files"),
        ("from box.data import load", "data data.labels data.voc"),
        ("from box.classes import open_run\nopen_run()", "alone classes helper"),
        (
            "from box.classes import open_run\nopen_run().samples()",
            "alone classes data data.labels data.voc files helper",
        ),
        ("from box.classes import open_run\nx = open_run\ngetattr(x, 'masks')", "alone classes helper never"),
        ("from box.classes import Parser\nParser()", "alone classes helper never"),
        ("from box.twice import train", "helper student teacher twice"),  # what stands in a table may be called
        ("from box.ring import f\nf()", "ring ring2"),
        ("from box import lazy", "lazy"),
        ("from box.lazy import train\ntrain()", "lazy lazy.cams teacher"),
        ("from box import lazy\nlazy.write()", "alone files lazy"),
        ("import importlib\nimportlib.import_module('box.alone')", "alone"),
    ],
)
def test_modules_that_code_imports(code, expected, box):
    found = imported_modules(["%matplotlib inline", code], box)
    assert [name.removeprefix("box.") for name in found if name != "box"] == expected.split()
    assert ("box" in found) == bool(expected)


def test_hash_of_a_module_changes_with_its_code_only(box):
    def cams() -> str:
        return imported_modules(["import box.cams"], box)["box.cams"]

    path = box / "cams.py"
    path.write_text('"""Maps."""\nx = 1')
    before = cams()
    path.write_text('"""Attention maps."""\n\n# one\nx = 1  # as before\n"""What x is."""')
    assert cams() == before
    path.write_text("x = 2  # another one")
    assert cams() != before


def test_docstrings_layout_and_comments_are_no_code():
    assert code_only("def f():\n    '''Why.'''\n    return 1 # one") == code_only("def f(): return 1")
    assert code_only("x = 'text'") != code_only("x = 'other'")
    assert code_only("%matplotlib inline") == "%matplotlib inline"


def test_parts_around_the_method():
    assert [
        is_around(f"smaflib{name}") for name in ("", ".errors", ".report.plots", ".explorer.page", ".runs.run")
    ] == [True] * 5
    assert not any(is_around(f"smaflib.{name}") for name in ("cams", "config.schema", "pipeline", "reports"))
    assert len(library_hash()) == 64


def test_no_import_of_a_notebook_is_missed():
    """What Python itself imports for notebook 08, which imports most."""
    cells = notebook_cells(PROJECT_ROOT / "notebooks" / "08_results.ipynb")
    sources = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    imports = [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    code = "\n".join([*imports, "import sys", "print(*[name for name in sys.modules if name.startswith('smaflib')])"])
    printed = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    assert set(printed.stdout.split()) <= imported_modules(sources).keys()
