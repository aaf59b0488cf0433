# SPDX-License-Identifier: Apache-2.0
"""``python -m dtq``, which ``torchrun -m dtq`` needs."""

from dtq.cli import main

if __name__ == "__main__":
    main(prog_name="dtq")
