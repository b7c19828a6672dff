"""The law of the layout: a package imports only what stands below it, files form no circles, names are used once.

`python tests/test_layout.py` prints the packages in order, what breaks the law, and how long and complex functions are.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

PACKAGES = (
    *("cli", "app", "report", "execution", "plan", "environments", "store", "recipe", "rules", "stages"),
    *("training", "evaluation", "calibration", "serving", "runtime", "process", "formats", "deploy"),
    "stage",  # the contract of stages: part of the ground, but it speaks of targets and models
    *("targets", "models", "algorithms"),
)
GROUND = ("described", "progress", "records", "fileio", "host", "errors", "text", "problems")
ORDER = ("__main__", *PACKAGES, *GROUND, "")
"""Top first; nothing imports what stands before it. Last, the package's own `__init__`, which holds the version."""

SHARED_NAMES = ("stages", "cli", "deploy")
"""A file here is named after a method or an engine, a verb, a server: other packages name theirs the same way."""

MOST_BRANCHES, MOST_LINES = 12, 63
"""A function above this does two things: split it where its reasons to change divide."""

ROOT = Path(__file__).parent.parent / "optikit"
BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.match_case)
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Import:
    """One import of a module by another, and where it is written."""

    source: str
    target: str
    place: str

    @property
    def ends(self) -> tuple[str, str]:
        return package(self.source), package(self.target)

    def __str__(self) -> str:
        return f"{self.place}: {self.source} imports {self.target}"


@dataclass(frozen=True)
class Function:
    """A function's size: lines from `def` to its end, and branches plus one (each `and`, `or`, loop, `case` counts)."""

    place: str
    lines: int
    complexity: int


