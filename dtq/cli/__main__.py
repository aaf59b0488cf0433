# SPDX-License-Identifier: Apache-2.0
"""``python -m dtq.cli``."""

from dtq.cli import main

if __name__ == "__main__":
    main()
