"""The site's settings for Sphinx. `build.py` gathers the pages and calls it."""

import accessible
import docstrings

import peftlab

project = "peftlab"
author = "The peftlab authors"
copyright = "The peftlab authors, Apache 2.0"
version = release = peftlab.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
exclude_patterns = ["parts"]
templates_path = ["templates"]

# The lessons are shown as they are stored.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80

html_theme = "sphinx_book_theme"
html_title = "peftlab"
html_static_path = ["static"]
html_favicon = "static/mark.svg"
html_css_files = ["site.css"]
html_js_files = [("figures.js", {"defer": "defer"}), ("panels/panels.js", {"defer": "defer"})]
html_show_sourcelink = False
html_copy_source = False
html_context = {"default_mode": "light"}  # the figures are drawn for white paper
html_theme_options = {
    "repository_url": peftlab.REPOSITORY,
    "use_repository_button": True,
    "use_download_button": False,
    "show_toc_level": 2,
    "navbar_persistent": [],
}
mathjax_path = "tex-svg-full.js"


def setup(app):
    app.connect("autodoc-process-docstring", docstrings.process)
    app.connect("html-page-context", accessible.on_page, priority=900)
    app.set_translator("html", accessible.Translator)
