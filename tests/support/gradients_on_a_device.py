"""What needs gradients, on a device that is not there: as on the CPU. In a process of its own.

python tests/support/gradients_on_a_device.py SEED
"""

import copy
import random
import sys
from string import ascii_letters
from typing import Any

import torch
from pretend_gpu import pretend_device, pretend_gpus
from small_models import picture, worded_model

from mmlens import EditRequest, attribution_patching, multedit, swap_span
from mmlens.editing import constrained_fine_tune, fine_tune, key_covariance, keys_of, memit, rome

TOLERANCE = 1e-7  # in float64, for Adam makes much of small differences


def main(seed: int) -> None:
    """Raise an AssertionError where the device's values are not the CPU's."""
    pretend_device()
    model = worded_model(seed, n_layers=3, d_mlp=13).double()
    with pretend_gpus():
        there = copy.deepcopy(model).to("pretend")
        inputs = model.prepare(
            "Where is this country?", picture(0), spans={"constraint": "this country"}
        )
        others = [model.prepare(text, picture(1)) for text in ("Who is it?", "And how big?")]
        corrupted = swap_span(model, inputs, "constraint", "Paris")
        patched = [attribution_patching(each, inputs, corrupted) for each in (model, there)]
        torch.testing.assert_close(patched[1].indirect_effect, patched[0].indirect_effect)
        request = EditRequest(inputs, "Rome", neighbours=others[:1])
        kept = keys_of(model, others, layer=1, span=None)
        # Of random letters: the covariance needs as many different keys as the MLP has neurons.
        chance = random.Random(seed)
        texts = ["".join(chance.choices(ascii_letters, k=40)) for _ in range(6)]
        many = [model.prepare(text, picture(n)) for n, text in enumerate(texts)]
        of_keys = key_covariance(model, many, [0, 1])
        options: dict[str, Any] = {"steps": 2, "layer": 1}
        for method, settings in (
            (multedit, {"kl_weight": 0.5}),
            (multedit, {"through_update": True}),
            (multedit, {"kept": kept}),
            (rome, {"covariance": of_keys}),
            (memit, {"covariance": of_keys, "layer": [0, 1]}),
            (fine_tune, {}),
            (constrained_fine_tune, {"bound": 0.01}),
        ):
            expected, found = (
                method(each, request, **options | settings) for each in (model, there)
            )
            with expected.applied(model), found.applied(there):
                edited = model(inputs)
                difference = (there(inputs).cpu() - edited).abs().max()
            assert difference <= TOLERANCE, (method.__name__, settings, float(difference))
            assert (model(inputs) - edited).abs().max() > 100 * TOLERANCE, method.__name__


if __name__ == "__main__":
    main(int(sys.argv[1]))
