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
    assert base.keys() == copy.keys() == {"parse_args", "fail", "flag_words", "changed_flags", "check_args"}
    assert all(copy[name] == base[name] for name in base if name != "parse_args")


def arguments(script):
    """{flag: its add_argument call, without the default and the help text}."""
    calls = [node for node in ast.walk(ast.parse(sections(script)[2])) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"]
    for call in calls:
        call.keywords = [keyword for keyword in call.keywords if keyword.arg not in ("default", "help")]
    return {call.args[0].value.removeprefix("--"): ast.unparse(call) for call in sorted(calls, key=lambda call: call.lineno)}


OWN_FLAGS = {"main_pmnist.py": ["n_hidden"], "main_cifar100_superclass.py": ["t_order", "official_data"],
             "main_five_datasets.py": ["official_data"]}


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_agree(script):
    own, common = OWN_FLAGS.get(script, []), arguments("main_cifar100.py")
    assert len(common) == 20
    flags = arguments(script)
    assert list({flag: call for flag, call in flags.items() if flag not in own}.items()) == list(common.items())
    assert set(own) <= set(flags)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script):
    """Reading a flag in order to check it, or to name the run after it, is not enough."""
    loader = ROOT / "dataloader" / f"{script.removeprefix('main_')}"
    code = "\n".join([*(sections(script)[number] for number in (3, 4, 5, 6, 7)), loader.read_text()])
    used = {node.attr for node in ast.walk(ast.parse(code))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"}
    assert set(arguments(script)) == used


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "main_cifar100.py"])
def test_scripts_differ_only_in_what_their_docstrings_list(script):
    """The network (section 3), own flags, defaults, help texts and the name of a run; nothing else, that is."""
    assert "Changes relative to main_cifar100.py:" in ast.get_docstring(ast.parse(source(script)))
    listed = ast.get_docstring(ast.parse(source(script))).split("Changes relative to main_cifar100.py:")[1].split("\n\n")[0]
    assert all(f"--{flag}" in listed for flag in OWN_FLAGS.get(script, []))

    own, base = (sections(name)[1].replace(f"from dataloader import {name[5:-3]} as", "from dataloader import X as")
                 for name in (script, "main_cifar100.py"))
    assert own == base

    def statements(name):
        """What parse_args does after the flags are defined, but for the run's name and what own flags need."""
        body = next(node for node in ast.parse(sections(name)[2]).body if getattr(node, "name", "") == "parse_args").body
        code = [ast.unparse(node) for node in body if "add_argument" not in ast.unparse(node)]
        return [line for line in code if not line.startswith(("if ", "n_samples = "))]

    ours, theirs = statements(script), statements("main_cifar100.py")
    assert len(theirs) == 7
    assert [line for line in ours if not line.startswith("parser = ")] == [line for line in theirs if not line.startswith("parser = ")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_share_nothing_but_the_loaders(script):
    imported = {node.module for node in ast.walk(ast.parse(source(script))) if isinstance(node, ast.ImportFrom)}
    assert imported == {"pathlib", "matplotlib.figure", "tqdm", "dataloader", "dataloader.raw"}
