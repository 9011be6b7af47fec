"""The scripts repeat each other on purpose; these tests keep the copies from drifting apart, and from growing."""
import ast
import difflib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.name for path in ROOT.glob("main_*.py"))
OTHERS = [script for script in SCRIPTS if script != "main_cifar100.py"]
OWN_FLAGS = {"main_pmnist.py": ["n_hidden"], "main_cifar100_superclass.py": ["t_order", "official_data"],
             "main_five_datasets.py": ["official_data"]}
TITLES = ["Imports", "Configuration", "Network", "Gradient projection memory", "Training and evaluation",
          "Results and checkpoints", "Main"]


def source(script):
    return (ROOT / script).read_text()


def sections(script):
    """{number: code} of the script's sections; 0 is the docstring."""
    return dict(enumerate(re.split(r"(?m)^# \d\. .* -+$", source(script))))


@pytest.mark.parametrize("script", SCRIPTS)
def test_banners_and_weight(script):
    assert re.findall(r"(?m)^# (\d)\. (.+?) -+$", source(script)) == [(str(i), title) for i, title in enumerate(TITLES, 1)]
    tree = ast.parse(source(script))
    lines = source(script).splitlines()
    assert len(lines) <= 480 and max(map(len, lines)) <= 128
    assert sum(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in tree.body) <= 32
    assert all(ast.get_docstring(node) for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)))
    assert sum(len(source(script).splitlines()) for script in SCRIPTS) <= 1848  # shorter than the released ones


@pytest.mark.parametrize("script", OTHERS)
def test_common_sections_are_equal(script):
    """Comments too; but for what main_pmnist.py lists."""
    own, base = sections(script), sections("main_cifar100.py")
    assert [own[n] for n in (6, 7)] == [base[n] for n in (6, 7)]
    changed = [line for n in (4, 5) for line in difflib.ndiff(base[n].splitlines(), own[n].splitlines()) if line[0] in "-+"]
    assert len(changed) <= (30 if script == "main_pmnist.py" else 0)
    named = {node.name for n in (4, 5) for node in ast.parse(own[n]).body if hasattr(node, "name")
             and ast.dump(node) not in {ast.dump(other) for other in ast.parse(base[n]).body}}
    assert all(name in own[0] for name in named)


@pytest.mark.parametrize("script", OTHERS)
def test_imports_and_functions_of_the_configuration_are_equal(script):
    own, base = sections(script), sections("main_cifar100.py")
    assert own[1].replace(f"from dataloader import {script[5:-3]} as", "from dataloader import cifar100 as") == base[1]
    own, base = ({f.name: ast.dump(f) for f in ast.parse(code[2]).body if hasattr(f, "name")} for code in (own, base))
    assert own.keys() == base.keys() and all(own[name] == base[name] for name in base if name != "parse_args")


def arguments(script):
    """{flag: its add_argument call, without its default and help text}."""
    calls = [node for node in ast.walk(ast.parse(sections(script)[2])) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"]
    for call in calls:
        call.keywords = [keyword for keyword in call.keywords if keyword.arg not in ("default", "help")]
    return {call.args[0].value.removeprefix("--"): ast.unparse(call) for call in sorted(calls, key=lambda call: call.lineno)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_agree_and_each_is_read(script):
    """Reading a flag in order to check it, or to name the run after it, is not enough."""
    own, common, flags = OWN_FLAGS.get(script, []), arguments("main_cifar100.py"), arguments(script)
    assert len(common) == 18
    assert list({flag: call for flag, call in flags.items() if flag not in own}.items()) == list(common.items())
    code = "\n".join([*(sections(script)[n] for n in (3, 4, 5, 6, 7)), source(f"dataloader/{script.removeprefix('main_')}")])
    used = {node.attr for node in ast.walk(ast.parse(code))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"}
    assert used - {"changed"} == set(flags)


@pytest.mark.parametrize("script", OTHERS)
def test_scripts_list_what_differs_and_share_nothing_but_the_loaders(script):
    listed = sections(script)[0].split("Changes relative to main_cifar100.py:")[1]
    assert all(f"--{flag}" in listed for flag in OWN_FLAGS.get(script, []))
    imported = {node.module for node in ast.walk(ast.parse(source(script))) if isinstance(node, ast.ImportFrom)}
    assert imported == {"pathlib", "tqdm", "dataloader", "dataloader.raw", "scipy.linalg"}
