"""The refresh policy "mapped": a plug-in that moves old vectors by a map. Importing this package registers it."""

from experiments.mapped_refresh.mapped import Mapped

__all__ = ["Mapped"]
