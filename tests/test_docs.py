"""The pages: links, file names, options and length."""

import re
import shlex
import subprocess

import pytest

from tests.conftest import ROOT

PAGES = [path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/*.md"))]
TRACKED = set(
    subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
)


def text_of(page):
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors_of(page):
    """Return the anchors that GitHub generates for a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_pages_are_tracked():
    assert {"README.md", "RECIPES.md", "models/README.md", "tests/README.md"} <= set(PAGES) <= TRACKED


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        path = file.resolve().relative_to(ROOT.resolve()).as_posix()
        assert path in TRACKED or any(each.startswith(f"{path}/") for each in TRACKED), target
        assert not anchor or anchor in anchors_of(path), target


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    named = re.findall(r"`((?:models|tests|data|checkpoints)/[\w./-]+\.\w+)`", text_of(page))
    assert set(named) - TRACKED <= {"checkpoints/resnet8.pt", "checkpoints/resnet8.json"}


def test_models_readme_names_every_product_file():
    section = (ROOT / "models/README.md").read_text()
    files = [name for name in TRACKED if re.fullmatch(r"models/.*\.py", name) and "__init__" not in name]
    assert len(files) > 20
    assert [name for name in files if f"`{name.rpartition('/')[2]}`" not in section] == []


def test_readme_length_and_start():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    start = "\n".join(lines[:60])
    for found in (
        "make ",
        "convert.py model.h5",
        "evaluate.py model.pt",
        "89.39 %",
        "](checkpoints/report.png)",
    ):
        assert found in start


def test_options_in_pages_exist():
    for script in ("convert.py", "evaluate.py"):
        known = set(re.findall(r"\"(--[a-z-]+)\"", (ROOT / script).read_text()))
        known |= set(re.findall(r"\"(--[a-z-]+)\"", (ROOT / "models/common/cli.py").read_text()))
        for page in PAGES:
            for call in re.findall(rf"{re.escape(script)} ([^\n`|]*)", (ROOT / page).read_text()):
                options = re.findall(r"(?<!\S)(--[a-z-]+)", call.partition("#")[0])
                assert set(options) <= known, (page, call)


@pytest.mark.parametrize(
    ("model", "options", "commands"),
    [
        ("", "", [["convert.py"], ["evaluate.py"]]),
        ("a/my.h5", "", [["convert.py", "a/my.h5", "-o", "a/my.pt"], ["evaluate.py", "a/my.pt"]]),
        (
            "b.keras",
            "--std 2",
            [["convert.py", "b.keras", "-o", "b.pt", "--std", "2"], ["evaluate.py", "b.pt"]],
        ),
        ("a b.h5", "", [["convert.py", "a b.h5", "-o", "a b.pt"], ["evaluate.py", "a b.pt"]]),
    ],
)
def test_make_converts_and_evaluates_a_model(model, options, commands):
    arguments = ["make", "-n", f"MODEL={model}", f"ARGS={options}"]
    shown = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    scripts = [line.partition("python ")[2] for line in shown.stdout.splitlines() if ".py" in line]
    assert [shlex.split(line) for line in scripts][-2:] == commands
