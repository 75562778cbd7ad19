"""Names of GGUF files, for those who list files without reading them: nothing here needs numpy."""

from __future__ import annotations

import re

SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
COMPANIONS = ("mmproj", "mtp-", "imatrix")  # files that sit beside a model without being one
