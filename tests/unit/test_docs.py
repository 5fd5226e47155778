"""docs/architecture.md stays true: one line for every file, none for a file that is gone."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = (
    "services/gateway", "services/attention", "services/experts", "services/scheduler",
    "services/scheduler/actuators", "shared", "shared/transport",
    "shared/models", "shared/models/families", "shared/kernels", "shared/scheduling", "shared/placement",
    "shared/planning", "shared/elastic", "shared/predictors", "shared/replay", "shared/simulation", "shared/traces",
    "shared/cli", "bench",
)  # fmt: skip


def listed() -> dict[str, list[str]]:
    """Folder -> file names in its table."""
    tables: dict[str, list[str]] = {}
    names: list[str] = []
    for line in (ROOT / "docs" / "architecture.md").read_text().splitlines():
        if title := re.match(r"\*\*([a-z/]+)[:*]", line):
            tables[title[1]] = names = []
        elif entry := re.match(r"\| `(\w+\.py)` \|", line):
            names.append(entry[1])
    return tables


def test_every_file_has_exactly_one_line_on_the_architecture_page() -> None:
    tables = listed()
    for folder in FOLDERS:
        files = sorted(p.name for p in (ROOT / folder).glob("*.py") if p.name != "__init__.py")
        assert tables[folder] == files, folder


def test_services_import_shared_and_never_each_other() -> None:
    for path in ROOT.glob("services/*/*.py"):
        for other in re.findall(r"^\s*(?:from|import) services\.(\w+)", path.read_text(), re.M):
            assert other == path.parent.name, f"{path} imports services.{other}"
    for path in ROOT.glob("shared/**/*.py"):
        assert not re.search(r"^\s*(?:from|import) services", path.read_text(), re.M), path


def test_no_page_has_a_section_twice() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        sections = re.findall(r"^## .*", page.read_text(), re.M)
        assert len(sections) == len(set(sections)), page
