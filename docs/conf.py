"""Settings of the documentation. `make docs` builds it into out/docs, without a network.

Equations are text, in pages and in docstrings alike. MathJax would load a script from another
server, and images of equations need LaTeX. Text can be copied and searched, and a reader's program
can say it aloud.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_extensions")]

project = "influence"
author = "the authors of influence"
project_copyright = ""

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "plain_docstrings",
    "present_files",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
nitpicky = True
# Names of other projects cannot be looked up without a network, and types of attributes may be ours
# without being public. All links that a page or a docstring makes are of the kind py:obj.
nitpick_ignore_regex = [(r"py:(?!obj\b).*", ".*"), ("py:obj", r"(?!influence\b).*")]

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4

autodoc_typehints = "none"  # the docstrings give shapes and units, which types do not
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_use_ivar = True
napoleon_attr_annotations = False
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "influence"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True
