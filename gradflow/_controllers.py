"""Step-size controllers around another one."""

import diffrax
import equinox as eqx


class AbstractWrapped(diffrax.AbstractAdaptiveStepSizeController):
    """One with the tolerances of the controller that it is around."""

    controller: eqx.AbstractVar[diffrax.AbstractAdaptiveStepSizeController]

    @property
    def rtol(self):
        return self.controller.rtol

    @property
    def atol(self):
        return self.controller.atol

    @property
    def norm(self):
        return self.controller.norm

    def wrap(self, direction):
        wrapped = self.controller.wrap(direction)
        return eqx.tree_at(lambda s: s.controller, self, wrapped)
