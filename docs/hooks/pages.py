"""MkDocs hook: pages that are made from the code when the site is built, so that they cannot go stale.

MkDocs calls the functions named ``on_...`` (https://www.mkdocs.org/dev-guide/plugins/#events). Nothing made here is
written into the repository. `python -m mkdocs build --strict` builds the site.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

from hooks import api, commands, methods, notebook  # noqa: E402


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the files of the site."""
    pages: dict[str, str | bytes] = {
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        "commands.md": commands.page(),
        **methods.pages(),
        **api.pages(),
        **notebook.pages(ROOT / "examples" / "notebook.ipynb", "tutorial"),
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    config.nav = [_filled(entry, sorted(pages)) for entry in config.nav or []]
    return files


def _filled(entry: Any, paths: list[str]) -> Any:
    """A navigation entry, with ``folder/`` replaced by the generated pages of that folder."""
    if isinstance(entry, dict):
        return {title: _filled(value, paths) for title, value in entry.items()}
    if isinstance(entry, list):
        return [_filled(value, paths) for value in entry]
    if isinstance(entry, str) and entry.endswith("/"):
        inside = [path for path in paths if path.startswith(entry) and path.endswith(".md")]
        first = (f"{entry}index.md", f"{entry}depth.md", f"{entry}phigrow.md")
        return sorted(inside, key=lambda path: (first.index(path) if path in first else len(first), path))
    return entry


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to files of the repository, which are not pages, lead to the repository."""
    repository = f"{config.repo_url}/blob/main/"
    if page.file.src_uri in ("contributing.md", "changelog.md"):  # these lie in the root of the repository
        markdown = re.sub(r"\]\(docs/", "](", markdown)
        return re.sub(r"\]\((?!https?:|#|[\w/-]+\.md)", f"]({repository}", markdown)
    return re.sub(r"\]\(\.\./(?!methods/)", f"]({repository}", markdown)


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> Navigation:
    """Refuse a page that the navigation does not show."""
    shown = {page.file.src_uri for page in nav.pages}
    hidden = [file.src_uri for file in files.documentation_pages() if file.src_uri not in shown]
    if hidden:
        raise SystemExit(f"pages that mkdocs.yml does not list under nav: {', '.join(hidden)}")
    return nav
