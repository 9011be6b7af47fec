"""The scripts repeat each other on purpose; these tests keep the copies from drifting apart."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.name for path in ROOT.glob("main_*.py"))
BANNER = re.compile(r"^# -{118}\n# (\d)\. (.+)\n# -{118}$", re.MULTILINE)


def source(script):
    return (ROOT / script).read_text()


def sections(script):
    """{number: code} of the script's sections."""
    text = source(script)
    starts = [(int(match[1]), match.end()) for match in BANNER.finditer(text)]
    ends = [match.start() for match in BANNER.finditer(text)][1:] + [len(text)]
    return {number: text[start:end] for (number, start), end in zip(starts, ends)}


def flags(script):
    return re.findall(r'add_argument\("--(\w+)"', source(script))


def test_there_are_scripts_to_compare():
    assert {"main_pmnist.py", "main_cifar100.py", "main_cifar100_superclass.py", "main_five_datasets.py"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_banners(script):
    titles = [match.groups() for match in BANNER.finditer(source(script))]
    assert titles == [("1", "Imports"), ("2", "Configuration"), ("3", "Network"), ("4", "Gradient projection memory"),
                      ("5", "Training and evaluation"), ("6", "Results and checkpoints"), ("7", "Main")]


@pytest.mark.parametrize("number", [4, 5, 6, 7])
@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "main_cifar100.py"])
def test_common_sections_are_equal_function_by_function(script, number):
    base, copy = ([ast.dump(node) for node in ast.parse(sections(name)[number]).body] for name in ("main_cifar100.py", script))
    assert len(base) >= 1
    assert copy == base


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "main_cifar100.py"])
def test_common_sections_are_equal_in_their_comments_too(script):
    assert [sections(script)[n] for n in (4, 5, 6, 7)] == [sections("main_cifar100.py")[n] for n in (4, 5, 6, 7)]


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "main_cifar100.py"])
def test_functions_of_the_configuration_are_equal(script):
    def functions(name):
        return {node.name: ast.dump(node) for node in ast.parse(sections(name)[2]).body if isinstance(node, ast.FunctionDef)}

    base, copy = functions("main_cifar100.py"), functions(script)
    assert base.keys() == copy.keys() == {"parse_args", "fail", "check_args"}
    assert all(copy[name] == base[name] for name in ("fail", "check_args"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_agree(script):
    own = {"main_pmnist.py": ["n_hidden"], "main_cifar100_superclass.py": ["t_order", "official_data"],
           "main_five_datasets.py": ["official_data"]}.get(script, [])
    common = flags("main_cifar100.py")
    assert [flag for flag in flags(script) if flag not in own] == common
    assert set(own) <= set(flags(script))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script):
    used = {node.attr for node in ast.walk(ast.parse(source(script)))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"}
    assert set(flags(script)) <= used


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "main_cifar100.py"])
def test_docstrings_list_the_changes(script):
    assert "Changes relative to main_cifar100.py:" in ast.get_docstring(ast.parse(source(script)))


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_share_nothing_but_the_loaders(script):
    imported = {node.module for node in ast.walk(ast.parse(source(script))) if isinstance(node, ast.ImportFrom)}
    assert imported == {"pathlib", "matplotlib.figure", "tqdm", "dataloader", "dataloader.raw"}
