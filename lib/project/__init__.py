"""The Makefile's commands: notebooks, runs, report, readme, verify, bench."""

import sys

# nbformat imports jsonschema, which builds a grammar of internationalised addresses if it finds this package. That
# takes as long as the rest of a figure's start, and no notebook's schema has such an address.
sys.modules.setdefault("rfc3987_syntax", None)
