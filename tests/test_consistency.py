"""The scripts repeat each other on purpose. These tests keep the copies from drifting apart."""

import ast
import difflib
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from bench import load_script

ROOT = Path(__file__).parents[1]
MODEL = "main_cifar100.py"  # the script that the others are compared with


class Variant(NamedTuple):
    """What a script may have of its own; in all else it equals the script it is compared with."""

    loader: str
    compared_with: str = MODEL
    sections: tuple = ()  # that differ as a whole
    flags: tuple = ()  # in section 2
    functions: tuple = ()  # in other sections; its docstring must name them


# Another method is added in one line, for example one with its own section 3:
#   "main_cifar100_sgp.py": Variant("cifar100", sections=(3,)),
VARIANTS = {
    "main_cifar100.py": Variant("cifar100"),
    "main_cifar100_superclass.py": Variant(
        "cifar100_superclass", sections=(2, 4), flags=("t_order", "official_data")
    ),
    "main_five_datasets.py": Variant("five_datasets", sections=(2, 4), flags=("official_data",)),
    "main_pmnist.py": Variant(
        "pmnist",
        sections=(2, 4),
        flags=("n_hidden",),
        functions=("projected_images", "sgd_step", "train_epoch", "train_task"),
    ),
}
TITLES = [
    "Imports",
    "Configuration",
    "Gradient projection memory",
    "Network",
    "Training and evaluation",
    "Main",
    "Runs: results and checkpoints",
    "Flags: types and checks",
]
BANNER = r"(?m)^# \d\. .+ -+$"
PUBLISHED = [name for name, variant in VARIANTS.items() if name == f"main_{variant.loader}.py"]

each_script = pytest.mark.parametrize("name", VARIANTS)
each_published_script = pytest.mark.parametrize("name", PUBLISHED)


def source(name):
    """The text of a file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def sections(code):
    """{number: code} of a script's sections; 0 is the docstring."""
    return dict(enumerate(re.split(BANNER, code)))


def definitions(code):
    """The functions and classes of some code, {name: node}."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: node for node in ast.parse(code).body if isinstance(node, kinds)}


def without(code, names):
    """The code without the functions of these names, as lines that are not empty."""
    lines = code.splitlines()
    for name, node in definitions(code).items():
        if name in names:
            first = min([node.lineno, *(mark.lineno for mark in node.decorator_list)])
            for number in range(first - 1, node.end_lineno):
                lines[number] = ""
    return [line for line in lines if line]


def flags_of(code):
    """{flag: its definition, without default and help} in section 2."""
    flags = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "add":
            node.keywords = [word for word in node.keywords if word.arg not in ("default", "help")]
            flags[node.args[0].value.removeprefix("--")] = ast.unparse(node)
    return flags


def differences(own, base, variant):
    """What differs between two scripts' code though the variant does not say so, as lines."""
    own, base = sections(own), sections(base)
    loaders = r"from dataloader import \w+ as benchmark"
    own[1] = re.sub(loaders, "", own[1])
    base[1] = re.sub(loaders, "", base[1])
    found = []
    for number in range(1, len(TITLES) + 1):
        if number not in variant.sections:
            mine = without(own[number], variant.functions)
            theirs = without(base[number], variant.functions)
            changes = difflib.ndiff(theirs, mine)
            found += [line for line in changes if line[0] in "+-"]
        elif number == 2:
            found += differences_of_configuration(own[2], base[2], variant)
    listed = own[0].partition("Changes relative to")[2]
    names = [*variant.functions, *(f"--{flag}" for flag in variant.flags)]
    found += [f"{name} is not in the docstring" for name in names if name not in listed]
    return found


def differences_of_configuration(own, base, variant):
    """Flags and functions that differ, where defaults, help and constants may."""
    own_flags = {flag: text for flag, text in flags_of(own).items() if flag not in variant.flags}
    mine = [*own_flags.values(), *constants(own), *functions_as_text(own)]
    theirs = [*flags_of(base).values(), *constants(base), *functions_as_text(base)]
    return [line for line in difflib.ndiff(theirs, mine) if line[0] in "+-"]


def constants(code):
    """The names that some code assigns to outside of functions."""
    nodes = [node for node in ast.parse(code).body if isinstance(node, ast.Assign)]
    return [ast.unparse(node.targets[0]) for node in nodes]


def functions_as_text(code):
    """The functions but parse_args, whose flags are compared one by one."""
    return [ast.unparse(node) for name, node in definitions(code).items() if name != "parse_args"]


# The scripts as they are --------------------------------------------------------------------------
def test_each_script_is_listed():
    """A script that is missing here is added to VARIANTS in one line."""
    assert sorted(path.name for path in ROOT.glob("main_*.py")) == sorted(VARIANTS)


@each_script
def test_sections_and_their_titles(name):
    banners = [banner.rstrip(" -") for banner in re.findall(BANNER, source(name))]
    assert banners == [f"# {number}. {title}" for number, title in enumerate(TITLES, 1)]


@each_script
def test_what_is_not_declared_is_equal(name):
    variant = VARIANTS[name]
    assert differences(source(name), source(variant.compared_with), variant) == []


@each_script
def test_declared_functions_differ(name):
    """Else the declaration is out of date."""
    variant = VARIANTS[name]
    own = definitions(source(name))
    base = definitions(source(variant.compared_with))
    for function in variant.functions:
        text = ast.dump(own[function])
        assert function not in base or ast.dump(base[function]) != text, function


@each_script
def test_a_docstring_lists_what_differs(name):
    docstring = ast.get_docstring(ast.parse(source(name)))
    if name != MODEL:
        assert f"Changes relative to {VARIANTS[name].compared_with}:" in docstring
    assert f"    python {name}" in docstring
    assert f"models/{name[5:-3]}/<run name>/results.json" in docstring


