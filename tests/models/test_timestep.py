# SPDX-License-Identifier: Apache-2.0
"""The timestep of a call is found by the name of its argument, and is that of every sample."""

from __future__ import annotations

import pytest
import torch

from dtq.errors import InputError
from dtq.models.timestep import timestep_argument, timestep_of


class Model(torch.nn.Module):
    def forward(self, hidden_states, timestep=None):
        return hidden_states


@pytest.mark.parametrize(
    ("args", "kwargs", "want"),
    [
        ((1, 7), {}, 7),
        ((1,), {"timestep": 7}, 7),
        ((), {"hidden_states": 1, "timestep": torch.tensor([7.0, 7.0])}, 7),
        ((1,), {}, None),
        ((), {"timestep": None}, None),
    ],
)
def test_the_timestep_is_found_by_name_and_by_position(args, kwargs, want):
    model = Model()
    got = timestep_argument(model, args, kwargs)
    assert got is None if want is None else (torch.as_tensor(got) == want).all()
    assert timestep_of(model, args, kwargs) == (want or 0)
    model.forward = lambda *args, **kwargs: None  # as of an adapter
    assert timestep_of(model, args, kwargs) == (want or 0)


def test_samples_of_different_timesteps_have_no_common_one():
    noisiest = torch.tensor([[0.0, 9.0], [9.0, 0.0]])
    assert timestep_of(Model(), (1, noisiest), {}) == 9
    with pytest.raises(InputError, match=r"different timesteps in one call \(9 is the first\)"):
        timestep_of(Model(), (1, torch.tensor([9.0, 7.0])), {})
