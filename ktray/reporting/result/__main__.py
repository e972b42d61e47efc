"""Print the JSON Schema: ``python -m ktray.reporting.result > docs/result.schema.json``."""

import sys

from ktray.reporting.result.schema import text

sys.stdout.write(text())
