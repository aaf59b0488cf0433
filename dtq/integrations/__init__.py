# SPDX-License-Identifier: Apache-2.0
"""Everything that patches another library: diffusers, PEFT, torch.compile."""
