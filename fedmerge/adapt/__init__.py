"""States of one architecture as states of another of its family: other widths, other depths."""

from fedmerge.adapt.families import Adaptation, adapt, adaptation, relation

__all__ = ["Adaptation", "adapt", "adaptation", "relation"]