@dataclass(frozen=True)
class Tree:
    """Source files below a package's folder, by module name, parsed."""

    root: Path
    modules: Mapping[str, Path]
    parsed: Mapping[str, ast.Module]

    def place(self, module: str, line: int) -> str:
        return f"{self.modules[module].relative_to(self.root.parent)}:{line}"

    @cached_property
    def imports(self) -> list[Import]:
        """Return imports between modules of the tree, at any depth: in functions and for type checkers too."""
        found = [
            Import(module, target, self.place(module, node.lineno))
            for module, tree in self.parsed.items()
            for node in statements(tree)
            for target in self._targets(module, node)
            if target != module
        ]
        return list(dict.fromkeys(found))

    def _targets(self, module: str, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in self.modules)
        elif isinstance(node, ast.ImportFrom):
            base = self._base(module, node)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield from [name for name in (full, base) if name in self.modules][:1]

    def _base(self, module: str, node: ast.ImportFrom) -> str:
        """Return the absolute name of what stands between `from` and `import`."""
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        kept = len(parts) - node.level + (self.modules[module].name == "__init__.py")
        return ".".join([*parts[:kept], *([node.module] if node.module else [])])

    def functions(self) -> list[Function]:
        """Return the size of every function, those in functions and classes too."""
        return [
            Function(
                self.place(module, node.lineno), (node.end_lineno or node.lineno) - node.lineno + 1, branches(node)
            )
            for module, tree in self.parsed.items()
            for node in statements(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]


def read(root: Path) -> Tree:
    """Parse the Python files below `root`."""
    modules = {}
    for path in sorted(root.rglob("*.py")):
        name = ".".join(path.relative_to(root.parent).with_suffix("").parts)
        modules[name.removesuffix(".__init__")] = path
    return Tree(root, modules, {name: ast.parse(path.read_bytes()) for name, path in modules.items()})


def package(module: str) -> str:
    """Return the part of a module's name that the order knows: `report` of `optikit.report.html`."""
    return module.split(".")[1] if "." in module else ""


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield statements at any depth, without the expressions in them: an import is a statement."""
    for part in ("body", "orelse", "finalbody", "handlers", "cases"):
        for node in getattr(tree, part, ()):
            yield node
            yield from statements(node)


def branches(function: ast.AST) -> int:
    """Return the cyclomatic complexity of a function, without the functions inside it."""
    found, waiting = 1, list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        if isinstance(node, BRANCHES):
            found += 1
        elif isinstance(node, ast.BoolOp):
            found += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            found += 1 + len(node.ifs)
        if not isinstance(node, SCOPES):
            waiting += ast.iter_child_nodes(node)
    return found


def unknown(tree: Tree) -> list[str]:
    """Return packages and root modules that the order doesn't name."""
    return sorted({package(module) for module in tree.modules} - set(ORDER))


def upward(tree: Tree) -> list[str]:
    """Return imports that run up, with their places."""
    found = []
    for each in tree.imports:
        here, there = each.ends
        if {here, there} <= set(ORDER) and ORDER.index(there) < ORDER.index(here):
            found.append(f"{each}, but {there} stands above {here}")
    return found


def circles(tree: Tree) -> list[str]:
    """Return circles of imports between files, each once, with the places of their imports."""
    found = []
    needs: dict[str, dict[str, str]] = defaultdict(dict)
    for each in tree.imports:
        needs[each.source].setdefault(each.target, str(each))
    while True:
        try:
            TopologicalSorter(needs).prepare()
        except CycleError as error:
            circle = list(reversed(error.args[1]))
            found.append("\n  ".join(["circle:", *(needs[a][b] for a, b in pairwise(circle))]))
            del needs[circle[0]][circle[1]]
        else:
            return found


def repeated(tree: Tree) -> list[str]:
    """Return file names that occur in two packages without naming a method, an engine, a server or a verb."""
    places: dict[str, dict[str, str]] = defaultdict(dict)
    for module, path in tree.modules.items():
        if not path.name.startswith("__"):
            places[path.name].setdefault(package(module), str(path.relative_to(tree.root.parent)))
    return [
        f"{name} occurs more than once: {', '.join(found.values())}"
        for name, found in places.items()
        if len(found) > 1 and (name.startswith("_") or not found.keys() & set(SHARED_NAMES))
    ]


LAW = {"arrows up": upward, "circles": circles, "repeated file names": repeated, "packages out of the order": unknown}


def overview(tree: Tree) -> Iterator[str]:
    """Write what `python tests/test_layout.py` prints."""
    imports = [each for each in tree.imports if each.ends[0] != each.ends[1]]
    yield f"{'package':<14}{'files':>6}{'lines':>8}{'arrows':>8}"
    for name in ORDER:
        files = [path for module, path in tree.modules.items() if package(module) == name]
        lines = sum(len(path.read_bytes().splitlines()) for path in files)
        arrows = sum(each.ends[0] == name for each in imports)
        yield f"{name or '__init__':<14}{len(files):>6}{lines:>8}{arrows:>8}"
    broken = {words: rule(tree) for words, rule in LAW.items()}
    for problems in broken.values():
        yield from problems
    yield ", ".join(f"{len(problems)} {words}" for words, problems in broken.items())
    functions = tree.functions()
    lines = sorted(each.lines for each in functions)
    worst = max(functions, key=lambda each: each.complexity)
    middle, high = (lines[int(len(lines) * part)] for part in (0.5, 0.95))
    yield f"{len(lines)} functions: {middle} / {high} / {lines[-1]} lines (median / 95th percentile / longest)"
    yield f"largest complexity: {worst.complexity} ({worst.place})"


@pytest.fixture(scope="module")
def tree() -> Tree:
    return read(ROOT)


@pytest.mark.parametrize("rule", LAW.values(), ids=LAW)
def test_the_law_holds(rule, tree):
    problems = rule(tree)
    assert not problems, "\n" + "\n".join(problems)


def test_functions_are_small(tree):
    large = [each for each in tree.functions() if each.complexity > MOST_BRANCHES or each.lines > MOST_LINES]
    assert not large, "\n" + "\n".join(map(str, large))


def test_the_order_names_no_package_that_is_gone(tree):
    assert set(ORDER) - {package(module) for module in tree.modules} == set()


def test_the_tests_mirror_the_packages():
    here = Path(__file__).parent
    packages = {path.parent.relative_to(ROOT) for path in ROOT.glob("*/**/__init__.py")}
    tested = {place for path in here.glob("*/**/test_*.py") for place in path.relative_to(here).parents}
    assert packages - tested == set()


SMALL = {
    "__init__.py": "__version__ = '1'\n",
    "errors.py": "",
    "models/__init__.py": "",
    "models/facts.py": "from optikit import __version__\nfrom optikit.errors import ModelError\n",
    "formats/gptq.py": "import optikit.models.facts\n",
    "stages/quantize/gptq.py": "from optikit.formats import gptq\n",
    "plan/__init__.py": "",
    "plan/make.py": "from optikit.models.facts import ModelFacts\nfrom . import render\n",
    "plan/render.py": "",
}
"""A tree that keeps the law, as small as may be."""


@pytest.fixture
def plant(tmp_path):
    """Write the small tree with files changed or added, and read it."""

    def write(**changed: str) -> Tree:
        for name, source in (SMALL | {key.replace("__", "/") + ".py": text for key, text in changed.items()}).items():
            path = tmp_path / "optikit" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source, encoding="utf-8")
        return read(tmp_path / "optikit")

    return write


