"""The site: these pages by Sphinx, MyST and Furo. `make docs` builds it and takes every warning for an error."""

project = "Glidepath"
extensions = ["myst_parser"]
myst_heading_anchors = 3  # as far down as links go; slugs are GitHub's, so that links work in both
exclude_patterns = ["pictures/README.md"]
html_theme = "furo"
html_title = "Glidepath"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
html_show_search_summary = False  # which a browser refuses to pages that lie in a folder
highlight_language = "none"  # commands and what they print are neither Python nor a shell's script
