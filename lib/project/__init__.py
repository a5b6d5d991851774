"""What the Makefile calls: notebooks, runs, report, readme, verify, bench."""

import sys

# jsonschema, which nbformat imports, builds a grammar of internationalised addresses if it finds this package. That
# takes as long as all else that starts a figure, and no notebook's schema has such an address.
sys.modules.setdefault("rfc3987_syntax", None)
