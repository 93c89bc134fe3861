"""What a training step of the built-in methods costs, for ``cmbench list``; imports no torch.

A new method fills :class:`cmbench.plugin.specs.TrainingCost` here: what it takes of teacher and
data, what is generated first, the network evaluations of a step at its default options, and the NFE
that it samples with. ``tests/methods/test_distillers.py`` compares the counts with the engine's.
"""

from __future__ import annotations

from cmbench.plugin.specs import TrainingCost

_PAIR = TrainingCost(calls=1)
_TUNED_PAIR = _PAIR._replace(teacher="weights")
_WEIGHTS_AND_TANGENT = TrainingCost(tangents=1, teacher="weights")
_STUDENTS = "steps of its students"

COSTS = {
    "edm": TrainingCost(),
    "cd": TrainingCost(calls=3, teacher="yes", notes="5 forwards with a first-order solver"),
    "ct": _PAIR,
    "ict": _PAIR,
    "ict-deep": _PAIR,
    "ect": _TUNED_PAIR,
    "cct": _WEIGHTS_AND_TANGENT,
    "sct": _WEIGHTS_AND_TANGENT,
    "scd": TrainingCost(calls=1, tangents=1, teacher="yes", notes="one more with guidance"),
    "pd": TrainingCost(calls=2, teacher="yes", nfe=_STUDENTS),
    "knowledge-distillation": TrainingCost(
        teacher="for data", data="no", generated="1,024,000 pairs x 35 NFE", nfe="1"
    ),
    "rf": TrainingCost(
        generated="pairs for every phase but the first: 1M x RK45, about 110 NFE each",
        notes="a teacher replaces the first phase, its pairs cost 35 NFE",
    ),
    "tract": TrainingCost(
        calls=3, teacher="yes", nfe=_STUDENTS, notes="5 forwards with solver = ddim"
    ),
    "mscd": TrainingCost(
        calls=3,
        teacher="yes",
        nfe="number of segments",
        notes="5 forwards with solver = addim or ddim, 4 and no teacher with form = training",
    ),
    "pid": TrainingCost(calls=1, graded=2, teacher="yes", data="no", nfe="1"),
    "dfno": TrainingCost(
        teacher="for data",
        data="no",
        generated="1M trajectories x 512 NFE",
        nfe="1",
        notes="a call has the arithmetic of one for each of its 4 states",
    ),
    "diff-instruct": TrainingCost(calls=3, graded=2, teacher="yes", data="labels", nfe="1"),
    "sid": TrainingCost(calls=1, graded=2, input_graded=2, teacher="yes", data="labels", nfe="1"),
    # The fake score moves in every step, the generator in every fifth.
    "dmd2": TrainingCost(
        calls=1.4,
        graded=1.2,
        teacher="yes",
        data="labels",
        nfe="1",
        notes="images and 12.4 forwards with a GAN term",
    ),
    # Also a discriminator of samples and images, and its gradient for the generator.
    "f-distill": TrainingCost(calls=2.4, graded=3.2, input_graded=0.2, teacher="yes", nfe="1"),
}
