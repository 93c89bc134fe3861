"""What methods ask of their teacher."""

from __future__ import annotations

from cmbench.diffusion.models import DiffusionModel
from cmbench.errors import UserError
from cmbench.plugin.method import Method, Teacher


def distilled(method: Method, teacher: Teacher | None, form: str = "") -> DiffusionModel:
    """Return the diffusion model that ``method`` distils.

    Raises:
        UserError: there is no teacher; ``form`` names the form of the method that needs one.
    """
    if teacher is None:
        raise UserError(
            f"method {type(method).__name__}",
            f"form {form!r} has no teacher" if form else "has no teacher",
            allowed="METHOD:RECIPE or analytic",
            remedy="set teacher in the recipe",
        )
    return teacher.model