@each_script
def test_docstrings_are_present(name):
    tree = ast.parse(source(name))
    assert ast.get_docstring(tree)
    nodes = definitions(source(name))
    assert [function for function, node in nodes.items() if not ast.get_docstring(node)] == []


@each_script
def test_each_flag_is_read(name):
    """Reading a flag in order to check it, or to name the run after it, is not enough."""
    parts = sections(source(name))
    thresholds = ast.unparse(definitions(parts[2])["thresholds"])
    loader = source(f"dataloader/{VARIANTS[name].loader}.py")
    code = "\n".join([thresholds, *(parts[number] for number in (3, 4, 5, 6, 7)), loader])
    read = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "args":
            read.add(node.attr)
    assert read - {"changed"} == set(flags_of(parts[2]))


@each_script
def test_scripts_share_nothing_but_the_loaders(name):
    imported = []
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported.append(node.module)
            if node.module == "dataloader":
                (alias,) = node.names
                assert (alias.name, alias.asname) == (VARIANTS[name].loader, "benchmark")
    packages = {module.split(".")[0] for module in imported} - sys.stdlib_module_names
    assert packages == {"dataloader", "filelock", "numpy", "scipy", "torch", "tqdm"}


# The published protocol ---------------------------------------------------------------------------
@pytest.fixture(scope="module")
def report():
    """models/report.py, where the published protocol stands."""
    return load_script(ROOT / "models" / "report.py")


def values(report, flags):
    """Flags whose values are the same for all layers, in a simple form."""
    return {flag: report.simple_form(value) for flag, value in flags.items()}


@each_published_script
def test_defaults_are_the_published_protocol(name, report):
    script = load_script(ROOT / name)
    args = vars(script.parse_args(["--device", "cpu"]))
    places = (*script.WHERE, "changed")
    defaults = {flag: value for flag, value in args.items() if flag not in places}
    published = report.PUBLISHED[VARIANTS[name].loader]
    assert values(report, defaults) == values(report, published)
    assert published["n_tasks"] == script.N_TASKS
    assert set(script.VARIANT) == set(report.CHOICES) & set(published)


@each_published_script
def test_widths_are_the_published_ones(name, report):
    script = load_script(ROOT / name)
    model = script.build_model(script.parse_args(["--device", "cpu"]))
    widths = [len(layer.M) for layer in script.projected_layers(model).values()]
    assert widths == report.WIDTHS[VARIANTS[name].loader]


@each_published_script
def test_the_papers_numbers_are_those_of_the_report(name, report):
    script = load_script(ROOT / name)
    rows = [row for row in report.ROWS if row.benchmark == VARIANTS[name].loader]
    ACC, BWT = next(row.paper for row in rows if row.paper != "-").split(" / ")
    assert re.match(r"[\d.]+( ± [\d.]+)?", script.PAPER["ACC"])[0] == ACC
    assert script.PAPER["BWT"].removesuffix(" ± 0") == BWT


# The comparison itself ----------------------------------------------------------------------------
SGP = Variant("cifar100", sections=(3,))


def with_change(old, new):
    """A made-up main_cifar100_sgp.py: it scales the projection and has another change as well."""
    code = source(MODEL)
    for before, after in ("return G - G @ M @ M.T", "return G - 0.9 * G @ M @ M.T"), (old, new):
        assert before in code
        code = code.replace(before, after)
    return code


def test_a_variant_with_its_own_method_is_equal_in_all_else():
    assert differences(with_change("", ""), source(MODEL), SGP) == []
    assert differences(with_change("", ""), source(MODEL), Variant("cifar100")) != []


@pytest.mark.parametrize(
    "old, new",
    [
        ("import math\n", "import math\nimport random\n"),  # section 1
        ("default=0.01", "default=0.02"),  # 2
        ("ProjectedLinear(1024, 2048)", "ProjectedLinear(1024, 1024)"),  # 4
        ("progress.waited += 1", "progress.waited += 2"),  # 5
        ("# no .item()", "# not .item()"),  # 5, a comment
        ("if t > 0:", "if t > 1:"),  # 6
        ("SAVE_SECONDS:\n", "SAVE_SECONDS / 2:\n"),  # 7
        ('"""{task: digest of its', '"""{task: the digest of its'),  # 7, a docstring
        ("len(name) <= 120", "len(name) <= 200"),  # 8
    ],
)
def test_an_undeclared_difference_is_found(old, new):
    found = differences(with_change(old, new), source(MODEL), SGP)
    assert len([line for line in found if line.startswith("+ ")]) == 1, found


@pytest.mark.parametrize(
    "old, new",
    [
        ("number(float, 1e-9), default=0.01", "number(float, 0), default=0.01"),
        ('add("--momentum"', 'add("--nesterov", action="store_true")\n    add("--momentum"'),
        ("eps + task * args", "eps - task * args"),
        ("SAVE_SECONDS = 30", "SAVES = 30"),
    ],
)
def test_in_a_configuration_of_its_own_only_defaults_may_differ(old, new):
    variant = Variant("cifar100", sections=(2, 3))
    assert differences(with_change("default=0.01", "default=0.1"), source(MODEL), variant) == []
    assert differences(with_change(old, new), source(MODEL), variant) != []


def test_a_declared_difference_must_be_in_the_docstring():
    variant = SGP._replace(functions=("train_task",), flags=("alpha",))
    found = differences(with_change("progress.waited += 1", "pass"), source(MODEL), variant)
    assert found == ["train_task is not in the docstring", "--alpha is not in the docstring"]
