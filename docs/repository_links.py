"""For mkdocs: files outside of docs/ that pages link to (`../examples/...`) join the site.

So a link works in the repository and on the site. What is linked must exist, or a strict build
fails.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\(\.\./([^)#\s]+)\)")
PLACE = "repository"


def on_files(files: Files, config: Any) -> Files:
    """Add what pages of the top level link to outside of docs/."""
    for page in list(files.documentation_pages()):
        for target in LINK.findall(Path(page.abs_src_path).read_text(encoding="utf-8")):
            path, name = ROOT / target, f"{PLACE}/{target}"
            if path.is_file() and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point the links there."""
    return LINK.sub(rf"]({PLACE}/\1)", markdown)
