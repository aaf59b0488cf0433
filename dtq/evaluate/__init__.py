# SPDX-License-Identifier: Apache-2.0
"""Compare a candidate with its float model on the same prompts and seeds.

The public modules are ``evaluate`` (``dtq eval``), ``gate`` (``dtq gate``), ``metrics``, ``report``
(the HTML page), ``run_file`` (``eval.json``), ``baselines`` (other libraries) and ``vbench``. They
are imported when they are needed, because metrics load large packages.
"""
