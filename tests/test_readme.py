"""README says where everything is."""

import subprocess

from tests.conftest import ROOT


def test_what_is_where_lists_every_product_file():
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [name for name in listed.stdout.split() if not name.startswith("tests/")]
    section = (ROOT / "README.md").read_text().partition("## What is where")[2]
    names = {name: name.rpartition("/")[2] for name in files if not name.endswith("__init__.py")}
    assert len(names) > 25
    assert [
        name for name, file in names.items() if f"`{name}`" not in section and f"`{file}`" not in section
    ] == []


def test_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    headings = {line[3:].lower() for line in text.splitlines() if line.startswith("## ")}
    anchors = {"".join(c for c in h.replace(" ", "-") if c.isalnum() or c == "-") for h in headings}
    links = {part.partition(")")[0] for part in text.split("](#")[1:]}
    assert len(links) > 8 and links <= anchors, links - anchors
