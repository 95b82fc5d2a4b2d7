"""What importing pgen does, and what its modules may import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pgen

ROOT = Path(pgen.__file__).parent

# A row may import from the rows above it, never from below (design of the house).
ROWS = [
    {"contracts", "files", "machine"},
    {"enumeration"},
    {"programs"},
    {"data"},
    {"nn"},
    {"distributions"},
    {"guides"},
    {"samplers"},
    {"objectives"},
    {"training"},
    {"evaluation"},
    {"plots"},
    {"diagnostics"},
    {"ladder"},
    {"base"},
    {"multistart"},
    {"models"},
    {"runs"},
    {"cli"},
    {"__main__"},
]
RANK = {name: i for i, row in enumerate(ROWS) for name in row}

HEAVY = ["matplotlib", "arviz", "arviz_base", "arviz_stats", "sklearn", "pandas", "zuko", "scipy.stats", "typer", "rich",
         "pyarrow", "xarray", "tensorboard"]  # fmt: skip


def run(code, **environment):
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**_environment(), **environment})
    assert out.returncode == 0, out.stderr
    return out.stdout.strip()


def _environment():
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT.parent), "OMP_NUM_THREADS": "1"}


def test_importing_pgen_changes_nothing_of_torch_or_pyro():
    code = """
import random, numpy as np, torch, pyro
torch.manual_seed(3), random.seed(3), np.random.seed(3)
def state():
    return (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2],
            torch.get_default_dtype(), torch.distributions.Distribution._validate_args, torch.get_num_threads(),
            pyro.settings.get(), list(pyro.get_param_store().keys()), torch.is_grad_enabled())
before = state()
import pgen
assert state() == before
torch.distributions.Distribution.set_default_validate_args(False)
pgen.Pair(lambda y: pyro.sample("z", pyro.distributions.Normal(0.0, 1.0)), "flow").fit(torch.zeros(3), steps=1, progress=False)
assert torch.distributions.Distribution._validate_args is False
torch.distributions.Distribution.set_default_validate_args(True)
pgen.plots
assert torch.distributions.Distribution._validate_args is True
print("unchanged")
"""
    assert run(code).endswith("unchanged")


def test_importing_pgen_brings_nothing_heavy():
    code = f"import sys, pgen; print([m for m in {HEAVY} if m in sys.modules])"
    # What Pyro itself brings is not ours to judge.
    brought = run(f"import sys, torch, pyro; print([m for m in {HEAVY} if m in sys.modules])")
    assert run(code) == brought == "[]"


def _imports(path):
    """Modules of ours that a file imports at its top level, as first names below ``pgen``; those in functions too."""
    package = path.relative_to(ROOT).parts[:-1]
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("pgen")):
            if node.level:
                base = package[: len(package) - node.level + 1]
                full = (*base, *(node.module.split(".") if node.module else ()))
            else:
                full = tuple(node.module.split("."))[1:]
            yield from ({full[0]} if full else {alias.name for alias in node.names})
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("pgen."))


def _own(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_imports_point_one_way(path):
    own = _own(path)
    assert own in RANK, f"{own} has no place in the order of imports; give it a row in ROWS"
    allowed = {name for name, rank in RANK.items() if rank < RANK[own]} | {own, "__version__"}
    below = {name for name in _imports(path) if name not in allowed}
    # The contract of models may ask diagnostics at use; diagnostics may not ask it.
    assert not below, f"{path.relative_to(ROOT)} imports {sorted(below)}"


def test_the_order_of_imports_is_seen_at_all():
    seen = {name for path in FILES for name in _imports(path)}
    assert {"contracts", "programs", "training", "data"} <= seen


def test_every_module_lists_its_public_names():
    for path in FILES:
        names = {t.id for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)
                 for t in node.targets if isinstance(t, ast.Name)}  # fmt: skip
        assert "__all__" in names or path.name == "__main__.py", path


def test_nothing_on_a_loading_path_executes_what_it_reads():
    forbidden = {"eval", "exec", "compile", "__import__"}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in forbidden, f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                called = f"{node.func.value.id}.{node.func.attr}"
                assert called not in {"torch.load", "pickle.load", "pickle.loads"}, f"{path}:{node.lineno}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "marshal", "shelve", "joblib", "dill", "cloudpickle"}, f"{path}:{node.lineno}"