def test_a_tree_that_keeps_the_law_passes(plant):
    assert [rule(plant()) for rule in LAW.values()] == [[], [], [], []]


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("from optikit.plan.make import plan", 1),
        ("from optikit import plan", 1),
        ("import optikit.plan.make as make", 1),
        ("from ..plan import make", 1),
        ("def late():\n    from optikit.plan import make\n", 2),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from optikit.plan.make import Plan\n", 3),
    ],
)
def test_an_import_that_runs_up_is_found_where_it_stands(plant, source, line):
    (found,) = upward(plant(models__facts=source))
    assert found.startswith(f"optikit/models/facts.py:{line}: optikit.models.facts imports optikit.plan")
    assert found.endswith("plan stands above models")


def test_the_ground_imports_no_package(plant):
    (found,) = upward(plant(errors="from optikit.models import facts"))
    assert found.startswith("optikit/errors.py:1: ")


def test_a_circle_in_one_package_is_found_with_its_imports(plant):
    (found,) = circles(plant(plan__render="\ndef late():\n    from optikit.plan.make import Plan\n"))
    assert "optikit/plan/make.py:2: optikit.plan.make imports optikit.plan.render" in found
    assert "optikit/plan/render.py:3: optikit.plan.render imports optikit.plan.make" in found


def test_two_circles_are_two(plant):
    tree = plant(
        plan__render="import optikit.plan.make",
        models__first="import optikit.models.second",
        models__second="import optikit.models.third",
        models__third="import optikit.models.first",
    )
    assert [len(found.splitlines()) for found in sorted(circles(tree), key=len)] == [3, 4]


@pytest.mark.parametrize(("name", "found"), [("models__render", 1), ("deploy__render", 0), ("cli__render", 0)])
def test_a_name_used_in_two_packages_is_found_unless_it_is_a_method_a_server_or_a_verb(plant, name, found):
    problems = repeated(plant(**{name: ""}))
    assert len(problems) == found
    assert all("optikit/models/render.py, optikit/plan/render.py" in problem for problem in problems)


def test_a_private_name_is_no_method(plant):
    assert len(repeated(plant(stages___cost="", plan___cost=""))) == 1


def test_a_package_that_the_order_does_not_know_is_found(plant):
    assert unknown(plant(helpers__strings="")) == ["helpers"]


def test_functions_are_measured(plant):
    source = '''
def plain():
    """Do nothing."""

def busy(x):
    def inner():
        return 1 if x else 2
    for item in x:
        if item and x or inner:
            return [a for a in x if a]
    return None
'''
    sizes = {each.place: (each.lines, each.complexity) for each in plant(plan__render=source).functions()}
    assert list(sizes.values()) == [(2, 1), (7, 7), (2, 2)]


def test_the_overview_counts_what_breaks_the_law(plant):
    printed = "\n".join(overview(plant(models__facts="import optikit.plan.make", errors="def f(): ...")))
    assert "1 arrows up, 1 circles, 0 repeated file names, 0 packages out of the order" in printed


if __name__ == "__main__":
    print("\n".join(overview(read(ROOT))))
    sys.exit(any(rule(read(ROOT)) for rule in LAW.values()))
